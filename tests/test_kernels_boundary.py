"""Kernels of the boundary between sublayers, in Pallas' interpreter, against hyper_connection.boundary."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import token_arrays

from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config
from mhc_jax.kernels import boundary as kernels
from mhc_jax.kernels.choice import Chip
from mhc_jax.model import Transformer, why_no_kernels
from mhc_jax.model_config import build_model
from mhc_jax.presets import connection_spec
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import gradients

B, T = 2, 32  # two tiles of 32 tokens or four of 16
# Programs are large and run once: compiling them well takes longer than running them.
ONCE = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}

# What a connection may differ in where a kernel must know it: (name, width, what connection_spec takes).
SOFTMAX = {'constraint': 'row_stochastic'}  # a cheap one; all constraints are in test_constraints.py
CASES = {
  'paper': ('mhc', 256, {'constraint_params': {'iterations': 2}}),
  'a width that is no multiple of 128': ('mhc', 48, SOFTMAX),
  'three streams': ('mhc', 32, {**SOFTMAX, 'streams': 3}),
  'no mixing': ('identity', 128, {}),
  'per stream, tanh, shared alpha': ('hc', 32, {}),
  'norm per stream': ('mhc', 32, {**SOFTMAX, 'norm_scope': 'per_stream'}),
  'norm weight, eps outside': ('mhc', 32, {**SOFTMAX, 'norm_weight': True, 'norm_eps_outside': True}),
  'low rank': ('mhc', 32, {**SOFTMAX, 'rank': 3}),
  'CP product': ('mhc', 32, {**SOFTMAX, 'rank': 3, 'generator': 'cp'}),
  'softmax read': ('mhc', 32, {**SOFTMAX, 'read_gate': 'softmax'}),
  'fixed read': ('mhc', 32, {**SOFTMAX, 'read_gate': 'fixed'}),
  'fixed write': ('mhc', 32, {**SOFTMAX, 'write_gate': 'fixed'}),
  'write to one stream each': ('mhc', 32, {**SOFTMAX, 'write_gate': 'one_hot'}),
  'single pass': ('mhc', 32, {'preset': 'deepseek_v4_1', **SOFTMAX, 'constraint_params': {}}),
}


# What differs only in functions of one token is traced by both platforms alike.
OF_ONE_TOKEN = 'norm weight, eps outside', 'low rank', 'CP product', 'softmax read', 'fixed write'
BOTH = [(case, platform) for case in CASES for platform in ('tpu', 'gpu')]
BOTH = [(case, platform) for case, platform in BOTH if platform == 'tpu' or case not in OF_ONE_TOKEN]


@functools.cache
def spec_of(case):
  name, width, options = CASES[case]
  return connection_spec(name, **{'streams': 2, **options}), width


@functools.cache
def inputs(case, dtype=jnp.float32):
  """(params, pending) with every part of them away from its start."""
  spec, width = spec_of(case)
  keys = iter(jax.random.split(jax.random.key(0), 40))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  params = hc.init_params(next(keys), spec, width, 1)
  params = {name: v + (0.3 if v.ndim < 3 else 0.02) * normal(*v.shape) for name, v in params.items()}
  n = spec.streams
  res_NMBT = normal(n, n, B, T) if spec.constraint.name != 'identity' else None
  pre_NBT = normal(n, B, T) if spec.single_pass else None
  streams = normal(n, B, T, width).astype(dtype), normal(B, T, width).astype(dtype)
  return params, hc.Pending(*streams, normal(n, B, T), res_NMBT, pre_NBT)


def by_kernels(spec, chip, params, pending):
  """The same from kernels, of the results that training needs."""
  n = spec.streams
  rows = [pending.post_NBT]
  rows += [] if pending.res_NMBT is None else [pending.res_NMBT.reshape(n * n, B, T)]
  if kernels.read_is_given(spec):
    rows += [pending.pre_NBT if spec.single_pass else hc.read_weights({}, spec, (B, T), jnp.float32)]
  mixed = kernels.Pending(pending.x_NBTD, pending.y_BTD, jnp.concatenate(rows))
  x_NBTD, h_BTD, mix_MBT = kernels.boundary(params, mixed, spec, jnp.int32(3), chip)
  own = kernels.definition(kernels.Pending(x_NBTD, h_BTD, mix_MBT), spec)
  return x_NBTD, h_BTD, *results(spec, own.pre_NBT, own.post_NBT, own.res_NMBT)


def by_definition(spec, params, pending):
  x_NBTD, h_BTD, own = hc.boundary(params, pending, spec, jnp.int32(3))
  return x_NBTD, h_BTD, *results(spec, *own)


def results(spec, pre_NBT, post_NBT, res_NMBT):
  post_NBT = jnp.ones((spec.streams, B, T)) if post_NBT is None else post_NBT
  return pre_NBT if spec.single_pass else None, post_NBT, res_NMBT


def values_and_gradients(function, arguments):
  """Values, and the gradients of a random linear function of them with respect to every array."""

  shapes = jax.tree.leaves(jax.eval_shape(function, *arguments))
  keys = jax.random.split(jax.random.key(1), len(shapes))
  weights = [jax.random.normal(key, v.shape).astype(v.dtype) for key, v in zip(keys, shapes, strict=True)]

  def loss(arguments, weights):
    values = function(*arguments)
    wide = [
      (w * v).astype(jnp.promote_types(v.dtype, jnp.float32)).sum()
      for w, v in zip(weights, jax.tree.leaves(values), strict=True)
    ]
    return sum(wide), values

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=ONCE)
  (_, values), found = run(arguments, weights)
  return values, found


@functools.cache
def defined(case):
  return values_and_gradients(functools.partial(by_definition, spec_of(case)[0]), inputs(case))


@pytest.mark.slow
@pytest.mark.parametrize('case,platform', BOTH)
def test_values_and_gradients_are_the_definitions(case, platform):
  """To 1e-5 of the maximum of each array: sums over 64 tokens and up to 512 numbers in another order."""
  spec, width = spec_of(case)
  chip = Chip(platform, 2 if case == 'paper' and platform == 'tpu' else 1, interpret=True)
  assert kernels.why_not(spec, width, B * T, jnp.float32, chip) is None
  found = values_and_gradients(functools.partial(by_kernels, spec, chip), inputs(case))
  pairs = zip(*map(jax.tree_util.tree_leaves_with_path, (defined(case), found)), strict=True)
  for (path, one), (_, other) in pairs:
    size = np.abs(one).max()
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * size + 1e-30, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_members_of_a_population_share_the_kernels(platform):
  """vmap: each member has streams and parameters of its own. Tolerance as above."""
  spec, _ = spec_of('three streams')
  members = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), inputs('three streams'))
  kernel = functools.partial(by_kernels, spec, Chip(platform, interpret=True))
  definition = functools.partial(by_definition, spec)
  found, truth = (values_and_gradients(jax.vmap(f), members) for f in (kernel, definition))
  for one, other in zip(jax.tree.leaves(truth), jax.tree.leaves(found), strict=True):
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5 * np.abs(one).max() + 1e-30)


@pytest.mark.slow
@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_bfloat16_is_no_worse_than_the_definition(platform):
  """Against float32 arithmetic on the same bfloat16 inputs; each array's norm of the error."""
  case = 'no mixing'
  spec, _ = spec_of(case)
  given = inputs(case, jnp.bfloat16)
  exact = jax.tree.map(lambda x: x.astype(jnp.float32), given)
  definition = functools.partial(by_definition, spec)
  kernel = functools.partial(by_kernels, spec, Chip(platform, interpret=True))
  truth, xla, ours = (
    jax.tree.leaves(values_and_gradients(function, arguments))
    for function, arguments in ((definition, exact), (definition, given), (kernel, given))
  )
  for one, other, found in zip(truth, xla, ours, strict=True):
    errors = [np.linalg.norm(np.float32(x) - one) / np.linalg.norm(one) for x in (other, found)]
    # A single number of the parameters may be off by chance; half a unit of bfloat16 is 2^-9.
    assert errors[1] <= 1.1 * errors[0] + (2**-9 if one.ndim == 0 else 1e-6), errors


def test_what_has_no_kernel_says_why():
  chip = Chip('tpu')
  spec = connection_spec('mhc', streams=2, **SOFTMAX)
  said = functools.partial(kernels.why_not, chip=chip)
  assert said(spec, 256, 128, jnp.bfloat16) is None
  assert 'float64' in said(spec, 256, 128, jnp.float64)
  assert '100 tokens of width 256' in said(spec, 256, 100, jnp.bfloat16)
  assert '8 streams' in kernels.why_not(connection_spec('hc', streams=8), 256, 128, jnp.float32, Chip('gpu'))
  assert 'MiB' in said(spec, 2**20, 128, jnp.bfloat16)
  assert 'generates nothing' in said(connection_spec('hc', streams=2, preset='static'), 256, 128, jnp.float32)
  assert 'generates nothing' in said(connection_spec('residual', streams=1), 256, 128, jnp.float32)
  assert 'per channel' in said(connection_spec('gated_residual', streams=2), 256, 128, jnp.float32)


def tiny(**changes):
  c = base_config()
  c.model.update({'width': 16, 'depth': 3, 'heads': 2, 'scan_unroll': 1, **changes})
  c.model.connection.update({'streams': 3, 'constraint': 'row_stochastic', 'expansion': 'one_hot'})
  return dataclasses.replace(build_model(c), vocab_size=11)


def parameters(model, *inputs):
  """Every one of them away from its start."""
  rng = np.random.default_rng(1)
  start = jax.jit(Transformer(model).init, compiler_options=ONCE)(jax.random.key(0), *inputs)['params']
  return jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), start)


@pytest.mark.slow
def test_a_model_with_kernels_is_the_same_model():
  """Loss and gradients through scan, recomputation and a mesh whose devices have tokens of their own.

  To 1e-4 of each gradient's maximum: what float32 leaves of sums that cancel, after three layers. Streams
  stay where they are, as in test_sharding.py: 5 divides no dimension of a parameter.
  """
  rng, time = np.random.default_rng(0), 160
  token_BS = rng.integers(0, 11, (B, time + 1)).astype(np.int32)
  batch = {'inputs': token_BS[:, :-1], 'targets': token_BS[:, 1:], 'segments': np.zeros((B, time), np.int32)}
  batch['weights'] = np.ones((B, time), np.float32)
  model, mesh = tiny(remat='layer'), make_mesh({'fsdp': 2, 'tensor': 2})
  params = parameters(model, batch['inputs'], batch['segments'])

  def run(mesh, **changes):
    program = functools.partial(gradients, model=dataclasses.replace(model, **changes), parts=None, mesh=mesh)
    compiled = jax.jit(program).lower(params, batch).compile(compiler_options=ONCE)
    return compiled(params, batch), compiled.as_text()

  (loss, expected), _ = run(None, kernels='xla', remat='none')
  (other, found), text = run(mesh, kernels='pallas')
  assert float(jax.tree.leaves(other)[0]) == pytest.approx(float(jax.tree.leaves(loss)[0]), rel=1e-6)
  for (path, one), (_, two) in zip(*map(jax.tree_util.tree_leaves_with_path, (expected, found)), strict=True):
    np.testing.assert_allclose(two, one, rtol=0, atol=1e-4 * np.abs(one).max(), err_msg=str(path))
  moved, one_input = token_arrays(text, 5 * model.width), time * model.width
  assert max(moved) == one_input < model.connection.streams * one_input // 2
  assert 2 * model.depth < len(moved) <= 6 * model.depth + 2


@pytest.mark.slow
def test_a_boundary_without_a_kernel_has_its_constraint_from_one():
  """14 tokens come in no tiles. Records are the definition's."""
  model = tiny(depth=1, scan=False)
  token_BT = np.random.default_rng(0).integers(0, 11, (B, 7)).astype(np.int32)
  segments_BT = np.zeros_like(token_BT)
  params = parameters(model, token_BT, segments_BT)

  def loss(params, kernels, record=0):
    module = Transformer(dataclasses.replace(model, kernels=kernels))
    return jnp.square(module.apply({'params': params}, token_BT, segments_BT, record=record)[0]).mean()

  assert why_no_kernels(dataclasses.replace(model, kernels='pallas'), B, 7, None).startswith(
    f'{7 * B} tokens'
  )
  program = str(jax.make_jaxpr(loss, static_argnums=(1, 2))(params, 'pallas', 0))
  assert program.count('pallas_call') == 2 * model.depth
  assert 'pallas_call' not in str(jax.make_jaxpr(loss, static_argnums=(1, 2))(params, 'pallas', 1))
  run = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options=ONCE)
  expected, found = run(params, 'xla'), run(params, 'pallas')
  # Rounding of float32 in sums of 14 tokens.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected)
