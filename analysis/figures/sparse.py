"""Sparse attention: gains of connections at equal attention, and recall of attention by layer.

Where: Study -> here -> catalogue.py, for sweeps like experiments/sparse.py.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..sparse import PLAIN
from ..study import Study
from .draw import WIDE, Drawing, explain, figure, legend, looks


def sparse_attention(s: Study) -> Drawing | str | None:
  """First panel: differences to residual by attention; then recall by layer, a panel for each attention."""
  gains, layers = s.sparsity.gains, s.sparsity.layers
  if gains.empty and layers.empty:
    return None
  if layers.empty:
    return 'Sparse attention: no run has logged diagnostics/attention_recall.'
  attentions = list(dict.fromkeys(layers['attention']))
  style = looks(list(dict.fromkeys(layers['connection'])))
  with figure(WIDE, 2.5, ncols=1 + len(attentions), squeeze=False) as (fig, axes):
    _draw_gains(axes[0][0], gains, style)
    for ax, attention in zip(axes[0][1:], attentions, strict=True):
      _draw_recall(ax, layers[layers['attention'] == attention], style)
      ax.set_title(attention)
    explain(axes[0][-1], 'as many tokens at best', linestyle=':', linewidth=0.8)
    explain(axes[0][-1], 'by chance', linestyle='--', linewidth=0.8, color='#7F7F7F')
    legend(fig, *axes[0])
  seeds = layers.groupby('arm')['seed'].nunique()
  caption = (
    'Left: final validation loss minus that of the residual connection with the same attention (nats; paired '
    'seeds, 95 % interval): below 0 the gain survives. Right: share of the weight of attention to all tokens '
    f'that the attended ones have, by layer, mean over tokens of one sequence and {seeds.min()} to '
    f'{seeds.max()} seeds, last logged.'
  )
  return Drawing(fig, caption, pd.concat([gains, layers], ignore_index=True))


def _draw_gains(ax: Axes, gains: pd.DataFrame, style: dict[str, dict]) -> None:
  known = gains[gains['difference'].notna()] if len(gains) else gains
  names = list(dict.fromkeys(gains['attention'])) if len(gains) else []
  for place, (connection, own) in enumerate(known.groupby('connection', sort=False) if len(known) else ()):
    at = [names.index(name) + 0.15 * place for name in own['attention']]
    middle = own['difference'].astype(float)
    low, high = (own[end].astype(float).fillna(middle) for end in ('low', 'high'))
    look = {name: style[connection][name] for name in ('color', 'marker')} if connection in style else {}
    ax.errorbar(at, middle, [middle - low, high - middle], ls='none', ms=4, lw=1, label=connection, **look)
  ax.axhline(0, color='#7F7F7F', lw=0.9)
  ax.set_xticks(range(len(names)), names, rotation=30, ha='right')
  ax.set_ylabel(f'loss - loss of {PLAIN}')


def _draw_recall(ax: Axes, layers: pd.DataFrame, style: dict[str, dict]) -> None:
  for connection, own in layers.groupby('connection', sort=False):
    mean = own.groupby('layer')[['recall', 'best', 'random']].mean()
    ax.plot(mean.index, mean['recall'], **style[connection], ms=4, label=connection)
    ax.plot(mean.index, mean['best'], color=style[connection]['color'], ls=':', lw=0.8)
    ax.plot(mean.index, mean['random'], color='#7F7F7F', ls='--', lw=0.8)
  ax.set_ylim(0, 1.02)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True))
  ax.set(xlabel='layer', ylabel='recall of attention')
