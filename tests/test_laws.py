"""Laws by their terms, pinned and tied parameters, the Huber loss in nats: exact points give them back."""

import dataclasses

import numpy as np
import pytest
from test_fit import CHINCHILLA, COMPUTE, TRUE, chinchilla_loss, grid, noisy_points, points_nd

from analysis.fitting.estimate import fit
from analysis.fitting.formula import parse_law
from analysis.fitting.intervals import band, delta_method
from analysis.fitting.laws import LAWS
from mhc_jax.errors import ConfigError


def test_what_is_pinned_stays_and_the_rest_is_found():
  """Exact points of a law give back what is not pinned, whichever parameters are."""
  n, d = grid()
  points = points_nd(n, d, chinchilla_loss(n, d))
  for names in (
    ('E',),
    ('A',),
    ('beta',),
    ('E', 'alpha'),
    ('A', 'B'),
    ('A', 'alpha'),
    ('E', 'A', 'B', 'alpha'),
  ):
    law = CHINCHILLA
    for name in names:
      law = law.pin(name, TRUE[name])
    for loss in ('huber', 'mse'):
      fitted = fit(points, law, loss=loss)
      assert fitted.parameters == pytest.approx(TRUE, rel=2e-3), (names, loss)
      assert set(delta_method(fitted)) == (set(TRUE) - set(names)) | {'a'}
      assert len(fitted.theta_P) == 5 - len(names) and not fitted.flags, (names, loss)
      assert fitted.starts_at_optimum == fitted.starts, (names, loss)
      np.testing.assert_allclose(band(fitted, points).loss, points.loss, rtol=1e-4)
  pure = points_nd(n, d, 400 * n**-0.3)
  nothing = fit(pure, LAWS['params'].pin('E', 0.0))
  assert nothing.parameters['alpha'] == pytest.approx(0.3, rel=1e-6) and not nothing.boundaries


def test_a_pinned_constant_narrows_the_rest():
  """The wrong constant bends the exponents; the right one halves their intervals at least."""
  points = noisy_points(0.003)
  free, right, wrong = (
    fit(points, law) for law in (CHINCHILLA, *(CHINCHILLA.pin('E', e) for e in (1.8172, 2)))
  )
  width = [np.diff(delta_method(f)['alpha'])[0] for f in (free, right)]
  assert width[1] < 0.5 * width[0]
  assert (
    wrong.objective > 3 * right.objective and wrong.parameters['alpha'] > right.parameters['alpha'] + 0.05
  )


def test_tied_exponents_are_one_parameter():
  n, d = grid()
  points = points_nd(n, d, 1.9 + 300 * n**-0.33 + 900 * d**-0.33)
  tied = fit(points, CHINCHILLA.tie('alpha', 'beta'))
  assert tied.parameters == pytest.approx({'E': 1.9, 'A': 300, 'B': 900, 'alpha': 0.33}, rel=2e-3)
  assert tied.law.formula.endswith(', beta = alpha') and tied.degrees_of_freedom == len(n) - 4
  both = fit(points, CHINCHILLA.tie('beta', 'alpha').pin('beta', 0.33))
  assert both.parameters['B'] == pytest.approx(900, rel=2e-3)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (lambda: CHINCHILLA.tie('alpha', 'gamma'), 'the exponents are alpha, beta'),
    (lambda: CHINCHILLA.pin('gamma', 1.0), 'the parameters are E, A, B, alpha, beta'),
    (lambda: CHINCHILLA.pin('alpha', 0.0), 'alpha must be positive'),
    (lambda: COMPUTE.pin('E', 1.0).pin('A', 1.0).pin('alpha', 1.0), 'nothing is left'),
  ],
)
def test_what_cannot_be_pinned_or_tied(change, words):
  with pytest.raises(ConfigError, match=words):
    change()


def test_huber_of_the_raw_loss():
  """An optimum of sum huber(L_hat - L) in nats: no neighbours are better, outliers are shed."""
  points = noisy_points(0.002)
  loss = points.loss.copy()
  loss[7] += 0.5
  raw = fit(dataclasses.replace(points, loss=loss), CHINCHILLA, loss='huber_raw')

  def total(v):
    r = v['E'] + v['A'] * np.exp(points.log_x['N']) ** -v['alpha'] - loss
    r = np.abs(r + v['B'] * np.exp(points.log_x['D']) ** -v['beta'])
    return np.sum(np.where(r < 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)))

  assert raw.objective == pytest.approx(total(raw.parameters), rel=1e-9)
  for name in TRUE:
    for factor in (0.999, 1.001):
      assert total(raw.parameters | {name: raw.parameters[name] * factor}) > raw.objective
  squares = fit(dataclasses.replace(points, loss=loss), CHINCHILLA, loss='mse')
  errors = [abs(f.parameters['alpha'] - TRUE['alpha']) for f in (raw, squares)]
  assert errors[0] < 0.5 * errors[1]


def test_a_law_is_given_by_its_terms():
  assert parse_law('E + A*N^-alpha + B*D^-beta').terms == CHINCHILLA.terms
  assert parse_law('L = E + A / N**alpha + B D^-beta').terms == CHINCHILLA.terms
  assert parse_law('E + A*C^-alpha').terms == COMPUTE.terms
  assert parse_law(LAWS['width_depth_params'].formula).terms == LAWS['width_depth_params'].terms
  over = parse_law('E + A*(C/M)^-eta + B*(C*M)^-eta')
  assert over.terms == LAWS['overtraining'].terms
  product = parse_law('K*(N*D^0.5)^-kappa')
  assert product.terms[0].covariates == (('N', 1.0), ('D', 0.5)) and product.terms[0].share == 0.75
  n, d = grid()
  points = points_nd(n, d, 70 * (n * d**0.5) ** -0.1)
  assert fit(points, product).parameters == pytest.approx({'E': 0.0, 'K': 70, 'kappa': 0.1}, rel=1e-6)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('E', 'without a power term'),
    ('E + A*N', r'not \^-exponent at .its end'),
    ('E + A*N^alpha', 'not - before the exponent'),
    ('E + A*N^-0.3', 'hold it by --pin'),
    ('1.7 + A*N^-alpha', 'hold it by --pin'),
    ('E + A*X^-alpha', 'not a covariate'),
    ('E + A*N^-alpha*D^-beta', 'one exponent to a term'),
    ('E + A*N^-alpha + A*D^-beta', 'A has two meanings'),
    ('E + F + A*N^-alpha', 'called E'),
    ('E + A*N^-alpha +', 'not a constant or a coefficient'),
    ('E + A*(N*D^-alpha', 'not a number'),
    ("E + __import__('os')", 'at "\'"'),
    ('E + A*N^-alpha)', 'one exponent'),
  ],
)
def test_other_text_is_no_law(text, words):
  with pytest.raises(ConfigError, match=words) as error:
    parse_law(text)
  assert '\n' not in str(error.value)
