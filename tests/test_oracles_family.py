"""The relatives of mHC against their authors' code: learned norm weights, permutations, Kronecker
products, maps shared by the streams, float32 and bfloat16 sources.

As in test_oracles.py, the adapters only rename, reorder and reshape (and write a norm's weight 1 + gamma
as such).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_oracles import (
  COMPILER,
  SEEDS,
  assert_complete,
  close,
  deepseek_v4,
  layer_params,
  load,
  stream_major,
  sublayer,
)

from mhc_jax.constraints.base import product
from mhc_jax.hyper_connection import init_params
from mhc_jax.presets import connection_spec

# All these sources mix as x'_t = sum_s a[s, t] x_s, the transpose of H: permutation k of theirs is the
# inverse of ours.
PERMUTATIONS = list(itertools.permutations(range(4)))
INVERSE = [PERMUTATIONS.index(tuple(np.argsort(p))) for p in PERMUTATIONS]


def author_layer(inputs, order, norm_shape):
  """KromHC's and mhc-lite's parameters: alpha holds pre | res, beta post."""
  n = norm_shape[0]
  dynamic, static = inputs['p_dynamic_alpha_fn'], inputs['p_static_alpha']
  phi_XK = jnp.concatenate([dynamic[:, :n], inputs['p_dynamic_beta_fn'], dynamic[:, n:][:, order]], 1)
  return {
    'phi': phi_XK.reshape(*norm_shape, -1),
    'norm_weight': 1 + inputs['p_norm.gamma'].reshape(norm_shape),
    'b_pre': static[:n],
    'b_post': inputs['p_static_beta'],
    'b_res': static[n:][order],
    'alpha_pre': inputs['p_pre_branch_scale'][0],
    'alpha_post': inputs['p_h_post_scale'],
    'alpha_res': inputs['p_residual_scale'][0],
  }


def lucidrains_layer(inputs):
  """One map of C for all streams; row s of alpha: how stream s is read, then where it goes."""
  alpha_DK = inputs['dynamic_alpha_fn'][0]
  static_NK = inputs['static_alpha']
  phi_DK = jnp.concatenate([alpha_DK[:, :1], inputs['dynamic_beta_fn'], alpha_DK[:, 1:]], 1)
  return {
    'phi': phi_DK[None],
    'norm_weight': 1 + inputs['norm_gamma'][None],
    'b_pre': static_NK[:, 0],
    'b_post': inputs['static_beta'].reshape(-1),
    'b_res': static_NK[:, 1:].T.reshape(-1),
    'alpha_pre': inputs['pre_branch_scale'][0],
    'alpha_post': inputs['h_post_scale'],
    'alpha_res': inputs['residual_scale'][0],
  }


def tilekernels_layer(inputs):
  params = layer_params(inputs['phi'], inputs['base'], inputs['scale'], 4)
  return {**params, 'norm_weight': inputs['gamma'].reshape(4, -1)}


def maxtext_layer(inputs):
  phi_KX = jnp.concatenate([inputs['pre_post_phi'], inputs['lite_phi'][jnp.array(INVERSE)]])
  base_K = jnp.concatenate([inputs['pre_post_base'], inputs['lite_base'][jnp.array(INVERSE)]])
  params = layer_params(phi_KX, base_K, inputs['scale'], 4)
  return {**params, 'norm_weight': inputs['gamma'].reshape(4, -1)}


# name -> (adapter, spec); inputs are the arrays that have a gradient d_NAME.
SOURCES = {
  'tilekernels_ref_gamma': (tilekernels_layer, deepseek_v4(norm_weight=True)),
  'mhclite_official': (
    functools.partial(author_layer, order=np.array(INVERSE), norm_shape=(4, 8)),
    connection_spec('mhc', 'mhc_lite'),
  ),
  'kromhc_official': (
    functools.partial(author_layer, order=np.arange(4), norm_shape=(4, 8)),
    connection_spec('mhc', 'kromhc'),
  ),
  'maxtext_lite': (maxtext_layer, connection_spec('mhc', 'mhc_lite', read_eps=1e-6, norm_eps=1e-6)),
  'lucidrains_mhcv2': (lucidrains_layer, connection_spec('mhc', 'lucidrains')),
}
TOLERANCE = {'maxtext_lite': (1e-5, 1e-6)}  # float32; 4e-6 from a float64 derivation


def inputs_of(oracle) -> dict[str, np.ndarray]:
  """The arrays whose gradients are given; parameters of the authors' own are p_NAME."""
  if 'd_lite_phi' in oracle:  # MaxText's layer uses rows and slices of the shared arrays
    oracle = {**oracle, 'pre_post_phi': oracle['phi'][:8], 'pre_post_base': oracle['base'][:8]}
    oracle['gamma'] = np.ones_like(oracle['gamma'])
  names = [key[2:] for key in oracle if key.startswith('d_')]
  return {k: oracle[k] for name in names for k in (name, f'p_{name}') if k in oracle}


@functools.partial(jax.jit, static_argnums=2, compiler_options=COMPILER)
def layer_and_gradients(inputs, cot_NBTD, name):
  adapter, spec = SOURCES[name]

  def loss(inputs):
    params = adapter(inputs)
    assert_complete(params, spec, inputs['x'].shape[-1])
    results = sublayer(params, inputs['Wf'], stream_major(inputs['x']), spec)
    return jnp.sum(results[0] * cot_NBTD), results

  grads, results = jax.grad(loss, has_aux=True)(inputs)
  return results, grads


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('name', SOURCES)
def test_layer_equals_source(x64, name, seed):
  oracle = load(name, seed)
  inputs = inputs_of(oracle)
  (out_NBTD, c, h_BTD, _), grads = layer_and_gradients(inputs, stream_major(oracle['cot']), name)
  near = functools.partial(close, **dict(zip(('rtol', 'atol'), TOLERANCE.get(name, ()), strict=False)))
  near(out_NBTD, stream_major(oracle['out']))
  if 'branch_in' in oracle:
    near(h_BTD, oracle['branch_in'])
  if 'h_pre' in oracle:
    near(c.pre_NBT, stream_major(oracle['h_pre']))
    near(c.res_NMBT, oracle['h_res'].transpose(3, 2, 0, 1))
  for key, grad in grads.items():
    near(grad, oracle[f'd_{key.removeprefix("p_")}'])


@pytest.mark.parametrize('seed', SEEDS)
def test_bfloat16_streams_cost_no_more_than_in_tokamax(x64, seed):
  """Coefficients as exact as float32 from the same bfloat16 streams; results rounded once."""
  oracle = load('tokamax_api_bf16', seed)
  inputs = {k: oracle[k] for k in ('x', 'phi', 'base', 'scale', 'Wf')}
  spec = deepseek_v4()

  @functools.partial(jax.jit, static_argnums=1, compiler_options=COMPILER)
  def run(inputs, dtype):
    params = layer_params(inputs['phi'], inputs['base'], inputs['scale'], 4)
    x_NBTD = stream_major(inputs['x']).astype(dtype)
    return sublayer(params, inputs['Wf'].astype(dtype), x_NBTD, spec)

  out_NBTD, c, h_BTD, _ = run(inputs, jnp.bfloat16)
  np.testing.assert_allclose(np.asarray(out_NBTD, np.float32), stream_major(oracle['out']), atol=0.018)
  exact_NBTD, *_ = run({k: v.astype(np.float64) for k, v in inputs.items()}, jnp.float64)
  assert out_NBTD.dtype == h_BTD.dtype == jnp.bfloat16 and c.res_NMBT.dtype == jnp.float32
  np.testing.assert_allclose(c.res_NMBT, oracle['h_res'].transpose(3, 2, 0, 1), atol=1e-5)
  np.testing.assert_allclose(c.post_NBT, stream_major(oracle['h_post']), atol=1e-5)
  np.testing.assert_allclose(np.asarray(h_BTD, np.float32), oracle['branch_in'], atol=0.01)
  assert np.abs(np.asarray(out_NBTD, np.float64) - exact_NBTD).max() < 0.018  # tokamax: 0.011-0.018


@pytest.mark.parametrize('seed', SEEDS)
def test_gradients_through_bfloat16_streams_are_those_of_tokamax(seed):
  """To 2 ulp of bfloat16 (2^-7) of each gradient's largest entry; both are as far from the exact ones."""
  oracle = load('tokamax_api_bf16', seed)
  inputs = {k: oracle[k] for k in ('x', 'phi', 'base', 'scale', 'Wf')}

  @functools.partial(jax.jit, compiler_options=COMPILER)
  def gradients(inputs):
    def loss(inputs):
      params = layer_params(inputs['phi'], inputs['base'], inputs['scale'], 4)
      streams = stream_major(inputs['x']).astype(jnp.bfloat16)
      out_NBTD, *_ = sublayer(params, inputs['Wf'].astype(jnp.bfloat16), streams, deepseek_v4())
      return jnp.sum(out_NBTD.astype(jnp.float32) * stream_major(oracle['cot']))

    return jax.grad(loss)(inputs)

  for name, found in gradients(inputs).items():
    expected = oracle[f'd_{name}']
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-7 * np.abs(expected).max(), err_msg=name)


def composite_gains(dtype, rounded=False, sublayers=60):
  """Amax gains of the product of all H_res, mean over tokens (mHC, section on its Fig. 3).

  rounded: H_res passes through bfloat16, as in MaxText 0.2.5.
  """
  n, width, tokens = 4, 32, (2, 16)
  spec = connection_spec('mhc', init='zero', alpha=3.0)  # logits of standard deviation 3

  def step(carry, key):
    x_NBTD, composite_NMBT = carry
    params = init_params(key, spec, width, 0)
    weight_DD = (jax.random.normal(key, (width, width)) / width**0.5).astype(dtype)
    x_NBTD, c, *_ = sublayer(params, weight_DD, x_NBTD, spec)
    res_NMBT = c.res_NMBT.astype(jnp.bfloat16) if rounded else c.res_NMBT
    return (x_NBTD, product(res_NMBT.astype(jnp.float32), composite_NMBT)), None

  # Drawn in float32: other dtypes draw other numbers.
  x_NBTD = jax.random.normal(jax.random.key(0), (n, *tokens, width)).astype(dtype)
  eye_NMBT = jnp.broadcast_to(jnp.eye(n)[..., None, None], (n, n, *tokens))
  keys = jax.random.split(jax.random.key(1), sublayers)
  composite_NMBT = jnp.abs(jax.lax.scan(step, (x_NBTD, eye_NMBT), keys)[0][1])
  return [composite_NMBT.sum(axis).max(0).mean() for axis in (1, 0)]  # forward: rows; backward


def test_bfloat16_streams_keep_the_composite_gain():
  """MaxText 0.2.5, whose coefficients pass through bfloat16, moves the forward gain by 1.5e-2."""
  run = jax.jit(composite_gains, static_argnums=(0, 1), compiler_options=COMPILER)
  high, low, wrong = (np.array(run(*how)) for how in ((jnp.float32,), (jnp.bfloat16,), (jnp.bfloat16, True)))
  assert (np.abs(low - high) < 1e-3).all() and (1 < high).all() and (high < 1.2).all()
  assert (np.abs(wrong - high) > 1e-3).any(), 'the test would not see rounded coefficients'
