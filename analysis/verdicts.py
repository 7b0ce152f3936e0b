"""The study's answers from a published sweep: paired differences between arms, over sizes and with compute.

  python -m analysis.verdicts docs/results/study-gpu-small
  python -m analysis.verdicts docs/results/study-cpu-muon --against docs/results/study-cpu

Prints tables as Markdown: a contrast's mean difference over all sizes and its change over a decade of
compute, each with a 95 % interval and a p-value, whether the cells have one mean, and what would settle
the means that are undecided; and the loss of each arm minus the reference's by size. --against: each
contrast in both sweeps at the sizes, budgets and seeds that both have, and what changed.
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

from .fitting.intervals import LEVEL
from .results_tables import table_text

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

  Of full models, on no axis of ranks. Raises ConfigError where one of them has several runs, or other data.
  """
  finished = table[(table['state'] == 'finished') & table['axis'].isna()]
  require(finished['data_digest'].nunique() < 2, 'the runs are of different corpora')
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
  spread = spread if spread > 1e-9 * weight.sum() else 0.0  # of equal FLOPs: rounding
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
  return table.assign(**{f'{what}_holm': holm(table[f'{what}_p']) for what in ('mean', 'slope')})


def by_size(table: pd.DataFrame, reference: str = 'residual') -> pd.DataFrame:
  """Mean difference of each arm to the reference, a row for each size and budget."""
  means = {}
  for arm in dict.fromkeys(table['arm']):
    if arm != reference:
      means[arm] = differences(table, arm, reference).groupby(CELL)['difference'].mean()
  return pd.DataFrame(means).reset_index()


def changes(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
  """A row for each contrast: what changed from one table to the other over the cells and seeds of both.

  As of verdicts; and now_mean, before_mean: of the contrast in each. Raises ConfigError for other data.
  """
  digests = {digest for t in (table, before) for digest in t['data_digest'].dropna()}
  require(len(digests) < 2, 'the sweeps are of different corpora')
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


def holm(p_values: pd.Series) -> np.ndarray:
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
  names = ('contrast', 'mean', 'p (Holm)', 'p of cells', 'per decade', 'p (Holm)', 'FLOPs to settle')
  rows = []
  for _, r in verdicts(table).iterrows():
    told = [f'{r[k]:+.4f} ± {r[f"{k}_half"]:.4f}' for k in ('mean', 'slope')]
    mean_p, cells_p, slope_p = (f'{r[k]:.2g}' for k in ('mean_holm', 'cells_p', 'slope_holm'))
    several = (cells_p, told[1], slope_p) if np.isfinite(r['slope']) else ('',) * 3  # of one size: neither
    to_settle = settle(r['mean'], r['mean_half'], r['flops'])
    rows.append((f'{r["arm"]} - {r["other"]}', told[0], mean_p, *several, to_settle))
  return table_text(names, rows)


def markdown_of_sizes(table: pd.DataFrame) -> str:
  """The table of by_size."""
  sizes = by_size(table)
  arms = [name for name in sizes if name not in CELL]
  rows = [
    (
      f'{r["width"]:.0f}x{r["depth"]:.0f}',
      f'{r["tokens"] / 1e6:.2f}M',
      *('' if pd.isna(r[arm]) else f'{r[arm]:+.3f}' for arm in arms),
    )
    for _, r in sizes.iterrows()
  ]
  names = (arm.replace('_', ' ') for arm in arms)  # which a page can break
  return table_text(('size', 'tokens', *names), rows)


def markdown_of_changes(table: pd.DataFrame, before: pd.DataFrame) -> str:
  """The table of --against."""
  rows = []
  for _, r in changes(table, before).iterrows():
    told = (f'{r[f"{k}_mean"]:+.4f} ± {r[f"{k}_mean_half"]:.4f}' for k in ('now', 'before'))
    low, high = r['mean'] - r['mean_half'], r['mean'] + r['mean_half']
    ends = f'{low:+.4f} to {high:+.4f}', f'{r["mean_holm"]:.2g}'
    rows.append((f'{r["arm"]} - {r["other"]}', *told, f'{r["mean"]:+.4f}', *ends))
  names = ('contrast', 'here', 'there', 'change', '95 %', 'p (Holm)')
  return table_text(names, rows)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the tables."""
  parser = argparse.ArgumentParser('python -m analysis.verdicts', description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=Path, help='with results.csv, as docs/results/study-gpu-small')
  parser.add_argument('--against', type=Path, help='another such folder, of the same arms, sizes and seeds')
  a = parser.parse_args(argv)
  table = pd.read_csv(a.folder / 'results.csv')
  print(f'{markdown(table)}\n\n{markdown_of_sizes(table)}')
  if a.against:
    print(f'\n{markdown_of_changes(table, pd.read_csv(a.against / "results.csv"))}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
