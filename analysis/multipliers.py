"""Compute multipliers of the arms in three currencies: FLOPs, equal size and tokens, seconds.

Where: the fitted law -> here -> study.py. Every number passes the rules of identify.py.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from .compare import nested
from .fitting.estimate import Fit, fit
from .fitting.identify import verdicts
from .fitting.intervals import delta_method
from .fitting.laws import ArmModel
from .gain import Gain, Multiple, gains, refused

UNITS = ('equal_tokens', 'seconds')


@dataclasses.dataclass(frozen=True)
class Multiplier:
  """Compute multiplier of an arm over the reference in three currencies; or why there is none.

  equal_tokens: at equal sizes and tokens, the connection's own cost left out. seconds: of training at the
  speeds measured. Intervals: 95 %. trend, smallest, largest: how m changes with compute (gain.py), in FLOPs;
  where one m would be wrong `flops` is None and the two ends stand for it.
  """

  arm: str
  problem: str | None
  flops: float | None = None
  flops_interval: list[float] | None = None
  equal_tokens: float | None = None
  equal_tokens_interval: list[float] | None = None
  equal_tokens_problem: str | None = None
  seconds: float | None = None
  seconds_interval: list[float] | None = None
  seconds_problem: str | None = None
  trend: str | None = None
  smallest: Multiple | None = None
  largest: Multiple | None = None


def multipliers(
  fitted: Fit | None,
  doc: dict | None,
  inside: pd.DataFrame,
  reference: str | None,
  changes: Sequence[Gain] = (),
) -> list[Multiplier]:
  """m per arm: FLOPs, work (N x D: equal sizes and tokens) and seconds the reference needs, over
  the arm's own, for equal loss.

  L(C) is fitted once per currency, each run's FLOPs replaced by its cost in that currency: the overhead of
  a connection differs between sizes. L(N, D) measures work; the costs at the largest common size convert it.
  """
  if fitted is None or len(fitted.points.arms) < 2:
    return []
  both, others = fitted.law.name == 'chinchilla', {}
  if not both:
    others = {unit: _in_currency(fitted, inside, reference, unit) for unit in UNITS}
  out, change = [], {g.arm: g for g in changes}
  for arm in (arm for arm in fitted.points.arms if arm != reference):
    name = f'm[{arm}]'
    trend = _trend(change.get(arm), cost_ratios(inside, arm, reference)[0] if both else 1.0)
    problem = doc['verdicts'].get(name)
    varies = problem is not None and problem == (change[arm].reason if arm in change else None)
    if problem and not (varies and not both):
      out.append(Multiplier(arm, problem, **(trend if varies else {})))
      continue
    value, ends = doc[name], np.array(doc['intervals'][name] or [np.nan, np.nan])
    if both:
      cost, speed = cost_ratios(inside, arm, reference)
      if not np.isfinite(cost):
        out.append(Multiplier(arm, f'no size in common with {reference}'))
        continue
      by_unit = {'flops': (value / cost, ends / cost), 'equal_tokens': (value, ends)}
      by_unit['seconds'] = (value * speed / cost, ends * speed / cost)
    else:
      by_unit = {unit: others[unit].get(arm, 'no common size') for unit in UNITS}
      by_unit |= {} if varies else {'flops': (value, ends)}  # it may vary with compute in one currency only
    fields = {}
    for unit, one in by_unit.items():
      if isinstance(one, str) or not np.isfinite(one[0]):
        fields[f'{unit}_problem'] = one if isinstance(one, str) else 'no speed was measured'
      else:
        fields |= {unit: float(one[0]), f'{unit}_interval': [float(v) for v in one[1]]}
    out.append(Multiplier(arm, problem, **fields, **trend))
  return out


def _trend(gain: Gain | None, cost: float) -> dict[str, object]:
  """Fields of a multiplier from the gain of its arm, over its cost at equal size and tokens."""
  if gain is None:
    return {}
  ends = {
    name: one if one is None else Multiple(one.flops, one.value / cost, [v / cost for v in one.interval])
    for name, one in (('smallest', gain.smallest), ('largest', gain.largest))
  }
  return {'trend': gain.trend} | ends


def _in_currency(
  fitted: Fit, inside: pd.DataFrame, reference: str, unit: str
) -> dict[str, tuple[float, list[float]] | str]:
  """Arm -> (m, interval), or the reason for none, of the same L(C) with C in another unit.

  equal_tokens: the FLOPs that the reference would spend on the run's tokens at its size; seconds: its tokens
  over the median speed of its arm and size. Runs of sizes without the reference, or without a speed, are out.
  """
  rows = inside.reset_index(drop=True)
  if unit == 'equal_tokens':
    per_token = rows[rows['arm'] == reference].groupby('size')['flops_per_token'].median()
    cost = rows['tokens'] * rows['size'].map(per_token)
  else:
    cost = rows['tokens'] / rows.groupby(['arm', 'size'])['tokens_per_second'].transform('median')
  known = np.isfinite(cost.to_numpy(float))
  points = fitted.points.take(known)
  points = dataclasses.replace(points, log_x=points.log_x | {'C': np.log(cost.to_numpy(float)[known])})
  left = points.arms
  if reference not in left or len(left) < 2 or len(points) <= len(left) + 1 + 2 * len(fitted.law.terms):
    return dict.fromkeys(fitted.points.arms, 'too few runs have a cost in this unit')
  again = fit(points, fitted.law, ArmModel('common', reference), width='auto', start_count=9)
  ends = delta_method(again)
  reasons = verdicts(again, ends)
  reasons |= {k: reasons[k] or why for k, why in refused(gains(again, nested(again))).items()}
  names = {arm: f'm[{arm}]' for arm in left if arm != reference}
  return {arm: reasons[name] or (again.parameters[name], ends[name]) for arm, name in names.items()}


def cost_ratios(inside: pd.DataFrame, arm: str, reference: str) -> tuple[float, float]:
  """Arm over reference at the largest common size: FLOPs per token, and FLOPs per second."""
  own, base = inside[inside['arm'] == arm], inside[inside['arm'] == reference]
  common = base[base['size'].isin(own['size'])]
  if not len(common):
    return np.nan, np.nan
  size = common.loc[common['flops'].idxmax(), 'size']
  own, base = own[own['size'] == size], base[base['size'] == size]
  cost = own['flops_per_token'].median() / base['flops_per_token'].median()
  return float(cost), float(cost * own['tokens_per_second'].median() / base['tokens_per_second'].median())
