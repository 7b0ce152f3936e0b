"""Compare laws and arms: rollout to held-out sizes, nested models, paired gaps.

Where: after estimate.py and intervals.py, before the report. Held-out error decides first; the
clustered F test says whether the difference could be noise. Separate fits per arm are
ill-conditioned (Volkova 2602.07712), so every arm model here shares E and the coefficients, and
frees the exponents only to test them.
"""

import dataclasses

import numpy as np
from scipy import linalg, stats

from analysis.estimate import DELTA, Fit, fit
from analysis.intervals import LEVEL, band, sandwich_covariance
from analysis.laws import ArmModel, Law, Points, design
from mhc_jax.config import ConfigError

CLUSTERS_PER_RESTRICTION = 4  # of the clustered F test


@dataclasses.dataclass(frozen=True)
class RolloutStep:
  """Fit on the k smallest sizes; errors in log loss on the rest (bias: predicted minus true)."""

  sizes_fitted: int
  runs_fitted: int
  runs_held_out: int
  extrapolation: float
  in_sample_error: float
  held_out_error: float
  bias: float
  coverage: float


def _order(points: Points) -> list:
  """Size groups from the smallest to the largest mean compute (or N where there is no C)."""
  key = points.log_x['C'] if 'C' in points.log_x else sum(points.log_x.values())
  groups = list(dict.fromkeys(points.size.tolist()))
  return sorted(groups, key=lambda g: float(key[points.size == g].mean()))


def rollout(
  points: Points,
  law: Law,
  arms: ArmModel | None = None,
  loss: str = 'huber',
  delta: float | str = DELTA,
  level: float = LEVEL,
) -> list[RolloutStep]:
  """For every k >= 3 that leaves degrees of freedom: fit the k smallest sizes, predict the rest."""
  order = _order(points)
  name = 'C' if 'C' in points.log_x else law.covariates[0]
  out = []
  for k in range(3, len(order)):
    inside_R = np.isin(points.size, order[:k])
    small, rest = points.take(inside_R), points.take(~inside_R)
    rest = rest.take(np.isin(rest.arm, small.arms))
    if not len(rest):
      continue
    try:
      fitted = fit(small, law, arms, loss, delta, start_count=9)
    except ConfigError:  # too few runs for the parameters
      continue
    if fitted.degrees_of_freedom < 1:
      continue
    predicted = band(fitted, rest, level)
    error_R = np.log(predicted.loss) - np.log(rest.loss)
    covered_R = (predicted.new_low <= rest.loss) & (rest.loss <= predicted.new_high)
    own_R = np.log(band(fitted, small, level).loss) - np.log(small.loss)
    ratio = np.exp(rest.log_x[name].max() - small.log_x[name].max())
    out.append(
      RolloutStep(
        k,
        len(small),
        len(rest),
        float(ratio),
        float(np.mean(np.abs(own_R))),
        float(np.mean(np.abs(error_R))),
        float(error_R.mean()),
        float(covered_R.mean()),
      )
    )
  return out


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One arm model in a nested comparison; F test against the simpler model it contains."""

  name: str
  parameters: int
  in_sample_error: float
  held_out_error: float | None
  left_out_error: float | None
  against: str | None
  f_statistic: float | None
  degrees: tuple[int, int] | None
  p_value: float | None
  fit: Fit


def restriction(big: Fit, small: Fit) -> np.ndarray:
  """Rows r with r @ theta_big = 0 exactly when the big model is the small one."""
  embed = np.zeros((len(big.theta_names), len(small.theta_names)))
  for row, name in enumerate(big.theta_names):
    base, _, arm = name.partition('[')
    if name in small.theta_names:
      embed[row, small.theta_names.index(name)] = 1
    elif base in small.theta_names:  # one value per arm against a shared one
      embed[row, small.theta_names.index(base)] = 1
    elif base in ('log rho_N', 'log rho_D') and f'log m[{arm}' in small.theta_names:
      embed[row, small.theta_names.index(f'log m[{arm}')] = 0.5  # rho_N = rho_D = sqrt(m)
  return linalg.null_space(embed.T).T


def clustered_f(big: Fit, small: Fit) -> tuple[float, tuple[int, int], float] | None:
  """Wald F of the restrictions with cluster-robust covariance: (F, (q, G - q), p) or None.

  None with fewer than CLUSTERS_PER_RESTRICTION clusters to a restriction: there the sandwich is too small
  (3 restrictions on 7 clusters reject a true hypothesis in 16 % of simulations at a nominal 5 %).
  """
  rows = restriction(big, small)
  covariance_PP, clusters = sandwich_covariance(big)
  q = len(rows)
  if q == 0 or clusters < max(CLUSTERS_PER_RESTRICTION * q, q + 2):
    return None
  gap = rows @ big.theta_P
  middle = rows @ covariance_PP @ rows.T
  if np.linalg.cond(middle) > 1e12:
    return None
  # Hotelling's correction (G - q) / (G - 1): the covariance is estimated from G clusters only.
  statistic = float(gap @ np.linalg.solve(middle, gap)) / q * (clusters - q) / (clusters - 1)
  degrees = (q, clusters - q)
  return statistic, degrees, float(stats.f.sf(statistic, *degrees))


def arm_models(law: Law, arms: tuple[str, ...]) -> list[tuple[str, ArmModel, str | None]]:
  """The nested questions: (its name, the model, the simpler model it is tested against)."""
  out = [('no effect', ArmModel('none'), None)]
  if len(arms) > 1:
    out.append(('one multiplier m per arm', ArmModel('common'), 'no effect'))
    if {'N', 'D'} <= set(law.covariates):
      out.append(('rho_N and rho_D per arm', ArmModel('both'), 'one multiplier m per arm'))
    out.append(
      (
        'm and own exponents per arm',
        ArmModel('common', free_exponents=True),
        'one multiplier m per arm',
      )
    )
  return out


def nested(
  points: Points,
  law: Law,
  reference: str,
  loss: str = 'huber',
  delta: float | str = DELTA,
) -> list[Candidate]:
  """Fits each arm model; held-out error (largest size), leave-one-size-out error, clustered F."""
  order = _order(points)
  done: dict[str, Candidate] = {}
  for name, arms, against in arm_models(law, points.arms):
    arms = dataclasses.replace(arms, reference=reference)
    try:
      fitted = fit(points, law, arms, loss, delta, start_count=9)
    except ConfigError:
      continue
    test = clustered_f(fitted, done[against].fit) if against in done else None
    left_out = [_held_out(points, law, arms, loss, delta, [size]) for size in order]
    done[name] = Candidate(
      name,
      len(fitted.theta_P),
      _error(fitted, points),
      _held_out(points, law, arms, loss, delta, order[-1:]),
      None if None in left_out else float(np.mean(left_out)),
      against,
      test and test[0],
      test and test[1],
      test and test[2],
      fitted,
    )
  return list(done.values())


def _error(fitted: Fit, points: Points) -> float:
  return float(np.mean(np.abs(np.log(band(fitted, points).loss) - np.log(points.loss))))


def _held_out(
  points: Points, law: Law, arms: ArmModel, loss: str, delta: float | str, sizes: list
) -> float | None:
  """Mean |log error| on the left-out sizes, or None when the rest cannot carry the fit."""
  out_R = np.isin(points.size, sizes)
  rest, held = points.take(~out_R), points.take(out_R)
  if not len(rest) or set(held.arms) - set(rest.arms):
    return None
  if len(rest) <= len(design(law, rest, arms).names):
    return None
  return _error(fit(rest, law, arms, loss, delta, start_count=0), held)


@dataclasses.dataclass(frozen=True)
class Gap:
  """Loss of an arm minus the reference's over paired seeds at one size (nats, and as a ratio)."""

  arm: str
  size: str
  log_flops: float
  pairs: int
  difference: float
  ratio: float
  low: float | None
  high: float | None
  ratio_low: float | None
  ratio_high: float | None
  flops_ratio: float
  tokens_ratio: float


@dataclasses.dataclass(frozen=True)
class Spread:
  """Standard deviation of paired differences and ratios at one size, with its freedom."""

  difference: float
  ratio: float
  freedom: int


def pooled_spread(groups: list[tuple[np.ndarray, np.ndarray]]) -> Spread | None:
  """Pools the within-group variance of own - other and own / other over groups of paired losses.

  A group is one arm at one size: its seeds. None when no group has two seeds.
  """
  freedom = sum(len(own) - 1 for own, _ in groups)
  if not freedom:
    return None

  def deviation(values: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(((v - v.mean()) ** 2).sum() for v in values) / freedom))

  return Spread(
    deviation([own - other for own, other in groups]),
    deviation([own / other for own, other in groups]),
    freedom,
  )


def paired_gap(
  arm: str,
  size: str,
  losses: tuple[np.ndarray, np.ndarray],
  flops: np.ndarray,
  costs: tuple[np.ndarray, np.ndarray],
  spread: Spread | None,
  level: float = LEVEL,
) -> Gap:
  """Gap of one arm at one size from the paired losses (own, other) of its seeds.

  The interval is Student's t with the pooled spread; without a spread there is none.
  costs: (FLOPs, tokens) of the arm over the reference's, per pair.
  """
  own, other = losses
  gap, ratio = float((own - other).mean()), float((own / other).mean())
  ends = [None] * 4
  if spread is not None:
    quantile = float(stats.t.ppf(0.5 + level / 2, spread.freedom)) / np.sqrt(len(own))
    ends = [gap - quantile * spread.difference, gap + quantile * spread.difference]
    ends += [ratio - quantile * spread.ratio, ratio + quantile * spread.ratio]
  cost = [float(np.exp(np.log(c).mean())) for c in costs]
  return Gap(arm, size, float(np.log(flops).mean()), len(own), gap, ratio, *ends, *cost)
