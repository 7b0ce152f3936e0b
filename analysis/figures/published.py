"""Published gaps against ours: loss minus the pre-norm residual model's, by source, size and arm.

Where: Study -> here -> catalogue.py.
"""

import numpy as np
from matplotlib.axes import Axes

from ..published import data
from ..study import Study
from .draw import SPARE_COLOURS, WIDE, Drawing, explain, figure, log_axis

MARKERS = ('o', 's', '^', 'D', 'v', 'P')  # by source
COLOURS = ('#0072B2', '#D55E00', '#009E73', *SPARE_COLOURS)  # by arm, within a panel


def published_figure(s: Study) -> Drawing | None:
  """A panel for each family of connections, gaps over parameters: marks by source, ours with intervals."""
  table = s.published.gaps
  if table.empty:
    return None
  arms, panels = data()['arms'], {}
  for arm, entry in arms.items():
    panels.setdefault(entry['panel'], []).append(arm)
  sources = dict(zip(table['source'].unique(), MARKERS, strict=False))
  with figure(WIDE, 5.2, nrows=2, ncols=2, sharex=True, sharey=True) as (fig, axes):
    for ax, (title, members) in zip(axes.flat, panels.items(), strict=True):
      _panel(ax, s, members, sources)
      ax.set_title(title)
    for ax in axes[1]:
      log_axis(ax, 'parameters')
    for ax in axes[:, 0]:
      ax.set_ylabel('loss minus residual (nats)')
    for source, marker in sources.items():
      explain(axes[0, 0], source, marker=marker)
    explain(axes[0, 0], 'this sweep, 95 % over paired seeds', marker='*', markersize=8)
    first = axes[0, 0].lines[-len(sources) - 1 :]
    fig.legend(first, [one.get_label() for one in first], loc='outside upper left', ncols=3)
  none = [arm for arm in table['arm'].unique() if arm not in set(s.published.own['arm'])]
  caption = (
    'Published gaps to the pre-norm residual model beside those of this sweep. Each source has its own data, '
    'tokenizer and training, so that signs and order compare, not nats; published runs have one to three '
    'seeds and no intervals. Parameters as each source counts them, ours all; a loss without a size is in '
    f'the table alone. Not in this sweep: {", ".join(none)}.'
  )
  return Drawing(fig, caption, table)


def _panel(ax: Axes, s: Study, members: list[str], sources: dict[str, str]) -> None:
  """The gaps of some published arms, and ours of the same."""
  table, own = s.published.gaps, s.published.own
  for arm, colour in zip(members, COLOURS, strict=False):
    look = {'color': colour, 'linestyle': '-', 'linewidth': 0.5}
    for (source, _), rows in table[table['arm'] == arm].groupby(['source', 'where'], sort=False):
      rows = rows[np.isfinite(rows['params'])]
      ax.plot(rows['params'], rows['gap'], marker=sources[source], markerfacecolor='none', **look)
    ours = own[own['arm'] == arm]
    if len(ours):
      half = ours['ours_high'].astype(float) - ours['ours_gap']
      mark = look | {'linestyle': 'none', 'elinewidth': 0.9}
      ax.errorbar(ours['ours_params'], ours['ours_gap'], half, marker='*', markersize=8, **mark)
    ax.plot([], [], color=colour, linestyle='-', label=arm)
  ax.axhline(0, color='#000000', lw=0.8)
  handles = [line for line in ax.lines if not line.get_label().startswith('_')]
  ax.legend(handles, [one.get_label() for one in handles], loc='lower left')
