"""Best size and token count at each compute budget, and their power laws (Hoffmann 2203.15556, approach 2).

Where: the grid's runs -> minima.py -> here -> study.py.
"""

import dataclasses

import numpy as np
import pandas as pd

from .minima import METHODS, Minimum, PowerLaw, minima_by_budget, power_law


@dataclasses.dataclass(frozen=True)
class Optimum:
  """N*(C) or D*(C) of one arm by one method: the minimum at each budget (FLOPs), and the law through them.

  law: None where fewer than two minima lie inside the grid.
  """

  arm: str
  name: str  # N* or D*
  method: str
  budgets: list[tuple[float, Minimum]]
  law: PowerLaw | None

  @property
  def inside(self) -> list[tuple[float, float]]:
    """(budget, optimum) where the minimum is inside the grid."""
    return [(c, float(np.exp(m.log_x))) for c, m in self.budgets if m.log_x is not None]


def optima(grid: pd.DataFrame, params: str) -> list[Optimum]:
  """N* and D* of every arm by every method, of budgets with a curve; seeds are averaged."""
  out = []
  for name, column in (('N*', f'params_{params}'), ('D*', 'tokens')):
    for method in METHODS:
      for arm, own in grid.groupby('arm', sort=False):
        log_c, log_x = np.log(own['flops'].to_numpy()), np.log(own[column].to_numpy())
        minima = minima_by_budget(log_c, log_x, own['validation_loss'].to_numpy(), method)
        budgets = [(float(np.exp(c)), m) for c, m in minima if len(m.curve_log_x)]
        if budgets:
          known = [(np.log(c), m.log_x) for c, m in budgets if m.log_x is not None]
          law = power_law(*np.array(known).T) if known else None
          out.append(Optimum(arm, name, method, budgets, law))
  return out


def as_json(o: Optimum) -> dict[str, object]:
  """Its numbers, without the curves."""
  law = {'exponent': None, 'coefficient': None, 'low': None, 'high': None}
  if o.law is not None:
    law = {'exponent': o.law.exponent, 'coefficient': np.exp(o.law.log_coefficient)}
    law |= {'low': o.law.low, 'high': o.law.high}
  budgets = [
    {'flops': c, 'value': None if m.log_x is None else np.exp(m.log_x), 'loss': m.loss, 'problem': m.problem}
    for c, m in o.budgets
  ]
  return {'arm': o.arm, 'optimum': o.name, 'method': o.method} | law | {'budgets': budgets}
