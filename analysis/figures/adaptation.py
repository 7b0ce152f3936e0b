"""Adaptation while reading: bits per byte before and after, by arm and by what adapted.

Where: adaptation.csv of experiments/adaptation.py -> here -> `mhc plots adaptation`. Intervals are of the
bootstrap over documents, the same draws for every arm and subset, so that differences are paired; the models
(seeds) are given.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from ..fitting.intervals import LEVEL
from .draw import WIDE, Drawing, explain, figure, legend, looks

COLUMNS = ('arm', 'seed', 'subset', 'scalars', 'lr', 'decay', 'document', 'bytes', 'nats_before', 'nats')
DRAWS = 4000


def read(folder: Path) -> pd.DataFrame:
  """The rows of folder/adaptation.csv; ConfigError where there is none."""
  path = folder / 'adaptation.csv'
  wanted = 'write it by python -m experiments.adaptation'
  if not path.is_file():
    raise ConfigError(f'{path} is missing; {wanted}')
  try:
    table = pd.read_csv(path)
  except ValueError as e:
    raise ConfigError(f'{path}: not a CSV table; {wanted}') from e
  absent = [name for name in COLUMNS if name not in table.columns]
  if absent or table.empty:
    lack = f'no column {absent[0]!r}' if absent else 'no rows'
    raise ConfigError(f'{path}: {lack}; {wanted}')
  return table


def summary(table: pd.DataFrame, draws: int = DRAWS) -> pd.DataFrame:
  """A row per arm and subset: bits per byte of all documents and seeds together, their change with its
  interval, and that change minus the one of the same arm's control of as many random scalars, paired.
  """
  documents = np.sort(table['document'].unique())
  drawn_BD = np.random.default_rng(0).integers(0, len(documents), (draws, len(documents)))
  rows, changes = [], {}
  for (arm, subset), own in table.groupby(['arm', 'subset'], sort=False):
    sums = own.groupby('document')[['bytes', 'nats_before', 'nats']].sum().reindex(documents)
    bits_D, bytes_D = (sums['nats'] - sums['nats_before']).to_numpy() / np.log(2), sums['bytes'].to_numpy()
    changes[arm, subset] = bits_D[drawn_BD].sum(1) / bytes_D[drawn_BD].sum(1), bits_D.sum() / bytes_D.sum()
    low, high = _ends(changes[arm, subset][0])
    rates = own[['seed', 'lr', 'decay']].drop_duplicates()
    rows.append(
      {
        **{
          'arm': arm,
          'subset': subset,
          'scalars': int(own['scalars'].max()),
          'seeds': own['seed'].nunique(),
        },
        **{'documents': len(documents), 'before': sums['nats_before'].sum() / np.log(2) / bytes_D.sum()},
        **{'change': changes[arm, subset][1], 'low': low, 'high': high},
        'rates': '; '.join(f'{r["lr"]:g}, {r["decay"]:g}' for _, r in rates.iterrows()),
      }
    )
  for row in rows:
    own, control = (
      changes[row['arm'], row['subset']],
      changes.get((row['arm'], f'random, as many as {row["subset"]}')),
    )
    names = ('minus_random', 'minus_random_low', 'minus_random_high')
    values = (np.nan,) * 3 if control is None else (own[1] - control[1], *_ends(own[0] - control[0]))
    row |= dict(zip(names, values, strict=True))
  return pd.DataFrame(rows)


def _ends(values_B: np.ndarray) -> tuple[float, float]:
  return tuple(np.quantile(values_B, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2]))


def changes(table: pd.DataFrame) -> Drawing:
  """The change in bits per byte of every subset, a colour for each arm; below 0 reading helped."""
  rows = summary(table)
  names, arms = dict.fromkeys(rows['subset']), list(dict.fromkeys(rows['arm']))
  subsets = sorted(names, key=lambda name: 'as many as' in name)  # controls below
  style = looks(arms)
  with figure(WIDE, 0.8 + 0.42 * len(subsets)) as (fig, ax):
    for place, arm in enumerate(arms):
      own = rows[rows['arm'] == arm]
      y = [subsets.index(name) + 0.16 * (place - (len(arms) - 1) / 2) for name in own['subset']]
      half = np.abs(own[['low', 'high']].to_numpy().T - own['change'].to_numpy())
      look = {'color': style[arm]['color'], 'marker': style[arm]['marker'], 'linestyle': 'none'}
      ax.errorbar(own['change'], y, xerr=half, elinewidth=0.9, **look, label=arm)
    ax.axvline(0, color='#000000', lw=0.8)
    ax.set_yticks(range(len(subsets)), subsets)
    ax.invert_yaxis()
    ax.set_xlabel('bits per byte after minus before')
    explain(ax, '95 % over documents', marker='_', markersize=9)
    legend(fig, ax)
  first = rows.iloc[0]
  caption = (
    'Change in bits per byte by adapting some scalars while a document is read; text is scored before '
    f'they are adapted to it. {first["documents"]} documents, {rows["seeds"].max()} seeds; rates fitted on '
    'as many other documents. Intervals: bootstrap over documents, of these models.'
  )
  return Drawing(fig, caption, rows)
