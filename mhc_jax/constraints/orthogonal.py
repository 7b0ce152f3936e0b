"""Rotations of the streams: by Cayley's map (JPmHC, 2602.18308), by quaternions (oHC, 2609.02672)."""

import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mhc_jax.constraints.base import Constraint, linear_map, materialise, product, promote
from mhc_jax.constraints.spectra import determinant
from mhc_jax.derivatives import with_backward
from mhc_jax.values import Within


def skew(coords_KX: jax.Array, n: int) -> jax.Array:
  """The skew-symmetric (n, n, *X) whose upper triangle, row by row, holds the n(n-1)/2 coordinates."""
  rows, columns = np.triu_indices(n, 1)
  picks_NMK = np.zeros((n, n, len(rows)))
  picks_NMK[rows, columns, range(len(rows))] = 1
  picks_NMK -= picks_NMK.swapaxes(0, 1)
  return linear_map(picks_NMK.reshape(n * n, -1), coords_KX).reshape(n, n, *coords_KX.shape[1:])


def _inverse(m_NMX: jax.Array) -> jax.Array:
  """Gauss-Jordan without pivoting: for I + A, A skew, every pivot is at least 1."""
  n = m_NMX.shape[0]
  is_row_N = jnp.arange(n).reshape(n, *(1,) * (m_NMX.ndim - 2))

  def sweep(k, m_NMX):
    stage = functools.partial(materialise, k >= 0)
    here_N = is_row_N == k

    def scaled_row(m_NMX):
      row_MX = lax.dynamic_index_in_dim(m_NMX, k, 0, False)
      pivot_X = lax.dynamic_index_in_dim(row_MX, k, 0, True)
      return jnp.where(here_N, 1, row_MX) / pivot_X

    row_MX = stage(scaled_row, m_NMX)
    column_NX = jnp.where(here_N, -1, lax.dynamic_index_in_dim(m_NMX, k, 1, False))
    rest_NMX = jnp.where(here_N[:, None] | here_N[None], 0, m_NMX)
    return rest_NMX - column_NX[:, None] * row_MX[None]

  return lax.fori_loop(0, n, sweep, m_NMX)


def _eye(a_NMX: jax.Array) -> jax.Array:
  n = a_NMX.shape[0]
  return jnp.eye(n, dtype=a_NMX.dtype).reshape(n, n, *(1,) * (a_NMX.ndim - 2))


def _cayley_and_inverse(a_NMX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Q = 2 (I + A)^-1 - I, with one Newton-Schulz step against the rounding errors of large A."""
  b_NMX = _inverse(_eye(a_NMX) + a_NMX)
  q_NMX = 2 * b_NMX - _eye(a_NMX)
  gram_NMX = product(q_NMX.swapaxes(0, 1), q_NMX)
  return product(q_NMX, 1.5 * _eye(a_NMX) - 0.5 * gram_NMX), b_NMX


def cayley(a_NMX: jax.Array) -> jax.Array:
  """(I - A)(I + A)^-1 of skew-symmetric A (n, n, *X): orthogonal, no eigenvalue -1."""
  return _cayley_and_inverse(a_NMX)[0]


def _cayley_backward(b_NMX, g_NMX):
  b_MNX = b_NMX.swapaxes(0, 1)
  return (-2 * product(product(b_MNX, g_NMX), b_MNX),)


cayley = with_backward(cayley, _cayley_and_inverse, _cayley_backward)


def cayley_flops(n: int) -> int:
  return 2 * n**3 + 4 * n**3 + 4 * n**2


def orthogonal_defect(h_NMX: jax.Array) -> jax.Array:
  """Largest entry of |H^T H - I| and |det H - 1|, per token."""
  gram_NMX = product(h_NMX.swapaxes(0, 1), h_NMX)
  return jnp.maximum(jnp.abs(gram_NMX - _eye(h_NMX)).max((0, 1)), jnp.abs(determinant(h_NMX) - 1))


def orthogonal_cayley() -> Constraint:
  """SO(n) without eigenvalue -1: the coordinates are the upper triangle of A, n(n-1)/2."""

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    return cayley(skew(promote(coords_KX), n))

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    """Q = I - 2 A + ...: sum of absolute off-diagonal entries of a row `mixing`."""
    return np.full(n * (n - 1) // 2, mixing / (2 * max(n - 1, 1)))

  return Constraint(
    name='orthogonal_cayley',
    num_coordinates=lambda n: n * (n - 1) // 2,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: n * (n - 1) // 2,
    defect=orthogonal_defect,
    properties=frozenset({'orthogonal', 'nonexpansive', 'exact'}),
    flops=cayley_flops,
  )


# Row-major entries of x -> q x and x -> x conj(r) as signs and indices into the quaternion's parts.
_LEFT = ((0, 1), (1, -1), (2, -1), (3, -1)), ((1, 1), (0, 1), (3, -1), (2, 1))
_LEFT += ((2, 1), (3, 1), (0, 1), (1, -1)), ((3, 1), (2, -1), (1, 1), (0, 1))
_RIGHT = ((0, 1), (1, 1), (2, 1), (3, 1)), ((1, -1), (0, 1), (3, -1), (2, 1))
_RIGHT += ((2, -1), (3, 1), (0, 1), (1, -1)), ((3, -1), (2, -1), (1, 1), (0, 1))


def _multiplication(q_KX: jax.Array, table: tuple) -> jax.Array:
  picks_NMK = np.zeros((4, 4, 4))
  for i, j in np.ndindex(4, 4):
    part, sign = table[i][j]
    picks_NMK[i, j, part] = sign
  return linear_map(picks_NMK.reshape(16, 4), q_KX).reshape(4, 4, *q_KX.shape[1:])


def orthogonal_quaternion(eps: Annotated[float, Within(1e-30, 1)] = 1e-12) -> Constraint:
  """SO(4) as x -> q x conj(r) with unit quaternions q, r (n = 4 only).

  The 8 coordinates are two quaternions less 1, each divided by sqrt(norm^2 + eps): orthogonal up to
  eps / norm^2. Raises ValueError for another n.
  """

  def check(n: int) -> None:
    if n != 4:
      raise ValueError(f'orthogonal_quaternion is defined for n = 4 streams only, got n = {n}')

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    check(n)
    one_K = np.array([1, 0, 0, 0]).reshape(4, *(1,) * (coords_KX.ndim - 1))
    units = []
    for nu_KX in (promote(coords_KX[:4]) + one_K, promote(coords_KX[4:]) + one_K):
      units.append(nu_KX * lax.rsqrt(jnp.sum(nu_KX * nu_KX, 0, keepdims=True) + eps))
    return product(_multiplication(units[0], _LEFT), _multiplication(units[1], _RIGHT))

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    """Both rotations off 1, else r's real part would have no gradient; rows' mean mass `mixing`."""
    check(n)
    return np.array([0, 1, 1, 1, 0, -0.5, -0.5, -0.5]) * mixing / 3

  def checked(value: int):
    return lambda n: check(n) or value

  return Constraint(
    name='orthogonal_quaternion',
    params={'eps': eps},
    num_coordinates=checked(8),
    matrix=matrix,
    identity=identity,
    dimension=checked(6),
    defect=orthogonal_defect,
    properties=frozenset({'orthogonal', 'nonexpansive', 'closed_under_product'}),
    flops=checked(2 * 4**3 + 2 * 14),
  )
