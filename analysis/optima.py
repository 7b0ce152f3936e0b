"""Best size and token count at each compute budget, and their power laws (Hoffmann 2203.15556, approach 2).

Where: the grid's runs -> minima.py -> here -> study.py, and `mhc fit --isoflop`.
"""

import dataclasses
import itertools

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from .fitting.laws import Points
from .minima import METHODS, Minimum, PowerLaw, minima_by_budget, power_law


@dataclasses.dataclass(frozen=True)
class Optimum:
  """N*, D* or D*/N* of one arm by one method: the minimum at each budget (FLOPs), and the law through them.

  law: None where fewer than two minima lie inside the grid.
  """

  arm: str
  name: str  # N*, D* or D*/N*
  method: str
  budgets: list[tuple[float, Minimum]]
  law: PowerLaw | None

  @property
  def inside(self) -> list[tuple[float, float]]:
    """(budget, optimum) where the minimum is inside the grid."""
    return [(c, float(np.exp(m.log_x))) for c, m in self.budgets if m.log_x is not None]

  def at(self, flops: float) -> tuple[float, float | None, float | None]:
    """The law at a budget, and the ends of its band; only where there is a law."""
    return tuple(v if v is None else float(np.exp(v)) for v in self.law.at(np.log(flops)))


def optimum(
  arm: str,
  name: str,
  method: str,
  log: tuple[np.ndarray, np.ndarray],
  loss: np.ndarray,
  level: float = 0.95,
  in_nats: bool = False,
) -> Optimum:
  """The minimum of loss over x at every budget, and the law through those inside the grid.

  log: (log C, log x) of every run.
  """
  minima = minima_by_budget(*log, loss, method, in_nats)
  return _with_law(arm, name, method, [(float(np.exp(c)), m) for c, m in minima], level)


def _with_law(
  arm: str, name: str, method: str, budgets: list[tuple[float, Minimum]], level: float
) -> Optimum:
  known = [(np.log(c), m.log_x) for c, m in budgets if m.log_x is not None]
  return Optimum(arm, name, method, budgets, power_law(*np.array(known).T, level) if known else None)


def ratio(d: Optimum, n: Optimum, level: float = 0.95) -> Optimum:
  """Tokens per parameter at the optimum, D*/N*, where both are inside the grid."""
  budgets = []
  for (c, above), (_, below) in zip(d.budgets, n.budgets, strict=True):
    problem = above.problem or below.problem
    value = None if problem else above.log_x - below.log_x
    loss = None if problem else below.loss
    budgets.append((c, Minimum(value, loss, problem, np.array([]), np.array([]))))
  return _with_law(d.arm, 'D*/N*', d.method, budgets, level)


def optima(grid: pd.DataFrame, params: str) -> list[Optimum]:
  """N* and D* of every arm by every method, of budgets with a curve; seeds are averaged."""
  out = []
  for name, column in (('N*', f'params_{params}'), ('D*', 'tokens')):
    for method in METHODS:
      for arm, own in grid.groupby('arm', sort=False):
        log_c, log_x = np.log(own['flops'].to_numpy()), np.log(own[column].to_numpy())
        o = optimum(arm, name, method, (log_c, log_x), own['validation_loss'].to_numpy())
        budgets = [(c, m) for c, m in o.budgets if len(m.curve_log_x)]
        if budgets:
          out.append(dataclasses.replace(o, budgets=budgets))
  return out


def optima_of_points(points: Points, level: float = 0.95, in_nats: bool = False) -> list[Optimum]:
  """N*, D* and D*/N* of every arm by every method; raises ConfigError without N, D and C.

  Budgets of runs with C as given, or 6 N D.
  """
  if not {'N', 'D', 'C'} <= set(points.log_x):
    raise ConfigError('--isoflop needs two of N=, D= and C= in --columns')
  out = []
  for arm in points.arms:
    own = points.take(points.arm == arm)
    for method in METHODS:
      n, d = (
        optimum(arm, f'{x}*', method, (own.log_x['C'], own.log_x[x]), own.loss, level, in_nats) for x in 'ND'
      )
      out += [n, d, ratio(d, n, level)]
  return out


def predicted(best: list[Optimum], at: dict[str, float | str]) -> list[dict[str, object]]:
  """N*, D* and D*/N* of each arm (or the one asked for) by each method at a budget C; raises ConfigError.

  problem: why there are none; range: how far C lies from the budgets.
  """
  arms = dict.fromkeys(o.arm for o in best)
  if set(at) - {'C', 'arm'} or 'C' not in at:
    raise ConfigError('--predict: with --isoflop write C=.., or C=..,arm=NAME')
  if at.get('arm', best[0].arm) not in arms:
    raise ConfigError(f'--predict: no arm {at["arm"]!r}; the arms are {", ".join(arms)}')
  out = []
  for arm, method in itertools.product([at['arm']] if 'arm' in at else arms, METHODS):
    own = [o for o in best if (o.arm, o.method) == (arm, method)]
    row = {'at': at, 'arm': arm, 'method': method, 'problem': None, 'range': None}
    if any(o.law is None for o in own):
      row['problem'] = 'fewer than two budgets have a minimum inside the grid'
    for o in own:
      values = o.at(at['C']) if o.law is not None else (None,) * 3
      row |= dict(zip((o.name, f'{o.name} low', f'{o.name} high'), values, strict=True))
    inside = [c for c, _ in own[0].inside]
    if inside and not min(inside) <= at['C'] <= max(inside):
      far, words = (
        (at['C'] / max(inside), 'above') if at['C'] > max(inside) else (min(inside) / at['C'], 'below')
      )
      row['range'] = f'C lies a factor of {far:.3g} {words} the budgets'
    out.append(row)
  return out


def as_json(o: Optimum) -> dict[str, object]:
  """Its numbers, without the curves."""
  law = {'exponent': None, 'coefficient': None, 'low': None, 'high': None}
  law |= {'coefficient_low': None, 'coefficient_high': None}
  if o.law is not None:
    law = {'exponent': o.law.exponent, 'coefficient': np.exp(o.law.log_coefficient)}
    law |= {key: getattr(o.law, key) for key in ('low', 'high', 'coefficient_low', 'coefficient_high')}
  budgets = [
    {'flops': c, 'value': None if m.log_x is None else np.exp(m.log_x), 'loss': m.loss, 'problem': m.problem}
    for c, m in o.budgets
  ]
  return {'arm': o.arm, 'optimum': o.name, 'method': o.method} | law | {'budgets': budgets}
