"""Doubly stochastic matrices as Kronecker products of small ones (KromHC, arXiv 2601.21579)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, stochastic_defect
from mhc_jax.constraints.birkhoff_dual import birkhoff_dual
from mhc_jax.constraints.birkhoff_permutations import (
  LARGEST,
  LEAST,
  birkhoff_permutations,
  logits_near_identity,
  permutation_matrices,
)


def prime_factors(n: int) -> tuple[int, ...]:
  """Ascending; none for 1."""
  factor = next((f for f in range(2, n + 1) if n % f == 0), None)
  return () if factor is None else (factor, *prime_factors(n // factor))


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


def _factor(size: int) -> Constraint:
  """All permutations of a small factor, entropic projection of a large one."""
  return birkhoff_permutations() if size <= LARGEST else birkhoff_dual()


def birkhoff_kronecker(factors: tuple[int, ...] | None = None) -> Constraint:
  """H = U_1 x U_2 x ..., each factor a mixture of all permutations of its size, or of exact logits.

  factors: sizes whose product is n, the first the slowest index; None takes n's prime factors, ascending
  (KromHC: all 2). The coordinates are the factors' logits one after the other, i_k! each; i_k^2 of
  birkhoff_dual where i_k exceeds LARGEST. defect compares H with the product of its own marginals, beside
  sums and signs. Raises ValueError, when used with an n, where factors do not multiply to n.
  """
  factors = None if factors is None else tuple(int(f) for f in factors)

  def sizes(n: int) -> tuple[int, ...]:
    sizes = prime_factors(n) if factors is None else factors
    if math.prod(sizes) != n or min(sizes, default=2) < 1:
      raise ValueError(f'birkhoff_kronecker: factors {sizes} do not multiply to n = {n}')
    return sizes

  def counts(n: int) -> list[int]:
    return [_factor(size).num_coordinates(size) for size in sizes(n)]

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    pieces = jnp.split(coords_KX, np.cumsum(counts(n))[:-1]) if n > 1 else []
    parts = [_factor(size).matrix(c, size) for c, size in zip(pieces, sizes(n), strict=True)]
    dtype = jnp.promote_types(coords_KX.dtype, jnp.float32)
    return functools.reduce(_kronecker, parts, jnp.ones((1, 1, *coords_KX.shape[1:]), dtype))

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    if n == 1:
      return np.zeros(0)
    share = 1 - (1 - min(mixing, 0.99)) ** (1 / len(sizes(n)))  # diagonals multiply
    return np.concatenate([start(size, share, LEAST * mixing) for size in sizes(n)])

  def start(size: int, share: float, least: float) -> np.ndarray:
    if size > LARGEST:
      return _factor(size).identity(size, share)
    return logits_near_identity(permutation_matrices(size), share, least)

  def defect(h_NMX: jax.Array) -> jax.Array:
    parts = [_marginal(h_NMX, sizes(len(h_NMX)), k) for k in range(len(sizes(len(h_NMX))))]
    nearest_NMX = functools.reduce(_kronecker, parts, jnp.ones_like(h_NMX[:1, :1]))
    return jnp.maximum(stochastic_defect(h_NMX), jnp.abs(h_NMX - nearest_NMX).max((0, 1)))

  def flops(n: int) -> int:
    products = np.cumprod(sizes(n)) ** 2
    return sum(_factor(size).flops(size) for size in sizes(n)) + int(products.sum())

  return Constraint(
    name='birkhoff_kronecker',
    params={'factors': factors},
    num_coordinates=lambda n: sum(counts(n)),
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
