"""Kernels with tokens in lanes, against the functions they are traced from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.base import Constraint
from mhc_jax.kernels.lanes import in_lanes, matrix_kernel

TOLERANCE = 1e-5  # of the largest entry, in float32


def with_vjp(matrix, coords, cotangents):
  h, pull = jax.vjp(matrix, coords)
  return h, pull(cotangents)[0]


def draw(constraint: Constraint, n: int, tokens: int):
  """Coordinates of scales 0.01 to 100, and cotangents."""
  rng = np.random.default_rng(n)
  coords_KX = rng.normal(size=(constraint.num_coordinates(n), tokens)) * np.resize([0.01, 1, 10, 100], tokens)
  return coords_KX.astype(np.float32), rng.normal(size=(n, n, tokens)).astype(np.float32)


def close(actual, expected) -> None:
  assert actual.shape == expected.shape
  if expected.size:
    assert np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-30)


def test_shared_gradients_are_sums_over_tokens():
  """Two cores with several blocks each would not show here: 1300 tokens are one block of each core."""

  def function(shared, a_K, b_K):
    coords_NM = jnp.tanh(shared['alpha'] * a_K + shared['b']).reshape(2, 2)
    return {'h': coords_NM @ coords_NM, 'w': a_K.sum() * b_K * shared['alpha']}

  rng = np.random.default_rng(0)
  shared = {'alpha': jnp.float32(1.3), 'b': jnp.arange(4, dtype=jnp.float32)}
  arrays = [jnp.asarray(rng.normal(size=(k, 2, 650)), jnp.float32) for k in (4, 3)]
  by_tokens = jax.vmap(jax.vmap(function, (None, -1, -1), -1), (None, 1, 1), -2)

  def loss(run, shared, *arrays):
    out = run(shared, *arrays)
    return jnp.sum(out['h'] ** 2) + jnp.sum(jnp.sin(out['w']))

  kernel = in_lanes(function, 'interpret')
  jax.tree.map(close, kernel(shared, *arrays), by_tokens(shared, *arrays))
  gradient = lambda run: jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2)))(shared, *arrays)  # noqa: E731
  jax.tree.map(close, gradient(kernel), gradient(by_tokens))


@pytest.mark.parametrize('name', ['birkhoff_permutations', 'birkhoff_dual'])
def test_kernel_in_the_interpreter(name):
  constraint, n = CONSTRAINTS[name](), 3
  coords_KX, g_NMX = (x.reshape(*x.shape[:-1], 3, 9) for x in draw(constraint, n, 27))
  run = lambda c, g: with_vjp(lambda c: matrix_kernel(constraint, c, n, 'interpret'), c, g)  # noqa: E731
  jax.tree.map(
    close, jax.jit(run)(coords_KX, g_NMX), with_vjp(lambda c: constraint.matrix(c, n), coords_KX, g_NMX)
  )
