"""Intervals for a fit: delta method, case bootstrap, clustered bootstrap; bands for predictions.

Where: after estimate.py; used by compare.py and the report.

Which is quoted (`preferred`; coverage.py measures it): below 40 groups of runs with noise of their own
(noise.py) the delta method with Student's t; from 40 on the bootstrap over them. Below 40 groups CAVEAT goes
with every number.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats
from tqdm import tqdm

from .estimate import Fit
from .laws import Design, Parameter, Points, design, log_loss, natural, natural_map
from .noise import covariance, variances
from .solve import descend, residuals, score

LEVEL = 0.95
FEW = 40
BOOTSTRAP_TOLERANCE = (
  2e-2  # of the whitened gradient: 2e-4 of a half residual of the width, nothing to sampling
)
CAVEAT = (
  f'fewer than {FEW} runs or groups of runs that share noise: intervals are approximate (simulated '
  'coverage of nominal 95 %, mhc coverage: 91 to 99 %)'
)


@dataclasses.dataclass(frozen=True)
class Resamples:
  """Bootstrap replicates: theta (B, P), how many draws were redrawn, and what was resampled."""

  theta_BP: np.ndarray
  redrawn: int
  unit: str


def groups(fit: Fit) -> int:
  """Number of groups of runs with noise of their own: the coarsest that the data show, or single runs."""
  return fit.noise.strata[0].groups


def coverage_caveat(fit: Fit) -> str | None:
  """The warning that belongs to intervals from few independent runs, or None."""
  return CAVEAT if groups(fit) < FEW else None


def preferred(fit: Fit, available: tuple[str, ...]) -> str:
  """Name of the interval method to quote among those computed."""
  name = 'case_bootstrap' if groups(fit) == len(fit.points) else 'cluster_bootstrap'
  return name if groups(fit) >= FEW and name in available else 'delta'


def correlation(fit: Fit) -> np.ndarray:
  """Correlation of the fitted parameters (P, P); 0 where a run does not see one."""
  covariance_PP = covariance(fit.noise, np.eye(len(fit.theta_P)))
  error_P = np.sqrt(np.maximum(np.diag(covariance_PP), 1e-300))
  return covariance_PP / np.outer(error_P, error_P)


def influence(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
  """One-step leave-one-out shifts in standard errors (R, P), and Cook's distances (R,)."""
  n, p = fit.noise, fit.problem
  leverage_R = n.slope_R * np.einsum('rp,pq,rq->r', n.jac_RP, n.inverse_PP, n.jac_RP)
  step_R = score(residuals(fit.theta_P, p)[0], p) / np.maximum(1 - leverage_R, 1e-6)
  shift_RP = (n.jac_RP * step_R[:, None]) @ n.inverse_PP
  covariance_PP = covariance(n, np.eye(len(fit.theta_P)))
  precision_PP = np.linalg.pinv(covariance_PP, rcond=1e-13, hermitian=True)
  cook_R = np.einsum('rp,pq,rq->r', shift_RP, precision_PP, shift_RP) / len(fit.theta_P)
  return shift_RP / np.sqrt(np.maximum(np.diag(covariance_PP), 1e-300)), cook_R


def derived(fit: Fit, theta_P: np.ndarray) -> dict[str, float]:
  """Quantities that follow from the exponents: a = beta/(alpha+beta), N*(C) ~ C^a."""
  value = natural(theta_P, fit.design)
  if fit.law.name == 'chinchilla' and 'alpha' in value and 'beta' in value:
    return {'a': value['beta'] / (value['alpha'] + value['beta'])}
  return {}


def delta_method(fit: Fit, level: float = LEVEL) -> dict[str, list[float]]:
  """Delta-method intervals with Student's t, on the log scale for E, coefficients and multipliers.

  E cannot lie above what runs have reached: its interval ends two standard deviations above the smallest
  loss.
  """
  parameters, map_ = natural_map(fit.design)
  centre = map_ @ fit.theta_P
  extra = derived(fit, fit.theta_P)
  gradients = [
    _gradient(lambda theta_P, name=name: derived(fit, theta_P)[name], fit.theta_P) for name in extra
  ]
  variance, freedom = variances(fit.noise, np.vstack([map_, *gradients]))
  half = stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt(variance)
  out = {}
  with np.errstate(over='ignore'):  # an unidentified coefficient: its upper end is inf
    shown = [*parameters, *(Parameter('derived', name) for name in extra)]
    for p, c, h in zip(shown, [*centre, *extra.values()], half, strict=True):
      out[p.label] = [float(np.exp(v) if p.in_log else v) for v in (c - h, c + h)]
      if p.kind == 'constant':
        reached = float(fit.points.loss.min() * np.exp(2 * np.sqrt(residual_variance(fit))))
        out[p.label][1] = max(min(out[p.label][1], reached), float(np.exp(c)))
  return out


def _gradient(function: Callable[[np.ndarray], float], theta_P: np.ndarray) -> np.ndarray:
  """Central differences; 1e-5 balances truncation and rounding for parameters of order one."""
  steps_PP = 1e-5 * np.eye(len(theta_P))
  return np.array([(function(theta_P + s) - function(theta_P - s)) / 2e-5 for s in steps_PP])


def bootstrap(
  fit: Fit,
  resamples: int = 1000,
  clustered: bool = False,
  seed: int = 0,
  progress: bool = False,
) -> Resamples:
  """Refits resampled runs from the optimum; `clustered` draws whole groups of the coarsest stratum of noise.

  Runs are drawn within each arm, so no resample loses an arm. A draw with fewer distinct runs than
  parameters, or that leaves a multiplier without runs, is drawn again and counted.
  """
  rng = np.random.default_rng(seed)
  p, n = fit.problem, len(fit.points)
  arm_R = np.unique(fit.points.arm, return_inverse=True)[1]
  label_R = fit.noise.label_R
  theta_BP, redrawn = np.empty((resamples, len(fit.theta_P))), 0
  used_RP = residuals(fit.theta_P, p)[1] != 0
  for b in tqdm(range(resamples), 'bootstrap', disable=None if progress else True, leave=False):
    for _ in range(100):
      if clustered:
        groups = rng.integers(0, label_R.max() + 1, label_R.max() + 1)
        count_R = np.bincount(groups, minlength=label_R.max() + 1)[label_R].astype(float)
      else:
        count_R = np.zeros(n)
        for arm in range(arm_R.max() + 1):
          rows = np.flatnonzero(arm_R == arm)
          np.add.at(count_R, rng.choice(rows, len(rows)), 1)
      present = count_R > 0
      if present.sum() >= len(fit.theta_P) and used_RP[present].any(0).all():
        break
      redrawn += 1
    theta_BP[b], _ = descend(fit.theta_P, dataclasses.replace(p, count_R=count_R), BOOTSTRAP_TOLERANCE)
  return Resamples(theta_BP, redrawn, 'clusters' if clustered else 'runs')


def percentile(fit: Fit, sample: Resamples, level: float = LEVEL) -> dict[str, list[float]]:
  """Percentile intervals of the natural and derived parameters."""
  rows = [natural(t, fit.design) | derived(fit, t) for t in sample.theta_BP]
  ends = 100 * np.array([0.5 - level / 2, 0.5 + level / 2])
  return {name: [float(v) for v in np.percentile([row[name] for row in rows], ends)] for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class Band:
  """Predicted loss with the band of the curve and the wider band of a new run, nats per token."""

  loss: np.ndarray
  low: np.ndarray
  high: np.ndarray
  new_low: np.ndarray
  new_high: np.ndarray


def predicted(fit: Fit, at: Points) -> np.ndarray:
  """The law's loss at points, nats per token."""
  return np.exp(log_loss(fit.theta_P, at_points(fit, at))[0])


def at_points(fit: Fit, at: Points) -> Design:
  """The fit's design at other points, of all or some of its arms."""
  return _aligned(design(fit.law, at, fit.design.arms, fit.design.centre_J), fit.design.parameters)


def band(fit: Fit, at: Points, level: float = LEVEL) -> Band:
  """Prediction at new points: curve uncertainty (delta method), and with one run's noise added.

  A new run is as noisy as the points' sigma says, or as the typical run where they have none.
  """
  log_R, jac_RP = log_loss(fit.theta_P, at_points(fit, at))
  variance_R, freedom_R = variances(fit.noise, jac_RP)
  quantile_R = stats.t.ppf(0.5 + level / 2, freedom_R)
  half_R = quantile_R * np.sqrt(variance_R)
  wide_R = quantile_R * np.sqrt(variance_R + new_run_variance(fit, at))
  ends = (log_R, log_R - half_R, log_R + half_R, log_R - wide_R, log_R + wide_R)
  with np.errstate(over='ignore'):  # a curve that the runs do not tell: its upper end is inf
    return Band(*(np.exp(v) for v in ends))


def new_run_variance(fit: Fit, at: Points) -> float | np.ndarray:
  """Variance of the noise of new runs: their sigma squared, rescaled if the fitted runs have sigmas, too.

  Without sigmas the residual variance.
  """
  if at.sigma is None:
    return residual_variance(fit)
  if fit.points.sigma is None:
    return at.sigma**2
  standard_R = (log_loss(fit.theta_P, fit.design)[0] - np.log(fit.points.loss)) / fit.points.sigma
  return at.sigma**2 * float(standard_R @ standard_R) / max(fit.degrees_of_freedom, 1)


def residual_variance(fit: Fit) -> float:
  """Variance of log loss of the typical run about the fit: of median sigma, where runs have one."""
  log_R, _ = log_loss(fit.theta_P, fit.design)
  residual_R = log_R - np.log(fit.points.loss)
  if fit.points.sigma is not None:
    residual_R = residual_R * np.median(fit.points.sigma) / fit.points.sigma
  return float(residual_R @ residual_R) / max(fit.degrees_of_freedom, 1)


def _aligned(d: Design, parameters: tuple[Parameter, ...]) -> Design:
  """A design over a subset of the arms, its parameters put in the order of the full fit."""
  position = [parameters.index(parameter) for parameter in d.parameters]

  def spread(matrix: np.ndarray) -> np.ndarray:
    out = np.zeros((*matrix.shape[:-1], len(parameters)))
    out[..., position] = matrix
    return out

  return dataclasses.replace(
    d,
    parameters=parameters,
    e_RP=spread(d.e_RP),
    a_JRP=spread(d.a_JRP),
    x_JRP=spread(d.x_JRP),
    m_JRP=spread(d.m_JRP),
  )
