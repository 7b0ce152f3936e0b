"""Doubly stochastic matrices as Kronecker products of small ones (KromHC, arXiv 2601.21579)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, stochastic_defect
from mhc_jax.constraints.birkhoff_permutations import (
  LARGEST,
  birkhoff_permutations,
)


def _prime_factors(n: int) -> tuple[int, ...]:
  factor = next((f for f in range(2, n + 1) if n % f == 0), None)
  return () if factor is None else (factor, *_prime_factors(n // factor))


def _kronecker(a_NMX: jax.Array, b_NMX: jax.Array) -> jax.Array:
  n = a_NMX.shape[0] * b_NMX.shape[0]
  blocks = a_NMX[:, None, :, None] * b_NMX[None, :, None, :]
  return blocks.reshape(n, n, *a_NMX.shape[2:])


def _marginal(h_NMX: jax.Array, sizes: tuple[int, ...], position: int) -> jax.Array:
  """The factor at `position`, if H is a Kronecker product of doubly stochastic matrices."""
  before, size = math.prod(sizes[:position]), sizes[position]
  tokens = h_NMX.shape[2:]
  split = h_NMX.reshape(before, size, -1, before, size, h_NMX.shape[0] // (before * size), *tokens)
  return split.sum((3, 5)).mean((0, 2))


def birkhoff_kronecker(factors: tuple[int, ...] | None = None) -> Constraint:
  """H = U_1 x U_2 x ..., each factor a mixture of all permutations of its size.

  factors: sizes whose product is n, the first the slowest index; None takes n's prime factors, ascending
  (KromHC: all 2). The coordinates are the factors' logits one after the other, i_k! each. defect
  compares H with the product of its own marginals, beside sums and signs. Raises ValueError, when
  used with an n, where factors do not multiply to n or one exceeds LARGEST.
  """
  factors = None if factors is None else tuple(int(f) for f in factors)
  permutations = birkhoff_permutations()

  def sizes(n: int) -> tuple[int, ...]:
    sizes = _prime_factors(n) if factors is None else factors
    if math.prod(sizes) != n or min(sizes, default=2) < 1:
      raise ValueError(f'birkhoff_kronecker: factors {sizes} do not multiply to n = {n}')
    if max(sizes, default=1) > LARGEST:
      raise ValueError(
        f'birkhoff_kronecker: n = {n} has a factor above {LARGEST} ({max(sizes)}! permutations); '
        'use birkhoff_dual or birkhoff_sinkhorn'
      )
    return sizes

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    stops = np.cumsum([math.factorial(size) for size in sizes(n)])[:-1]
    pieces = jnp.split(coords_KX, stops) if n > 1 else []
    parts = [permutations.matrix(c, size) for c, size in zip(pieces, sizes(n), strict=True)]
    dtype = jnp.promote_types(coords_KX.dtype, jnp.float32)
    return functools.reduce(_kronecker, parts, jnp.ones((1, 1, *coords_KX.shape[1:]), dtype))

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    if n == 1:
      return np.zeros(0)
    share = 1 - (1 - min(mixing, 0.99)) ** (1 / len(sizes(n)))  # diagonals multiply
    return np.concatenate([permutations.identity(size, share) for size in sizes(n)])

  def defect(h_NMX: jax.Array) -> jax.Array:
    parts = [_marginal(h_NMX, sizes(len(h_NMX)), k) for k in range(len(sizes(len(h_NMX))))]
    nearest_NMX = functools.reduce(_kronecker, parts, jnp.ones_like(h_NMX[:1, :1]))
    return jnp.maximum(stochastic_defect(h_NMX), jnp.abs(h_NMX - nearest_NMX).max((0, 1)))

  def flops(n: int) -> int:
    products = np.cumprod(sizes(n)) ** 2
    return sum(permutations.flops(size) for size in sizes(n)) + int(products.sum())

  return Constraint(
    name='birkhoff_kronecker',
    params={'factors': factors},
    num_coordinates=lambda n: sum(math.factorial(size) for size in sizes(n)),
    matrix=matrix,
    identity=identity,
    dimension=lambda n: sum((size - 1) ** 2 for size in sizes(n)),
    defect=defect,
    properties=frozenset(
      {
        'row_stochastic',
        'column_stochastic',
        'nonnegative',
        'nonexpansive',
        'closed_under_product',
        'exact',
      }
    ),
    flops=flops,
  )
