"""Doubly stochastic matrices from squared blocks of a rotation (go-mHC, arXiv 2604.02309)."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, promote, stochastic_defect
from mhc_jax.constraints.orthogonal import cayley, cayley_flops, skew
from mhc_jax.values import Within


def _block_norms(q_NMX, n: int, size: int):
  """(1 / s) * squared Frobenius norm of every s x s block; numpy or jax arrays."""
  split = (q_NMX * q_NMX).reshape(n, size, n, size, *q_NMX.shape[2:])
  return split.sum((1, 3)) / size


def _numpy_matrix(coords_K: np.ndarray, n: int, size: int) -> np.ndarray:
  a_NM = np.zeros((n * size, n * size))
  a_NM[np.triu_indices(n * size, 1)] = coords_K
  a_NM -= a_NM.T
  eye_NM = np.eye(n * size)
  return _block_norms(np.linalg.solve((eye_NM + a_NM).T, (eye_NM - a_NM).T).T, n, size)


def birkhoff_orthostochastic(s: Annotated[int, Within(1, 64)] = 2) -> Constraint:
  """H_ij = |Q_ij|^2 / s over the s x s blocks of Q = (I - A)(I + A)^-1, A skew-symmetric (ns, ns).

  s = 1: squares of a rotation's entries (orthostochastic); larger s covers more of the polytope. The
  coordinates are A's upper triangle, ns(ns-1)/2. Membership is hard to decide, so defect is that of
  the Birkhoff polytope. Raises ValueError for s < 1.
  """
  if s < 1:
    raise ValueError(f'birkhoff_orthostochastic: s must be at least 1, got {s}')

  def num_coordinates(n: int) -> int:
    return n * s * (n * s - 1) // 2

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    if num_coordinates(n) == 0:
      return jnp.ones((1, 1, *coords_KX.shape[1:]), promote(coords_KX).dtype)
    return _block_norms(cayley(skew(promote(coords_KX), n * s)), n, s)

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    """Off A = 0, where the squares have no gradient: entries between blocks equal, mass `mixing`."""
    rows, columns = np.triu_indices(n * s, 1)
    between = np.where(rows // s == columns // s, 0.0, 1.0)
    if n == 1:
      return between
    target = max(mixing, 1e-6)
    scale = np.sqrt(target / (4 * s * (n - 1)))
    for _ in range(20):
      mass = 1 - np.trace(_numpy_matrix(scale * between, n, s)) / n
      scale *= np.sqrt(target / mass)
    return scale * between

  return Constraint(
    name='birkhoff_orthostochastic',
    params={'s': s},
    num_coordinates=num_coordinates,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: (n - 1) ** 2 if s > 1 else min((n - 1) ** 2, n * (n - 1) // 2),
    defect=stochastic_defect,
    properties=frozenset({'row_stochastic', 'column_stochastic', 'nonnegative', 'nonexpansive', 'exact'}),
    flops=lambda n: cayley_flops(n * s) + 2 * (n * s) ** 2,
  )
