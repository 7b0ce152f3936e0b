"""Attention's kernels, run by Pallas's interpreter, against the formula: values, gradients, who sees whom."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mhc_jax.config import base_config
from mhc_jax.kernels.attention import block_of, splash, triton
from mhc_jax.layers.attention import attention, causal_mask, formula, visible, why_formula
from mhc_jax.model import Transformer, why_no_kernels
from mhc_jax.model_config import build_model
from mhc_jax.sharding import constrain, make_mesh
from mhc_jax.train_step import loss_fn

LETTERS = ('BTHK', 'BSGK', 'BSGK')
KERNELS = {'splash': splash, 'triton': triton}
# Query heads, groups of keys and values, sizes of a query and of a value: shared keys; latent attention's.
SHAPES = {'grouped': (4, 2, 32, 32), 'latent': (2, 2, 48, 32)}


def inputs(shape, batch, time, rng):
  """q, k, v, the cotangent of the output, and documents of about 60 tokens."""
  heads, groups, head_dim, value_dim = SHAPES[shape]
  sizes = ((heads, head_dim), (groups, head_dim), (groups, value_dim), (heads, value_dim))
  arrays = [rng.normal(size=(batch, time, *size)) for size in sizes]
  return arrays, np.cumsum(rng.random((batch, time)) < 1 / 60, 1).astype(np.int32)


def with_gradients(function, arrays, dtype):
  q, k, v, cotangent = (jnp.asarray(x, dtype) for x in arrays)

  @jax.jit
  def run(q, k, v, cotangent):
    out, pull = jax.vjp(function, q, k, v)
    return out, *pull(cotangent)

  return [np.asarray(x, np.float64) for x in run(q, k, v, cotangent)]


def by_formula(segments, scale):
  return lambda q, k, v: formula(q, k, v, causal_mask(segments), scale)


def by(kernel, segments, scale):
  return lambda q, k, v: KERNELS[kernel](q, k, v, segments, scale, interpret=True)


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('kernel', KERNELS)
def test_kernels_are_the_formula(kernel, shape, rng):
  # 384 = 3 tiles: one block of splash attention, whose keys are computed in three parts.
  arrays, segments = inputs(shape, 2, 384, rng)
  assert len(np.unique(segments)) > 3
  expected = with_gradients(by_formula(segments, 0.2), arrays, jnp.float32)
  found = with_gradients(by(kernel, segments, 0.2), arrays, jnp.float32)
  for one, other in zip(found, expected, strict=True):
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()  # sums of some hundred float32 terms


def test_blocks_after_the_first_and_below_the_diagonal(monkeypatch, rng):
  monkeypatch.setattr('mhc_jax.kernels.attention.LARGEST', 128)  # 3 x 3 blocks, 3 of them never computed
  arrays, segments = inputs('latent', 1, 384, rng)
  segments[:] = np.arange(384) >= 300
  expected = with_gradients(by_formula(segments, 0.2), arrays, jnp.float32)
  found = with_gradients(by('splash', segments, 0.2), arrays, jnp.float32)
  for one, other in zip(found, expected, strict=True):
    assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


@pytest.mark.parametrize('kernel', KERNELS)
def test_values_in_bfloat16_are_as_near_to_the_truth_as_roundings_leave_them(kernel, rng):
  arrays, segments = inputs('latent', 1, 256, rng)
  arrays = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in arrays]
  scale = 48**-0.5  # no power of two: scaled queries are rounded
  with jax.enable_x64(True):
    truth = with_gradients(by_formula(segments, scale), arrays, jnp.float64)

  def errors(function):
    found = with_gradients(function, arrays, jnp.bfloat16)
    return [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(found, truth, strict=True)]

  # A rounding to bfloat16 leaves 1.6e-3, root mean square. Of the kernels, values have two, the scaled
  # queries' and their own, and gradients up to five: of the scaled queries, the output, the scores' gradient,
  # a gradient and, scaled, again. Of the formula, values have two, the weights' and their own, and gradients
  # three.
  for program, roundings in ((by(kernel, segments, scale), 5), (by_formula(segments, scale), 3)):
    value, *gradients = errors(program)
    assert value < 2**0.5 * 1.6e-3
    assert max(gradients) < roundings**0.5 * 1.6e-3


@pytest.mark.parametrize('program', ['formula', *KERNELS])
def test_a_token_sees_itself_and_what_its_document_has_before(program, rng):
  arrays, segments = inputs('grouped', 1, 256, rng)
  q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
  begins, query = 70, 200
  segments[:] = np.arange(256) >= begins
  run = by_formula(segments, 0.2) if program == 'formula' else by(program, segments, 0.2)
  dk, dv = jax.jit(jax.grad(lambda k, v: jnp.sum(run(q, k, v)[0, query] ** 2), (0, 1)))(k, v)
  for gradient in (dk, dv):
    touched = np.asarray(jnp.any(gradient != 0, (0, 2, 3)))
    np.testing.assert_array_equal(np.flatnonzero(touched), np.arange(begins, query + 1))


def model(connection='mhc', **fields):
  c = base_config()
  c.model.connection.name = connection
  c.model.update({'width': 32, 'depth': 2, 'heads': 2, 'dtype': 'float32', 'kernels': 'pallas', **fields})
  return build_model(c, None)


def test_when_the_formula_is_used():
  assert why_formula(model(), None, 256) is None
  assert why_formula(model(kernels='auto'), None, 256) == 'model.kernels chooses it here'  # on CPU
  assert why_formula(model(), None, 200) == 'sequences of 200 tokens, not a multiple of 128'
  assert why_formula(model(), None, 128).startswith('sequences of 128 tokens, whose')
  assert why_formula(model(dtype='float64'), None, 256) == 'the kernels know no float64'
  nvidia = SimpleNamespace(devices=np.array([SimpleNamespace(platform='gpu')]))
  assert why_formula(model(kernels='auto'), nvidia, 2048).startswith('float32, which')
  assert why_formula(model(kernels='auto'), nvidia, 4096) is None
  assert why_formula(model(kernels='auto', dtype='bfloat16'), nvidia, 256) is None
  assert why_no_kernels(model(kernels='auto'), 1, 256, nvidia).startswith("XLA's takes less time")
  seen = visible(jnp.zeros((1, 256), jnp.int32), model(), None)
  assert seen.mask_BTS is None
  assert visible(jnp.zeros((1, 200), jnp.int32), model(), None).mask_BTS.shape == (1, 200, 200)
  assert [block_of(time, 1024) for time in (128, 640, 2048, 1152)] == [128, 640, 1024, 384]


def test_devices_run_the_kernel_on_their_own_sequences_and_heads(rng):
  arrays, segments = inputs('grouped', 4, 128, rng)
  q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
  c = model(heads=4, kv_heads=2)
  mesh = make_mesh({'fsdp': 2, 'tensor': 2})

  def run(mesh):
    def total(*arrays):
      q, k, v = (constrain(x, letters, mesh) for x, letters in zip(arrays, LETTERS, strict=True))
      return jnp.sum(jnp.sin(attention(q, k, v, visible(segments, c, mesh), c, mesh)))

    return jax.jit(jax.value_and_grad(total, (0, 1, 2)))

  program = run(mesh).lower(q, k, v).compile()
  for one, other in zip(*map(jax.tree.leaves, (program(q, k, v), run(None)(q, k, v))), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', program.as_text())
  assert all(len(dims.split(',')) < 4 for dims in gathered), gathered  # no q, k or v


def kernels_in(jaxpr):
  """The Pallas kernels that a program calls."""
  names = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'pallas_call':
      names.append(str(equation.params['jaxpr'].debug_info.func_name))
    else:
      names += [name for inner in jaxprs_in_params(equation.params) for name in kernels_in(inner)]
  return names


@pytest.mark.parametrize(('remat', 'forwards'), [('none', 1), ('layer', 2), ('products', 1)])
def test_recomputation_that_keeps_products_keeps_what_attention_needs(remat, forwards):
  config = model('identity', remat=remat, scan_unroll=1)
  tokens = jnp.zeros((1, 256), jnp.int32)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)['params']
  batch = dict.fromkeys(('inputs', 'targets', 'segments'), tokens) | {'weights': jnp.ones((1, 256))}
  traced = jax.jit(jax.grad(lambda params: loss_fn(params, batch, config)[0])).trace(params)
  names = kernels_in(traced.jaxpr.jaxpr)
  assert sum('fwd' in name for name in names) == forwards, names
  assert sum('dkv' in name for name in names) == 1, names
