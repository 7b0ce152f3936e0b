"""Loads of experts over training: the fullest expert of each layer over the mean, per router.

Where: a sweep's folder (experiments/router.py) -> here -> `python -m analysis.plots router`.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from ..runs import Run, Sweep
from .draw import WIDE, Panel, figure, legend, log_axis, looks, save

METRIC = 'train/load_max_over_mean'
LIMIT, LAST = 1.5, 20  # no expert above LIMIT times the mean load, averaged over the LAST batches


def loads(sweep: Sweep) -> pd.DataFrame:
  """One row per run and logged update: arm, seed, run_id, step, and layer_1 .. of the layers with experts.

  Raises ConfigError where no run has logged loads.
  """
  rows = [
    {'arm': run.arm, 'seed': run.config['seed'], 'run_id': run.run_id, 'step': row['step']}
    | {f'layer_{layer}': value for layer, value in enumerate(row[METRIC], _first_layer(run))}
    for run in sweep.runs.values()
    for row in run.rows
    if METRIC in row
  ]
  if not rows:
    raise ConfigError(f'{sweep.folder}: no run has logged {METRIC}; experiments/router.py has runs that do')
  return pd.DataFrame(rows)


def _first_layer(run: Run) -> int:
  """Number, from 1 on, of the first layer with experts."""
  return run.config['model']['dense_layers'] + 1


def last_means(table: pd.DataFrame) -> pd.Series:
  """Mean over each run's last LAST batches, indexed by arm, seed and layer.

  Not below the mean of any single expert of the layer, since that expert is never fuller than the fullest.
  """
  layers = [name for name in table.columns if name.startswith('layer_')]
  last = table.sort_values('step').groupby(['arm', 'seed'], sort=False).tail(LAST)
  return last.groupby(['arm', 'seed'], sort=False)[layers].mean().stack()


def load_figure(sweep: Sweep, folder: Path) -> Panel:
  """A panel per router: a line per layer, the mean over seeds, in a band of all seeds; the limit dotted."""
  table = loads(sweep)
  arms, layers = list(dict.fromkeys(table['arm'])), [n for n in table.columns if n.startswith('layer_')]
  with figure(WIDE, 2.7, ncols=len(arms), squeeze=False, sharey=True) as (fig, axes):
    for ax, arm in zip(axes[0], arms, strict=True):
      for layer, look in looks(layers).items():
        values = table[table['arm'] == arm].pivot(index='step', columns='seed', values=layer)
        ax.fill_between(
          values.index, values.min(axis=1), values.max(axis=1), color=look['color'], alpha=0.2, lw=0
        )
        label = layer.replace('_', ' ')
        ax.plot(values.index, values.mean(axis=1), look['linestyle'], color=look['color'], label=label)
      ax.axhline(LIMIT, color='black', linestyle=':', lw=1)
      ax.set_title(arm)
      ax.set_xlabel('update')
    log_axis(axes[0][0], 'fullest expert / mean load', 'y')
    legend(fig, axes[0][0])
  worst = last_means(table).groupby('arm', sort=False).max()
  words = ', '.join(f'{arm} {value:.2f}' for arm, value in worst.items())
  caption = (
    f'Load of the fullest expert over the mean load, per layer; lines: mean over {table["seed"].nunique()} '
    f'seeds, bands: all seeds, dotted: {LIMIT}. Worst layer and seed, mean over the last {LAST} batches: '
    f'{words}.'
  )
  table[layers] = np.round(table[layers], 4)
  return save(fig, folder, 'router_loads', caption, table)
