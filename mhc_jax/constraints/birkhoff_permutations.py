"""Doubly stochastic matrices as convex mixtures of permutations (mHC-lite, arXiv 2601.05732)."""

import itertools
import math

import jax
import numpy as np

from mhc_jax.constraints.base import Constraint, linear_map, promote, stochastic_defect
from mhc_jax.errors import require

LARGEST = 5  # 5! = 120 coordinates per matrix; 6! = 720
LEAST = 0.105  # of the mixing, for each cycle type at the start: slopes over 1e-3 at mixing 0.01


def number_of_permutations(n: int, count: int | None = None) -> int:
  """n!, or `count`; ConfigError where there are too many or too few."""
  if count is None:
    require(
      n <= LARGEST,
      f'birkhoff_permutations: n = {n} has {math.factorial(n)} permutations; set count to choose '
      f'some of them (all are used up to n = {LARGEST})',
    )
    return math.factorial(n)
  require(
    1 <= count <= math.factorial(n),
    f'birkhoff_permutations: count must lie between 1 and n! = {math.factorial(n)} at n = {n}, got {count}',
  )
  return count


def permutation_matrices(n: int, count: int | None = None) -> np.ndarray:
  """(K, n, n): all n! permutations, lexicographic, the identity first; or `count` of them.

  A choice takes the n cyclic shifts first, then distinct permutations drawn with a fixed seed.
  Raises ConfigError where there are too many or too few.
  """
  number = number_of_permutations(n, count)
  if count is None:
    return np.eye(n)[np.array(list(itertools.permutations(range(n))))]
  chosen = dict.fromkeys([tuple((i + shift) % n for i in range(n)) for shift in range(n)][:number])
  rng = np.random.default_rng(0)
  while len(chosen) < number:
    chosen[tuple(int(i) for i in rng.permutation(n))] = None
  return np.eye(n)[np.array(list(chosen))]


def _mixture(coords_KX: jax.Array, p_KNM: np.ndarray) -> jax.Array:
  n = p_KNM.shape[1]
  weights_KX = jax.nn.softmax(promote(coords_KX), 0)
  h_RX = linear_map(p_KNM.reshape(-1, n * n).T, weights_KX)
  return h_RX.reshape(n, n, *coords_KX.shape[1:])


def cycle_types(p_KNM: np.ndarray) -> np.ndarray:
  """A number for each permutation, the same for those that differ only by the names of the streams."""
  powers = range(1, p_KNM.shape[1] + 1)
  fixed_SK = [np.trace(np.linalg.matrix_power(p_KNM, power), axis1=1, axis2=2) for power in powers]
  return np.unique(np.array(fixed_SK), axis=1, return_inverse=True)[1]


def logits_near_identity(p_KNM: np.ndarray, mixing: float, least: float) -> np.ndarray:
  """Logits with equal weights on all but the identity; rows' mean off-diagonal mass `mixing`.

  Permutations of one cycle type, which are equivalent coordinates, have together a mass of at least `least`:
  the slope of H along them. With many types the whole mass is larger for it.
  """
  count, n = p_KNM.shape[:2]
  if count == 1:
    return np.zeros(1)
  moved_K = 1 - np.trace(p_KNM[1:], axis1=1, axis2=2) / n  # share of streams that each moves
  others = min(max(mixing, 1e-6) / moved_K.mean(), 1 - 1e-6)
  weights_K, types_K = np.full(count - 1, others / (count - 1)), cycle_types(p_KNM[1:])
  weights_K *= np.maximum(1, least / np.bincount(types_K, weights_K * moved_K))[types_K]
  weights_K *= min(1, (1 - 1e-6) / weights_K.sum())
  return np.log(np.r_[1 - weights_K.sum(), weights_K])


def permutation_hull_dimension(p_KNM: np.ndarray) -> int:
  """Dimension of the convex hull of the given permutations."""
  differences = (p_KNM[1:] - p_KNM[:1]).reshape(len(p_KNM) - 1, -1)
  return int(np.linalg.matrix_rank(differences)) if len(differences) else 0


def birkhoff_permutations(count: int | None = None) -> Constraint:
  """H = sum_k softmax(coordinates)_k P_k over all n! permutations (n <= 5), or over `count` of them.

  With a choice the set is the hull of those permutations, and defect is a lower bound (sums and signs).
  Raises ConfigError, when used with an n, for more permutations than LARGEST! or than there are.
  """
  full = count is None
  properties = {'row_stochastic', 'column_stochastic', 'nonnegative', 'nonexpansive', 'exact'}

  def dimension(n: int) -> int:
    p_KNM = permutation_matrices(n, count)
    return (n - 1) ** 2 if full else permutation_hull_dimension(p_KNM)

  return Constraint(
    name='birkhoff_permutations',
    params={'count': count},
    num_coordinates=lambda n: number_of_permutations(n, count),
    matrix=lambda coords_KX, n: _mixture(coords_KX, permutation_matrices(n, count)),
    identity=lambda n, mixing=0.01: logits_near_identity(
      permutation_matrices(n, count), mixing, LEAST * mixing
    ),
    dimension=dimension,
    defect=stochastic_defect,
    properties=frozenset(properties | ({'closed_under_product'} if full else set())),
    flops=lambda n: (2 * n * n + 5) * number_of_permutations(n, count),
  )
