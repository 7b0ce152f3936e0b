"""Paired gaps to the reference: equal size and seed, equal budget, tokens or FLOPs."""

import dataclasses

import numpy as np
import pandas as pd
from scipy import stats

from .fitting.intervals import LEVEL


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

  @property
  def flops(self) -> float:
    """Geometric mean over the pairs."""
    return float(np.exp(self.log_flops))


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


def seed_spread(grid: pd.DataFrame) -> float | None:
  """Standard deviation of the final loss between seeds (nats), pooled over arms and sizes; or None."""
  groups = [g for _, g in grid.groupby(['arm', 'size', 'duration', 'lr'])['validation_loss']]
  freedom = sum(len(g) - 1 for g in groups)
  if not freedom:
    return None
  return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom))


def gaps(table: pd.DataFrame, reference: str | None) -> list[Gap]:
  """Paired gaps to the reference of every arm, smallest size first; the spread of the paired
  differences is pooled over all arms and sizes, since one arm has too few seeds for its own.
  """
  if reference is None:
    return []
  groups = []
  for arm, pairs in pair_up(table, reference).items():
    groups += [(arm, size, rows) for size, rows in pairs.groupby(['size', 'duration'], sort=False)]
  losses = [_both(rows, 'validation_loss') for *_, rows in groups]
  spread = pooled_spread(losses)
  out = []
  for (arm, (size, _), rows), loss in zip(groups, losses, strict=True):
    flops, tokens = _both(rows, 'flops'), _both(rows, 'tokens')
    costs = (flops[0] / flops[1], tokens[0] / tokens[1])
    out.append(paired_gap(arm, size, loss, flops[0], costs, spread))
  return sorted(out, key=lambda g: (g.arm, g.log_flops))


def _both(pairs: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
  return pairs[f'{name}_own'].to_numpy(float), pairs[f'{name}_ref'].to_numpy(float)


def pair_up(t: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
  """Arm -> pairs with the reference: same size and seed, and equal budget, tokens or FLOPs.

  Columns: size, seed, duration; run_id, validation_loss, flops and tokens of the arm (suffix _own)
  and of the reference (_ref). Of several partners the one nearest in tokens counts.
  """
  inside = t[t['paired']]
  base = inside[inside['arm'] == reference]
  out = {}
  for arm in dict.fromkeys(inside['arm']):
    rows = []
    for _, own in inside[inside['arm'] == arm].iterrows():
      partners = base[(base['size'] == own['size']) & (base['seed'] == own['seed'])]
      best = _partner(own, partners)
      if best is not None and arm != reference:
        keys = ('run_id', 'validation_loss', 'flops', 'tokens')
        rows.append(
          {name: own[name] for name in ('size', 'seed', 'duration')}
          | {f'{k}_own': own[k] for k in keys}
          | {f'{k}_ref': best[k] for k in keys}
        )
    if rows:
      out[arm] = pd.DataFrame(rows)
  return out


def _partner(own: pd.Series, partners: pd.DataFrame) -> pd.Series | None:
  def close(name: str) -> pd.Series:
    return np.abs(np.log(partners[name] / own[name])) < 0.05

  if not len(partners):
    return None
  fits = (partners['duration'] == own['duration']) | close('tokens') | close('flops')
  partners = partners[fits]
  if not len(partners):
    return None
  return partners.loc[np.abs(np.log(partners['tokens'] / own['tokens'])).idxmin()]
