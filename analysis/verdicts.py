"""The study's answers from a published sweep: paired differences between arms, over sizes and with compute.

  python -m analysis.verdicts docs/results/study-gpu-small
  python -m analysis.verdicts docs/results/study-cpu-muon --against docs/results/study-cpu

Prints tables as Markdown: a contrast's mean difference over all sizes and its change over a decade of
compute, each with a 95 % interval and a p-value, whether the cells have one mean, and what would settle
the means that are undecided; the loss of each arm minus the reference's by size; and of each rank, or number
of streams, minus the full model's. --against: each contrast in both sweeps at the sizes, budgets and seeds
that both have, and what changed.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .conventions import AXIS_FIELD
from .fitting.intervals import LEVEL
from .selection import rate_losses

CONTRASTS = (
  ('mhc', 'residual'),
  ('identity', 'residual'),
  ('mhc', 'identity'),
  ('mhc exact', 'mhc'),
  ('hc', 'residual'),
  ('hc', 'mhc'),
  ('attention_residual', 'residual'),
  ('gated_residual', 'residual'),
)
CELL = ['width', 'depth', 'tokens']  # of equal size and budget


def differences(table: pd.DataFrame, arm: str, other: str) -> pd.DataFrame:
  """A row for each seed of a cell: the arm's final loss minus the other's, and the arm's FLOPs.

  Of full models, on no axis of ranks. Raises ConfigError where one of them has several runs.
  """
  finished = table[(table['state'] == 'finished') & table['axis'].isna()]
  several = finished[finished.duplicated(['arm', *CELL, 'seed']) & finished['arm'].isin((arm, other))]
  names = ', '.join(several['arm'].unique())
  require(
    several.empty, f'runs of {names} differ by more than size, budget and seed: of which is the contrast?'
  )
  columns = [*CELL, 'seed', 'validation_loss', 'flops']
  own, base = (finished[finished['arm'] == name][columns] for name in (arm, other))
  paired = own.merge(base, on=[*CELL, 'seed'], suffixes=('', '_other'))
  return paired.assign(difference=paired['validation_loss'] - paired['validation_loss_other'])


def noise_slope(pairs: Iterable[pd.DataFrame]) -> float:
  """By which power of compute the variance within cells falls: one for all contrasts, by least squares.

  Each has a level of its own. A power for each contrast, from a handful of variances of two degrees of
  freedom, weighs cells by chance: intervals of 95 % then hold in about 90 %.
  """
  x, y = [], []
  for paired in pairs:
    cells = paired.groupby(CELL)
    within = cells['difference'].var().to_frame('var').assign(flops=cells['flops'].mean())
    logs = np.log(within[within['var'] > 0])  # of one seed there is none
    logs -= logs.mean()
    x, y = [*x, *logs['flops']], [*y, *logs['var']]
  return float(np.dot(x, y) / np.dot(x, x)) if np.dot(x, x) > 1e-9 else 0.0  # cells of equal FLOPs: rounding


def line(paired: pd.DataFrame, slope: float) -> dict[str, float]:
  """Weighted means: of the difference over all rows, and its slope over a decade of compute; half widths.

  slope: noise_slope. cells_p: that all cells have one mean, by F. Raises ConfigError without a cell of two
  seeds.
  """
  cells, value = paired.groupby(CELL)['difference'], paired['difference'].to_numpy(float)
  freedom = int((cells.size() - 1).sum())
  require(freedom > 0, 'intervals need two seeds of a size')
  sd = (paired['flops'] / paired['flops'].mean()).to_numpy(float) ** (slope / 2)
  sd *= float(np.sqrt((((value - cells.transform('mean')) / sd) ** 2).sum() / freedom))
  quantile = stats.t.ppf(0.5 + LEVEL / 2, freedom)
  weight = sd**-2
  decades = np.log10(paired['flops'].to_numpy(float))
  centre = float((weight * decades).sum() / weight.sum())
  spread = float((weight * (decades - centre) ** 2).sum())
  mean = float((weight * value).sum() / weight.sum())
  along = float((weight * (decades - centre) * value).sum() / spread) if spread else np.nan
  between = float((weight * (cells.transform('mean') - mean) ** 2).sum()) / max(len(cells) - 1, 1)
  return {
    'mean': mean,
    'mean_half': float(quantile / np.sqrt(weight.sum())),
    'mean_p': float(2 * stats.t.sf(abs(mean) * np.sqrt(weight.sum()), freedom)),
    'slope': along,
    'slope_half': float(quantile / np.sqrt(spread)) if spread else np.nan,
    'slope_p': float(2 * stats.t.sf(abs(along) * np.sqrt(spread), freedom)),
    'cells_p': float(stats.f.sf(between, len(cells) - 1, freedom)) if len(cells) > 1 else np.nan,
    'flops': float(paired['flops'].sum()),
  }


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
  """A row for each contrast whose arms the sweep has; p-values of means and slopes corrected for the rows."""
  pairs = {contrast: differences(table, *contrast) for contrast in CONTRASTS}
  pairs = {contrast: paired for contrast, paired in pairs.items() if len(paired)}
  return _lines(pairs, noise_slope(pairs.values()))


def _lines(pairs: dict[tuple[str, str], pd.DataFrame], slope: float) -> pd.DataFrame:
  require(bool(pairs), f'no contrast has finished runs of both arms: {", ".join(map(" - ".join, CONTRASTS))}')
  found = [{'arm': arm, 'other': other} | line(paired, slope) for (arm, other), paired in pairs.items()]
  table = pd.DataFrame(found)
  return table.assign(**{f'{what}_holm': _holm(table[f'{what}_p']) for what in ('mean', 'slope')})


def by_size(table: pd.DataFrame, reference: str = 'residual') -> pd.DataFrame:
  """Mean difference of each arm to the reference, a row for each size and budget."""
  means = {}
  for arm in dict.fromkeys(table['arm']):
    if arm != reference:
      means[arm] = differences(table, arm, reference).groupby(CELL)['difference'].mean()
  return pd.DataFrame(means).reset_index()


def by_rank(table: pd.DataFrame) -> pd.DataFrame:
  """A row for each rank, or number of streams, of an arm: its mean difference to the full model.

  Runs are in blocks of equal size, budget and seed, at the rate that is best on the other seeds. The noise
  is pooled over an axis, by what blocks and values leave over; p-values are corrected for the axis's values.
  Values with a run that did not finish are left out, and so is an axis of one block. Raises ConfigError
  for an arm without a run of the full model, or with several runs of one value.
  """
  out = []
  for (arm, axis), rows in table[table['axis'].notna()].groupby(['arm', 'axis'], sort=False):
    full = table[(table['arm'] == arm) & table['axis'].isna()]
    runs = pd.concat([rows, full]).assign(value=lambda t, axis=axis: t[axis].fillna(np.inf))
    kept = pd.concat([_at_best_rate(own) for _, own in runs.groupby([*CELL, 'value'])])
    several = kept.duplicated([*CELL, 'seed', 'value']).any()
    require(not several, f'runs of {arm} differ by more than size, budget, seed and {axis}')
    flops, losses = (kept.pivot(index=[*CELL, 'seed'], columns='value', values=k) for k in ('flops', 'loss'))
    home = full[axis].fillna(np.inf).iloc[0] if len(full) else None
    require(home is not None, f'{arm} has no run of the full model beside its {axis}')
    losses = losses[losses[home].notna()].dropna(axis=1)
    left = losses.sub(losses.mean(axis=1), axis=0) - losses.mean() + losses.to_numpy().mean()
    freedom = (len(losses) - 1) * (losses.shape[1] - 1)
    if freedom < 1:
      continue
    error = float(np.sqrt(2 * (left**2).to_numpy().sum() / freedom / len(losses)))
    found = pd.DataFrame({'mean': losses.sub(losses[home], axis=0).mean().drop(home)})
    found = found.assign(half=stats.t.ppf(0.5 + LEVEL / 2, freedom) * error)
    found['p'] = 2 * stats.t.sf(found['mean'].abs() / error, freedom)
    found['flops'] = flops.loc[losses.index].sum().drop(home) + flops.loc[losses.index, home].sum()
    out.append(found.reset_index().assign(arm=arm, axis=axis, home=home, holm=_holm(found['p'])))
  return pd.concat(out) if out else pd.DataFrame()


def _at_best_rate(rows: pd.DataFrame) -> pd.DataFrame:
  """Of each seed the run at the rate that is best on the others; loss: NaN where that run did not finish."""
  kept = []
  for seed, own in rows.groupby('seed'):
    others = rows[rows['seed'] != seed]
    best = rate_losses(others if len(others) else rows).idxmin()
    kept.append(own[own['lr'] == best])
  kept = pd.concat(kept)
  return kept.assign(loss=kept['validation_loss'].where(kept['state'] == 'finished'))


def changes(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
  """A row for each contrast: what changed from one table to the other over the cells and seeds of both.

  As of verdicts; and now_mean, before_mean: of the contrast in each.
  """
  now, then, moved = {}, {}, {}
  for contrast in CONTRASTS:
    both = differences(table, *contrast).merge(
      differences(before, *contrast), on=[*CELL, 'seed'], suffixes=('', '_before')
    )
    if len(both):
      now[contrast], then[contrast] = both, both.assign(difference=both['difference_before'])
      moved[contrast] = both.assign(difference=both['difference'] - both['difference_before'])
  slope, ends = noise_slope([*now.values(), *then.values()]), ['mean', 'mean_half']  # one: equal weights
  own = [_lines(pairs, slope)[ends].add_prefix(f'{k}_') for k, pairs in (('now', now), ('before', then))]
  return pd.concat([_lines(moved, slope), *own], axis=1)


def _holm(p_values: pd.Series) -> np.ndarray:
  """Corrected for their number (Holm 1979)."""
  order, corrected = p_values.argsort().to_numpy(), np.empty(len(p_values))
  step = p_values.to_numpy()[order] * np.arange(len(p_values), 0, -1)
  corrected[order] = np.minimum(np.maximum.accumulate(step), 1)
  return corrected


def settle(mean: float, half: float, flops: float) -> str:
  """The compute at which the interval's half width would be the difference that was measured."""
  return '' if abs(mean) > half else f'{2 * flops * (half / mean) ** 2:.1e}'


def markdown(table: pd.DataFrame) -> str:
  """The table of verdicts."""
  lines = [
    '| contrast | mean | p (Holm) | p of cells | per decade | p (Holm) | FLOPs to settle |',
    '|' + '---|' * 7,
  ]
  for _, r in verdicts(table).iterrows():
    mean, slope = (f'{r[k]:+.4f} ± {r[f"{k}_half"]:.4f}' for k in ('mean', 'slope'))
    lines.append(
      f'| {r["arm"]} - {r["other"]} | {mean} | {r["mean_holm"]:.2g} | {r["cells_p"]:.2g} | {slope} | '
      f'{r["slope_holm"]:.2g} | {settle(r["mean"], r["mean_half"], r["flops"])} |'
    )
  return '\n'.join(lines)


def markdown_of_sizes(table: pd.DataFrame) -> str:
  """The table of by_size."""
  sizes = by_size(table)
  arms = [name for name in sizes if name not in CELL]
  lines = [f'| size | tokens | {" | ".join(arms)} |', '|' + '---|' * (2 + len(arms))]
  for _, r in sizes.iterrows():
    cells = ' | '.join(f'{r[arm]:+.3f}' for arm in arms)
    lines.append(f'| {r["width"]:.0f}x{r["depth"]:.0f} | {r["tokens"] / 1e6:.2f}M | {cells} |')
  return '\n'.join(lines)


def markdown_of_changes(table: pd.DataFrame, before: pd.DataFrame) -> str:
  """The table of --against."""
  found = changes(table, before)
  lines = ['| contrast | here | there | change | 95 % | p (Holm) |', '|' + '---|' * 6]
  for _, r in found.iterrows():
    told = [f'{r[f"{k}_mean"]:+.4f} ± {r[f"{k}_mean_half"]:.4f}' for k in ('now', 'before')]
    low, high = r['mean'] - r['mean_half'], r['mean'] + r['mean_half']
    lines.append(
      f'| {r["arm"]} - {r["other"]} | {told[0]} | {told[1]} | {r["mean"]:+.4f} | '
      f'{low:+.4f} to {high:+.4f} | {r["mean_holm"]:.2g} |'
    )
  return '\n'.join(lines)


def markdown_of_ranks(table: pd.DataFrame) -> str:
  """The table of by_rank; empty where the sweep has no ranks."""
  lines = ['| ranks of | minus | mean | p (Holm) | FLOPs to settle |', '|' + '---|' * 5]
  for _, r in (found := by_rank(table)).iterrows():
    own, home = ('full' if np.isinf(v) else f'{v:.0f}' for v in (r['value'], r['home']))
    lines.append(
      f'| {r["arm"]}, {AXIS_FIELD[r["axis"]]} {own} | {home} | {r["mean"]:+.4f} ± {r["half"]:.4f} | '
      f'{r["holm"]:.2g} | {settle(r["mean"], r["half"], r["flops"])} |'
    )
  return '\n'.join(lines) if len(found) else ''


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the tables."""
  parser = argparse.ArgumentParser('python -m analysis.verdicts', description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=Path, help='with results.csv, as docs/results/study-gpu-small')
  parser.add_argument('--against', type=Path, help='another such folder, of the same arms, sizes and seeds')
  a = parser.parse_args(argv)
  table = pd.read_csv(a.folder / 'results.csv')
  ranks = markdown_of_ranks(table)
  if not ranks or table.loc[table['axis'].isna(), 'arm'].nunique() > 1:
    print(f'{markdown(table)}\n\n{markdown_of_sizes(table)}', end='\n\n' if ranks else '\n')
  if ranks:
    print(ranks)
  if a.against:
    print(f'\n{markdown_of_changes(table, pd.read_csv(a.against / "results.csv"))}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
