"""Kernels with tokens in lanes, against the functions they are traced from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eager_lanes import eager_lanes, value_and_pull
from jax import lax
from jax.extend.core import jaxpr_as_fun

from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.kernels import lane_blocks
from mhc_jax.kernels.lanes import in_lanes, matrix_kernel, why_not

TOLERANCE = 1e-5  # of the largest entry, in float32


def close(actual, expected) -> None:
  assert actual.shape == expected.shape
  if expected.size:
    assert np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-30)


@pytest.mark.parametrize('block_bytes', [lane_blocks.BLOCK_BYTES, 1])
def test_shared_gradients_are_sums_over_tokens(block_bytes, monkeypatch):
  """Each of two cores has two sets of registers, in one grid step or in two; the last is not full."""
  monkeypatch.setattr(lane_blocks, 'BLOCK_BYTES', block_bytes)

  def function(shared, a_K, b_K):
    coords_NM = jnp.tanh(shared['alpha'] * a_K + shared['b']).reshape(2, 2)
    return {'h': coords_NM @ coords_NM, 'w': a_K.sum() * b_K * shared['alpha']}

  rng = np.random.default_rng(0)
  shared = {'alpha': jnp.float32(1.3), 'b': jnp.arange(4, dtype=jnp.float32)}
  arrays = [jnp.asarray(rng.normal(size=(k, 2, 2600)), jnp.float32) for k in (4, 3)]
  by_tokens = jax.vmap(jax.vmap(function, (None, -1, -1), -1), (None, 1, 1), -2)

  def loss(run, shared, *arrays):
    out = run(shared, *arrays)
    return jnp.sum(out['h'] ** 2) + jnp.sum(jnp.sin(out['w']))

  kernel = in_lanes(function, 'interpret')
  jax.tree.map(close, kernel(shared, *arrays), by_tokens(shared, *arrays))
  gradient = lambda run: jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2)))(shared, *arrays)  # noqa: E731
  jax.tree.map(close, gradient(kernel), gradient(by_tokens))


def own_matrix(coords_KX: jax.Array, n: int) -> jax.Array:
  """Scans with stacked results and with a counter as index, a constant product, a gather, two branches."""
  basis_RK = jnp.asarray(np.random.default_rng(0).normal(size=(n * n, n)), coords_KX.dtype)
  x_KX = coords_KX[jnp.array([2, 0, 1])[:n]]
  _, steps_TKX = lax.scan(
    lambda c, row: (0.5 * c + row, c * row), x_KX, jnp.tanh(jnp.stack([x_KX, -x_KX, 2 * x_KX]))
  )

  def add(k, total_KX):
    return total_KX.at[k].add(lax.dynamic_index_in_dim(steps_TKX, k % 3, 0, False)[k])

  total_KX = lax.fori_loop(0, n, add, jnp.cumsum(steps_TKX, 0)[-1])
  bent_KX = lax.cond(total_KX[0] > 0, jnp.sin, lambda x: x * jnp.abs(x), total_KX)
  return (basis_RK @ bent_KX).reshape(n, n)


def test_a_function_of_ones_own(rng):
  """For each token what jax.vmap gives, branches included."""
  x_KX, g_NMX = (rng.normal(size=s).astype(np.float32) for s in ((3, 17), (3, 3, 17)))
  run = value_and_pull(lambda coords_K: own_matrix(coords_K, 3))
  jax.tree.map(close, eager_lanes(run, x_KX, g_NMX), list(jax.vmap(run, -1, -1)(x_KX, g_NMX)))


def stacking(coords_KX: jax.Array) -> jax.Array:
  """Ten turns whose rows a loop takes from the last on, one from the first on, and a sum as an array."""

  def turn(carry, _):
    count, c_KX = carry
    c_KX = jnp.sin(c_KX) + c_KX[::-1] / (count + 1)
    return (count + 1, c_KX), (c_KX, c_KX[0] * count)

  (_, last_KX), (rows_TKX, firsts_TX) = lax.scan(turn, (0.0, coords_KX), length=10)
  back = lambda carry, xs: (0.9 * carry + xs[0] * xs[1], None)  # noqa: E731
  ends = [lax.scan(back, last_KX, (rows_TKX, firsts_TX), reverse=reverse)[0] for reverse in (True, False)]
  return jnp.stack([*ends, rows_TKX.sum(0)])


@pytest.mark.parametrize('platform', ['gpu', 'interpret'])
def test_loops_over_what_loops_stack(platform, rng):
  x_KX, g_NKX = (rng.normal(size=s).astype(np.float32) for s in ((2, 9), (3, 2, 9)))
  run = value_and_pull(stacking)
  actual = eager_lanes(run, x_KX, g_NKX, platform=platform)
  jax.tree.map(close, actual, list(jax.vmap(run, -1, -1)(x_KX, g_NKX)))


def test_sinkhorn_backward_is_short_on_gpus(rng):
  """Its iterations and their way back stay loops, of which 40 take no more instructions than 10."""
  x_KX, g_NMX = (rng.normal(size=s).astype(np.float32) for s in ((4, 9), (2, 2, 9)))

  def traced(iterations, platform):
    constraint = CONSTRAINTS['birkhoff_sinkhorn'](iterations=iterations)
    run = value_and_pull(lambda coords_K: constraint.matrix(coords_K, 2))
    made = jax.make_jaxpr(lambda x, g: eager_lanes(run, x, g, platform=platform))(x_KX, g_NMX)
    return lane_blocks.instructions(made.jaxpr), made, run

  length, made, run = traced(10, 'gpu')
  assert length == traced(40, 'gpu')[0] < traced(10, 'interpret')[0] / 2
  kernel = jax.jit(jaxpr_as_fun(made))
  jax.tree.map(close, kernel(x_KX, g_NMX), list(jax.vmap(run, -1, -1)(x_KX, g_NMX)))


def test_a_loop_ends_for_each_token_by_its_own_condition(rng):
  def halve(x_K):
    return lax.while_loop(lambda c: jnp.max(jnp.abs(c[1])) > 1, lambda c: (c[0] + 1, c[1] / 2), (0, x_K))[1]

  x_KX = (rng.normal(size=(2, 33)) * 100).astype(np.float32)
  (actual,) = eager_lanes(halve, x_KX)
  np.testing.assert_array_equal(actual, jax.vmap(halve, -1, -1)(x_KX))


def test_kernels_in_jit_scan_and_recomputation(rng):
  constraint = CONSTRAINTS['orthogonal_cayley']()
  run = in_lanes(lambda shared, x_K: constraint.matrix(shared['alpha'] * x_K, 3), 'interpret')
  by_xla = lambda shared, x_KX: constraint.matrix(shared['alpha'] * x_KX, 3)  # noqa: E731

  def loss(run, shared, x_KX):
    layer = jax.checkpoint(lambda x_KX, _: (x_KX + 0.1 * run(shared, x_KX)[0], None))
    return jnp.sum(lax.scan(layer, x_KX, length=2)[0] ** 2)

  inputs = {'alpha': jnp.float32(0.7)}, jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
  gradient = lambda run: jax.jit(jax.grad(functools.partial(loss, run), (0, 1)))(*inputs)  # noqa: E731
  jax.tree.map(close, gradient(run), gradient(by_xla))


@pytest.mark.parametrize('name', ['birkhoff_permutations', 'birkhoff_transport'])
def test_kernel_in_the_interpreter(name, rng):
  constraint, n = CONSTRAINTS[name](), 3
  shapes = (constraint.num_coordinates(n), 3, 9), (n, n, 3, 9)
  inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
  kernel = value_and_pull(lambda coords_KX: matrix_kernel(constraint, coords_KX, n, 'interpret'))
  by_xla = value_and_pull(lambda coords_KX: constraint.matrix(coords_KX, n))
  jax.tree.map(close, jax.jit(kernel)(*inputs), by_xla(*inputs))


def test_empty_arrays_and_float64(x64):
  for name, coordinates, dtype in (('identity', 0, 'float32'), ('row_stochastic', 4, 'float64')):
    x_KX = np.linspace(0, 1, coordinates * 5).reshape(coordinates, 5).astype(dtype)
    actual = matrix_kernel(CONSTRAINTS[name](), jnp.asarray(x_KX), 2, 'interpret')
    np.testing.assert_array_equal(actual, CONSTRAINTS[name]().matrix(x_KX, 2))


@pytest.mark.parametrize(
  'function, why',
  [
    (lambda coords_KX, n: jnp.sort(coords_KX, 0).reshape(n, n), 'sort has no rule'),
    (
      lambda coords_KX, n: coords_KX[coords_KX[0].astype(int)] * jnp.ones((n, n)),
      'index that depends on the token',
    ),
    (lambda coords_KX, n: coords_KX.astype(jnp.bfloat16).reshape(n, n), 'other dtypes than float32'),
  ],
)
def test_what_has_no_kernel_is_named(function, why):
  constraint = dataclasses.replace(CONSTRAINTS['unconstrained'](), matrix=function)
  assert why in why_not(constraint, 2, 'tpu')


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
@pytest.mark.parametrize('name', ['birkhoff_permutations', 'circulant', 'orthogonal_cayley', 'birkhoff_dual'])
def test_kernels_lower_for_what_is_not_here(name, platform):
  if platform == 'gpu' and jax.__version_info__ >= (0, 12):
    pytest.skip('from JAX 0.12 on, Triton kernels are lowered where a GPU is')
  assert why_not(CONSTRAINTS[name](), 2, platform) is None
