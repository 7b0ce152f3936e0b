"""Does the law hold: rollout to held-out sizes, nested models of the arms, residuals, lack of fit.

Where: a fit -> here -> study.py; each is empty where there is no fit. Held-out error decides first; the
F test says whether the difference could be noise. Separate fits per arm are
ill-conditioned (Volkova 2602.07712), so every arm model here shares E and the coefficients, and
frees the exponents only to test them.
"""

import dataclasses
import functools

import numpy as np
import pandas as pd
from scipy import linalg

from mhc_jax.errors import ConfigError

from .fitting.estimate import E_GONE, Fit, fit
from .fitting.intervals import band, influence, predicted, residual_variance
from .fitting.laws import HUBER_WIDTH, ArmModel, Design, Law, Points, design, log_loss
from .fitting.noise import wald

ONE, OWN_EXPONENTS, OWN_E = 'one multiplier m per arm', 'm and own exponents per arm', 'm and own E per arm'
MANY = 200  # runs
FOLDS = 10  # at most so many groups of sizes are held out in turn


@dataclasses.dataclass(frozen=True)
class RolloutStep:
  """Fit on the k smallest sizes; errors in log loss on the rest (bias: predicted minus true).

  problem: why k sizes cannot be fitted; there are no errors then.
  """

  sizes_fitted: int
  runs_fitted: int
  runs_held_out: int
  problem: str | None
  extrapolation: float | None = None
  in_sample_error: float | None = None
  held_out_error: float | None = None
  bias: float | None = None
  coverage: float | None = None


def log_compute(points: Points) -> np.ndarray:
  """log C of every run, or the sum of its log covariates where there is no C: what sizes are ordered by."""
  return points.log_x['C'] if 'C' in points.log_x else sum(points.log_x.values())


def folded(points: Points) -> Points:
  """The points with sizes numbered by mean compute from 0 up, neighbours joined to at most FOLDS groups."""
  key_R = log_compute(points)
  size_R = np.unique(points.size, return_inverse=True)[1]
  order_G = np.argsort(np.argsort(np.bincount(size_R, key_R) / np.bincount(size_R)))
  count = len(order_G)
  return dataclasses.replace(points, size=(order_G * min(FOLDS, count) // count)[size_R])


def rollout(whole: Fit | None, width: float | str = HUBER_WIDTH) -> list[RolloutStep]:
  """For every k: fit the k smallest sizes, predict the runs of the larger ones (of arms that were fitted)."""
  if whole is None:
    return []
  points, law = folded(whole.points), whole.law
  name = 'C' if 'C' in points.log_x else law.covariates[0]
  out = []
  for k in range(1, int(points.size.max()) + 1):
    inside_R = points.size < k
    small, rest = points.take(inside_R), points.take(~inside_R)
    rest = rest.take(np.isin(rest.arm, small.arms))
    fitted = _fit_or_reason(k, small, len(rest), whole, width)
    if isinstance(fitted, str):
      out.append(RolloutStep(k, len(small), len(rest), fitted))
      continue
    seen = band(fitted, rest)
    error_R = np.log(seen.loss) - np.log(rest.loss)
    covered_R = (seen.new_low <= rest.loss) & (rest.loss <= seen.new_high)
    errors = {
      'extrapolation': np.exp(rest.log_x[name].max() - small.log_x[name].max()),
      'in_sample_error': _error(fitted, small),
      'held_out_error': np.mean(np.abs(error_R)),
      'bias': error_R.mean(),
      'coverage': covered_R.mean(),
    }
    out.append(RolloutStep(k, len(small), len(rest), None, **{key: float(v) for key, v in errors.items()}))
  return out


def starts_for(points: Points) -> int:
  """Starts of a refit: with many runs the start by variable projection is at the optimum's foot."""
  return 9 if len(points) < MANY else 0


def _fit_or_reason(k: int, small: Points, held_out: int, whole: Fit, width: float | str) -> Fit | str:
  """The fit to the k smallest sizes, or why there is none."""
  if k < 3:
    return f'{k} size{"s" * (k > 1)} for a constant and a power: 3 are needed'
  if not held_out:
    return 'no arm has runs on both sides'
  try:
    fitted = fit(small, whole.law, whole.design.arms, whole.problem.kind, width, starts_for(small))
  except ConfigError as error:  # too few runs for the parameters
    return str(error)
  if fitted.degrees_of_freedom < 1:
    return f'{len(small)} runs for {len(fitted.theta_P)} parameters'
  return fitted


@dataclasses.dataclass(frozen=True)
class Candidate:
  """One arm model in a nested comparison; F test against the simpler model it contains."""

  name: str
  fit: Fit
  width: float | str
  against: str | None
  f_statistic: float | None
  degrees: tuple[int, float] | None
  p_value: float | None

  @property
  def parameters(self) -> int:
    return len(self.fit.theta_P)

  @functools.cached_property
  def errors(self) -> 'Errors':
    """Fitted only where somebody asks: they take a fit for every size."""
    return errors(self.fit, self.width)

  def as_json(self) -> dict[str, object]:
    """Its numbers, without the fit."""
    test = {k: getattr(self, k) for k in ('against', 'f_statistic', 'degrees', 'p_value')}
    return {'name': self.name, 'parameters': self.parameters} | vars(self.errors) | test


@dataclasses.dataclass(frozen=True)
class Errors:
  """Mean |log error| of a law: of its own runs, of the largest size held out, of each size held out in turn.

  None where the rest cannot carry the fit.
  """

  in_sample_error: float | None
  held_out_error: float | None
  left_out_error: float | None


NO_ERRORS = Errors(None, None, None)


def restriction(big: Fit, small: Fit) -> np.ndarray:
  """Rows r with r @ theta_big = 0 exactly when the big model is the small one on the same runs.

  Both are linear maps to every run's log E, log A, exponents and log m: the big parameters that give the
  small model's are B^-1 S theta_small.
  """

  def stacked(d: Design) -> np.ndarray:
    return np.concatenate([m.reshape(-1, len(d.names)) for m in (d.e_RP, d.a_JRP, d.x_JRP, d.m_JRP)])

  embed = np.linalg.lstsq(stacked(big.design), stacked(small.design))[0]
  return linalg.null_space(embed.T).T


def nested_f(big: Fit, small: Fit) -> tuple[float, tuple[int, float], float] | None:
  """Wald F of the restrictions by the big fit's noise: (F, (q, degrees of freedom), p) or None."""
  rows = restriction(big, small)
  # Of a floor that ran to zero nothing can be tested.
  gone = [p.kind == 'constant' and big.boundaries.get(p.label) == E_GONE for p in big.design.parameters]
  unknown = big.noise.problem or np.abs(rows[:, gone]).max(initial=0) > 1e-9
  return None if unknown else wald(big.noise, rows, big.theta_P)


def split_levels(points: Points, axis: str) -> Points:
  """The same runs with an arm of its own for every value of an axis: multipliers free instead of r^phi."""
  log_r = points.axes[axis]
  names = [
    f'{arm}, {axis} = {np.exp(r):g}' if r else arm for arm, r in zip(points.arm.tolist(), log_r, strict=True)
  ]
  return dataclasses.replace(points, arm=np.array(names))


def arm_models(law: Law, points: Points) -> list[tuple[str, Points, ArmModel, str | None]]:
  """The nested questions: (its name, the runs, the model, the simpler model it is tested against)."""
  one = ONE
  out = [('no effect', points, ArmModel('none'), None)]
  if len(points.arms) > 1:
    out.append((one, points, ArmModel('common'), 'no effect'))
    if {'N', 'D'} <= set(law.covariates):
      out.append(('rho_N and rho_D per arm', points, ArmModel('both'), one))
    if 'C' in points.log_x:  # in L(C) a trend of m is an exponent of the arm's own, better conditioned
      middle = float(points.log_x['C'].mean())
      out.append((OWN_EXPONENTS, points, ArmModel('common', slope_at=middle), one))
    out.append((OWN_E, points, ArmModel('common', free_e=True), one))
  for axis in points.axes:
    power = f'm = r^phi along {axis}'
    out.append(
      (power, points, ArmModel('common', axes=(axis,)), one if len(points.arms) > 1 else 'no effect')
    )
    out.append((f'm free at every {axis}', split_levels(points, axis), ArmModel('common'), power))
  return out


def nested(
  whole: Fit | None, width: float | str | None = None, start_count: int | None = None
) -> list[Candidate]:
  """Fits each arm model to a fit's runs; its errors, and the F test against the simpler one.

  Empty for one arm without an axis, too. width: of Huber's loss, None that of the fit.
  """
  if whole is None or (len(whole.points.arms) < 2 and not whole.points.axes):
    return []
  width = whole.problem.width if width is None else width
  count = starts_for(whole.points) if start_count is None else start_count
  done: dict[str, Candidate] = {}
  for name, runs, arms, against in arm_models(whole.law, whole.points):
    arms = dataclasses.replace(arms, reference=whole.design.arms.reference)
    try:
      fitted = fit(runs, whole.law, arms, whole.problem.kind, width, count)
    except ConfigError:
      continue
    test = nested_f(fitted, done[against].fit) if against in done else None
    done[name] = Candidate(name, fitted, width, against, *(test or (None,) * 3))
  return list(done.values())


def errors(fitted: Fit, width: float | str) -> Errors:
  """Mean |log error| of a law in sample, on the largest size held out, and on each size held out in turn."""
  points = folded(fitted.points)
  left_out = [_held_out(fitted, points, width, size) for size in range(int(points.size.max()) + 1)]
  every = None if None in left_out else float(np.mean(left_out))
  return Errors(_error(fitted, fitted.points), left_out[-1], every)


def _error(fitted: Fit, points: Points) -> float:
  return float(np.mean(np.abs(np.log(predicted(fitted, points)) - np.log(points.loss))))


def _held_out(whole: Fit, points: Points, width: float | str, size: int) -> float | None:
  """Mean |log error| on the size left out, or None when the rest cannot carry the fit."""
  out_R = points.size == size
  rest, held = points.take(~out_R), points.take(out_R)
  if not len(rest) or set(held.arms) - set(rest.arms):
    return None
  law, arms = whole.law, whole.design.arms
  if len(rest) <= len(design(law, rest, arms).names):
    return None
  return _error(fit(rest, law, arms, whole.problem.kind, width, start_count=0), held)


def residuals(fitted: Fit | None) -> pd.DataFrame:
  """Measured minus fitted in percent, influence and covariates of every run of the law; empty without one."""
  if fitted is None:
    return pd.DataFrame()
  points = fitted.points
  percent = 100 * (np.log(points.loss) - log_loss(fitted.theta_P, fitted.design)[0])
  columns = {'arm': points.arm, 'run_id': points.run, 'residual_percent': percent, 'loss': points.loss}
  columns['cooks_distance'] = influence(fitted)[1]
  return pd.DataFrame(columns | {name: np.exp(points.log_x[name]) for name in 'NDC'})


@dataclasses.dataclass(frozen=True)
class LackOfFit:
  """How far runs are from the law, and seeds from each other (None for one seed), over the loss."""

  scatter: float
  seeds: float | None

  @property
  def beyond_seeds(self) -> bool:
    """Whether the law misses by more than seeds explain."""
    return self.seeds is not None and self.scatter > 1.5 * self.seeds


def lack_of_fit(fitted: Fit | None, seed_spread: float | None) -> LackOfFit | None:
  """seed_spread: in nats."""
  if fitted is None:
    return None
  seeds = None if seed_spread is None else seed_spread / float(fitted.points.loss.mean())
  return LackOfFit(float(np.sqrt(residual_variance(fitted))), seeds)
