"""Does an arm's gain fade, hold or grow with compute? The multiplier m(C), and when one m will do.

Where: the nested fits of compare.py -> here -> document and multipliers. An arm that differs in its exponent
or its floor has another multiplier at every size; one number would be right in the middle of the data and
wrong where it matters, at the largest run.
"""

import dataclasses

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from .compare import ONE, OWN_E, OWN_EXPONENTS, Candidate, log_compute
from .fitting.estimate import Fit
from .fitting.identify import doubts
from .fitting.intervals import LEVEL, at_points
from .fitting.laws import Design, Points, log_loss
from .fitting.noise import variances, wald

NEEDED = 0.01  # p-value of an arm's own exponent or floor below which one m is not enough
MAYBE, BETTER = 0.05, 0.9  # or a p-value below MAYBE where it also takes a tenth off the held-out error
HOLDS = 1.25  # change of m over the data, as a factor, within which a gain is said to hold
FARTHEST = 10.0  # log m beyond which there is none


@dataclasses.dataclass(frozen=True)
class Multiple:
  """m at one compute (FLOPs, or the units of C) with its 95 % interval."""

  flops: float
  value: float
  interval: list[float]


@dataclasses.dataclass(frozen=True)
class Gain:
  """How the multiplier of an arm changes with compute.

  trend: 'fades' (m falls), 'grows', 'holds' (within a factor of HOLDS either way), 'cannot tell'; None where
  nothing can be tested, for the reason in `problem`. p_exponent, p_floor: of the arm's own exponent and E.
  one: whether one m is enough. change: of m over the data, as a factor, with interval.
  """

  arm: str
  trend: str | None
  problem: str | None = None
  p_exponent: float | None = None
  p_floor: float | None = None
  one: bool = True
  change: float | None = None
  change_interval: list[float] | None = None
  smallest: Multiple | None = None
  largest: Multiple | None = None

  @property
  def reason(self) -> str | None:
    """Why one m must not be quoted, or None."""
    if self.one:
      return None
    if self.smallest is None:
      return f'not one number: {self.problem}'
    ends = [
      f'{m.value:.2f} [{m.interval[0]:.2f}, {m.interval[1]:.2f}]' for m in (self.smallest, self.largest)
    ]
    return f'not one number: it {self.trend} from {ends[0]} at the smallest to {ends[1]} at the largest size'


def gains(whole: Fit | None, nested: list[Candidate]) -> list[Gain]:
  """Per arm but the reference; empty for one arm, along an axis, or without common multipliers."""
  if whole is None or len(whole.points.arms) < 2 or whole.design.arms.multiplier != 'common':
    return []
  if whole.points.axes:  # a rank may stand for the gain of its arm, or hide it
    return []
  found = {c.name: c for c in nested}
  one, rich = found.get(ONE), [found[n] for n in (OWN_EXPONENTS, OWN_E) if n in found]
  arms = [arm for arm in whole.points.arms if arm != whole.design.arms.reference]
  if one is None or not rich:
    return [Gain(arm, None, 'no model of a changing gain could be fitted') for arm in arms]
  return [_gain(whole, arm, one, rich) for arm in arms]


def refused(changes: list[Gain]) -> dict[str, str]:
  """Label of each multiplier that one number must not stand for -> why."""
  return {f'm[{g.arm}]': g.reason for g in changes if g.reason}


def _gain(whole: Fit, arm: str, one: Candidate, rich: list[Candidate]) -> Gain:
  """The verdict on one arm; m at the ends is averaged over the models with a changing gain."""
  points, reference = whole.points, whole.design.arms.reference
  common = [s for s in _sizes_of(points, arm) if s in _sizes_of(points, reference)]
  if len(common) < 3:
    lack = (
      f'{len(common)} model sizes in common with {reference}'
      if common
      else f'no model size in common with {reference}'
    )
    return Gain(arm, None, f'{lack}; 3 are needed to see a trend')
  # Of a floor that ran to zero nothing can be tested.
  sound = [c for c in rich if not doubts(c.fit) and not (c.name == OWN_E and c.fit.boundaries)]
  if not sound:
    return Gain(arm, None, 'no model of a changing gain fits soundly: ' + '; '.join(doubts(rich[0].fit)))
  p_values = {c.name: _p_value(c.fit, arm) for c in sound}
  needed = any(_needed(p_values[c.name], c, one) for c in sound)
  tests = (p_values.get(OWN_EXPONENTS), p_values.get(OWN_E), not needed)

  sizes = (common[0], common[-1])
  found = [[_log_multiplier(c.fit, points, arm, size) for size in sizes] for c in sound]
  if any(one is None for pair in found for one in pair):
    problem = 'no compute of the reference is enough for the loss of this arm, as far as the law says'
    return Gain(arm, None, problem, *tests)
  ends = []
  for k, size in enumerate(sizes):
    value, *interval = _averaged(sound, [pair[k] for pair in found])
    ends.append(Multiple(_compute(points, arm, size), value, interval))
  change, low, high = _averaged(sound, [(b[0] - a[0], b[1] - a[1]) for a, b in found])
  trend = 'cannot tell'
  if needed:
    trend = 'grows' if change > 1 else 'fades'
  elif 1 / HOLDS < low and high < HOLDS:
    trend = 'holds'
  return Gain(arm, trend, None, *tests, change, [low, high], *ends)


def _needed(p_value: float | None, c: Candidate, one: Candidate) -> bool:
  """Whether an arm's own exponent or floor is needed, by the nested test or by it and held-out error."""
  if p_value is None:
    return False
  if not NEEDED <= p_value < MAYBE:
    return p_value < NEEDED
  errors = (c.errors.left_out_error, one.errors.left_out_error)
  return None not in errors and errors[0] < BETTER * errors[1]


def _sizes_of(points: Points, arm: str) -> list:
  """Model sizes of an arm, smallest mean compute first."""
  own = points.take(points.arm == arm)
  key = log_compute(own)
  return sorted(dict.fromkeys(own.size.tolist()), key=lambda s: float(key[own.size == s].mean()))


def _p_value(fit: Fit, arm: str) -> float | None:
  """Of the arm's own trend, or of its floor being the reference's."""
  names, row = fit.theta_names, np.zeros(len(fit.theta_P))
  if f'g[{arm}]' in names:
    row[names.index(f'g[{arm}]')] = 1
  else:
    row[names.index(f'log E[{arm}]')] = 1
    row[names.index(f'log E[{fit.design.arms.reference}]')] = -1
  test = None if fit.noise.problem else wald(fit.noise, row[None], fit.theta_P)
  return None if test is None else test[2]


def _log_multiplier(fit: Fit, points: Points, arm: str, size: object) -> tuple[float, np.ndarray] | None:
  """log m at an arm's mean point of one size, and its gradient in theta; None where no compute is enough.

  With m times the compute the reference has the arm's loss.
  """
  own = points.take((points.arm == arm) & (points.size == size))
  log_x = {name: np.array([v.mean()]) for name, v in own.log_x.items()}
  axes = {name: np.zeros(1) for name in points.axes}

  def built(name: str) -> Design:
    return at_points(fit, Points(log_x, np.ones(1), np.array([name]), *[np.zeros(1)] * 3, axes=axes))

  target_R, target_RP = log_loss(fit.theta_P, built(arm))
  base = built(fit.design.arms.reference)
  share_J1 = np.array([[term.share] for term in fit.law.terms])

  def reached(log_m: float) -> tuple[np.ndarray, np.ndarray]:
    return log_loss(fit.theta_P, dataclasses.replace(base, cov_JR=base.cov_JR + share_J1 * log_m))

  def missing(log_m: float) -> float:
    return float(reached(log_m)[0][0] - target_R[0])

  if missing(-FARTHEST) < 0 or missing(FARTHEST) > 0:
    return None
  log_m = float(brentq(missing, -FARTHEST, FARTHEST, xtol=1e-10))
  slope = (missing(log_m + 1e-5) - missing(log_m - 1e-5)) / 2e-5  # negative: more compute, less loss
  return log_m, (target_RP[0] - reached(log_m)[1][0]) / slope  # of the implicit function


def _compute(points: Points, arm: str, size: object) -> float:
  """Mean compute of an arm's runs of one size; the first covariate where there is no C."""
  log_x_R = points.log_x.get('C', next(iter(points.log_x.values())))
  return float(np.exp(log_x_R[(points.arm == arm) & (points.size == size)].mean()))


def _averaged(models: list[Candidate], found: list[tuple[float, np.ndarray]]) -> tuple[float, float, float]:
  """exp of a number with its 95 % interval, averaged over models that fit about as well.

  found: the number and its gradient in the parameters, by model. Own exponent and own floor have as many
  parameters and are seldom told apart, yet differ at the ends. Each gives a Student's t by the delta method;
  a model's weight is its likelihood, objective^-freedom/2.
  """
  parts = []
  for c, (value, gradient_P) in zip(models, found, strict=True):
    variance, freedom = variances(c.fit.noise, gradient_P[None])
    parts.append((value, float(np.sqrt(variance[0])), float(freedom[0]), c.fit.objective))
  freedom = models[0].fit.degrees_of_freedom
  weight = np.array([-0.5 * freedom * np.log(max(part[3], 1e-300)) for part in parts])
  weight = np.exp(weight - weight.max()) / np.exp(weight - weight.max()).sum()

  def quantile(level: float) -> float:
    def above(x: float) -> float:
      below = [stats.t.cdf((x - v) / max(s, 1e-12), f) for v, s, f, _ in parts]
      return float(weight @ below) - level

    each = [v + s * stats.t.ppf(level, f) for v, s, f, _ in parts]
    return each[0] if np.ptp(each) < 1e-9 else float(brentq(above, min(each), max(each)))

  middle = float(np.sum(weight * [part[0] for part in parts]))
  return tuple(float(np.exp(v)) for v in (middle, quantile(0.5 - LEVEL / 2), quantile(0.5 + LEVEL / 2)))
