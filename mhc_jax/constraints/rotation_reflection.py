"""Mixtures of a rotation and a reflection of the streams (E-Delta-MHC-Geo, 2605.06729)."""

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, promote
from mhc_jax.constraints.orthogonal import cayley, cayley_flops, skew
from mhc_jax.constraints.spectra import singular_values

EPS = 1e-12  # beside |k|^2, which may vanish


def rotation_reflection() -> Constraint:
  """H = g Q + (1 - g) (I - 2 k k^T / |k|^2): Cayley's Q, a Householder reflection, g a sigmoid.

  Reaches determinant -1, which Cayley's map alone does not. Coordinates: g's logit, k less 1 (n, none for one
  stream, whose reflection is -1), the upper triangle of Q's skew matrix, n(n-1)/2. The defect is the spectral
  norm above 1, a lower bound. The paper's regulariser 4 g (1 - g) is not here.
  """

  def axes(n: int) -> int:
    return n if n > 1 else 0

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    coords_KX = promote(coords_KX)
    gate_X, first = jax.nn.sigmoid(coords_KX[0]), 1 + axes(n)
    k_NX = 1 + coords_KX[1:first] if axes(n) else jnp.ones_like(coords_KX)
    outer_NMX = k_NX[:, None] * k_NX[None] / (jnp.sum(k_NX * k_NX, 0) + EPS)[None, None]
    eye_NM = jnp.eye(n, dtype=coords_KX.dtype).reshape(n, n, *(1,) * (coords_KX.ndim - 1))
    rotation_NMX = cayley(skew(coords_KX[first:], n))
    return gate_X[None, None] * rotation_NMX + (1 - gate_X)[None, None] * (eye_NM - 2 * outer_NMX)

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    """k of ones reflects `mixing` of each row to others; Q adds half of that, of both signs."""
    reflected = np.clip(mixing * (n / (2 * (n - 1)) if n > 1 else 0.5), 1e-6, 1 - 1e-6)
    angles = np.full(n * (n - 1) // 2, mixing / (4 * max(n - 1, 1)))
    return np.r_[np.log(1 / reflected - 1), np.zeros(axes(n)), angles]

  return Constraint(
    name='rotation_reflection',
    num_coordinates=lambda n: n * (n - 1) // 2 + axes(n) + 1,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: n * (n - 1) // 2 + n,
    defect=lambda h_NMX: jnp.maximum(singular_values(h_NMX)[0] - 1, 0),
    properties=frozenset({'nonexpansive'}),
    flops=lambda n: cayley_flops(n) + 8 * n * n + 3 * n + 4,
  )
