"""The maps themselves against formulas in plain numpy, and birkhoff_dual against converged Sinkhorn."""

import argparse
import functools

import jax
import numpy as np
import pytest
import scipy.linalg
import scipy.special

from experiments.bench import constraints as bench_constraints
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.birkhoff_dual import birkhoff_dual
from mhc_jax.constraints.birkhoff_kronecker import birkhoff_kronecker
from mhc_jax.constraints.birkhoff_orthostochastic import birkhoff_orthostochastic
from mhc_jax.constraints.birkhoff_permutations import (
  birkhoff_permutations,
  cycle_types,
  permutation_matrices,
)
from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn
from mhc_jax.constraints.birkhoff_transport import birkhoff_transport
from mhc_jax.constraints.circulant import circulant
from mhc_jax.constraints.orthogonal import orthogonal_cayley, orthogonal_quaternion
from mhc_jax.constraints.spectral_sphere import spectral_sphere

COMPILER = {'xla_backend_optimization_level': 0}  # compiles twice as fast, same arithmetic


def matrices(constraint, coords_KX, n):
  """(tokens, n, n) float64."""
  h_NMX = jax.jit(lambda c: constraint.matrix(c, n), compiler_options=COMPILER)(coords_KX)
  return np.moveaxis(np.asarray(h_NMX), 2, 0)


def skewed(coords_K, n):
  a_NM = np.zeros((n, n))
  a_NM[np.triu_indices(n, 1)] = coords_K
  return a_NM - a_NM.T


def rotation(coords_K, n):
  a_NM, eye_NM = skewed(coords_K, n), np.eye(n)
  return (eye_NM - a_NM) @ np.linalg.inv(eye_NM + a_NM)


def squared_blocks(coords_K, n, s=2):
  q_NM = rotation(coords_K, n * s)
  norms = [[np.linalg.norm(q_NM[i * s : i * s + s, j * s : j * s + s]) for j in range(n)] for i in range(n)]
  return np.array(norms) ** 2 / s


def kronecker(coords_K, _):
  """12 = 3 x 4: the first factor is the slow index."""
  three, four = np.split(coords_K, [6])
  mixture = birkhoff_permutations().matrix
  return np.kron(*(np.asarray(mixture(c[:, None], n))[..., 0] for c, n in ((three, 3), (four, 4))))


def kronecker_of_a_large_factor(coords_K, _):
  """14 = 2 x 7: [[p, 1 - p], [1 - p, p]], and converged Sinkhorn iterations."""
  p, m_NM = scipy.special.expit(coords_K[0] - coords_K[1]), np.exp(coords_K[2:].reshape(7, 7))
  for axis in (0, 1) * 3000:
    m_NM = m_NM / m_NM.sum(axis, keepdims=True)
  return np.kron([[p, 1 - p], [1 - p, p]], m_NM)


def transport(coords_K, n):
  """The general rule with all three lower bounds, margins as sums."""
  t_NM, x_NM = coords_K.reshape(n - 1, n - 1), np.zeros((n, n))
  for i, j in np.ndindex(n - 1, n - 1):
    row_left, column_left = 1 - x_NM[i].sum(), 1 - x_NM[:, j].sum()
    later = sum(1 - x_NM[:, k].sum() for k in range(j + 1, n))
    lower, upper = max(0, row_left - later, column_left - (n - 1 - i)), min(row_left, column_left)
    x_NM[i, j] = lower + (upper - lower) * scipy.special.expit(t_NM[i, j])
    if j == n - 2:
      x_NM[i, -1] = 1 - x_NM[i].sum()
  x_NM[-1] = 1 - x_NM.sum(0)
  return x_NM


def shifts(coords_K, n, gamma=0.3):
  p_K = scipy.special.softmax(coords_K)
  mixed = sum(p * np.roll(np.eye(n), k, 1) for k, p in enumerate(p_K))
  return (1 - gamma) * np.eye(n) + gamma * mixed


def quaternion_rotation(coords_K, _):
  """Column k is q e_k conj(r), multiplied by Hamilton's rules."""

  def times(a, b):
    scalar = a[0] * b[0] - a[1:] @ b[1:]
    return np.r_[scalar, a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])]

  q, r = (v / np.linalg.norm(v) for v in np.split(coords_K + np.tile([1, 0, 0, 0], 2), 2))
  return np.stack([times(times(q, e), r * [1, -1, -1, -1]) for e in np.eye(4)], 1)


def sphere(coords_K, n, gamma=1.0):
  bounded, turns = np.tanh(coords_K), (n - 1) * (n - 2) // 2
  u, v = (rotation(gamma * c, n - 1) for c in np.split(bounded[: 2 * turns], 2))
  z_NK = scipy.linalg.helmert(n).T
  return np.full((n, n), 1 / n) + z_NK @ u @ np.diag(bounded[2 * turns :]) @ v.T @ z_NK.T


FORMULAS = {
  'orthogonal_cayley': (orthogonal_cayley, 5, rotation),
  'orthogonal_quaternion': (orthogonal_quaternion, 4, quaternion_rotation),
  'orthostochastic': (birkhoff_orthostochastic, 3, squared_blocks),
  'kronecker': (functools.partial(birkhoff_kronecker, (3, 4)), 12, kronecker),
  'kronecker of a large factor': (birkhoff_kronecker, 14, kronecker_of_a_large_factor),
  'transport': (birkhoff_transport, 4, transport),
  'circulant': (functools.partial(circulant, 0.3), 4, shifts),
  'spectral_sphere': (spectral_sphere, 4, sphere),
}


@pytest.mark.parametrize('name', FORMULAS)
def test_equals_formula(x64, rng, name):
  factory, n, formula = FORMULAS[name]
  constraint = factory()
  coords_KX = 2 * rng.normal(size=(constraint.num_coordinates(n), 5))
  expected_XNM = np.stack([formula(coords_K, n) for coords_K in coords_KX.T])
  np.testing.assert_allclose(matrices(constraint, coords_KX, n), expected_XNM, atol=1e-11)


@pytest.mark.parametrize('n', (2, 4, 9))  # 9: the elimination in loops
def test_dual_is_the_limit_of_sinkhorn(x64, rng, n):
  """Value, and gradient against autodiff through iterations that have converged."""
  logits_KX, cot_NMX = 1.5 * rng.normal(size=(n * n, 5)), rng.normal(size=(n, n, 5))

  def value_and_gradient(constraint):
    def evaluate(logits_KX):
      h_NMX, pull = jax.vjp(lambda c: constraint.matrix(c, n), logits_KX)
      return h_NMX, pull(cot_NMX)[0]

    return jax.jit(evaluate, compiler_options=COMPILER)(logits_KX)

  pairs = zip(*map(value_and_gradient, (birkhoff_dual(), birkhoff_sinkhorn(3000))), strict=True)
  for actual, expected in pairs:
    np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize('n', (3, 4, 8, 16))
def test_dual_in_float32_leaves_no_defect(rng, n):
  """<= 1e-6 up to logit std 10; the same at 100, where 20 Sinkhorn iterations are off by 1 and more."""
  logits_KX = rng.normal(size=(n * n, 16384 // n))
  constraint = birkhoff_dual()
  evaluate = jax.jit(lambda c: constraint.defect(constraint.matrix(c, n)), compiler_options=COMPILER)
  for std in (1, 3, 10, 100):
    assert evaluate((std * logits_KX).astype(np.float32)).max() <= 1e-6


def test_dual_returns_whatever_it_is_given(rng):
  """Infinite and NaN logits spoil their own token only, unless it is the first (base.materialise)."""
  logits_KX = (3 * rng.normal(size=(16, 64))).astype(np.float32)
  clean = matrices(birkhoff_dual(), logits_KX, 4)
  for broken in (np.inf, -np.inf, np.nan):
    logits_KX[5, 7] = broken
    h_NMX = matrices(birkhoff_dual(), logits_KX, 4)
    np.testing.assert_allclose(np.delete(h_NMX, 7, 0), np.delete(clean, 7, 0), atol=1e-6)


def test_dual_stops_where_it_is_told(rng):
  logits_KX = (10 * rng.normal(size=(9, 100))).astype(np.float32)
  one, many = (matrices(birkhoff_dual(k), logits_KX, 3).sum(1) for k in (1, 30))
  assert np.abs(one - 1).max() > 1e-2 > 1e-6 > np.abs(many - 1).max()


def test_permutations_in_lexicographic_order(x64):
  """Coordinate k alone gives permutation k: row i has its 1 in column pi_k(i)."""
  peaked_KX = 1e3 * np.eye(6)
  h_XNM = matrices(birkhoff_permutations(), peaked_KX, 3)
  expected = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
  np.testing.assert_array_equal(h_XNM.argmax(2), expected)


@pytest.mark.parametrize(
  'make, n, message',
  (
    (lambda: birkhoff_permutations(), 6, 'n = 6 has 720 permutations; set count'),
    (lambda: birkhoff_permutations(7), 3, 'count must lie between 1 and n! = 6 at n = 3, got 7'),
    (lambda: birkhoff_kronecker((2, 2)), 8, r'factors \(2, 2\) do not multiply to n = 8'),
    (lambda: orthogonal_quaternion(), 3, 'n = 4 streams only, got n = 3'),
    (lambda: birkhoff_orthostochastic(0), 4, 's must be at least 1'),
    (lambda: birkhoff_dual(0), 4, 'max_iterations must be at least 1'),
    (lambda: circulant(0.0), 4, 'gamma must lie in'),
    (lambda: spectral_sphere(-1.0), 4, 'gamma must be positive'),
  ),
)
def test_undefined_sizes_and_parameters_are_named(make, n, message):
  with pytest.raises(ValueError, match=message):
    make().num_coordinates(n)


def test_parameters_tell_constraints_apart():
  """Name and parameters enter a run's id; equal ones are equal."""
  assert birkhoff_permutations(3) == birkhoff_permutations(3) != birkhoff_permutations(4)
  assert len({CONSTRAINTS[name]() for name in CONSTRAINTS}) == len(CONSTRAINTS)


@pytest.mark.parametrize('n', (3, 4))
def test_mixtures_of_all_permutations_start_with_equal_weights(n):
  """Up to n = 4, where every cycle type has its share of the mass without being raised."""
  logits_K = CONSTRAINTS['birkhoff_permutations']().identity(n, 0.01)
  np.testing.assert_allclose(logits_K[1:], logits_K[1], rtol=1e-15)


def test_many_cycle_types_start_with_a_share_of_the_mass_each():
  """At n = 5 the ten transpositions would have 1/24 of it; 10 of their coordinates move a stream by 4 w."""
  p_KNM = permutation_matrices(5)
  weights_K = scipy.special.softmax(birkhoff_permutations().identity(5, 0.01))
  moved_K, types_K = 1 - np.trace(p_KNM, axis1=1, axis2=2) / 5, cycle_types(p_KNM)
  assert len(set(types_K)) == 7 and np.bincount(types_K).max() == 30
  mass_C = np.bincount(types_K, weights_K * moved_K)
  assert sorted(mass_C)[0] == 0 and sorted(mass_C)[1] == pytest.approx(0.105 * 0.01, rel=1e-9)


@pytest.mark.parametrize('gamma', (0.002, 0.01, 0.0101, 0.2))
@pytest.mark.parametrize('n', (2, 4, 8))
def test_a_leaky_circulant_starts_near_the_identity_whatever_its_gamma(x64, n, gamma):
  """Off-diagonal mass 0.01 where equal weights have more, else equal weights; no shift outweighs I."""
  constraint = circulant(gamma)
  coords_K = constraint.identity(n, 0.01)
  assert (coords_K[0] >= coords_K[1:] - 1e-12).all()
  mass = min(0.01, gamma * (n - 1) / n)
  h_NM = matrices(constraint, coords_K[:, None], n)[0]
  assert h_NM[0].sum() - h_NM[0, 0] == pytest.approx(mass, rel=1e-9)
  # dH/dc of a shift of weight w is gamma w (1 - w), and at most half of the weight lies on one shift.
  slope_NMK = jax.jit(jax.jacobian(lambda c: constraint.matrix(c, n)), compiler_options=COMPILER)(coords_K)
  assert (np.abs(slope_NMK).max((0, 1)) >= 0.5 * mass / (n - 1)).all()


def test_bench_compares_with_sinkhorn(monkeypatch):
  """Ratios to 20 Sinkhorn iterations within a round, defects by logit std, what is undefined and why."""
  names = ('birkhoff_sinkhorn', 'circulant', 'orthogonal_quaternion')
  clock = {('birkhoff_sinkhorn', 'forward'): [2.0, 8.0, 4.0], ('circulant', 'forward'): [1.0, 1.0, 1.0]}
  clock |= {(name, 'forward_backward'): [3.0, 3.0, 3.0] for name in names[:2]}

  def timed(functions, repeats, calls):
    assert (repeats, calls) == (2, 1) and functions.keys() == clock.keys()
    for function in functions.values():
      jax.block_until_ready(function())
    return clock

  monkeypatch.setattr(bench_constraints, 'CONSTRAINTS', {k: CONSTRAINTS[k] for k in names})
  monkeypatch.setattr(bench_constraints, 'interleaved', timed)
  args = argparse.Namespace(streams=3, tokens=64, repeats=2, calls=1)
  result = bench_constraints.bench_constraints(args)
  sinkhorn_, circulant_ = (result['constraints'][name] for name in names[:2])
  assert circulant_['forward']['ratio_to_sinkhorn'] == {'median': 0.25, 'min': 0.125, 'max': 0.5}
  assert circulant_['forward_backward']['ratio_to_sinkhorn'] == {'median': 1, 'min': 1, 'max': 1}
  assert sinkhorn_['forward']['seconds'] == {'median': 4, 'min': 2, 'max': 8}
  assert sinkhorn_['defect_by_std']['10'] > 0.01 > 1e-6 > circulant_['defect_by_std']['10']
  assert (circulant_['coordinates'], circulant_['dimension']) == (3, 2)
  assert 'got n = 3' in result['undefined']['orthogonal_quaternion']
