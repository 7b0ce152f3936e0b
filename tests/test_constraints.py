"""One conformance suite over every constraint: claims, derivatives, start point, dtypes.

`check` holds for any Constraint, so a new line in CONSTRAINTS needs no edit here. What is known of the
published sets is written down by hand beside it (TRUE, UNDEFINED), so that a wrong claim cannot hide.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from eager_lanes import eager_lanes, value_and_pull

from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.base import Constraint
from mhc_jax.constraints.birkhoff_kronecker import birkhoff_kronecker, prime_factors
from mhc_jax.constraints.birkhoff_orthostochastic import birkhoff_orthostochastic
from mhc_jax.constraints.birkhoff_permutations import (
  LARGEST,
  birkhoff_permutations,
  cycle_types,
  permutation_matrices,
)
from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn
from mhc_jax.constraints.circulant import circulant
from mhc_jax.constraints.spectral_sphere import spectral_sphere

STREAMS = (1, 2, 3, 4, 8)
SCALES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
TOKENS = 64  # also n * n at n = 8: one token per entry of H where Jacobians are taken
COMPILER = {'xla_backend_optimization_level': 0}  # compiles twice as fast, same arithmetic

SUMS = {'row_stochastic', 'column_stochastic'}
CONVEX = SUMS | {'nonnegative', 'nonexpansive', 'exact'}  # doubly stochastic: norm <= 1 follows
# name -> (all true claims of the set, as constructed by default; dimension by number of streams)
TRUE: dict[str, tuple[set[str], Callable[[int], int]]] = {
  'unconstrained': ({'closed_under_product', 'exact'}, lambda n: n * n),
  'identity': (CONVEX | {'orthogonal', 'closed_under_product'}, lambda n: 0),
  'birkhoff_sinkhorn': ({'row_stochastic', 'nonnegative'}, lambda n: (n - 1) ** 2),
  'birkhoff_dual': (CONVEX | {'closed_under_product'}, lambda n: (n - 1) ** 2),
  'birkhoff_permutations': (CONVEX | {'closed_under_product'}, lambda n: (n - 1) ** 2),
  'birkhoff_kronecker': (
    CONVEX | {'closed_under_product'},
    {1: 0, 2: 1, 3: 4, 4: 2, 8: 3}.__getitem__,
  ),
  'birkhoff_orthostochastic': (CONVEX, lambda n: (n - 1) ** 2),
  'birkhoff_transport': (CONVEX | {'closed_under_product'}, lambda n: (n - 1) ** 2),
  'circulant': (CONVEX | {'closed_under_product'}, lambda n: n - 1),
  # A product of two rotations without eigenvalue -1 may have it.
  'orthogonal_cayley': ({'orthogonal', 'nonexpansive', 'exact'}, lambda n: n * (n - 1) // 2),
  # Not exact: eps / norm^2 of the quaternions, which may vanish.
  'orthogonal_quaternion': (
    {'orthogonal', 'nonexpansive', 'closed_under_product'},
    {4: 6}.__getitem__,
  ),
  # Streams are kept in part: rows sum to less than 1.
  'diagonal': ({'nonnegative', 'nonexpansive', 'closed_under_product', 'exact'}, lambda n: n),
  'rotation_reflection': ({'nonexpansive'}, lambda n: n * (n - 1) // 2 + n),
  'row_stochastic': (
    {'row_stochastic', 'nonnegative', 'closed_under_product', 'exact'},
    lambda n: n * (n - 1),
  ),
  'spectral_sphere': (
    SUMS | {'nonexpansive', 'closed_under_product', 'exact'},
    lambda n: (n - 1) ** 2,
  ),
}
UNDEFINED = {('birkhoff_permutations', 8)} | {('orthogonal_quaternion', n) for n in (1, 2, 3, 8)}
# Besides the defaults: other parameters whose code or claims differ, (n, constraint, claims, dimension).
CLOSED = CONVEX | {'closed_under_product'}
VARIANTS = {
  'sinkhorn deepseek_v4': (4, birkhoff_sinkhorn(preset='deepseek_v4'), {'nonnegative'}, 9),
  'sinkhorn megatron_main': (4, birkhoff_sinkhorn(preset='megatron_main'), {'nonnegative'}, 9),
  'sinkhorn lucidrains': (
    4,
    birkhoff_sinkhorn(preset='lucidrains'),
    {'column_stochastic', 'nonnegative'},
    9,
  ),
  'permutations, 3 shifts': (4, birkhoff_permutations(3), CONVEX, 2),
  'permutations, 5 of 24': (4, birkhoff_permutations(5), CONVEX, 4),
  'permutations, all 120': (5, birkhoff_permutations(), CLOSED, 16),
  'permutations, 16 of 8!': (8, birkhoff_permutations(16), CONVEX, 15),
  'permutations, 24 of 8!': (8, birkhoff_permutations(24), CONVEX, 23),
  'kronecker (4,)': (4, birkhoff_kronecker((4,)), CLOSED, 9),
  'kronecker (2, 4)': (8, birkhoff_kronecker((2, 4)), CLOSED, 10),
  'kronecker (4, 2)': (8, birkhoff_kronecker((4, 2)), CLOSED, 10),
  'kronecker (7,)': (7, birkhoff_kronecker(), CLOSED, 36),
  'orthostochastic s = 1': (4, birkhoff_orthostochastic(1), CONVEX, 6),
  'orthostochastic s = 3': (4, birkhoff_orthostochastic(3), CONVEX, 9),
  'circulant leaky': (4, circulant(0.2), CONVEX, 3),
  'spectral sphere gamma 0.3': (
    4,
    spectral_sphere(0.3),
    SUMS | {'nonexpansive', 'closed_under_product', 'exact'},
    9,
  ),
}
# Error of claims in float64, and in float32 for coordinates of scale <= 10 and of 100: some ulp of the
# entries; Cayley's map loses |A|. The quaternions' eps is 1e-12 of a squared norm of 1e-3 and more.
TOLERANCE = {'float64': (1e-13, 1e-13), 'float32': (1e-6, 1e-5)}
# Of the largest entry, between XLA's order of operations and the kernel's: 5e-6 by birkhoff_orthostochastic,
# 7e-7 and less by the others.
KERNEL = 1e-5
LOOSER = {'orthogonal_quaternion': 1e-9}


@functools.cache
def compiled(constraint: Constraint, n: int):
  """(coordinates, cotangents) -> matrices, defects, gradients; one compilation per dtype."""

  def evaluate(coords_KX, cot_NMX):
    h_NMX, pull = jax.vjp(lambda coords_KX: constraint.matrix(coords_KX, n), coords_KX)
    assert h_NMX.shape == (n, n, *coords_KX.shape[1:])
    assert h_NMX.dtype == jnp.promote_types(coords_KX.dtype, jnp.float32)
    return h_NMX, constraint.defect(h_NMX), pull(cot_NMX)[0]

  return jax.jit(evaluate, compiler_options=COMPILER)


@functools.cache
def compiled_defect(constraint: Constraint):
  return jax.jit(constraint.defect, compiler_options=COMPILER)


def draw(constraint: Constraint, n: int, dtype: str = 'float64'):
  """Coordinates of every scale, cotangents, and the scale of each token."""
  rng = np.random.default_rng(n)
  scale_X = np.resize(SCALES, TOKENS)
  coords_KX = rng.normal(size=(constraint.num_coordinates(n), TOKENS)) * scale_X
  return coords_KX.astype(dtype), rng.normal(size=(n, n, TOKENS)).astype(dtype), scale_X


def violations(constraint: Constraint, h_XNM: np.ndarray, defect_X: np.ndarray) -> dict:
  """Claimed property -> by how much each token violates it; products of neighbouring tokens."""
  h_XNM = h_XNM.astype(np.float64)
  eye_NM = np.eye(h_XNM.shape[1])
  products_XNM = h_XNM @ np.roll(h_XNM, 1, 0)
  measures = {
    'row_stochastic': lambda: np.abs(h_XNM.sum(2) - 1).max(1),
    'column_stochastic': lambda: np.abs(h_XNM.sum(1) - 1).max(1),
    'nonnegative': lambda: np.maximum(-h_XNM, 0).max((1, 2)),
    'orthogonal': lambda: np.abs(h_XNM.swapaxes(1, 2) @ h_XNM - eye_NM).max((1, 2)),
    'nonexpansive': lambda: np.linalg.norm(h_XNM, 2, axis=(1, 2)) - 1,
    'closed_under_product': lambda: np.asarray(compiled_defect(constraint)(np.moveaxis(products_XNM, 0, 2))),
    'exact': lambda: defect_X,
  }
  return {claim: measures[claim]() for claim in constraint.properties}


def check_claims(constraint: Constraint, n: int, dtype: str) -> None:
  coords_KX, cot_NMX, scale_X = draw(constraint, n, dtype)
  h_NMX, defect_X, grad_KX = compiled(constraint, n)(coords_KX, cot_NMX)
  assert defect_X.shape == (TOKENS,) and grad_KX.dtype == dtype
  assert np.isfinite(h_NMX).all() and np.isfinite(grad_KX).all()
  moderate, large = (max(t, LOOSER.get(constraint.name, 0)) for t in TOLERANCE[dtype])
  tolerance_X = np.where(scale_X <= 10, moderate, large)
  h_XNM = np.moveaxis(np.asarray(h_NMX), 2, 0)
  for claim, violation_X in violations(constraint, h_XNM, defect_X).items():
    factors = 2 if claim == 'closed_under_product' else 1  # errors of the factors add up
    assert (violation_X <= factors * tolerance_X).all(), (claim, n, dtype, violation_X.max())


def check_gradient(constraint: Constraint, n: int) -> None:
  """Against central differences along a random direction per token, for every scale.

  Their error is step^2 = 1e-10 times a third derivative, and rounding, 1e-16 / step. Maps that are only
  piecewise smooth (birkhoff_transport) may have a kink within a step of one token in 20: there the
  difference on the smooth side counts, whose error is the step times a second derivative.
  """
  if constraint.num_coordinates(n) == 0:
    return
  coords_KX, cot_NMX, _ = draw(constraint, n)
  direction_KX = np.random.default_rng(1).normal(size=coords_KX.shape)
  step = 1e-5
  values = []
  for sign in (1, 0, -1):
    h_NMX, _, grad_KX = compiled(constraint, n)(coords_KX + sign * step * direction_KX, cot_NMX)
    values.append((np.asarray(h_NMX) * cot_NMX).sum((0, 1)))
    if sign == 0:
      actual_X = (np.asarray(grad_KX) * direction_KX).sum(0)
  up_X, here_X, down_X = values
  smooth_X = np.isclose(actual_X, (up_X - down_X) / (2 * step), rtol=1e-5, atol=1e-7)
  one_side_X = [
    np.isclose(actual_X, d_X / step, rtol=1e-3, atol=1e-4) for d_X in (up_X - here_X, here_X - down_X)
  ]
  assert (smooth_X | one_side_X[0] | one_side_X[1]).all() and smooth_X.mean() > 0.95, n


def jacobian(constraint: Constraint, n: int, coords_K: np.ndarray):
  """H and dH (n * n, K) at one point: each token asks for the gradient of one entry."""
  unit_RX = np.zeros((n * n, TOKENS))
  np.fill_diagonal(unit_RX, 1)
  coords_KX = np.repeat(np.asarray(coords_K, np.float64)[:, None], TOKENS, 1)
  h_NMX, _, grad_KX = compiled(constraint, n)(coords_KX, unit_RX.reshape(n, n, TOKENS))
  return np.asarray(h_NMX)[..., 0], np.asarray(grad_KX)[:, : n * n].T


def check_dimension(constraint: Constraint, n: int) -> None:
  """The map's rank at a random point is the dimension of the set."""
  coords_K = np.random.default_rng(2).normal(size=constraint.num_coordinates(n))
  d_h_RK = jacobian(constraint, n, coords_K)[1]
  rank = np.linalg.matrix_rank(d_h_RK, tol=1e-8) if d_h_RK.size else 0
  assert rank == constraint.dimension(n), (n, rank)


def flat_by_symmetry(constraint: Constraint, n: int) -> np.ndarray:
  """Coordinates whose derivative at identity() vanishes for a reason.

  birkhoff_orthostochastic: A's entries within a stream's own s x s block turn that block in itself, and
  block norms do not see it to first order.
  """
  if constraint.name != 'birkhoff_orthostochastic':
    return np.zeros(constraint.num_coordinates(n), bool)
  s = constraint.params['s']
  rows, columns = np.triu_indices(n * s, 1)
  return rows // s == columns // s


def orbits(constraint: Constraint, n: int, d_h_RK: np.ndarray) -> np.ndarray:
  """A label for each coordinate, the same for equivalent ones: those that other names of the streams swap.

  Permutations are equivalent where their cycle types are equal; elsewhere coordinates whose slopes have the
  same magnitudes.
  """
  if constraint.name == 'birkhoff_permutations':
    return cycle_types(permutation_matrices(n, constraint.params['count']))
  sizes = constraint.params.get('factors') or prime_factors(n)
  if constraint.name == 'birkhoff_kronecker' and max(sizes) <= LARGEST:
    types = [cycle_types(permutation_matrices(size)) for size in sizes]
    return np.concatenate([100 * position + t for position, t in enumerate(types)])
  return np.unique(np.round(np.sort(np.abs(d_h_RK), 0), 9), axis=1, return_inverse=True)[1]


def check_start(constraint: Constraint, n: int) -> None:
  """At mixing 0.01 near I, with that off-diagonal mass; finite for others."""
  coords_K = constraint.identity(n, 0.01)
  assert coords_K.shape == (constraint.num_coordinates(n),)
  assert np.array_equal(coords_K, constraint.identity(n))
  for mixing in (0.0, 0.3):
    assert np.isfinite(constraint.identity(n, mixing)).all()
  if constraint.dimension(n) == 0:
    return
  h_NM, _ = jacobian(constraint, n, coords_K)
  assert np.abs(h_NM - np.eye(n)).max() <= 0.05
  off_diagonal = np.abs(h_NM - np.diag(np.diag(h_NM))).sum(1).mean()
  if constraint.name == 'diagonal':  # has none: as much is lost instead
    off_diagonal += 1 - np.diag(h_NM).mean()
  assert n == 1 or 0.009 <= off_diagonal <= 0.015, (n, off_diagonal)


def check_slopes(constraint: Constraint, n: int) -> None:
  """Near I every coordinate, or all equivalent ones together, moves an entry of H by 1e-3 and more."""
  if constraint.dimension(n) == 0:
    return
  _, d_h_RK = jacobian(constraint, n, constraint.identity(n, 0.01))
  orbit_K = orbits(constraint, n, d_h_RK)
  for k in np.flatnonzero(~flat_by_symmetry(constraint, n)):
    together_R = d_h_RK[:, orbit_K == orbit_K[k]].sum(1)
    moved = max(np.abs(d_h_RK[:, k]).max(), np.abs(together_R).max())
    assert moved >= 1e-3, (n, k, moved)


def check_low_precision(constraint: Constraint, n: int) -> None:
  """bfloat16 input is computed in float32; any shape of tokens."""
  coords_KX = draw(constraint, n, 'float32')[0]
  low_KX = jnp.asarray(coords_KX.reshape(-1, 8, TOKENS // 8), jnp.bfloat16)
  evaluate = compiled(constraint, n)
  h_NMX, defect_X, grad_KX = evaluate(low_KX, jnp.ones((n, n, *low_KX.shape[1:]), jnp.float32))
  assert grad_KX.dtype == jnp.bfloat16 and defect_X.shape == low_KX.shape[1:]
  rounded_KX = np.asarray(low_KX, np.float32).reshape(coords_KX.shape)
  expected = evaluate(rounded_KX, np.ones((n, n, TOKENS), np.float32))[0]
  np.testing.assert_allclose(np.asarray(h_NMX).reshape(n, n, -1), expected, atol=1e-5)


def check_kernel(constraint: Constraint, n: int) -> None:
  """What its kernel computes with tokens in lanes, and the kernel of its vjp, in float32."""
  coords_KX, cot_NMX, _ = draw(constraint, n, 'float32')
  h_NMX, _, grad_KX = compiled(constraint, n)(coords_KX, cot_NMX)
  run = value_and_pull(lambda coords_K: constraint.matrix(coords_K, n))
  for actual, expected in zip(eager_lanes(run, coords_KX, cot_NMX), (h_NMX, grad_KX), strict=True):
    assert actual.shape == expected.shape and actual.dtype == np.float32
    assert not actual.size or np.abs(actual - expected).max() <= KERNEL * np.abs(expected).max()


def check_defect(constraint: Constraint, n: int) -> None:
  """A random change of 0.1 leaves the set, and the defect says so."""
  if constraint.dimension(n) == n * n:
    return
  h_NMX = np.asarray(compiled(constraint, n)(*draw(constraint, n)[:2])[0])
  outside_NMX = h_NMX + 0.1 * np.random.default_rng(3).normal(size=h_NMX.shape)
  assert np.asarray(compiled_defect(constraint)(outside_NMX)).max() > 1e-2


def check_counts(constraint: Constraint, n: int) -> None:
  assert 0 <= constraint.dimension(n) <= constraint.num_coordinates(n)
  assert isinstance(constraint.flops(n), int) and constraint.flops(n) >= 0


# Everything a Constraint promises (base.py).
CHECKS = {
  'counts': check_counts,
  'claims': functools.partial(check_claims, dtype='float64'),
  'gradient': check_gradient,
  'dimension': check_dimension,
  'start': check_start,
  'slopes': check_slopes,
  'defect': check_defect,
  'float32': functools.partial(check_claims, dtype='float32'),
  'low precision': check_low_precision,
  'kernel': check_kernel,
}
ONLY_AT_4 = ('float32', 'low precision', 'kernel')


def check(constraint: Constraint, n: int) -> None:
  """All checks, at n streams."""
  for name, check_one in CHECKS.items():
    if n == 4 or name not in ONLY_AT_4:
      check_one(constraint, n)


@functools.cache
def default(name: str) -> Constraint:
  return CONSTRAINTS[name]()


@pytest.mark.parametrize('n', STREAMS)
@pytest.mark.parametrize('name', CONSTRAINTS)
def test_conforms(x64, name, n):
  constraint = default(name)
  assert constraint.name == name
  if (name, n) in UNDEFINED:
    with pytest.raises(ValueError, match=f'n = {n}'):
      constraint.num_coordinates(n)
    return
  if name in TRUE:
    claims, dimension = TRUE[name]
    assert constraint.properties == claims and constraint.dimension(n) == dimension(n)
  check(constraint, n)


def test_every_published_set_is_there():
  assert set(TRUE) <= set(CONSTRAINTS)


@pytest.mark.parametrize('name', VARIANTS)
def test_variant_conforms(x64, name):
  n, constraint, claims, dimension = VARIANTS[name]
  assert constraint.properties == claims and constraint.dimension(n) == dimension
  check(constraint, n)
