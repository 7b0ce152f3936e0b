"""The layer against other people's implementations: forward and every gradient, in float64.

tests/oracles/README.md says where each file comes from. The adapters below only rename and
reshape; the arithmetic is generate / read / write / collapse.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.hyper_connection import collapse, expand, generate, init_params, read, write
from mhc_jax.presets import connection_spec

FOLDER = pathlib.Path(__file__).parent / 'oracles'
RTOL = 1e-9  # the sources agree with an independent float64 derivation to 2e-14
SEEDS = (0, 1)
COMPILER = {'xla_backend_optimization_level': 0}  # compiles twice as fast, same arithmetic


def load(name: str, seed: int) -> dict[str, np.ndarray]:
  with np.load(FOLDER / f'{name}_seed{seed}.npz') as file:
    return {key: file[key] for key in file.files if key != 'meta'}


def close(actual, desired, rtol=RTOL, atol=1e-12) -> None:
  """atol is relative to the reference's largest entry, for gradients that cancel to nearly 0."""
  np.testing.assert_allclose(actual, desired, rtol=rtol, atol=atol * np.abs(desired).max())


def stream_major(x_BTND):
  return jnp.moveaxis(x_BTND, 2, 0)


def layer_params(phi_KX, base_K, scale_P, n) -> dict[str, jax.Array]:
  """Rows of phi and base are pre | post | res, columns of phi run over (stream, width)."""
  parts = ('pre', 'post', 'res')[: len(scale_P)]
  params = {'phi': jnp.moveaxis(phi_KX.reshape(phi_KX.shape[0], n, -1), 0, -1)}
  for i, part in enumerate(parts):
    params[f'b_{part}'] = base_K[i * n : (i + 1) * n if i < 2 else None]
    params[f'alpha_{part}'] = scale_P[i]
  return params


def head_params(oracle) -> dict[str, jax.Array]:
  n = len(oracle['head_base'])
  phi = jnp.moveaxis(oracle['head_phi'].reshape(n, n, -1), 0, -1)
  return {'phi': phi, 'alpha': oracle['head_scale'][0], 'b': oracle['head_base']}


def sublayer(params, weight_DD, x_NBTD, spec):
  c = generate(params, x_NBTD, spec)
  h_BTD = read(c.pre_NBT, x_NBTD)
  y_BTD = jnp.tanh(h_BTD @ weight_DD)
  return write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD), c, h_BTD, y_BTD


def deepseek_v4(**changes):
  return connection_spec('mhc', 'deepseek_v4', **changes)


LAYERS = {
  'hf_deepseek_v4': deepseek_v4(),
  'megatron_main': connection_spec('mhc', 'megatron_main'),
  'hf_hy_v4_identity': connection_spec('identity', 'hy_v4'),
}


def assert_complete(params, spec, width) -> None:
  """The adapter fills every parameter of the preset, in its shape, and no other."""
  like = jax.eval_shape(lambda key: init_params(key, spec, width, 0), jax.random.key(0))
  assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in like.items()}


@functools.partial(jax.jit, static_argnums=2, compiler_options=COMPILER)
def layer_and_gradients(inputs, cot_NBTD, name):
  """The sublayer's results; the gradient of sum(out * cot) in the oracle's names and shapes."""
  n = inputs['x'].shape[2]

  def loss(inputs):
    params = layer_params(inputs['phi'], inputs['base'], inputs['scale'], n)
    assert_complete(params, LAYERS[name], inputs['x'].shape[-1])
    results = sublayer(params, inputs['Wf'], stream_major(inputs['x']), LAYERS[name])
    return jnp.sum(results[0] * cot_NBTD), results

  grads, results = jax.grad(loss, has_aux=True)(inputs)
  return results, grads


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', LAYERS)
def test_layer_equals_source(x64, name, seed):
  oracle = load(name, seed)
  inputs = {k: oracle[k] for k in ('x', 'phi', 'base', 'scale', 'Wf')}
  (out_NBTD, c, h_BTD, y_BTD), grads = layer_and_gradients(inputs, stream_major(oracle['cot']), name)
  close(out_NBTD, stream_major(oracle['out']))
  close(h_BTD, oracle['branch_in'])
  close(c.post_NBT, stream_major(oracle['h_post']))
  if 'branch_out' in oracle:
    close(y_BTD, oracle['branch_out'])
  if 'h_pre' in oracle:
    close(c.pre_NBT, stream_major(oracle['h_pre']))
  if 'h_res' in oracle:  # V4 stores comb and applies its transpose
    axes = (3, 2, 0, 1) if name == 'hf_deepseek_v4' else (2, 3, 0, 1)
    close(c.res_NMBT, oracle['h_res'].transpose(axes))
  for key, grad in grads.items():
    close(grad, oracle[f'd_{key}'])


@functools.partial(jax.jit, compiler_options=COMPILER)
def head_and_gradients(inputs, oracle):
  spec = deepseek_v4()

  def loss(inputs):
    params = layer_params(inputs['phi'], oracle['base'], oracle['scale'], spec.streams)
    x_NBTD = sublayer(params, oracle['Wf'], stream_major(inputs['x']), spec)[0]
    out_BTD = collapse(x_NBTD, 'learned', head_params(inputs), spec)
    return jnp.sum(out_BTD * oracle['head_cot']), out_BTD

  return jax.grad(loss, has_aux=True)(inputs)


@pytest.mark.parametrize('seed', SEEDS)
def test_learned_collapse_equals_source(x64, seed):
  oracle = load('hf_deepseek_v4', seed)
  inputs = {k: oracle[k] for k in ('x', 'phi', 'head_phi', 'head_base', 'head_scale')}
  grads, out_BTD = head_and_gradients(inputs, oracle)
  close(out_BTD, oracle['head_out'])
  for key, grad in grads.items():
    close(grad, oracle[f'dh_{key}'])


STACKED = ('phi', 'base', 'scale', 'W')
HEAD = ('head_phi', 'head_base', 'head_scale')


def run_stack(inputs):
  """Six sublayers from expand to all three collapses."""
  spec = deepseek_v4()

  def step(x_NBTD, layer):
    params = layer_params(layer['phi'], layer['base'], layer['scale'], spec.streams)
    x_NBTD, c, *_ = sublayer(params, layer['W'], x_NBTD, spec)
    return x_NBTD, c.res_NMBT

  x_NBTD = expand(inputs['emb'], spec.streams)
  x_NBTD, mixers_LNMBT = jax.lax.scan(step, x_NBTD, {k: inputs[k] for k in STACKED})
  out = {how: collapse(x_NBTD, how) for how in ('mean', 'sum')}
  out['learned'] = collapse(x_NBTD, 'learned', head_params(inputs), spec)
  return out, (x_NBTD, mixers_LNMBT)


@functools.partial(jax.jit, compiler_options=COMPILER)
def stack_and_gradients(inputs, cot_BTD):
  out, pull, states = jax.vjp(run_stack, inputs, has_aux=True)
  zero = jax.tree.map(jnp.zeros_like, out)
  grads = {how: pull({**zero, how: cot_BTD})[0] for how in ('learned', 'mean')}
  return out, states, grads


@pytest.mark.parametrize('seed', SEEDS)
def test_stack_equals_source(x64, seed):
  oracle = load('hf_stack', seed)
  inputs = {k: oracle[k] for k in ('emb', *STACKED, *HEAD)}
  out, (x_NBTD, mixers_LNMBT), grads = stack_and_gradients(inputs, oracle['cot'])
  close(x_NBTD, stream_major(oracle['streams']))
  close(mixers_LNMBT, oracle['h_res'].transpose(0, 4, 3, 1, 2))
  for how, key in (('learned', 'head_out'), ('mean', 'mean_out'), ('sum', 'sum_out')):
    close(out[how], oracle[key])
  for key in inputs:
    close(grads['learned'][key], oracle[f'd_{key}'])
  for key in ('emb', 'phi'):
    close(grads['mean'][key], oracle[f'dmean_{key}'])
