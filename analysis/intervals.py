"""Intervals for a fit: delta method, case bootstrap, clustered bootstrap; bands for predictions.

Where: after estimate.py; used by compare.py and the report.

Which is quoted (`preferred`; coverage.py measures it): below 40 clusters the delta method with
Student's t, which covers close to its nominal 95 % at 25 runs; from 40 on the bootstrap over
clusters, which needs no equal or normal noise. Below 40 runs CAVEAT goes with every number.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats
from tqdm import tqdm

from analysis.estimate import Fit, mean_slope, noise_covariance
from analysis.laws import Points, design, natural, natural_map, predict
from analysis.solve import descend, residuals, score

LEVEL = 0.95
FEW_RUNS = 40
CAVEAT = (
  'fewer than 40 runs: simulated coverage of nominal 95 % intervals is 90-98 % (delta method) and '
  '80-95 % (percentile bootstraps)'
)


@dataclasses.dataclass(frozen=True)
class Resamples:
  """Bootstrap replicates: theta (B, P), how many draws were redrawn, and what was resampled."""

  theta_BP: np.ndarray
  redrawn: int
  unit: str


def coverage_caveat(fit: Fit) -> str | None:
  """The warning that belongs to intervals from few runs, or None."""
  return CAVEAT if len(fit.points) < FEW_RUNS else None


def clusters_hold_several(points: Points) -> bool:
  """Whether some cluster has more than one run."""
  return len(set(points.cluster.tolist())) < len(points)


def preferred(fit: Fit, available: tuple[str, ...]) -> str:
  """Name of the interval method to quote among those computed."""
  name = 'cluster_bootstrap' if clusters_hold_several(fit.points) else 'case_bootstrap'
  enough = len(set(fit.points.cluster.tolist())) >= FEW_RUNS
  return name if enough and name in available else 'delta'


def cluster_labels(points: Points) -> np.ndarray:
  """Cluster number of every run (R,)."""
  return np.unique(points.cluster, return_inverse=True)[1]


def paired_covariance(fit: Fit) -> tuple[np.ndarray, float]:
  """Covariance of theta when runs of one cluster share noise, and their correlation rho.

  Runs of one (size, seed) see the same data and start alike in every arm. rho is the mean product
  of two scores of one cluster over the mean square (moment estimate, kept in [0, 0.9]); unlike a
  sandwich it needs one number from the data, so that few clusters suffice.
  """
  theta_P, p = fit.theta_P, fit.problem
  residual_R, jac_RP = residuals(theta_P, p)
  psi_R, label_R = score(residual_R, p), cluster_labels(fit.points)
  same_RR = label_R[:, None] == label_R[None, :]
  pairs = same_RR.sum() - len(label_R)
  rho = 0.0
  if pairs:
    rho = (psi_R @ same_RR @ psi_R - psi_R @ psi_R) / pairs / max(np.mean(psi_R**2), 1e-300)
    rho = float(np.clip(rho, 0.0, 0.9))
  plain_PP, inverse_PP = noise_covariance(theta_P, p)
  # plain = s^2 (J'J)^-1, so s^2 is recovered from any diagonal element.
  s2 = plain_PP[0, 0] / inverse_PP[0, 0] if inverse_PP[0, 0] > 0 else 0.0
  middle_PP = jac_RP.T @ ((1 - rho) * np.eye(len(label_R)) + rho * same_RR) @ jac_RP
  return s2 * inverse_PP @ middle_PP @ inverse_PP, rho


def sandwich_covariance(fit: Fit) -> tuple[np.ndarray, int]:
  """Cluster-robust covariance (CR1) of theta and the number of clusters."""
  residual_R, jac_RP = residuals(fit.theta_P, fit.problem)
  n, k = jac_RP.shape
  psi_R, label_R = score(residual_R, fit.problem), cluster_labels(fit.points)
  clusters = int(label_R.max()) + 1
  sums_GP = np.zeros((clusters, k))
  np.add.at(sums_GP, label_R, psi_R[:, None] * jac_RP)
  _, inverse_PP = noise_covariance(fit.theta_P, fit.problem)
  bread_PP = inverse_PP / mean_slope(residual_R, k, fit.problem)
  correction = clusters / max(clusters - 1, 1) * (n - 1) / max(n - k, 1)
  return correction * bread_PP @ sums_GP.T @ sums_GP @ bread_PP, clusters


def covariance(fit: Fit) -> np.ndarray:
  """The default covariance: paired where clusters hold several runs, else independent noise."""
  return paired_covariance(fit)[0] if clusters_hold_several(fit.points) else fit.covariance_PP


def derived(fit: Fit, theta_P: np.ndarray) -> dict[str, float]:
  """Quantities that follow from the exponents: a = beta/(alpha+beta), N*(C) ~ C^a."""
  value = natural(theta_P, fit.design)
  if fit.law.name == 'chinchilla' and 'alpha' in value and 'beta' in value:
    return {'a': value['beta'] / (value['alpha'] + value['beta'])}
  return {}


def delta(
  fit: Fit, level: float = LEVEL, covariance_PP: np.ndarray | None = None
) -> dict[str, list[float]]:
  """Delta-method intervals with Student's t (n - P), on the log scale for E, A and multipliers."""
  covariance_PP = covariance(fit) if covariance_PP is None else covariance_PP
  quantile = stats.t.ppf(0.5 + level / 2, max(fit.degrees_of_freedom, 1))
  names, map_ = natural_map(fit.design)
  centre = map_ @ fit.theta_P
  half = quantile * np.sqrt(np.maximum(np.einsum('qp,pr,qr->q', map_, covariance_PP, map_), 0))
  out = {}
  with np.errstate(over='ignore'):  # an unidentified coefficient: its upper end is inf
    for name, c, h in zip(names, centre, half, strict=True):
      ends = [c - h, c + h]
      log = name.startswith('log ')
      out[name.removeprefix('log ')] = [float(np.exp(v)) if log else float(v) for v in ends]
  for name, value in derived(fit, fit.theta_P).items():
    gradient_P = _gradient(lambda theta_P, name=name: derived(fit, theta_P)[name], fit.theta_P)
    h = quantile * float(np.sqrt(max(gradient_P @ covariance_PP @ gradient_P, 0)))
    out[name] = [value - h, value + h]
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
  return {
    name: [float(v) for v in np.percentile([row[name] for row in rows], ends)] for name in rows[0]
  }


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
  log_R, jac_RP = predict(fit.theta_P, _aligned(d, fit.design.names))
  quantile = stats.t.ppf(0.5 + level / 2, max(fit.degrees_of_freedom, 1))
  variance_R = np.maximum(np.einsum('rp,pq,rq->r', jac_RP, covariance(fit), jac_RP), 0)
  noise = residual_variance(fit)
  half_R, wide_R = quantile * np.sqrt(variance_R), quantile * np.sqrt(variance_R + noise)
  ends = (log_R, log_R - half_R, log_R + half_R, log_R - wide_R, log_R + wide_R)
  return Band(*(np.exp(v) for v in ends))


def residual_variance(fit: Fit) -> float:
  """Variance of log loss about the fit, n - P degrees of freedom."""
  log_R, _ = predict(fit.theta_P, fit.design)
  residual_R = log_R - np.log(fit.points.loss)
  return float(residual_R @ residual_R) / max(fit.degrees_of_freedom, 1)


def _aligned(d, names: tuple[str, ...]):
  """A design over a subset of the arms, its parameters put in the order of the full fit."""
  position = [names.index(name) for name in d.names]

  def spread(matrix: np.ndarray) -> np.ndarray:
    out = np.zeros((*matrix.shape[:-1], len(names)))
    out[..., position] = matrix
    return out

  return dataclasses.replace(
    d,
    names=names,
    e_RP=spread(d.e_RP),
    a_JRP=spread(d.a_JRP),
    x_JRP=spread(d.x_JRP),
    m_JRP=spread(d.m_JRP),
  )
