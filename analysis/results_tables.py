"""What docs/results.md says of a folder of docs/results: a table or a sentence, from its CSVs alone.

Where: publish.py -> CSVs -> here -> results_page.py. A part whose CSV is missing, or holds no number for it,
is empty; words that judge are chosen by the numbers beside them.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from .fitting.intervals import LEVEL

Lines = list[str]
SCALE = ((1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Lines:
  """Markdown; nothing without rows. A bar in a cell would end it."""
  cells = [[str(cell).replace('|', '/') for cell in row] for row in rows]
  if not cells:
    return []
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  return [*lines, *('| ' + ' | '.join(row) + ' |' for row in cells), '']


def table_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
  """The same as one string, without a line after it."""
  return '\n'.join(table(columns, rows)).strip()


def read(path: Path, *needed: str) -> pd.DataFrame:
  """A CSV of the folder, without rows where it, or a column that is needed, is missing."""
  try:
    found = pd.read_csv(path)
  except (FileNotFoundError, pd.errors.EmptyDataError):
    return pd.DataFrame(columns=list(needed))
  return found if set(needed) <= set(found) else pd.DataFrame(columns=list(needed))


def number(value: float, form: str = '.3f') -> str:
  """It, or a dash where there is none."""
  return '–' if pd.isna(value) else f'{value:{form}}'


def interval(low: float, high: float, digits: int = 3) -> str:
  """Ends with signs, or nothing."""
  return '' if pd.isna(low) or pd.isna(high) else f'{low:+.{digits}f} to {high:+.{digits}f}'


def verdict(low: float, high: float) -> str:
  """What the interval of a difference of losses says."""
  if pd.isna(low) or pd.isna(high):
    return 'no interval'
  return 'undecided' if low <= 0 <= high else 'lower' if high < 0 else 'higher'


def big(value: float) -> str:
  """10.7k, 2.4M."""
  return next((f'{value / scale:.3g}{unit}' for scale, unit in SCALE if value >= scale), f'{value:.3g}')


def _size(runs: pd.DataFrame) -> pd.Series:
  return runs['width'].map('{:.0f}'.format) + 'x' + runs['depth'].map('{:.0f}'.format)


def _ratio(m: float, ends: str) -> str:
  """Compute that the arm needs over the reference's, 1 / m, and its interval."""
  low, high = json.loads(ends)
  return f'{1 / m:.2f} ({1 / high:.2f} to {1 / low:.2f})'


def _compute(row: pd.Series) -> tuple[str, str]:
  """(compute for equal loss over the reference's, what that says) of a row of multipliers.csv."""
  if pd.notna(row.get('flops')) and isinstance(row.get('flops_interval'), str):
    low, high = json.loads(row['flops_interval'])
    said = 'saves compute' if low > 1 else 'costs compute' if high < 1 else 'undecided'
    unknown = row.get('trend') == 'cannot tell'
    return _ratio(row['flops'], row['flops_interval']), said + '; trend unknown' * unknown
  if row.get('trend') in ('fades', 'grows') and pd.notna(row.get('smallest.value')):
    ends = [
      f'{_ratio(row[f"{at}.value"], row[f"{at}.interval"])} at {row[f"{at}.flops"]:.1e}'
      for at in ('smallest', 'largest')
    ]
    return ', '.join(ends), f'its gain {row["trend"]}'
  why = row.get('problem')
  return 'none', why if isinstance(why, str) else 'not in the law'


def law(folder: Path) -> Lines:
  """Compute for equal loss, and the paired difference at the largest size, of every arm."""
  multipliers, gaps = (
    read(folder / 'multipliers.csv', 'arm'),
    read(folder / 'gaps.csv', 'arm', 'size', 'flops', 'difference', 'low', 'high'),
  )
  known = {row['arm']: _compute(row) for _, row in multipliers.iterrows()}
  at_largest = {row['arm']: row for _, row in _at_largest(gaps).iterrows()}
  rows = []
  for arm in dict.fromkeys([*known, *at_largest]):
    needs = known.get(arm, ('none', 'no law' if multipliers.empty else 'not in the law'))
    rows.append((arm, *needs, *(_gap(at_largest[arm]) if arm in at_largest else ('',) * 3)))
  where = f' at {_at_largest(gaps)["size"].iloc[0]}' if at_largest else ''
  columns = ('arm', "compute for equal loss, over the reference's", '', f'difference{where}', 'interval', '')
  return table(columns, rows)


def _at_largest(gaps: pd.DataFrame) -> pd.DataFrame:
  """The rows of the size that took most compute."""
  gaps = gaps.dropna(subset=['flops', 'difference'])
  return gaps if gaps.empty else gaps[gaps['size'] == gaps.groupby('size')['flops'].mean().idxmax()]


def _gap(row: pd.Series) -> tuple[str, str, str]:
  return (
    number(row['difference'], '+.4f'),
    interval(row['low'], row['high']),
    verdict(row['low'], row['high']),
  )


def gaps(folder: Path) -> Lines:
  """Paired differences to the reference at the largest size."""
  found = _at_largest(read(folder / 'gaps.csv', 'arm', 'size', 'flops', 'difference', 'low', 'high', 'pairs'))
  rows = [(row['arm'], row['size'], f'{row["pairs"]:.0f}', *_gap(row)) for _, row in found.iterrows()]
  return table(('arm', 'size', 'seeds', 'difference', 'interval', ''), rows)


def best_rates(folder: Path) -> Lines:
  """Each arm's best rate at each size with its mean loss, of the rates whose seeds all finished."""
  runs = read(folder / 'results.csv', 'arm', 'width', 'depth', 'lr', 'validation_loss')
  if runs.empty:
    return []
  runs['size'] = _size(runs)
  means = runs.groupby(['arm', 'size', 'lr'], sort=False)['validation_loss']
  means = means.agg(mean='mean', finished='count', planned='size')
  cells = {}
  for key, own in means[means['finished'] == means['planned']].groupby(['arm', 'size'], sort=False):
    rate = own['mean'].idxmin()[2]
    tried = runs.loc[(runs['arm'] == key[0]) & (runs['size'] == key[1]), 'lr']
    edge = ', edge' if rate in (tried.min(), tried.max()) else ''
    cells[key] = f'{own["mean"].min():.3f} ({rate:g}{edge})'
  sizes, arms = dict.fromkeys(runs['size']), dict.fromkeys(runs['arm'])
  rows = [(arm, *(cells.get((arm, size), 'none') for size in sizes)) for arm in arms]
  return table(('arm', *(f'{size}: loss (best rate)' for size in sizes)), rows)


def variants(folder: Path, base: str) -> Lines:
  """Loss of an arm 'CONNECTION, VARIANT' minus that of 'CONNECTION, BASE' (base '': 'CONNECTION').

  Paired by seed at one rate; intervals by each cell's own spread, for loud cells are among them.
  """
  runs = read(folder / 'results.csv', 'arm', 'lr', 'seed', 'validation_loss').dropna(subset='validation_loss')
  parts = [arm.partition(', ') for arm in runs['arm']]
  runs = runs.assign(connection=[part[0] for part in parts], variant=[part[2] for part in parts])
  key = ['connection', 'lr', 'seed']
  paired = runs.merge(
    runs.loc[runs['variant'] == base, [*key, 'validation_loss']], on=key, suffixes=('', '_base')
  )
  paired = paired[paired['variant'] != base]
  paired = paired.assign(difference=paired['validation_loss'] - paired['validation_loss_base'])
  cells = paired.groupby(['variant', 'lr', 'connection'], sort=False)['difference'].agg(
    ['mean', 'std', 'count']
  )
  freedom = (cells['count'] - 1).where(cells['count'] > 1)
  cells['half'] = stats.t.ppf(0.5 + LEVEL / 2, freedom) * cells['std'] / np.sqrt(cells['count'])
  several = paired['lr'].nunique() > 1
  connections = list(dict.fromkeys(paired['connection']))
  rows = []
  for variant, lr in dict.fromkeys(zip(paired['variant'], paired['lr'], strict=True)):
    own = [_cell(cells, (variant, lr, connection)) for connection in connections]
    rows.append((variant + f', rate {lr:g}' * several, *own))
  return table((f'minus {base or "without"}', *connections), rows)


def _cell(cells: pd.DataFrame, key: tuple) -> str:
  """+0.020 ± 0.010, bold where that leaves out 0."""
  if key not in cells.index:
    return ''
  mean, half = cells.loc[key, 'mean'], cells.loc[key, 'half']
  text = number(mean, '+.3f') + ('' if pd.isna(half) else f' ± {half:.3f}')
  return f'**{text}**' if abs(mean) > half else text


def clusters(folder: Path) -> Lines:
  """Bytes that a token takes between clusters, and the loss over that of data parallelism."""
  columns = ('connection', 'arm', 'seeds', 'bytes_per_token', 'reference', 'difference', 'standard_error')
  found = read(folder / 'clusters.csv', *columns)
  if found.empty:
    return []
  scheme = [arm.removeprefix(f'{c}, ') for arm, c in zip(found['arm'], found['connection'], strict=True)]
  cells = {}
  for (_, row), name in zip(found.iterrows(), scheme, strict=True):
    half = stats.t.ppf(0.5 + LEVEL / 2, row['seeds'] - 1) * row['standard_error']
    more = '' if pd.isna(half) or row['arm'] == row['reference'] else f' ± {half:.3f}'
    sent = number(row['bytes_per_token'], '.3g')
    cells[name, row['connection']] = f'{number(row["difference"], "+.3f")}{more} ({sent})'
  connections = dict.fromkeys(found['connection'])
  rows = [(name, *(cells.get((name, c), '') for c in connections)) for name in dict.fromkeys(scheme)]
  return table(('scheme', *(f'{c}: difference (bytes a token)' for c in connections)), rows)


def sparse(folder: Path) -> Lines:
  """What a connection gains over residual at equal attention."""
  found = read(folder / 'sparse_attention.csv', 'attention', 'connection', 'difference', 'low', 'high')
  found = found.dropna(subset='difference')
  connections = dict.fromkeys(found['connection'])
  rows = []
  for attention, own in found.groupby('attention', sort=False):
    by = {row['connection']: row for _, row in own.iterrows()}
    rows.append((attention, *(' / '.join(filter(None, _gap(by[c]))) if c in by else '' for c in connections)))
  return table(('attention', *(f'{c} minus residual' for c in connections)), rows)


def diverged(folder: Path) -> Lines:
  """Diverged runs of each arm and where, the largest gradient norm and composite gain."""
  columns = ('arm', 'depth', 'lr', 'diverged', 'gradient_norm', 'composite_gain')
  found = read(folder / 'paper_stability.csv', *columns)
  rows = []
  for arm, own in found.groupby('arm', sort=False):
    counts = own.groupby(['depth', 'lr'])['diverged'].agg(['sum', 'size'])
    where = [f'{d:.0f} layers at {lr:g}: {n:.0f} of {of:.0f}' for (d, lr), (n, of) in counts.iterrows() if n]
    largest = (number(own[name].max(), '.2g') for name in ('gradient_norm', 'composite_gain'))
    rows.append((arm, f'{own["diverged"].sum():.0f} of {len(own)}', '; '.join(where) or 'none', *largest))
  return table(('arm', 'diverged', 'where', 'largest gradient norm', 'largest gain'), rows)


def growth(folder: Path) -> Lines:
  """Gradients and streams of each arm by sublayer after the last update that was followed, of each seed.

  Growth by Theil and Sen: the median over pairs of sublayers, for those whose gradients vanish are few.
  """
  found = read(
    folder / 'gradients.csv', 'arm', 'seed', 'update', 'sublayer', 'gradient', 'mean', 'mean_least'
  )
  found = found[(found['update'] == found['update'].max()) & np.isfinite(found['gradient'].astype(float))]
  found, rows = found[found['gradient'] > 0], []
  for arm, own in found.groupby('arm', sort=False):
    seeds = [run for _, run in own.groupby('seed')]
    slopes = (stats.theilslopes(np.log(run['gradient']), run['sublayer'])[0] for run in seeds)
    means = (f'{run["mean"].mean():.2f} ({run["mean_least"].min():.2f})' for run in seeds)
    told = ([f'{np.exp(-s):.2f}' for s in slopes], [f'{run["gradient"].max():.1g}' for run in seeds], means)
    rows.append((arm, *(', '.join(each) for each in told)))
  over = f"gradient's growth by a sublayer towards the first, update {found['update'].max()}"
  return table(('arm', over, 'largest gradient', "streams' mean over size (least)"), rows)


def ranks(folder: Path) -> Lines:
  """Mean loss by rank, and over that of full rank where there is one, of each figure of ranks."""
  rows = []
  for path in sorted(folder.glob('loss_vs_*.csv')):
    found = read(path, 'arm', 'kind', 'rank', 'validation_loss', 'standard_error')
    for arm, own in found.groupby('arm', sort=False):
      full = own.loc[own['kind'] == 'full', 'validation_loss'].mean()
      means = own[own['kind'] == 'mean']
      losses = zip(means['rank'], means['validation_loss'], strict=True)
      cells = [
        f'{r:g}: {number(v)}' + ('' if pd.isna(full + v) else f' ({v - full:+.3f})') for r, v in losses
      ]
      error = means['standard_error'].max()
      name = path.stem.removeprefix('loss_vs_').replace('_', ' ')
      rows.append((f'{name}, {arm}', ', '.join(cells), number(error)))
  return table(('rank of', 'rank: loss (over full rank)', 'standard error'), rows)


def optimal_sizes(folder: Path) -> Lines:
  """Exponents of the best size and tokens over compute."""
  found = read(folder / 'paper_optimal_sizes.csv', 'arm', 'optimum', 'method', 'exponent', 'low', 'high')
  found = found.dropna(subset='exponent').drop_duplicates(['arm', 'optimum', 'method'])
  columns = dict.fromkeys(zip(found['optimum'], found['method'], strict=True))
  rows = []
  for arm, own in found.groupby('arm', sort=False):
    ends = zip(own['exponent'], own['low'], own['high'], strict=True)
    cells = [
      number(v, '.2f') + ('' if pd.isna(low) else f' ({low:.2f} to {high:.2f})') for v, low, high in ends
    ]
    by = dict(zip(zip(own['optimum'], own['method'], strict=True), cells, strict=True))
    rows.append((arm, *(by.get(column, 'none') for column in columns)))
  return table(('exponent over FLOPs', *(f'{what} by {method}' for what, method in columns)), rows)


def loads(folder: Path) -> Lines:
  """The fullest expert over the mean: the worst layer of the last 20 batches, by seed."""
  found = read(folder / 'router_loads.csv', 'arm', 'seed', 'step')
  layers = [name for name in found if name.startswith('layer_')]
  last = found.sort_values('step').groupby(['arm', 'seed']).tail(20)
  worst = last.groupby(['arm', 'seed'])[layers].mean().max(axis=1)
  words = [f'{arm} {", ".join(number(v, ".2f") for v in own)}' for arm, own in worst.groupby('arm')]
  start = 'Load of the fullest expert over the mean, of the worst layer in the last 20 batches, by seed'
  return [f'{start}: {"; ".join(words)}.', ''] if words else []


def ablation(folder: Path) -> Lines:
  """mHC's Table 1."""
  parts = ('H_res', 'H_pre', 'H_post')
  found = read(folder / 'ablation.csv', 'arm', *parts, 'validation_loss', 'difference', 'low', 'high')
  rows = [
    (
      *(row[name] for name in ('arm', *parts)),
      number(row['validation_loss']),
      *(('',) * 3 if pd.isna(row['difference']) else _gap(row)),
    )
    for _, row in found.iterrows()
  ]
  return table(('arm', *parts, 'loss', 'difference', 'interval', ''), rows)


def slopes(folder: Path) -> Lines:
  """The largest slope of each arm over width and depth, with the rules of transfer and without."""
  found = read(folder / 'coordinates.csv', 'arm', 'axis', 'transfer', 'slope').dropna(subset='slope')
  found = found.assign(
    slope=found['slope'].abs(), rules=found['transfer'].map({True: 'with', False: 'without'})
  )
  worst = found.groupby(['arm', 'axis', 'rules'], sort=False)['slope'].max()
  columns = list(dict.fromkeys((axis, rules) for _, axis, rules in worst.index))
  rows = [
    (
      arm,
      *(f'{worst[arm, axis, rules]:.2f}' if (arm, axis, rules) in worst else '' for axis, rules in columns),
    )
    for arm in dict.fromkeys(found['arm'])
  ]
  names = (f'largest slope over {axis}, {rules} the rules' for axis, rules in columns)
  return table(('arm', *names), rows)


def adaptation(folder: Path) -> Lines:
  """Change of bits per byte while reading, by arm and by the subset of parameters that adapts."""
  found = read(folder / 'adaptation.csv', 'arm', 'subset', 'change', 'low', 'high')
  subsets = dict.fromkeys(found['subset'])
  rows = []
  for arm, own in found.groupby('arm', sort=False):
    by = {
      r['subset']: f'{number(r["change"], "+.4f")} ({interval(r["low"], r["high"], 4)})'
      for _, r in own.iterrows()
    }
    rows.append((arm, *(by.get(subset, '') for subset in subsets)))
  return table(('arm', *subsets), rows)


TABLES: dict[str, Callable[[Path], Lines]] = {
  'study': law,
  'rates': best_rates,  # this and the next three: parts of the study
  'transfer': best_rates,
  'muon': gaps,
  'ranks': ranks,
  'quick': law,
  'learning_rate': best_rates,
  'attention_residual': best_rates,
  'identity_or_mixing': gaps,
  'ablation': ablation,
  'stability': diverged,
  'rotations': lambda folder: diverged(folder) + growth(folder),
  'rank': ranks,
  'isoflop': optimal_sizes,
  'router': loads,
  'fractions': gaps,
  'sparse': sparse,
  'clusters': clusters,
  'fp8': lambda folder: variants(folder, 'float32'),
  'mtp': lambda folder: variants(folder, ''),
  'coordinate_check': slopes,
  'adaptation': adaptation,
}
