"""Unit row and column sums, spectral norm at most 1, entries of any sign (sHC, arXiv 2603.20896)."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, product, promote
from mhc_jax.constraints.orthogonal import cayley, cayley_flops, skew
from mhc_jax.constraints.spectra import singular_values
from mhc_jax.values import Within


def _helmert(n: int) -> np.ndarray:
  """(n, n - 1): an orthonormal basis of the vectors that sum to 0."""
  basis = np.array([[1.0] * k + [-k] + [0.0] * (n - 1 - k) for k in range(1, n)])
  return (basis / np.linalg.norm(basis, axis=1, keepdims=True)).T


def spectral_sphere(gamma: Annotated[float, Within(1e-6, 1e6)] = 1.0) -> Constraint:
  """H = J + Z U diag(tanh d) V^T Z^T, J = 11^T / n, Z a Helmert basis of the complement of 1.

  U, V = (I - A)(I + A)^-1 with entries gamma tanh(.) in A. The (n - 1)^2 coordinates are U's and V's
  upper triangles and d. Raises ValueError unless gamma > 0.
  """
  if gamma <= 0:
    raise ValueError(f'spectral_sphere: gamma must be positive, got {gamma}')

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    coords_KX, tokens = promote(coords_KX), coords_KX.shape[1:]
    if n == 1:
      return jnp.ones((1, 1, *tokens), coords_KX.dtype)
    turns = (n - 1) * (n - 2) // 2
    bounded_KX = jnp.tanh(coords_KX)
    z_NK = jnp.asarray(_helmert(n), coords_KX.dtype).reshape(n, n - 1, *(1,) * len(tokens))
    left_NKX = z_NK * bounded_KX[2 * turns :][None]
    right_NKX = z_NK
    if turns:
      u_KKX, v_KKX = (cayley(gamma * skew(bounded_KX[start : start + turns], n - 1)) for start in (0, turns))
      left_NKX = product(z_NK, u_KKX) * bounded_KX[2 * turns :][None]
      right_NKX = product(z_NK, v_KKX)
    return 1 / n + product(left_NKX, right_NKX.swapaxes(0, 1))

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    """U = V = I and singular values below 1, spread: where they agree, U and V turn H alike."""
    if n == 1:
      return np.zeros(0)
    below = max(mixing, 1e-6) * n / (n - 1)
    spread = np.minimum(below * 2 * (np.arange(n - 1) + 0.5) / (n - 1), 2 - 1e-6)
    return np.r_[np.zeros((n - 1) * (n - 2)), np.arctanh(1 - spread)]

  def defect(h_NMX: jax.Array) -> jax.Array:
    sums_X = jnp.maximum(jnp.abs(h_NMX.sum(1) - 1).max(0), jnp.abs(h_NMX.sum(0) - 1).max(0))
    return jnp.maximum(sums_X, singular_values(h_NMX)[0] - 1)

  return Constraint(
    name='spectral_sphere',
    params={'gamma': gamma},
    num_coordinates=lambda n: (n - 1) ** 2,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: (n - 1) ** 2,
    defect=defect,
    properties=frozenset(
      {'row_stochastic', 'column_stochastic', 'nonexpansive', 'closed_under_product', 'exact'}
    ),
    flops=lambda n: 2 * cayley_flops(n - 1) + 6 * n * (n - 1) ** 2 + (n - 1) ** 2,
  )
