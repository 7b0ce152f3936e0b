"""Loads of experts over training: the fullest expert of each layer over the mean, per router.

Where: Study -> here -> catalogue.py, for sweeps like experiments/router.py.
"""

import numpy as np

from ..router import LAST, METRIC
from ..study import Study
from .draw import WIDE, Drawing, figure, legend, log_axis, looks

LIMIT = 1.5  # dotted


def expert_loads(s: Study) -> Drawing | str:
  """A panel per router: a line per layer, the mean over seeds, in a band of all seeds; the limit dotted."""
  table = s.loads.updates
  if table.empty:
    return f'Loads of experts: no run has logged {METRIC}.'
  arms, layers = list(dict.fromkeys(table['arm'])), [n for n in table.columns if n.startswith('layer_')]
  with figure(WIDE, 2.7, ncols=len(arms), squeeze=False, sharey=True) as (fig, axes):
    for ax, arm in zip(axes[0], arms, strict=True):
      for layer, look in looks(layers).items():
        values = table[table['arm'] == arm].pivot(index='step', columns='seed', values=layer)
        low, high = values.min(axis=1), values.max(axis=1)
        ax.fill_between(values.index, low, high, color=look['color'], alpha=0.2, lw=0)
        label = layer.replace('_', ' ')
        ax.plot(values.index, values.mean(axis=1), look['linestyle'], color=look['color'], label=label)
      ax.axhline(LIMIT, color='black', linestyle=':', lw=1)
      ax.set_title(arm)
      ax.set_xlabel('update')
    log_axis(axes[0][0], 'fullest expert / mean load', 'y')
    legend(fig, axes[0][0])
  worst = s.loads.last.groupby('arm', sort=False)['load'].max()
  words = ', '.join(f'{arm} {value:.2f}' for arm, value in worst.items())
  caption = (
    f'Load of the fullest expert over the mean load, per layer; lines: mean over {table["seed"].nunique()} '
    f'seeds, bands: all seeds, dotted: {LIMIT}. Worst layer and seed, mean over the last {LAST} batches: '
    f'{words}.'
  )
  return Drawing(fig, caption, table.assign(**{layer: np.round(table[layer], 4) for layer in layers}))
