"""Which law a grid of runs can carry, and which of a fit's numbers may be printed.

Where: between estimate.py and everything that prints. All identifiability rules are here, and only
here; the report quotes RULES. A number that fails its rule is replaced by the sentence returned.
"""

import dataclasses

import numpy as np

from .estimate import Fit
from .intervals import delta_method
from .laws import LAWS, Law, Points, natural_map

MIN_DEGREES_OF_FREEDOM = 3
MIN_SIZES = 4  # a constant plus a power has 3 numbers: with 3 sizes every curve fits
MIN_RANGE = 8.0  # largest over smallest compute
MAX_CORRELATION = 0.95  # of log N and log D
MIN_LEVELS = 3  # of N, and of D at like N
MAX_CONDITION = 1e8
MAX_FACTOR = 4.0  # upper over lower end of a 95 % interval, for E, exponents and multipliers
MAX_COEFFICIENT_FACTOR = 1e3  # A and B are extrapolations to one parameter, one token, one FLOP

RULES = (
  f'A law is fitted only to at least {MIN_SIZES} model sizes whose compute spans a factor of '
  f'{MIN_RANGE:g} or more, with at least {MIN_DEGREES_OF_FREEDOM} more runs than parameters.',
  f'L(N, D) is used when log N and log D correlate by less than {MAX_CORRELATION:g} and there are '
  f'at least {MIN_LEVELS} levels of N and of D at like N; otherwise L(C).',
  'A fit whose optimiser did not converge, or whose best objective was reached from too few '
  'starts, prints no numbers.',
  f'E, exponents and compute multipliers are printed when their 95 % interval is narrower than a '
  f'factor of {MAX_FACTOR:g} and they are not at a boundary (E -> 0, exponent -> 0); coefficients '
  f'(A, B) within a factor of {MAX_COEFFICIENT_FACTOR:g}. E must also have its interval below the '
  'smallest measured loss. Except for multipliers, the condition number of the centred problem must '
  f'be below {MAX_CONDITION:.0e}.',
  'A multiplier is a horizontal shift inside the range of the data, so it can be printed even '
  'where E or an exponent, which are extrapolations, cannot.',
)


@dataclasses.dataclass(frozen=True)
class Choice:
  """The law that the grid identifies (or None), and why, in a sentence."""

  law: Law | None
  reason: str


def _levels(log_value: np.ndarray, tolerance: float = 0.1) -> int:
  """Distinct values of a log covariate; values closer than 10 % count as one."""
  return int(1 + np.sum(np.diff(np.sort(log_value)) > tolerance))


def choose_law(points: Points) -> Choice:
  """L(N, D) when the grid separates N from D, else L(C), else none. Reads log_x N, D, C."""
  if not len(points):
    return Choice(None, 'There is no finished run.')
  sizes = len(set(points.size.tolist()))
  span = float(np.exp(np.ptp(points.log_x['C'])))
  if sizes < MIN_SIZES:
    return Choice(
      None,
      f'No law is fitted: the finished runs cover {sizes} model size{"s" * (sizes != 1)}, and a '
      f'constant plus a power needs at least {MIN_SIZES}.',
    )
  if span < MIN_RANGE:
    return Choice(
      None,
      f'No law is fitted: compute spans a factor of {span:.1f} only; {MIN_RANGE:g} are needed.',
    )
  n, d = points.log_x['N'], points.log_x['D']
  levels_d = max(_levels(d[points.size == g]) for g in dict.fromkeys(points.size.tolist()))
  spread = min(np.std(n), np.std(d))
  correlation = abs(float(np.corrcoef(n, d)[0, 1])) if spread > 1e-3 else 1.0
  if levels_d >= MIN_LEVELS and _levels(n) >= MIN_LEVELS and correlation < MAX_CORRELATION:
    return Choice(
      LAWS['chinchilla'],
      f'L(N, D) is fitted: {_levels(n)} levels of N, up to {levels_d} of D at one size, and log N '
      f'and log D correlate by {correlation:.2f}.',
    )
  if _levels(d) == 1:
    path = 'every run uses about the same number of tokens, so the token term is part of E'
  else:
    budgets = 'one token budget' if levels_d == 1 else f'at most {levels_d} token budgets'
    path = (
      f'each model size was trained on {budgets}, and log N and log D correlate by '
      f'{correlation:.2f}, so alpha and beta cannot be told apart'
    )
  return Choice(LAWS['compute'], f'L(C) is fitted, not L(N, D): {path}.')


def shape_law(points: Points) -> Choice:
  """Width x depth x D, less the terms that the grid cannot tell: what does not vary, and tied tokens."""
  base = choose_law(points)
  if base.law is None:
    return base
  whole, note = LAWS['width_depth'], ''
  levels = {name: _levels(points.log_x[name]) for name in whole.covariates}
  kept = [name for name in whole.covariates if levels[name] > 1]
  others = [points.log_x[name] for name in kept if name != 'D']
  if not others:
    return Choice(None, 'every run has the same width and depth.')
  if 'D' in kept and _multiple_correlation(points.log_x['D'], others) >= MAX_CORRELATION:
    kept.remove('D')
    note = '; tokens grow with the model, so the exponents include their part'
  needed = MIN_SIZES if len(kept) == 1 else MIN_LEVELS
  words = {'W': 'widths', 'H': 'depths', 'D': 'token budgets'}
  few = [f'{levels[name]} {words[name]}' for name in kept if levels[name] < needed]
  if few:
    return Choice(None, f'{" and ".join(few)} cannot test a power law ({needed} are needed).')
  if len(others) == 2 and _multiple_correlation(others[0], others[1:]) >= MAX_CORRELATION:
    return Choice(None, 'width and depth grow together.')
  law = whole.keep(kept)
  return Choice(law, f'{law.formula}{note}.')


def _multiple_correlation(y: np.ndarray, others: list[np.ndarray]) -> float:
  """Correlation of y with its best linear prediction from the others."""
  centred = np.stack([x - x.mean() for x in others], 1)
  y = y - y.mean()
  return float(np.linalg.norm(centred @ np.linalg.lstsq(centred, y)[0]) / np.linalg.norm(y))


def doubts(fit: Fit) -> list[str]:
  """Reasons that forbid every number of a fit; empty when none does."""
  out = []
  sizes = len(set(fit.points.size.tolist()))
  if sizes < MIN_SIZES:
    out.append(f'only {sizes} model sizes (at least {MIN_SIZES} are needed)')
  if fit.degrees_of_freedom < MIN_DEGREES_OF_FREEDOM:
    out.append(
      f'{len(fit.points)} runs for {len(fit.theta_P)} parameters '
      f'(at least {MIN_DEGREES_OF_FREEDOM} more runs are needed)'
    )
  out += fit.warnings
  return out


def verdicts(fit: Fit, intervals: dict[str, list[float]] | None = None) -> dict[str, str | None]:
  """Parameter name -> None when its number may be printed, else the reason in words."""
  intervals = delta_method(fit) if intervals is None else intervals
  everything = doubts(fit)
  kinds = {parameter.label: parameter.kind for parameter in natural_map(fit.design)[0]}
  return {
    label: 'not fitted soundly: ' + '; '.join(everything)
    if everything
    else _verdict(fit, kinds.get(label, 'derived'), ends, fit.boundaries.get(label))
    for label, ends in intervals.items()
  }


def _verdict(fit: Fit, kind: str, ends: list[float], boundary: str | None) -> str | None:
  if boundary:
    return f'not identified: {boundary}'
  if kind not in ('multiplier', 'axis') and fit.condition > MAX_CONDITION:
    return f'not identified: condition number {fit.condition:.0e}'
  if kind == 'axis':
    return None  # an exponent of rank may be zero or negative: the interval says all
  low, high = ends
  limit = MAX_COEFFICIENT_FACTOR if kind == 'coefficient' else MAX_FACTOR
  if kind == 'constant' and high >= fit.points.loss.min():
    return 'not identified: its 95 % interval reaches the smallest measured loss'
  if not np.isfinite(high) or low <= 0 or high / low > limit:
    return f'not identified: its 95 % interval is wider than a factor of {limit:g}'
  return None
