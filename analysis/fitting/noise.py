"""How the noise of runs is made up: what sizes, groups and repeats share, and whose noise is larger.

Where: a fit (estimate.py) -> here -> intervals.py and the tests of compare.py. Analysis of variance in
strata: runs of one model size share what the law misses there; runs of one seed or trunk their start and
data; repeats of one arm at one point what the law misses for that arm. Each contrast of the parameters is
known only as well as the strata that it is made of (Satterthwaite's degrees of freedom), so that many rows of
few models do not pass for many measurements. All sums go over groups: O(R).
"""

import dataclasses

import numpy as np
from scipy import sparse, special, stats
from scipy.sparse.csgraph import connected_components

from .laws import Points, log_loss
from .solve import Problem, residuals, score

NULL = 1e-9  # singular value, relative to the largest, of a direction that no run sees
DEAD = 1e-6  # share of the Jacobian below which a parameter has no effect left (E -> 0)
# p-value above which a stratum is pooled with the finer one: Bancroft's rule for model sizes, of which there
# are few; one that is declared is pooled only where it is no louder.
POOL = {'model size': 0.25, 'cluster': 0.5, 'arm and point': 0.25}
TOLD = 0.5  # degrees of freedom below which a mean square says nothing
SURE = 0.01  # p-value below which the finer one is taken as quiet as it looks
UNEQUAL = {'loss': 0.005, 'arm': 0.05}  # p-value below which noise is modelled as unequal
LEAST = 6  # runs of an arm, or repeats, that tell of its noise
MOST_POINTS = 500  # of which repeats are looked at one by one


@dataclasses.dataclass(frozen=True)
class Stratum:
  """What groups of runs share beyond coarser groups: its mean square in units of one run's variance.

  covariance_PP: this stratum's part of the covariance of the parameters.
  """

  name: str
  groups: int
  freedom: float
  mean_square: float
  covariance_PP: np.ndarray


@dataclasses.dataclass(frozen=True)
class Noise:
  """What is known of the noise of a fit's runs.

  scale_R: each run's noise relative to the typical one. strata: coarse to fine, the last is single runs;
  label_R: group of each run in the coarsest. notes: what was found, in words. problem: why the noise cannot
  be told, or None. inverse_PP: of J' J, each run with the mean slope of its score; slope_R: that.
  """

  scale_R: np.ndarray
  slope_R: np.ndarray
  strata: tuple[Stratum, ...]
  label_R: np.ndarray
  notes: tuple[str, ...]
  problem: str | None
  inverse_PP: np.ndarray
  jac_RP: np.ndarray

  @property
  def shared(self) -> float:
    """Correlation of two runs of one group of the coarsest stratum (0: every run has noise of its own)."""
    first, last = self.strata[0], self.strata[-1]
    shared = (first.mean_square - last.mean_square) * first.groups / len(self.label_R)
    return max(0.0, shared / (shared + last.mean_square)) if first is not last and shared > 0 else 0.0


def robust_scale(residual_R: np.ndarray, parameters: int) -> float:
  """Standard deviation of a normal core: median |r| / 0.6745 without the `parameters` smallest."""
  largest = np.sort(np.abs(residual_R))[min(parameters, len(residual_R) - 1) :]
  return float(np.median(largest) / 0.6745)


def _core(residual_R: np.ndarray, parameters: int) -> float:
  """Standard deviation of the noise: the robust scale, or the plain one where that is smaller."""
  plain = np.sqrt(residual_R @ residual_R / max(len(residual_R) - parameters, 1))
  return min(robust_scale(residual_R, parameters), float(plain))


def spectrum(jac_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(length of each column, singular values, right vectors) of the Jacobian with columns of length one.

  Columns without effect are left out (length 0): the rest is judged given that parameter.
  """
  length_P = np.linalg.norm(jac_RP, axis=0)
  length_P = np.where(length_P > DEAD * np.linalg.norm(length_P), length_P, 0.0)
  scaled_RP = jac_RP / np.where(length_P > 0, length_P, np.inf)
  # The R factor has the same singular values, and is small however many runs there are.
  _, values, right_KP = np.linalg.svd(np.linalg.qr(scaled_RP, mode='r'))
  return length_P, values, right_KP


def null_space(jac_RP: np.ndarray) -> np.ndarray:
  """Directions of the parameters that no run sees, (K, P), in columns of length one."""
  length_P, values, right_KP = spectrum(jac_RP)
  seen = np.concatenate([values, np.zeros(len(right_KP) - len(values))]) > NULL * values.max()
  null_KP = right_KP[~seen]
  alive_KP = null_KP * (length_P > 0)
  return alive_KP[np.linalg.norm(alive_KP, axis=1) > 1e-6] / np.where(length_P > 0, length_P, 1.0)


def normal_inverse(jac_RP: np.ndarray) -> np.ndarray:
  """(J'J)^-1 over the directions that some run sees."""
  length_P, values, right_KP = spectrum(jac_RP)
  keep = values > NULL * values.max()
  half_KP = right_KP[: len(values)][keep] / values[keep, None]
  back_P = np.divide(1.0, length_P, out=np.zeros_like(length_P), where=length_P > 0)
  return (half_KP.T @ half_KP) * np.outer(back_P, back_P)


def rank(jac_RP: np.ndarray) -> int:
  """Number of directions that some run sees."""
  values = spectrum(jac_RP)[1]
  return int((values > NULL * values.max()).sum())


def _clipped_square(deviation: np.ndarray, width: float) -> np.ndarray:
  """E clip(r, +-width)^2 of normal r."""
  a = width / np.maximum(deviation, 1e-300)
  inside = special.erf(a / np.sqrt(2)) - np.sqrt(2 / np.pi) * a * np.exp(-(a**2) / 2)
  return deviation**2 * inside + width**2 * special.erfc(a / np.sqrt(2))


def noise(theta_P: np.ndarray, p: Problem, points: Points) -> Noise:
  """The noise of a fit's runs, with the strata that the data show."""
  residual_R, jac_RP = residuals(theta_P, p)
  scale_R, notes, arms = unequal(residual_R, jac_RP, points, log_loss(theta_P, p.design)[0])

  def analysed(relative_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, list]:
    core = _core(residual_R / relative_R, rank(jac_RP))
    robust, spread_R = p.robust and core > 0, max(core, 1e-300) * relative_R
    slope_R = special.erf(p.width / (np.sqrt(2) * spread_R)) if robust else np.ones_like(relative_R)
    deviation_R = np.sqrt(_clipped_square(spread_R, p.width)) if robust else spread_R
    inverse_PP = normal_inverse(jac_RP * np.sqrt(slope_R)[:, None])
    left_RP = (slope_R / deviation_R)[:, None] * (jac_RP @ inverse_PP)
    right_RP = jac_RP * deviation_R[:, None]
    raw = _strata(score(residual_R, p) / deviation_R, left_RP, right_RP, inverse_PP, points)
    return slope_R, inverse_PP, right_RP @ inverse_PP, raw

  slope_R, inverse_PP, _, raw = analysed(scale_R)
  strata, label_R, found, problem = _pooled(raw)
  if notes and len(strata) > 1:
    # What groups share is not the noise of their runs, and has one size however loud these are: all runs have
    # the typical noise, loud ones what is theirs beyond it, known from their own repeats only.
    loud = strata[-1]
    slope_R, inverse_PP, weight_RP, raw = analysed(np.ones_like(scale_R))
    strata, label_R, found, problem = _pooled(raw, {s.name for s in strata})
    beyond_R1 = np.maximum(scale_R**2 - 1, 0)[:, None]
    beyond_PP = loud.mean_square * (weight_RP * beyond_R1).T @ weight_RP
    freedom = loud.freedom / max(arms, 1)
    strata = (*strata, dataclasses.replace(loud, name='loud run', covariance_PP=beyond_PP, freedom=freedom))
  return Noise(scale_R, slope_R, strata, label_R, (*notes, *found), problem, inverse_PP, jac_RP)


def labels(points: Points) -> list[tuple[str, np.ndarray]]:
  """(name, number of the group of each run) of everything that runs may share, coarse to fine."""
  size_R = np.unique(points.size, return_inverse=True)[1]
  cluster_R = np.unique(points.cluster, return_inverse=True)[1]
  at_R = [np.round(v, 9) for v in (*points.log_x.values(), *points.axes.values())]  # logs carry rounding
  alike = np.stack([np.unique(points.arm, return_inverse=True)[1], size_R, *at_R])
  point_R = np.unique(alike, axis=1, return_inverse=True)[1].ravel()
  out = [('model size', size_R), ('cluster', cluster_R), ('arm and point', point_R)]
  if not _finer(cluster_R, size_R):  # clusters across sizes shift whole curves
    out[:2] = out[1::-1]
  return [(name, label_R) for name, label_R in out if label_R.max() + 1 < len(points)]


def _means(x_RQ: np.ndarray, label_R: np.ndarray) -> np.ndarray:
  """Group means, at every run."""
  count = np.bincount(label_R)
  member = sparse.csr_matrix((np.ones(len(label_R)), (label_R, np.arange(len(label_R)))))
  return ((member @ x_RQ) / count[:, None])[label_R]


def projected(x_RQ: np.ndarray, groups: tuple[np.ndarray, ...]) -> np.ndarray:
  """Least squares of columns on the groups' indicators; crossed groups by backfitting."""
  out_RQ = np.zeros_like(x_RQ)
  for _ in range(100 if len(groups) > 1 else 1):
    change = 0.0
    for label_R in groups:
      step_RQ = _means(x_RQ - out_RQ, label_R)
      out_RQ += step_RQ
      change = max(change, float(np.abs(step_RQ).max(initial=0)))
    if change < 1e-10 * max(float(np.abs(x_RQ).max(initial=0)), 1e-300):
      break
  return out_RQ


def _finer(a_R: np.ndarray, b_R: np.ndarray) -> bool:
  """Whether every group of a lies in one of b."""
  return len(np.unique(np.stack([a_R, b_R]), axis=1).T) == a_R.max() + 1


def _joined(coarser: tuple[np.ndarray, ...], label_R: np.ndarray) -> tuple[np.ndarray, ...]:
  """Labels that span what both span, without those that another refines."""
  return (*(one_R for one_R in coarser if not _finer(label_R, one_R)), label_R)


def _dimension(groups: tuple[np.ndarray, ...]) -> int:
  """Dimension of the span of one or two labellings."""
  if len(groups) == 1:
    return int(groups[0].max() + 1)
  first_R, second_R = groups[0], groups[1]
  size = (int(first_R.max() + 1), int(second_R.max() + 1))
  graph = sparse.csr_matrix((np.ones(len(first_R)), (first_R, size[0] + second_R)), (sum(size), sum(size)))
  return sum(size) - connected_components(graph, directed=False)[0]


def _strata(
  e_R: np.ndarray, left_RP: np.ndarray, right_RP: np.ndarray, inverse_PP: np.ndarray, points: Points
) -> list[tuple[Stratum, np.ndarray]]:
  """Mean squares by stratum of standardised scores e = (I - left right') true ones, with their groups."""
  spans, groups = [], ()
  for name, label_R in labels(points):
    joined = _joined(groups, label_R)
    if len(joined) <= 2 and _dimension(joined) > (_dimension(groups) if groups else 0):
      groups = joined
      spans.append((name, groups, label_R))
  every_R = np.arange(len(e_R))
  spans.append(('run', (every_R,), every_R))
  both_RK = np.concatenate([e_R[:, None], left_RP, right_RP @ inverse_PP], 1)
  count, inner_PP = left_RP.shape[1], right_RP.T @ right_RP
  before_RK, dimension, raw = np.zeros_like(both_RK), 0, []
  for name, span, label_R in spans:
    after_RK = projected(both_RK, span)
    own_RK = after_RK - before_RK
    left_own_RP, weight_own_RP = own_RK[:, 1 : 1 + count], own_RK[:, 1 + count :]
    # Expected square for noise of variance one: tr Q (I - L R')(I - L R')'.
    freedom = _dimension(span) - dimension - 2 * np.sum(right_RP * left_own_RP)
    freedom += np.sum(inner_PP * (left_own_RP.T @ left_own_RP))
    mean_square = float(own_RK[:, 0] @ own_RK[:, 0]) / max(float(freedom), 1e-9)
    own_PP = weight_own_RP.T @ weight_own_RP
    raw.append((Stratum(name, int(label_R.max()) + 1, float(freedom), mean_square, own_PP), label_R))
    before_RK, dimension = after_RK, _dimension(span)
  return raw


def _pooled(
  raw: list[tuple[Stratum, np.ndarray]], keep: set[str] | None = None
) -> tuple[tuple[Stratum, ...], np.ndarray, list[str], str | None]:
  """From fine to coarse: a stratum that is not noisier than the finer one, or cannot be told, joins it.

  keep: names of those that do not, whatever they show. Returns the strata, the groups of the coarsest, notes
  and the problem.
  """
  (*coarser, finest), notes, problem = raw, [], None
  kept, label_R = [finest[0]], finest[1]
  for one, own_R in reversed(coarser):
    finer = kept[-1]
    told = min(one.freedom, finer.freedom) > TOLD
    p_value = stats.f.sf(one.mean_square / max(finer.mean_square, 1e-300), one.freedom, finer.freedom)
    apart = told and p_value < POOL[one.name]
    if apart if keep is None else one.name in keep:
      if p_value > SURE:
        # Perhaps the finer one is quiet by chance: what rests on it must not gain by that.
        kept[-1] = dataclasses.replace(finer, mean_square=_joint(finer, one)[1])
      kept.append(one)
      label_R = own_R
      if p_value < 0.01:
        notes.append(f'runs of one {one.name} share noise (p = {p_value:.1g}); intervals count these groups')
      continue
    if one.name == 'cluster' and not told:
      count = 'one cluster' if one.groups == 1 else f'{one.groups} clusters'
      problem = f'{count} cannot tell how much noise runs of a cluster share'
    freedom, mean_square = _joint(finer, one)
    whole_PP = finer.covariance_PP + one.covariance_PP
    kept[-1] = dataclasses.replace(finer, freedom=freedom, mean_square=mean_square, covariance_PP=whole_PP)
  strata = [dataclasses.replace(s, covariance_PP=s.mean_square * s.covariance_PP) for s in reversed(kept)]
  return tuple(strata), label_R, notes, problem


def _joint(*parts: Stratum) -> tuple[float, float]:
  """Degrees of freedom and mean square of strata taken together."""
  freedom = sum(max(s.freedom, 0.0) for s in parts)
  return freedom, sum(max(s.freedom, 0.0) * s.mean_square for s in parts) / max(freedom, 1e-9)


def covariance(n: Noise, rows_QP: np.ndarray) -> np.ndarray:
  """Covariance of rows @ theta, (Q, Q)."""
  return rows_QP @ sum(s.covariance_PP for s in n.strata) @ rows_QP.T


def variances(n: Noise, rows_QP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Variance of each of rows @ theta and its degrees of freedom (Satterthwaite), each (Q,)."""
  parts_SQ = np.array([np.einsum('qp,po,qo->q', rows_QP, s.covariance_PP, rows_QP) for s in n.strata])
  total_Q = np.maximum(parts_SQ.sum(0), 0)  # no rounding below zero
  freedom_S1 = np.array([[max(s.freedom, 1.0)] for s in n.strata])
  return total_Q, np.maximum(total_Q**2 / np.maximum((parts_SQ**2 / freedom_S1).sum(0), 1e-300), 1.0)


def wald(n: Noise, rows_QP: np.ndarray, theta_P: np.ndarray) -> tuple[float, tuple[int, float], float] | None:
  """F of rows @ theta = 0: (F, (q, degrees of freedom), p), or None where the runs do not see a row."""
  cov_QQ = covariance(n, rows_QP)
  if not len(rows_QP) or np.linalg.cond(cov_QQ) > 1e12:
    return None
  # Independent combinations of the rows: the one known with fewest degrees of freedom decides.
  values, vectors = np.linalg.eigh(cov_QQ)
  turned_QP = (vectors / np.sqrt(values)).T @ rows_QP
  freedom = float(variances(n, turned_QP)[1].min())
  statistic = float(np.sum((turned_QP @ theta_P) ** 2)) / len(rows_QP)
  return statistic, (len(rows_QP), freedom), float(stats.f.sf(statistic, len(rows_QP), freedom))


def unequal(
  residual_R: np.ndarray, jac_RP: np.ndarray, points: Points, log_R: np.ndarray
) -> tuple[np.ndarray, list[str], int]:
  """Noise of each run relative to the typical one (geometric mean 1): what grows with the loss, and by arm.

  Also notes, and the number of arms whose noise is their own (0: it is one).

  A gamma regression of squared residuals, each freed of what the fit took from it (restricted likelihood,
  Smyth 1989). A term is used where it is significant at UNEQUAL; otherwise noise is equal. Where there are
  repeats they alone speak: what the law misses is no noise.
  """
  n, equal = len(residual_R), np.ones(len(residual_R))
  seen_RP = _with_repeats(jac_RP, points)
  if n - rank(seen_RP) < LEAST or np.ptp(log_R) == 0 or not np.any(residual_R):
    return equal, [], 0
  big = [arm for arm in points.arms if (points.arm == arm).sum() >= LEAST]
  terms = {'loss': ((log_R - log_R.mean()) / log_R.std())[:, None]}
  if len(big) > 1:
    terms['arm'] = np.stack([(points.arm == arm) - np.mean(points.arm == arm) for arm in big[1:]], 1)
  basis_RK, notes = np.ones((n, 1)), []
  best, variance_R = _dispersion(residual_R, seen_RP, basis_RK)
  while terms:
    tried = {name: _dispersion(residual_R, seen_RP, np.hstack([basis_RK, x])) for name, x in terms.items()}
    p_values = {
      name: float(stats.chi2.sf(2 * (tried[name][0] - best), x.shape[1])) for name, x in terms.items()
    }
    name = min(p_values, key=lambda k: p_values[k] / UNEQUAL[k])
    if p_values[name] > UNEQUAL[name]:
      break
    basis_RK, (best, variance_R) = np.hstack([basis_RK, terms.pop(name)]), tried[name]
    notes.append(f'noise differs with the {name} (p = {p_values[name]:.1g}): intervals use its own size')
  scale_R = np.sqrt(variance_R)
  return scale_R / np.exp(np.log(scale_R).mean()), notes, 0 if 'arm' in terms else len(big)


def _with_repeats(jac_RP: np.ndarray, points: Points) -> np.ndarray:
  """The Jacobian, with an indicator of every arm and point where enough runs repeat one."""
  label_R = dict(labels(points)).get('arm and point')
  if label_R is None or not LEAST <= len(label_R) - label_R.max() - 1 or label_R.max() >= MOST_POINTS:
    return jac_RP
  return np.eye(label_R.max() + 1)[label_R]  # it spans what the law can say


def _dispersion(residual_R: np.ndarray, jac_RP: np.ndarray, basis_RK: np.ndarray) -> tuple[float, np.ndarray]:
  """(restricted log likelihood, variance of each run) with log variance linear in the basis.

  The residuals are those of the fit that these variances would weigh (one linear step): at equal weights the
  noise of loud runs would hide how quiet the others are.
  """
  gamma_K = np.zeros(basis_RK.shape[1])
  gamma_K[0] = np.log(np.mean(residual_R**2))
  for _ in range(50):
    variance_R = np.exp(np.clip(basis_RK @ gamma_K, -60, 60))
    scaled_RP = jac_RP / np.sqrt(variance_R)[:, None]
    inverse_PP = normal_inverse(scaled_RP)
    left_R = residual_R - jac_RP @ (inverse_PP @ (scaled_RP.T @ (residual_R / np.sqrt(variance_R))))
    free_R = np.maximum(1 - np.einsum('rp,pq,rq->r', scaled_RP, inverse_PP, scaled_RP), 1e-3)
    # A run far out says little about the noise of its kind: at most three deviations.
    ratio_R = np.minimum(left_R**2 / variance_R / free_R, 9.0)
    weight_R = free_R / 2
    step_K = np.linalg.lstsq(np.sqrt(weight_R)[:, None] * basis_RK, np.sqrt(weight_R) * (ratio_R - 1))[0]
    gamma_K = gamma_K + np.clip(step_K, -2, 2)
    if np.abs(step_K).max() < 1e-4:
      break
  _, values, _ = spectrum(scaled_RP)
  log_volume = 2 * float(np.log(values[values > NULL * values.max()]).sum())
  length_P = spectrum(scaled_RP)[0]
  log_volume += 2 * float(np.log(length_P[length_P > 0]).sum())
  log_likelihood = -0.5 * (float(np.log(variance_R).sum()) + log_volume + float(free_R @ ratio_R))
  return log_likelihood, variance_R
