"""Which law a grid of runs can carry, and which of a fit's numbers may be printed.

Where: between estimate.py and everything that prints. All identifiability rules are here, and only
here; the report quotes RULES. A number that fails its rule is replaced by the sentence returned.
"""

import dataclasses

import numpy as np

from .estimate import Fit
from .intervals import delta_method
from .laws import LAWS, Law, Parameter, Points, Term, natural_map, power_covariates
from .noise import DEAD, null_space

MIN_DEGREES_OF_FREEDOM = 3
MIN_SIZES = 4  # a constant plus a power has 3 numbers: with 3 sizes every curve fits
MIN_RANGE = 8.0  # largest over smallest compute
MAX_CORRELATION = 0.95  # of a term's log covariate with the best mixture of the other terms'
MIN_LEVELS = 3  # of N, and of D at like N
MAX_FACTOR = (
  4.0  # upper over lower end of a 95 % interval, of a multiplier, and of E where a law is extrapolated
)
NOTHING = {'constant': np.inf, 'coefficient': 1e9}  # factor of an interval that says nothing
TIGHT = 1.1  # a floor known this well may be used though runs have reached it
NO_EXPONENT = 2.0  # width of an exponent's interval that says nothing

RULES = (
  f'A law is fitted only to at least {MIN_SIZES} model sizes whose compute spans a factor of '
  f'{MIN_RANGE:g} or more, with at least {MIN_DEGREES_OF_FREEDOM} more runs than parameters.',
  f'L(N, D) is used when log N and log D correlate by less than {MAX_CORRELATION:g} and there are '
  f'at least {MIN_LEVELS} levels of N and of D at like N; otherwise L(C). Where the terms of a law move '
  'together as much, their exponents and coefficients, and E, are not printed.',
  'A parameter is printed only if the runs tell it apart from the others: it must lie in the row space of '
  'the Jacobian. What varies with another or never is named.',
  'A fit whose optimiser did not converge, or whose best objective was reached from too few '
  'starts, prints no numbers; nor does one whose noise cannot be told.',
  'Every parameter that the runs tell is printed, however wide its interval: to print only what looks narrow '
  'would make intervals cover too seldom. Not at a boundary (E -> 0, exponent -> 0); E at its boundary takes '
  'exponents and coefficients with it, which would take its place.',
  f'A compute multiplier is printed when its 95 % interval is narrower than a factor of {MAX_FACTOR:g}. A '
  'law is drawn or read beyond the runs only if E is known as well, below the smallest measured loss or '
  'within '
  f'{TIGHT - 1:.0%}.',
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
  sizes = _sizes(fit)
  if sizes < MIN_SIZES:
    out.append(f'only {sizes} model size{"s" * (sizes != 1)} (at least {MIN_SIZES} are needed)')
  name = 'C' if 'C' in fit.points.log_x else fit.law.covariates[0]
  span = float(np.exp(np.ptp(fit.points.log_x[name])))
  if name == 'C' and span < MIN_RANGE:
    out.append(f'compute spans a factor of {span:.1f} only ({MIN_RANGE:g} are needed)')
  if fit.degrees_of_freedom < MIN_DEGREES_OF_FREEDOM:
    out.append(
      f'{len(fit.points)} runs for {len(fit.points) - fit.degrees_of_freedom} parameters '
      f'(at least {MIN_DEGREES_OF_FREEDOM} more runs are needed)'
    )
  return out + ([fit.noise.problem] if fit.noise.problem else []) + list(fit.warnings)


def _sizes(fit: Fit) -> int:
  """Model sizes; of a law of one covariate that is not the model's, its levels."""
  if {'N', 'C', 'W', 'H'} & set(fit.law.covariates):
    return len(set(fit.points.size.tolist()))
  return max(_levels(log_x_R) for log_x_R in power_covariates(fit.law, fit.points))


def verdicts(fit: Fit, intervals: dict[str, list[float]] | None = None) -> dict[str, str | None]:
  """Parameter name -> None when its number may be printed, else the reason in words."""
  intervals = delta_method(fit) if intervals is None else intervals
  everything = '; '.join(doubts(fit))
  parameters = {parameter.label: parameter for parameter in natural_map(fit.design)[0]}
  design = _tied_terms(fit) | confounding(fit)
  out = {}
  for label, ends in intervals.items():
    parameter = parameters.get(label, Parameter('derived', label))
    # The design first: what it cannot tell also keeps an optimiser from one answer.
    reason = design.get(label) or (None if everything else _boundary(fit, parameter))
    out[label] = f'not identified: {reason}' if reason else _verdict(fit, parameter.kind, ends)
    if everything and not reason:
      out[label] = f'not fitted soundly: {everything}'
  for label in (k for k, parameter in parameters.items() if parameter.kind == 'exponent' and out[k]):
    if 'a' in out and out['a'] is None:
      out['a'] = f'not identified: {label} is not'
  return out


def _boundary(fit: Fit, parameter: Parameter) -> str | None:
  """The boundary that a parameter, or the E that it would take the place of, has run to."""
  own = fit.boundaries.get(parameter.label)
  if own or parameter.kind not in ('exponent', 'coefficient', 'derived'):
    return own
  gone = [p.label for p in fit.design.parameters if p.kind == 'constant' and p.label in fit.boundaries]
  return f'{gone[0]} is at its boundary (E -> 0), and the exponents take its place' if gone else None


def _verdict(fit: Fit, kind: str, ends: list[float]) -> str | None:
  if kind in ('axis', 'slope'):
    return None  # an exponent of rank or of the gain may be zero or negative: the interval says all
  low, high = ends
  if kind in ('exponent', 'derived'):
    vague = not high - low < NO_EXPONENT
    return f'not identified: its 95 % interval is {low:.2g} to {high:.2g}' if vague else None
  limit = NOTHING.get(kind, MAX_FACTOR)
  if not np.isfinite(high) or low <= 0 or high / low > limit:
    return f'not identified: its 95 % interval is wider than a factor of {limit:g}'
  return None


def unknown_floor(fit: Fit, reasons: dict[str, str | None], intervals: dict[str, list[float]]) -> str | None:
  """Why the law must not be read beyond its runs, where E decides, or None.

  reasons: verdicts.
  """
  for label in (p.label for p in natural_map(fit.design)[0] if p.kind == 'constant'):
    low, high = intervals[label]
    if reasons[label]:
      return reasons[label]
    if high / low > MAX_FACTOR or (high >= fit.points.loss.min() and high / low > TIGHT):
      return f'known only as {low:.3g} to {high:.3g}'
  return None


def _tied_terms(fit: Fit) -> dict[str, str]:
  """Label -> reason, of E, coefficients and exponents of a law whose covariates move together."""
  cov_JR = power_covariates(fit.law, fit.points)
  moving = [j for j, log_x_R in enumerate(cov_JR) if np.ptp(log_x_R) > 1e-9]
  for j in moving:
    others = [cov_JR[k] for k in moving if k != j]
    correlation = _multiple_correlation(cov_JR[j], others) if others else 0.0
    if correlation >= MAX_CORRELATION:
      names = _listed([_covariate(fit.law.terms[k]) for k in moving])
      reason = f'{names} move together (log correlation {correlation:.4f})'
      kinds = ('constant', 'coefficient', 'exponent')
      labels = [p.label for p in natural_map(fit.design)[0] if p.kind in kinds]
      return dict.fromkeys([*labels, 'a'], reason)
  return {}


def _covariate(term: Term) -> str:
  return '/'.join(name for name, _ in term.covariates)


def _listed(names: list[str]) -> str:
  return ', '.join(names[:-1]) + ' and ' + names[-1] if len(names) > 1 else names[0]


def confounding(fit: Fit) -> dict[str, str]:
  """Label of each parameter outside the row space of the Jacobian -> why the runs cannot tell it."""
  length_P = np.linalg.norm(fit.noise.jac_RP, axis=0)
  # A parameter that no run sees at all; of an E that ran to zero its boundary tells.
  unseen = [p.kind != 'constant' for p in fit.design.parameters] & (
    length_P < DEAD * np.linalg.norm(length_P)
  )
  length_P = np.maximum(length_P, 1e-100)  # its inverse squared must stay finite
  null_KP = np.vstack([null_space(fit.noise.jac_RP), np.diag(1 / length_P)[unseen]])
  if not len(null_KP):
    return {}
  parameters, map_ = natural_map(fit.design)
  out = {}
  for parameter, row_P in zip(parameters, map_, strict=True):
    moved = np.abs(null_KP @ row_P) > 1e-6 * np.linalg.norm(row_P / length_P)
    if moved.any():
      direction_P = null_KP[int(np.argmax(np.abs(null_KP @ row_P)))] * length_P
      inside = np.abs(direction_P) > 1e-6 * np.abs(direction_P).max()
      together = [p for p, used in zip(fit.design.parameters, inside, strict=True) if used]
      out[parameter.label] = _why(fit, parameter, together)
  return out


def _why(fit: Fit, parameter: Parameter, together: list[Parameter]) -> str:
  """In the words of the design: what never varies, what moves together, who has too few runs."""
  points, kinds = fit.points, {p.kind for p in together}
  axes = [p.of for p in together if p.kind == 'axis']
  arms = [p.of for p in together if p.kind == 'multiplier']
  fixed = [axis for axis in axes if np.ptp(points.axes[axis]) == 0]
  if fixed:
    return f'the {fixed[0]} never varies'
  if axes and arms:
    known = [_known_product(fit, axis, arm) for axis in axes for arm in dict.fromkeys(arms)]
    return f'the {axes[0]} and the arm move together' + ''.join(k for k in known if k)
  if {'rho_N', 'rho_D'} <= {p.base for p in together}:
    count = int((points.arm == arms[0]).sum())
    runs = 'one run' if count == 1 else f'{count} runs of {arms[0]} that move N and D together'
    return f'{runs} cannot tell rho_N from rho_D'
  if kinds & {'coefficient', 'exponent', 'constant'}:
    constant = [
      _covariate(term)
      for term, log_x_R in zip(fit.law.terms, power_covariates(fit.law, points), strict=True)
      if np.ptp(log_x_R) < 1e-9
    ]
    if constant:
      return f'{_listed(constant)} never varies: its term is part of E'
    for term, log_x_R in zip(fit.law.terms, power_covariates(fit.law, points), strict=True):
      if (
        term.exponent in {p.base for p in together}
        and 'constant' in kinds
        and _levels(log_x_R, 1e-6) < MIN_LEVELS
      ):
        return (
          f'{_covariate(term)} has {_levels(log_x_R, 1e-6)} values; a constant and a power need {MIN_LEVELS}'
        )
    moving = {t.exponent: _covariate(t) for t in fit.law.terms}
    if kinds == {'coefficient', 'exponent'} and len(together) == 2:
      return f'the term of {moving[together[1].base]} shows at one of its values only'
    named = list(dict.fromkeys(moving[p.base] for p in together if p.kind == 'exponent'))
    if len(named) > 1:
      return f'{_listed(named)} move together'
  return f'the runs tell only a combination of {_listed([p.label for p in together])}'


def _known_product(fit: Fit, axis: str, arm: str) -> str:
  """'; only m[b] 4^phi = 1.50 is known', where all runs of an arm are at one value of an axis."""
  log_r_R = fit.points.axes[axis][fit.points.arm == arm]
  if not len(log_r_R) or np.ptp(log_r_R) > 0 or log_r_R[0] == 0:
    return ''
  value = fit.parameters[f'm[{arm}]'] * np.exp(log_r_R[0] * fit.parameters[f'phi[{axis}]'])
  return f'; only m[{arm}] {np.exp(log_r_R[0]):g}^phi[{axis}] = {value:.3g} is known'
