"""The study's answers from a published sweep: paired differences between arms, over sizes and with compute.

  python -m analysis.verdicts docs/results/study-gpu-small
  python -m analysis.verdicts docs/results/study-cpu-muon --against docs/results/study-cpu-small

Prints two tables as Markdown: a contrast's mean difference over all sizes and its change over a decade of
compute, each with a 95 % interval, and what would settle those that are undecided; and the loss of each arm
minus the reference's by size. --against: a third, each contrast in both sweeps at the sizes, budgets and
seeds that both have, and what changed.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mhc_jax.command import end_with_message

from .fitting.intervals import LEVEL

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
  """A row for each seed of a cell: the arm's final loss minus the other's, and the arm's FLOPs."""
  finished = table[table['state'] == 'finished']
  columns = [*CELL, 'seed', 'validation_loss', 'flops']
  own, base = (finished[finished['arm'] == name][columns] for name in (arm, other))
  paired = own.merge(base, on=[*CELL, 'seed'], suffixes=('', '_other'))
  return paired.assign(difference=paired['validation_loss'] - paired['validation_loss_other'])


def weighted(paired: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, int]:
  """(differences, their standard deviations, degrees of freedom) of rows whose noise falls with compute.

  Runs of few updates scatter ten times as much as longer ones: log variance within cells is a line in log
  compute, by least squares over the cells.
  """
  cells = paired.groupby(CELL)
  within = cells['difference'].agg(['var', 'count']).assign(flops=cells['flops'].mean())
  told = within[(within['count'] > 1) & (within['var'] > 0)]
  slope, level = np.polyfit(np.log(told['flops']), np.log(told['var']), 1) if len(told) > 2 else (0.0, np.nan)
  log_variance = level + slope * np.log(paired['flops'].to_numpy(float))
  if np.isnan(level):
    log_variance = np.full(len(paired), np.log(told['var'].mean()))
  sd = np.exp(log_variance / 2)
  centred = paired['difference'] - cells['difference'].transform('mean')
  freedom = int((told['count'] - 1).sum())
  scale = float(np.sqrt(((centred / sd) ** 2).sum() / freedom))  # logs of variances lie below their mean
  return paired['difference'].to_numpy(float), sd * scale, freedom


def line(paired: pd.DataFrame) -> dict[str, float]:
  """Weighted means: of the difference over all rows, and its slope over a decade of compute; half widths."""
  value, sd, freedom = weighted(paired)
  quantile = stats.t.ppf(0.5 + LEVEL / 2, freedom)
  weight = sd**-2
  decades = np.log10(paired['flops'].to_numpy(float))
  centre = float((weight * decades).sum() / weight.sum())
  spread = float((weight * (decades - centre) ** 2).sum())
  return {
    'mean': float((weight * value).sum() / weight.sum()),
    'mean_half': float(quantile / np.sqrt(weight.sum())),
    'slope': float((weight * (decades - centre) * value).sum() / spread),
    'slope_half': float(quantile / np.sqrt(spread)),
    'p_value': float(2 * stats.t.sf(abs((weight * value).sum()) / np.sqrt(weight.sum()), freedom)),
    'flops': float(paired['flops'].sum()),
  }


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
  """A row for each contrast whose arms the sweep has; holm: p-values of the means, corrected for the rows."""
  rows = []
  for arm, other in CONTRASTS:
    paired = differences(table, arm, other)
    if len(paired):
      rows.append({'arm': arm, 'other': other} | line(paired))
  return _corrected(pd.DataFrame(rows))


def by_size(table: pd.DataFrame, reference: str = 'residual') -> pd.DataFrame:
  """Mean difference of each arm to the reference, a row for each size and budget."""
  means = {}
  for arm in dict.fromkeys(table['arm']):
    if arm != reference:
      means[arm] = differences(table, arm, reference).groupby(CELL)['difference'].mean()
  return pd.DataFrame(means).reset_index()


def changes(table: pd.DataFrame, before: pd.DataFrame) -> pd.DataFrame:
  """A row for each contrast: its mean in each table over the cells and seeds of both, and the change's line.

  holm: p-values of the changes, corrected for the rows.
  """
  rows = []
  for arm, other in CONTRASTS:
    now, then = (differences(one, arm, other) for one in (table, before))
    both = now.merge(then, on=[*CELL, 'seed'], suffixes=('', '_before'))
    if len(both):
      moved = both.assign(difference=both['difference'] - both['difference_before'])
      means = {'now': line(both), 'before': line(both.assign(difference=both['difference_before']))}
      ends = {f'{k}_{end}': v[end] for k, v in means.items() for end in ('mean', 'mean_half')}
      rows.append({'arm': arm, 'other': other} | ends | line(moved))
  return _corrected(pd.DataFrame(rows))


def _corrected(found: pd.DataFrame) -> pd.DataFrame:
  """With a column holm, of p_value."""
  order = found['p_value'].argsort().to_numpy()
  step = found['p_value'].to_numpy()[order] * np.arange(len(found), 0, -1)
  found.loc[order, 'holm'] = np.minimum(np.maximum.accumulate(step), 1)
  return found


def settle(mean: float, half: float, flops: float) -> str:
  """The compute at which the interval's half width would be the difference that was measured."""
  return '' if abs(mean) > half else f'{2 * flops * (half / mean) ** 2:.1e}'


def markdown(table: pd.DataFrame) -> str:
  """Both tables."""
  lines = [
    '| contrast | mean | 95 % | p (Holm) | per decade | 95 % | FLOPs to settle |',
    '|' + '---|' * 7,
  ]
  for _, r in verdicts(table).iterrows():
    ends = [(r[k] - r[f'{k}_half'], r[k] + r[f'{k}_half']) for k in ('mean', 'slope')]
    told = [f'{low:+.4f} to {high:+.4f}' for low, high in ends]
    lines.append(
      f'| {r["arm"]} - {r["other"]} | {r["mean"]:+.4f} | {told[0]} | {r["holm"]:.2g} | {r["slope"]:+.4f} | '
      f'{told[1]} | {settle(r["mean"], r["mean_half"], r["flops"])} |'
    )
  sizes = by_size(table)
  arms = [name for name in sizes if name not in CELL]
  lines += ['', f'| size | tokens | {" | ".join(arms)} |', '|' + '---|' * (2 + len(arms))]
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
      f'{low:+.4f} to {high:+.4f} | {r["holm"]:.2g} |'
    )
  return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the tables."""
  parser = argparse.ArgumentParser('python -m analysis.verdicts', description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=Path, help='with results.csv, as docs/results/study-gpu-small')
  parser.add_argument('--against', type=Path, help='another such folder, of the same arms, sizes and seeds')
  a = parser.parse_args(argv)
  table = pd.read_csv(a.folder / 'results.csv')
  print(markdown(table))
  if a.against:
    print(f'\n{markdown_of_changes(table, pd.read_csv(a.against / "results.csv"))}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
