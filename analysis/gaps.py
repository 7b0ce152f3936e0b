"""Paired gaps to the reference: equal size and seed, equal budget, tokens or FLOPs."""

import dataclasses
from collections.abc import Collection

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


DIFFERS = 0.05  # p-value below which spreads differ by arm, or with compute
SLOPE_FREEDOM = 4  # degrees of freedom below which a trend of the spread is not tried


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Paired losses (own, other) of the seeds of one arm at one size, with its log FLOPs."""

  arm: str
  log_flops: float
  losses: tuple[np.ndarray, np.ndarray]

  @property
  def freedom(self) -> int:
    return len(self.losses[0]) - 1


def spreads(groups: list[Pairs], values: list[np.ndarray]) -> list[tuple[float, float]] | None:
  """(standard deviation, degrees of freedom) of a paired value in each group; None without two seeds.

  One spread for all, unless the data tell that it differs by arm (one may depend on rounding) or with
  compute: a gamma regression of the groups' variances, with the terms that a likelihood ratio finds at
  DIFFERS.
  """
  freedom_G = np.array([g.freedom for g in groups], float)
  if not freedom_G.sum():
    return None
  square_G = np.array([((v - v.mean()) ** 2).sum() for v in values])
  pooled = square_G.sum() / freedom_G.sum()
  square_G = np.maximum(square_G, 1e-4 * pooled * freedom_G)  # equal to all digits is luck, not exactness
  log_c_G = np.array([g.log_flops for g in groups])
  arm_G = np.array([g.arm for g in groups])
  told = [arm for arm in dict.fromkeys(arm_G.tolist()) if freedom_G[arm_G == arm].sum() > 0]
  arms_GA = np.stack([arm_G == arm for arm in told[1:]] or [np.zeros(len(groups))], 1).astype(float)
  terms = {'arm': arms_GA} if len(told) > 1 else {}
  if np.ptp(log_c_G[freedom_G > 0]) > 0 and freedom_G.sum() >= SLOPE_FREEDOM:
    terms['compute'] = (log_c_G - log_c_G.mean())[:, None]
  own = {arm: freedom_G[arm_G == arm].sum() for arm in told}
  # Bartlett's correction: with few degrees of freedom to an arm the ratio is too large.
  bartlett = 1 + (sum(1 / f for f in own.values()) - 1 / freedom_G.sum()) / (3 * max(len(told) - 1, 1))
  basis_GK, chosen = np.ones((len(groups), 1)), []
  best, variance_G = _variances(square_G, freedom_G, basis_GK)
  while terms:
    tried = {k: _variances(square_G, freedom_G, np.hstack([basis_GK, x])) for k, x in terms.items()}
    p_values = {
      k: stats.chi2.sf(2 * (tried[k][0] - best) / (bartlett if k == 'arm' else 1.0), x.shape[1])
      for k, x in terms.items()
    }
    name = min(p_values, key=p_values.get)
    if p_values[name] > DIFFERS:
      break
    basis_GK, (best, variance_G) = np.hstack([basis_GK, terms.pop(name)]), tried[name]
    chosen.append(name)
  # A log variance with error v is worth 2 / v degrees of freedom: fewer for an arm of its own, and at the
  # ends.
  half_GK = np.sqrt(freedom_G / 2)[:, None] * basis_GK
  error_G = np.einsum('gk,kl,gl->g', basis_GK, np.linalg.pinv(half_GK.T @ half_GK), basis_GK)
  free_G = np.maximum(2 / error_G, 1.0)
  if 'arm' in chosen:  # an arm without repeats has the spread of all
    alone_G = ~np.isin(arm_G, told)
    variance_G, free_G = np.where(alone_G, pooled, variance_G), np.where(alone_G, freedom_G.sum(), free_G)
  return list(zip(np.sqrt(variance_G).tolist(), free_G.tolist(), strict=True))


def _variances(square_G: np.ndarray, freedom_G: np.ndarray, basis_GK: np.ndarray) -> tuple[float, np.ndarray]:
  """(log likelihood, variance of each group), log variance linear in the basis, of sums of squares."""
  gamma_K = np.zeros(basis_GK.shape[1])
  gamma_K[0] = np.log(max(square_G.sum() / freedom_G.sum(), 1e-300))
  root_G1 = np.sqrt(freedom_G / 2)[:, None]
  mean_G = square_G / np.maximum(freedom_G, 1)
  for _ in range(100):
    variance_G = np.exp(np.clip(basis_GK @ gamma_K, -200, 200))
    ratio_G = mean_G / np.maximum(variance_G, 1e-300)
    step_K = np.linalg.lstsq(root_G1 * basis_GK, root_G1[:, 0] * (ratio_G - 1))[0]
    gamma_K = gamma_K + np.clip(step_K, -2, 2)
    if np.abs(step_K).max() < 1e-8:
      break
  return -0.5 * float(freedom_G @ (np.log(np.maximum(variance_G, 1e-300)) + ratio_G)), variance_G


def paired_gap(
  pairs: Pairs,
  size: str,
  costs: tuple[np.ndarray, np.ndarray],
  spread: tuple[tuple[float, float], tuple[float, float]] | None,
  level: float = LEVEL,
) -> Gap:
  """Gap of one arm at one size from the paired losses of its seeds.

  The interval is Student's t with the spreads of difference and ratio (deviation, degrees of freedom);
  without them there is none. costs: (FLOPs, tokens) of the arm over the reference's, per pair.
  """
  own, other = pairs.losses
  gap, ratio = float((own - other).mean()), float((own / other).mean())
  ends = [None] * 4
  if spread is not None:
    halves = [float(stats.t.ppf(0.5 + level / 2, free)) * sd / np.sqrt(len(own)) for sd, free in spread]
    ends = [gap - halves[0], gap + halves[0], ratio - halves[1], ratio + halves[1]]
  cost = [float(np.exp(np.log(c).mean())) for c in costs]
  return Gap(pairs.arm, size, pairs.log_flops, len(own), gap, ratio, *ends, *cost)


def seed_spread(grid: pd.DataFrame) -> float | None:
  """Standard deviation of the final loss between seeds (nats), pooled over arms and sizes; or None."""
  groups = [g for _, g in grid.groupby(['arm', 'size', 'duration', 'lr'])['validation_loss']]
  freedom = sum(len(g) - 1 for g in groups)
  if not freedom:
    return None
  return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom))


def gaps(table: pd.DataFrame, reference: str | None, unequal_rates: Collection[str] = ()) -> list[Gap]:
  """Paired gaps to the reference of every arm, smallest size first.

  Their spread is that of `spreads`: one arm at one size has too few seeds for its own. unequal_rates: arms
  whose rate was chosen among more on the runs compared; their gaps have no interval.
  """
  if reference is None:
    return []
  groups, rest = [], []
  for arm, paired in pair_up(table, reference).items():
    for (size, _), rows in paired.groupby(['size', 'duration'], sort=False):
      flops, tokens = _both(rows, 'flops'), _both(rows, 'tokens')
      groups.append(Pairs(arm, float(np.log(flops[0]).mean()), _both(rows, 'validation_loss')))
      rest.append((size, (flops[0] / flops[1], tokens[0] / tokens[1])))
  differences = spreads(groups, [g.losses[0] - g.losses[1] for g in groups]) if groups else None
  ratios = spreads(groups, [g.losses[0] / g.losses[1] for g in groups]) if groups else None
  known = [None] * len(groups) if differences is None else list(zip(differences, ratios, strict=True))
  known = [None if g.arm in unequal_rates else one for g, one in zip(groups, known, strict=True)]
  out = [paired_gap(g, *more, spread) for g, more, spread in zip(groups, rest, known, strict=True)]
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
