"""Doubly stochastic matrices filled entry by entry (TBP-mHC, arXiv 2605.21724)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mhc_jax.constraints.base import Constraint, near_identity, promote, stochastic_defect


def _bounds(row_left, columns_left, j: int):
  """What entry j of a row may be, given what row and columns still need; numpy or jax arrays.

  The general transportation polytope has a third lower bound, what column j needs beyond the rows to
  come; with unit margins it is never positive.
  """
  later = functools.reduce(lambda a, b: a + b, columns_left[j + 1 :])
  excess = row_left - later
  lower = excess * (excess > 0)
  upper = columns_left[j] + (row_left - columns_left[j]) * (row_left < columns_left[j])
  return lower, upper


def _fill_row(columns_left_MX: jax.Array, shares_KX: jax.Array) -> jax.Array:
  """One row (n, *X) from what the columns still need and n - 1 shares in (0, 1).

  Rounding could leave a remainder of -1e-7: clipped at 0.
  """
  left_X, row = jnp.ones_like(columns_left_MX[0]), []
  for j in range(len(shares_KX)):
    lower_X, upper_X = _bounds(left_X, columns_left_MX, j)
    row.append(lower_X + (upper_X - lower_X) * shares_KX[j])
    left_X = jnp.maximum(left_X - row[-1], 0)
  return jnp.stack([*row, left_X])


def _fill(coords_KX: jax.Array, n: int) -> jax.Array:
  shares_NKX = jax.nn.sigmoid(promote(coords_KX)).reshape(n - 1, n - 1, *coords_KX.shape[1:])

  def fill_next(columns_left_MX, shares_KX):
    row_MX = _fill_row(columns_left_MX, shares_KX)
    return jnp.maximum(columns_left_MX - row_MX, 0), row_MX

  start_MX = jnp.ones((n, *coords_KX.shape[1:]), shares_NKX.dtype)
  last_MX, rows_NMX = lax.scan(fill_next, start_MX, shares_NKX)
  return jnp.concatenate([rows_NMX, last_MX[None]])


def _coordinates(h_NM: np.ndarray) -> np.ndarray:
  """The coordinates of a doubly stochastic matrix with positive entries."""
  n, columns_left, logits = len(h_NM), np.ones(len(h_NM)), []
  for row in h_NM[:-1]:
    left = 1.0
    for j in range(n - 1):
      lower, upper = _bounds(left, columns_left, j)
      share = (row[j] - lower) / (upper - lower)
      logits.append(np.log(share / (1 - share)))
      left -= row[j]
    columns_left = columns_left - row
  return np.array(logits)


def birkhoff_transport() -> Constraint:
  """Row by row, each entry a sigmoid's share of what row and column leave: (n - 1)^2 coordinates.

  The last row and column are remainders. identity() keeps an off-diagonal entry of at least 0.002, since
  a coordinate's derivative is at most a quarter of what is left to share.
  """

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    if n == 1:
      return jnp.ones((1, 1, *coords_KX.shape[1:]), promote(coords_KX).dtype)
    return _fill(coords_KX, n)

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    return _coordinates(near_identity(n, max(mixing, 0.002 * (n - 1))))

  return Constraint(
    name='birkhoff_transport',
    num_coordinates=lambda n: (n - 1) ** 2,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: (n - 1) ** 2,
    defect=stochastic_defect,
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
    flops=lambda n: (n - 1) ** 2 * (10 + n),
  )
