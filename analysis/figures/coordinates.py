"""The coordinate check as a figure: sizes of activations against width and depth, rules on and off.

Where: coordinates.csv of experiments/coordinate_check.py -> here -> `mhc plots coordinates`.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from .draw import WIDE, Drawing, explain, figure, legend, log_axis, looks

COLUMNS = ('arm', 'axis', 'width', 'depth', 'transfer', 'lr', 'update', 'coordinate', 'value')


def read(folder: Path) -> pd.DataFrame:
  """The rows of folder/coordinates.csv; ConfigError where there is none."""
  path = folder / 'coordinates.csv'
  if not path.is_file():
    raise ConfigError(f'{path} is missing; write it by python -m experiments.coordinate_check')
  try:
    table = pd.read_csv(path)
  except ValueError as e:  # no table at all, or not in UTF-8
    raise ConfigError(f'{path}: not a CSV table; write it by python -m experiments.coordinate_check') from e
  absent = [name for name in COLUMNS if name not in table.columns]
  if absent:
    raise ConfigError(f'{path}: no column {absent[0]!r}; write it by python -m experiments.coordinate_check')
  return table


def slopes(table: pd.DataFrame) -> pd.DataFrame:
  """d log(value) / d log(width or depth) after the last update, per arm, axis, rules and coordinate."""
  last = table[table['update'] == table['update'].max()]
  rows = []
  for key, own in last.groupby(['arm', 'axis', 'transfer', 'coordinate'], sort=False):
    size = own[key[1]].to_numpy(float)
    slope = np.polyfit(np.log(size), np.log(own['value'].to_numpy()), 1)[0]
    rows.append(dict(zip(('arm', 'axis', 'transfer', 'coordinate'), key, strict=True)) | {'slope': slope})
  return pd.DataFrame(rows)


def coordinates(table: pd.DataFrame) -> Drawing:
  """After the last update: a column per coordinate, a row per axis; dotted without the rules."""
  last = table[table['update'] == table['update'].max()]
  names, axes_of = list(dict.fromkeys(last['coordinate'])), list(dict.fromkeys(last['axis']))
  style = looks(list(dict.fromkeys(last['arm'])))
  slope = slopes(table)
  with figure(WIDE, 2.3 * len(axes_of), nrows=len(axes_of), ncols=len(names), squeeze=False) as (fig, grid):
    for row, axis in zip(grid, axes_of, strict=True):
      for ax, name in zip(row, names, strict=True):
        here = last[(last['axis'] == axis) & (last['coordinate'] == name)]
        for (arm, transfer), own in here.groupby(['arm', 'transfer'], sort=False):
          look = style[arm] | {'linestyle': '-' if transfer else ':'}
          ax.plot(own[axis], own['value'], **look, ms=3, label=arm if transfer else None)
        log_axis(ax, axis)
        ax.set_xticks(sorted(here[axis].unique()), [str(v) for v in sorted(here[axis].unique())])
        log_axis(ax, '', 'y')
        ax.set_title(name, fontsize=8)
    explain(grid[0][0], 'without the transfer rules', linestyle=':')
    legend(fig, grid[0][0])
  worst = slope[slope['transfer']].groupby('arm', sort=False)['slope'].apply(lambda v: v.abs().max())
  words = ', '.join(f'{arm} {value:.2f}' for arm, value in worst.items())
  caption = (
    f'Coordinate check after {last["update"].max()} updates at learning rate {last["lr"].iloc[0]:g}. '
    f'Lines: with the transfer rules; dotted: without. Largest |slope| with the rules: {words}.'
  )
  numbers = last.merge(slope, on=['arm', 'axis', 'transfer', 'coordinate'])
  return Drawing(fig, caption, numbers)
