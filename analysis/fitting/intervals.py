"""Intervals for a fit: delta method, case bootstrap, clustered bootstrap; bands for predictions.

Where: after estimate.py; used by compare.py and the report.

Which is quoted (`preferred`; coverage.py measures it): below 40 clusters the delta method with
Student's t, which covers close to its nominal 95 % at 25 runs; from 40 on the bootstrap over
clusters, which needs no equal or normal noise. Below 40 clusters CAVEAT goes with every number.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats
from tqdm import tqdm

from .estimate import Fit, mean_slope, noise_covariance
from .laws import Design, Parameter, Points, design, log_loss, natural, natural_map
from .solve import descend, residuals, score

LEVEL = 0.95
FEW = 40
CAVEAT = (
  f'fewer than {FEW} runs or groups of runs of one size and seed: intervals are approximate (simulated '
  'coverage of nominal 95 %, mhc coverage: delta method 94-98 %, bootstrap 93-100 %)'
)


@dataclasses.dataclass(frozen=True)
class Resamples:
  """Bootstrap replicates: theta (B, P), how many draws were redrawn, and what was resampled."""

  theta_BP: np.ndarray
  redrawn: int
  unit: str


def clusters(points: Points) -> int:
  """Number of groups of runs that share noise."""
  return len(set(points.cluster.tolist()))


def coverage_caveat(fit: Fit) -> str | None:
  """The warning that belongs to intervals from few independent runs, or None."""
  return CAVEAT if clusters(fit.points) < FEW else None


def preferred(fit: Fit, available: tuple[str, ...]) -> str:
  """Name of the interval method to quote among those computed."""
  count = clusters(fit.points)
  name = 'case_bootstrap' if count == len(fit.points) else 'cluster_bootstrap'
  return name if count >= FEW and name in available else 'delta'


def cluster_labels(points: Points) -> np.ndarray:
  """Cluster number of every run (R,)."""
  return np.unique(points.cluster, return_inverse=True)[1]


@dataclasses.dataclass(frozen=True)
class Noise:
  """Variance of one run's (pseudo-)residual: its own part, and the part its cluster shares."""

  own: float
  shared: float
  own_freedom: float
  shared_freedom: float
  mean_cluster: float  # runs per cluster

  @property
  def correlation(self) -> float:
    """Correlation of two runs of one cluster."""
    total = self.own + self.shared
    return self.shared / total if total > 0 else 0.0


def noise(fit: Fit) -> Noise:
  """Variance components of the residuals by cluster (analysis of variance, shared part >= 0).

  Paired runs of all arms see the same data in the same order, so part of their noise is common. It
  hardly touches multipliers, which are differences within clusters, but the curve itself is known
  only from as many pieces of information as there are clusters. Degrees of freedom: those of
  within- and between-cluster residuals, less the parameters that each part determines (the trace
  of the hat matrix there). Residuals of a Huber fit enter as psi / mean(psi').
  """
  residual_R, jac_RP = residuals(fit.theta_P, fit.problem)
  n, k = jac_RP.shape
  pseudo_R = score(residual_R, fit.problem) / mean_slope(residual_R, k, fit.problem)
  total = float(pseudo_R @ pseudo_R)
  pooled = Noise(total / max(n - k, 1), 0.0, max(n - k, 1), 1.0, 1.0)
  count = clusters(fit.points)
  if count == n:
    return pooled
  label_R = cluster_labels(fit.points)
  same_RR = (label_R[:, None] == label_R[None, :]).astype(float)
  mean_RR = same_RR / same_RR.sum(1, keepdims=True)
  _, inverse_PP = noise_covariance(fit.theta_P, fit.problem)
  between_parameters = float(np.einsum('rs,sp,pq,rq->', mean_RR, jac_RP, inverse_PP, jac_RP))
  between = float(pseudo_R @ mean_RR @ pseudo_R)
  shared_freedom = max(count - between_parameters, 1.0)
  own_freedom = max(n - count - (k - between_parameters), 1.0)
  own = (total - between) / own_freedom
  shared = (between / shared_freedom - own) * count / n
  if shared <= 0:
    return pooled
  return Noise(own, shared, own_freedom, shared_freedom, n / count)


def contrast_variance(fit: Fit, rows_QP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Variance of rows @ theta and its degrees of freedom (Satterthwaite), each (Q,)."""
  e = noise(fit)
  _, jac_RP = residuals(fit.theta_P, fit.problem)
  _, inverse_PP = noise_covariance(fit.theta_P, fit.problem)
  weight_QR = rows_QP @ inverse_PP @ jac_RP.T
  alone_Q = np.einsum('qr,qr->q', weight_QR, weight_QR)
  if e.shared == 0:
    return e.own * alone_Q, np.full(len(rows_QP), e.own_freedom)
  label_R = cluster_labels(fit.points)
  sums_QG = weight_QR @ np.eye(label_R.max() + 1)[label_R]
  together_Q = np.einsum('qg,qg->q', sums_QG, sums_QG) / e.mean_cluster
  within_Q = e.own * np.maximum(alone_Q - together_Q, 0)
  between_Q = (e.own + e.mean_cluster * e.shared) * together_Q
  variance_Q = within_Q + between_Q
  spread_Q = within_Q**2 / e.own_freedom + between_Q**2 / e.shared_freedom
  return variance_Q, np.maximum(variance_Q**2 / np.maximum(spread_Q, 1e-300), 1.0)


def sandwich_covariance(fit: Fit) -> np.ndarray:
  """Cluster-robust covariance (CR1) of theta."""
  residual_R, jac_RP = residuals(fit.theta_P, fit.problem)
  n, k = jac_RP.shape
  psi_R, label_R = score(residual_R, fit.problem), cluster_labels(fit.points)
  count = clusters(fit.points)
  sums_GP = np.zeros((count, k))
  np.add.at(sums_GP, label_R, psi_R[:, None] * jac_RP)
  _, inverse_PP = noise_covariance(fit.theta_P, fit.problem)
  bread_PP = inverse_PP / mean_slope(residual_R, k, fit.problem)
  correction = count / max(count - 1, 1) * (n - 1) / max(n - k, 1)
  return correction * bread_PP @ sums_GP.T @ sums_GP @ bread_PP


def derived(fit: Fit, theta_P: np.ndarray) -> dict[str, float]:
  """Quantities that follow from the exponents: a = beta/(alpha+beta), N*(C) ~ C^a."""
  value = natural(theta_P, fit.design)
  if fit.law.name == 'chinchilla' and 'alpha' in value and 'beta' in value:
    return {'a': value['beta'] / (value['alpha'] + value['beta'])}
  return {}


def delta_method(fit: Fit, level: float = LEVEL) -> dict[str, list[float]]:
  """Delta-method intervals with Student's t, on the log scale for E, coefficients and multipliers."""
  parameters, map_ = natural_map(fit.design)
  centre = map_ @ fit.theta_P
  extra = derived(fit, fit.theta_P)
  gradients = [
    _gradient(lambda theta_P, name=name: derived(fit, theta_P)[name], fit.theta_P) for name in extra
  ]
  variance, freedom = contrast_variance(fit, np.vstack([map_, *gradients]))
  half = stats.t.ppf(0.5 + level / 2, freedom) * np.sqrt(variance)
  out = {}
  with np.errstate(over='ignore'):  # an unidentified coefficient: its upper end is inf
    shown = [*parameters, *(Parameter('derived', name) for name in extra)]
    for p, c, h in zip(shown, [*centre, *extra.values()], half, strict=True):
      out[p.label] = [float(np.exp(v) if p.in_log else v) for v in (c - h, c + h)]
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
  """Refits resampled runs from the optimum; `clustered` draws whole clusters.

  Runs are drawn within each arm, so no resample loses an arm. A draw with fewer distinct runs than
  parameters, or that leaves a multiplier without runs, is drawn again and counted.
  """
  rng = np.random.default_rng(seed)
  p, n = fit.problem, len(fit.points)
  arm_R = np.unique(fit.points.arm, return_inverse=True)[1]
  label_R = cluster_labels(fit.points)
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
    theta_BP[b], _ = descend(fit.theta_P, dataclasses.replace(p, count_R=count_R))
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


def band(fit: Fit, at: Points, level: float = LEVEL) -> Band:
  """Prediction at new points: curve uncertainty (delta method), and with one run's noise added."""
  d = design(fit.law, at, fit.design.arms, fit.design.centre_J)
  log_R, jac_RP = log_loss(fit.theta_P, _aligned(d, fit.design.parameters))
  variance_R, freedom_R = contrast_variance(fit, jac_RP)
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
  """Variance of log loss about the fit, n - P degrees of freedom."""
  log_R, _ = log_loss(fit.theta_P, fit.design)
  residual_R = log_R - np.log(fit.points.loss)
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
