"""Doubly stochastic circulant matrices, plain and leaky (C-mHC)."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, linear_map, promote, stochastic_defect
from mhc_jax.constraints.birkhoff_permutations import permutation_matrices
from mhc_jax.values import Within


def circulant(gamma: Annotated[float, Within(1e-6, 1)] = 1.0) -> Constraint:
  """H = (1 - gamma) I + gamma sum_k softmax(coordinates)_k S^k, S the cyclic shift: n coordinates.

  gamma = 1 is the plain form; the leaky one takes beta / (2 L) with L layers, which keeps the smallest
  singular value of their product above exp(-beta - beta^2 / L). Raises ValueError unless
  0 < gamma <= 1.
  """
  if not 0 < gamma <= 1:
    raise ValueError(f'circulant: gamma must lie in (0, 1], got {gamma}')

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    shifts_RK = permutation_matrices(n, n).reshape(n, n * n).T
    leak_RK = (1 - gamma) * shifts_RK[:, :1] + gamma * shifts_RK  # the weights sum to 1
    weights_KX = jax.nn.softmax(promote(coords_KX), 0)
    return linear_map(leak_RK, weights_KX).reshape(n, n, *coords_KX.shape[1:])

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    if n == 1:
      return np.zeros(1)
    others = min(max(mixing, 1e-6) / gamma, 1 - 1 / n)  # at most equal weights, also where mixing > gamma
    return np.log(np.r_[1 - others, np.full(n - 1, others / (n - 1))])

  def defect(h_NMX: jax.Array) -> jax.Array:
    shifted_NMX = jnp.roll(jnp.roll(h_NMX, 1, 0), 1, 1)
    uneven_X = jnp.abs(h_NMX - shifted_NMX).max((0, 1))
    too_small_X = jnp.maximum(1 - gamma - h_NMX[0, 0], 0)
    return jnp.maximum(stochastic_defect(h_NMX), jnp.maximum(uneven_X, too_small_X))

  properties = {'row_stochastic', 'column_stochastic', 'nonnegative', 'nonexpansive', 'exact'}
  return Constraint(
    name='circulant',
    params={'gamma': gamma},
    num_coordinates=lambda n: n,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: n - 1,
    defect=defect,
    properties=frozenset(properties | ({'closed_under_product'} if gamma == 1 else set())),
    flops=lambda n: 2 * n**3 + 5 * n,
  )
