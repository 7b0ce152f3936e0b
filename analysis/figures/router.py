"""Loads of experts over training: the fullest expert of each layer over the mean, per router.

Where: Study -> here -> catalogue.py, for sweeps like experiments/router.py.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator

from ..router import LAST, METRIC
from ..study import Study
from . import grids
from .draw import WIDE, Drawing, explain, figure, legend, line, log_axis, looks

LIMIT = 1.5  # dotted
TICKS = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7, 10, 20, 50, 100)


def expert_loads(s: Study) -> Drawing | str | None:
  """A panel per router: a line per layer, the mean over seeds, between all seeds; the limit dotted."""
  table = s.loads.updates
  if table.empty and not grids.experts(s):
    return None
  if table.empty:
    return f'Loads of experts: no run has logged {METRIC}.'
  arms, layers = (
    [arm for arm in s.arms if arm in set(table['arm'])],
    [n for n in table.columns if n.startswith('layer_')],
  )
  with figure(WIDE, 2.7, ncols=len(arms), squeeze=False, sharey=True) as (fig, axes):
    for ax, arm in zip(axes[0], arms, strict=True):
      for layer, look in looks(layers).items():
        values = table[table['arm'] == arm].pivot_table(index='step', columns='seed', values=layer)
        low, high = values.min(axis=1), values.max(axis=1)
        for edge in (low, high):
          ax.plot(values.index, edge, color=look['color'], linewidth=0.4, alpha=0.6)
        ax.plot(
          values.index, values.mean(axis=1), **line(look) | {'linewidth': 1}, label=layer.replace('_', ' ')
        )
      ax.axhline(LIMIT, color='black', linestyle=':', lw=1)
      ax.set_title(arm)
      ax.set_xlabel('update')
    explain(axes[0][0], 'lowest and highest seed', linestyle='-', linewidth=0.4)
    explain(axes[0][0], f'{LIMIT}', linestyle=':', linewidth=1, color='#000000')
    log_axis(axes[0][0], 'fullest expert / mean load', 'y')
    _mark(axes[0][0])
    legend(fig, axes[0][0])
  worst = s.loads.last.groupby('arm', sort=False)['load'].max()
  words = ', '.join(f'{arm} {value:.2f}' for arm, value in worst.items())
  caption = (
    f'Load of the fullest expert over the mean load, per layer; lines: mean over {table["seed"].nunique()} '
    f'seeds, thin: the lowest and highest of them, dotted: {LIMIT}. Worst layer and seed, mean over the '
    f'last {LAST} batches: {words}.'
  )
  return Drawing(fig, caption, table.assign(**{layer: np.round(table[layer], 4) for layer in layers}))


def _mark(ax: Axes) -> None:
  """Ticks where loads are read: tenths up to the limit, so far as they stay apart."""
  low, high = ax.get_ylim()
  shown, least = [], np.log(high / low) / 14
  for tick in TICKS:
    if low <= tick <= high and (not shown or np.log(tick / shown[-1]) > least):
      shown.append(tick)
  ax.yaxis.set_major_locator(FixedLocator(shown))
