"""Loss at a point that was not measured: `mhc fit ... --predict N=7e10,D=1.4e12`.

Where: after estimate.py; the bands are those of intervals.py, the rules those of identify.py.
"""

import numpy as np

from mhc_jax.errors import ConfigError

from .estimate import Fit
from .identify import doubts, unknown_floor, verdicts
from .intervals import LEVEL, band, delta_method
from .laws import Points, natural_map
from .points import AXIS, COVARIATES, completed
from .table import number

FAR = 4.0  # a covariate this factor outside the runs is said
SHOWN = ('loss', 'low', 'high', 'new_run_low', 'new_run_high')


def parse_point(text: str) -> dict[str, float | str]:
  """'N=70B,D=1.4e12,arm=mhc' -> {'N': 7e10, 'D': 1.4e12, 'arm': 'mhc'}; raises ConfigError.

  sigma: relative noise of a run there; loss: what was measured there, in nats.
  """
  out: dict[str, float | str] = {}
  for part in text.split(','):
    name, _, value = part.partition('=')
    if name in out:
      raise ConfigError(f'--predict: {name} is given twice')
    if name == 'arm':
      out[name] = value
      continue
    if name not in (*COVARIATES, 'sigma', 'loss') and not name.startswith(AXIS):
      raise ConfigError(
        f'--predict: {part!r} is not one of {", ".join(COVARIATES)}, arm, axis:NAME, sigma, loss'
      )
    try:
      out[name] = number(value)
    except ValueError:
      out[name] = -1.0
    if not 0 < out[name] < np.inf:
      raise ConfigError(f'--predict: {part!r} must be a positive number')
  return out


def prediction(
  fit: Fit, at: dict[str, float | str], level: float = LEVEL, anyway: bool = False
) -> dict[str, object]:
  """The loss at a point, the bands of the curve and of a new run; or the problem that forbids them.

  anyway: the numbers all the same, and the problem under `extrapolated`. range: which covariates lie far
  outside the runs. relative_error: predicted over measured loss, less 1, where the loss is given.
  """
  arms = fit.design.arms
  arm = at.get('arm', arms.reference)
  if arm not in fit.points.arms:
    raise ConfigError(f'--predict: no arm {arm!r}; the arms are {", ".join(fit.points.arms)}')
  unknown = {name for name in at if name.startswith(AXIS)} - {f'{AXIS}{axis}' for axis in arms.axes}
  if unknown:
    raise ConfigError(f'--predict: {min(unknown)} is not a column of --columns')
  log_x = completed({name: np.log([v]) for name, v in at.items() if name in COVARIATES})
  missing = [name for name in fit.law.covariates if name not in log_x]
  if missing:
    raise ConfigError(f'--predict: law {fit.law.name} needs {missing[0]}')
  one = np.zeros(1)
  axes = {axis: np.log([at.get(f'{AXIS}{axis}', 1.0)]) for axis in arms.axes}
  sigma = np.array([at['sigma']]) if 'sigma' in at else None
  b = band(fit, Points(log_x, one, np.array([arm]), one, one, one, sigma, axes), level)
  values = (b.loss, b.low, b.high, b.new_low, b.new_high)
  numbers = {name: float(v[0]) for name, v in zip(SHOWN, values, strict=True)}
  problem = _problem(fit, log_x)
  if problem is None and not np.isfinite(b.high[0]):
    problem = 'the law has no finite band there'
  if 'loss' in at:
    numbers |= {'measured': at['loss'], 'relative_error': numbers['loss'] / at['loss'] - 1}
  if problem and not anyway:
    numbers = dict.fromkeys(numbers)
  said = {'problem': None if anyway else problem, 'extrapolated': problem if anyway else None}
  return {'at': at, 'arm': arm} | numbers | said | {'range': _range(fit, log_x)}


def _range(fit: Fit, log_x: dict[str, np.ndarray]) -> str | None:
  """Which covariates lie a factor of FAR or more outside the runs."""
  out = []
  for name in fit.law.covariates:
    own = fit.points.log_x[name]
    for factor, words in ((own.min() - log_x[name][0], 'below'), (log_x[name][0] - own.max(), 'above')):
      if factor > np.log(FAR) - 1e-9:
        out.append(f'{name} lies a factor of {np.exp(factor):.3g} {words} the runs')
  return ', '.join(out) or None


def _problem(fit: Fit, log_x: dict[str, np.ndarray]) -> str | None:
  """Why the law may not be read at a point: an unsound fit, or outside the runs what decides is not known.

  Beyond the largest runs that is the floor E, below the smallest the exponents.
  """
  if doubts(fit):
    return 'not fitted soundly: ' + '; '.join(doubts(fit))
  own = fit.points.log_x
  beyond = [name for name in fit.law.covariates if log_x[name][0] > own[name].max() + 1e-9]
  below = {name for name in fit.law.covariates if log_x[name][0] < own[name].min() - 1e-9}
  ends = delta_method(fit)
  reasons = verdicts(fit, ends)
  floor = unknown_floor(fit, reasons, ends)
  if beyond and floor:
    return f'beyond the largest {" and ".join(beyond)} the floor E decides, and it is {floor}'
  parameters = natural_map(fit.design)[0]
  for term in fit.law.terms:
    names = sorted(below & {name for name, _ in term.covariates})
    unknown = [p.label for p in parameters if p.base == term.exponent and reasons[p.label]]
    if names and unknown:
      return f'below the smallest {names[0]} {unknown[0]} decides, and it is {reasons[unknown[0]]}'
  return None
