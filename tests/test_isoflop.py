"""Which law a grid can carry; minima of IsoFLOP curves and of learning-rate curves."""

import numpy as np
import pytest
from test_fit import CHINCHILLA, COMPUTE, TRUE, chinchilla_loss, noisy_points, points_nd

from analysis.fitting.identify import choose_law
from analysis.minima import best_learning_rate, minima_by_budget, minimum, power_law


def test_choice_of_law():
  assert choose_law(noisy_points(0.0)).law is CHINCHILLA
  n = np.geomspace(1e5, 1e7, 6)
  path = points_nd(n, 20 * n, chinchilla_loss(n, 20 * n))
  assert choose_law(path).law is COMPUTE and 'cannot be told apart' in choose_law(path).reason
  assert 'same number of tokens' in choose_law(points_nd(n, np.full(6, 1e8), n)).reason
  assert choose_law(path.take(np.arange(3))).law is None
  narrow = points_nd(n[:1] * np.linspace(1, 1.5, 5), np.full(5, 1e8), np.ones(5))
  assert 'factor of 1.5' in choose_law(narrow).reason


def test_the_band_of_a_power_law_covers():
  """Curve, exponent and coefficient of 5 optima with log-normal noise: nominal 95 %, 400 draws."""
  rng, log_c, hits = np.random.default_rng(0), np.log(np.geomspace(1e18, 1e20, 5)), []
  for _ in range(400):
    line = power_law(log_c, np.log(0.1) + 0.5 * log_c + 0.05 * rng.standard_normal(5))
    _, low, high = line.at(np.log(1e22))
    far = low < np.log(0.1) + 0.5 * np.log(1e22) < high
    _, low, high = line.at(log_c.mean())
    middle = low < np.log(0.1) + 0.5 * log_c.mean() < high
    hits.append((far, middle, line.low < 0.5 < line.high, line.coefficient_low < 0.1 < line.coefficient_high))
  # Three standard errors of 400 draws: 3.3 %.
  np.testing.assert_allclose(np.mean(hits, 0), 0.95, atol=0.033)
  two = power_law(log_c[:2], 0.5 * log_c[:2])
  assert two.low is None and two.coefficient_high is None and two.at(50.0)[1:] == (None, None)
  assert two.at(50.0)[0] == pytest.approx(25)


def test_compute_without_gaps_is_no_budget():
  log_c = np.linspace(40, 42, 60)
  ((_, m),) = minima_by_budget(log_c, np.tile([1.0, 2, 3], 20), np.tile([3.0, 2, 3], 20))
  assert m.log_x is None and 'not one budget' in m.problem


def test_isoflop_minima_and_their_guards():
  budgets = np.geomspace(1e18, 1e21, 4)
  share = np.geomspace(0.25, 4, 7)
  rows = [(c, n) for c in budgets for n in 0.1 * c**0.49 * share]
  c, n = (np.array(v) for v in zip(*rows, strict=True))
  loss = chinchilla_loss(n, c / (6 * n))
  a = TRUE['beta'] / (TRUE['alpha'] + TRUE['beta'])
  for method in ('parabola', 'akima'):
    found = [(b, m.log_x) for b, m in minima_by_budget(np.log(c), np.log(n), loss, method) if not m.problem]
    line = power_law(*np.array(found).T)
    # alpha != beta biases both slightly (2603.22339).
    assert len(found) == 4 and line.exponent == pytest.approx(a, abs=0.02)
  x = np.linspace(0, 1, 6)
  loss = 2 + 3 * (x - 0.4) ** 2  # a parabola of the loss itself
  exact, near = (minimum(x, loss, in_nats=flag) for flag in (True, False))
  assert exact.log_x == pytest.approx(0.4, abs=1e-12) and exact.loss == pytest.approx(2, rel=1e-12)
  assert 1e-3 < abs(near.log_x - 0.4) < 0.05
  assert minimum(x, loss, 'akima', True).loss == pytest.approx(2, abs=3 * 0.02**2)  # 25 points to a gap
  assert 'downwards' in minimum(x, np.exp(-((x - 0.5) ** 2))).problem
  assert 'outside' in minimum(x, np.exp((x - 2) ** 2)).problem
  assert 'edge' in minimum(x, np.exp(x), 'akima').problem
  assert 'points' in minimum(x[:2], x[:2] + 1).problem
  rate = np.geomspace(1e-4, 1e-2, 5)
  best = best_learning_rate(rate, 2 + 0.1 * np.log(rate / 2e-3) ** 2)
  assert np.exp(best.log_x) == pytest.approx(2e-3, rel=0.05)
  assert best_learning_rate(rate, np.array([5, 4, 3, 2, np.nan])).log_x is None
