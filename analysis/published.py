"""Published losses of connections over the pre-norm residual model's, beside the gaps of a sweep.

Where: expected/published_gaps.json, paired gaps and multipliers -> here -> study.py. A sweep's arm stands
beside a published one when its connection is the same by the columns of results.csv, whatever its label. The
numbers are of other models, data and tokens: signs and order compare, nats do not.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .gaps import Gap
from .multipliers import Multiplier

DATA = Path(__file__).parent / 'expected' / 'published_gaps.json'


@dataclasses.dataclass(frozen=True)
class Published:
  """Tables of what others measured beside ours; both empty where the sweep has no arm to compare.

  gaps: a row per source, size and arm; the columns of `ours` are those of the sweep's arm at its largest
  size. fits: compute multipliers by published fits at both ends of their range. own: the sweep's gaps of
  these arms at every size, with the size's parameters. All nats; throughput over residual's.
  """

  gaps: pd.DataFrame
  fits: pd.DataFrame
  own: pd.DataFrame


@functools.cache
def data() -> dict:
  """The file of published numbers with their sources."""
  return json.loads(DATA.read_text())


def loss_of(fit: Sequence[float], compute: float) -> float:
  """L(C) = E + A C^-a of (E, A, a), C in the units of its source."""
  floor, scale, exponent = fit
  return floor + scale * compute**-exponent


def multiplier_of(fit: Sequence[float], base: Sequence[float], compute: float) -> float:
  """Compute that `base` needs for the loss of `fit` at `compute`, over it: (C' / C) at L_base(C') = L(C)."""
  floor, scale, exponent = base
  return (scale / (loss_of(fit, compute) - floor)) ** (1 / exponent) / compute


def published_gaps() -> pd.DataFrame:
  """Every published loss with its gap to its own pre-norm residual model: nats, and as a ratio."""
  rows = []
  for table in data()['tables']:
    for arm, losses in table['losses'].items():
      speeds = table.get('throughput', {}).get(arm, [None] * len(losses))
      of_size = zip(table['sizes'], table['residual'], losses, speeds, strict=True)
      for (size, params), base, loss, speed in of_size:
        if loss is not None:
          row = {'source': table['source'], 'where': table['where'], 'arm': arm, 'size': size}
          row |= {
            'params': params,
            'loss': loss,
            'gap': round(loss - base, 6),
            'ratio': round(loss / base, 6),
          }
          rows.append(row | {'throughput': speed})
  return pd.DataFrame(rows).astype({'params': float, 'throughput': float})


def published_fits() -> pd.DataFrame:
  """The compute multiplier of every published pair of fits at either end of its range, in FLOPs."""
  rows = []
  for one in data()['fits']:
    for arm, curve in one['curves'].items():
      for compute in one['range']:
        row = {'source': one['source'], 'where': one['where'], 'arm': arm, 'flops': compute * one['unit']}
        rows.append(row | {'multiplier': multiplier_of(curve, one['residual'], compute)})
  return pd.DataFrame(rows)


def same_arms(grid: pd.DataFrame) -> dict[str, str]:
  """Arm of the sweep -> the published arm that it is; arms that are none are left out.

  Streams are whole where the published arm does not name their fractions.
  """
  out = {}
  for arm, rows in grid.groupby('arm', sort=False):
    row = rows.iloc[0]
    for name, entry in data()['arms'].items():
      wanted = {'connection_fractions': [1], **(entry['ours'] or {})}
      if entry['ours'] and all(row[column] in values for column, values in wanted.items()):
        out[arm] = name
  return out


def published(
  grid: pd.DataFrame, gaps: Sequence[Gap], multipliers: Sequence[Multiplier], reference: str | None
) -> Published:
  """Published numbers beside the sweep's; empty unless its reference is the residual model."""
  base, known = grid[grid['arm'] == reference], same_arms(grid)
  if not (base['connection_name'] == 'residual').any() or not any(g.arm in known for g in gaps):
    return Published(*(pd.DataFrame(),) * 3)
  rows = [_own(g, known[g.arm], grid, reference) for g in gaps if g.arm in known]
  own = pd.DataFrame(rows).sort_values('ours_params', kind='stable')
  last = own.drop_duplicates('arm', keep='last')
  needs = {known[m.arm]: m for m in multipliers if m.arm in known}
  fits = published_fits()
  for field in ('flops', 'flops_interval'):
    fits[f'ours_{field}'] = [getattr(needs.get(arm), field, None) for arm in fits['arm']]
  return Published(published_gaps().merge(last, how='left', on='arm'), fits, own)


def _own(g: Gap, name: str, grid: pd.DataFrame, reference: str) -> dict[str, object]:
  """A gap of the sweep as columns of the table."""
  here = grid[grid['size'] == g.size]
  speed = here.groupby('arm')['tokens_per_second'].median()
  return {
    **{'arm': name, 'ours': g.arm, 'ours_size': g.size},
    'ours_params': float(here.loc[here['arm'] == reference, 'params_total'].iloc[0]),
    **{'ours_gap': g.difference, 'ours_low': g.low, 'ours_high': g.high, 'ours_pairs': g.pairs},
    'ours_throughput': float(speed.get(g.arm, np.nan) / speed.get(reference, np.nan)),
  }
