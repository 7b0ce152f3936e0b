"""Figures of the law: loss against compute, at equal compute, the multipliers, arrows to equal loss.

Where: Study -> here -> catalogue.py. A figure whose data are absent is the sentence that says so.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..study import Study
from .draw import WIDE, Drawing, figure, legend, log_axis, looks


def loss_vs_flops(s: Study) -> Drawing | str:
  """Validation loss against training FLOPs, with the fitted curve and 95 % band of each arm."""
  if not len(s.grid):
    return 'Loss against compute: no run has finished.'
  with figure() as (fig, ax):
    rows = _draw_runs_and_law(ax, s)
    legend(fig, ax)
  caption = 'Validation loss against training compute; every marker is one run.'
  if s.curves:
    caption += (
      ' Lines: the joint fit'
      + ('' if 'E' in s.document['verdicts'] else ', dotted beyond the largest run')
      + (', along the compute-optimal frontier' if s.fit.law.name == 'chinchilla' else '')
      + '. Shaded: 95 % band of the curve (a single new run scatters more; see the CSV).'
    )
  return Drawing(fig, caption, pd.DataFrame(rows))


def _draw_runs_and_law(ax: Axes, s: Study) -> list[dict]:
  """Draws runs, curves and bands; returns their numbers."""
  style, rows = looks(s.arms), []
  for arm, own in s.grid.groupby('arm', sort=False):
    look = style[arm]
    edge = {'markeredgecolor': 'white', 'markeredgewidth': 0.4, 'zorder': 3}
    ax.plot(own['flops'], own['validation_loss'], look['marker'], color=look['color'], label=arm, **edge)
    rows += [
      {'arm': arm, 'kind': 'run', 'run_id': i, 'flops': x, 'loss': y}
      for i, x, y in zip(own['run_id'], own['flops'], own['validation_loss'], strict=True)
    ]
    if arm not in s.curves:
      continue
    curve = s.curves[arm]
    c, b, inside = curve.flops, curve.band, curve.up_to(own['flops'].max())
    ax.plot(c[inside], b.loss[inside], color=look['color'], lw=1.2)
    ax.plot(c[~inside], b.loss[~inside], color=look['color'], lw=0.9, ls=':')
    ax.fill_between(c, b.low, b.high, color=look['color'], alpha=0.15, lw=0)
    names = ('flops', 'loss', 'low', 'high', 'new_run_low', 'new_run_high')
    values = (c, b.loss, b.low, b.high, b.new_low, b.new_high)
    rows += [
      {'arm': arm, 'kind': 'fit'} | dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)
    ]
  log_axis(ax, 'training FLOPs')
  ax.set_ylabel('validation loss (nats per token)')
  return rows


def equal_flops(s: Study) -> Drawing | str:
  """Every run's loss over the reference's fitted loss at the same FLOPs, with each arm's curve."""
  if s.at_equal_flops.empty:
    return 'Loss at equal FLOPs: there is no fitted curve of several arms.'
  style, percent = looks(s.arms), 'percent_of_reference_fit'
  with figure() as (fig, ax):
    for arm, own in s.at_equal_flops.groupby('arm', sort=False):
      look, runs, curve = style[arm], own[own['kind'] == 'run'], own[own['kind'] == 'fit']
      ax.plot(runs['flops'], runs[percent], look['marker'], color=look['color'], label=arm, ms=4)
      if len(curve):
        ax.plot(curve['flops'], curve[percent], color=look['color'], ls=look['linestyle'], lw=1.2)
    log_axis(ax, 'training FLOPs')
    ax.set(ylabel=f'loss, % of the fit to {s.reference}')
    legend(fig, ax)
  caption = (
    f'The same at equal FLOPs: loss as a percentage of the fitted {s.reference} curve. Markers: '
    'runs; lines: each arm with its compute multiplier.'
  )
  return Drawing(fig, caption, s.at_equal_flops)


def multiplier_plot(s: Study) -> Drawing | str:
  """Compute multiplier of each arm with its interval."""
  shown = [m for m in s.multipliers if m.flops is not None]
  if not shown:
    return 'Compute multipliers: none is identified.'
  style = looks(s.arms)
  with figure(height=0.9 + 0.4 * len(shown)) as (fig, ax):
    for y, m in enumerate(reversed(shown)):
      (low, high), look = m.flops_interval, style[m.arm]
      ends = [[m.flops - low], [high - m.flops]]
      ax.errorbar(m.flops, y, xerr=ends, fmt=look['marker'], color=look['color'])
    ax.axvline(1, color='#7F7F7F', lw=0.8, ls='--')
    ax.set_yticks(range(len(shown)), [m.arm for m in reversed(shown)])
    ax.set_ylim(-0.6, len(shown) - 0.4)
    ax.grid(axis='y', visible=False)
    ax.set(xlabel=f'compute of {s.reference} to reach equal loss')
    ax.xaxis.set_major_formatter(lambda value, _: f'{value:g}x')
  caption = (
    f'Compute multiplier m against {s.reference} at equal FLOPs, with 95 % interval: '
    f'm = 1.2 means that {s.reference} needs 1.2 times the compute for the same loss.'
  )
  return Drawing(fig, caption, pd.DataFrame([vars(m) for m in shown]))


def compute_arrows(s: Study) -> Drawing | str:
  """Loss against compute, whole and near the largest runs, with an arrow per arm to equal loss."""
  if not s.arrows:
    return 'Arrows to equal loss: no compute multiplier is identified.'
  style = looks(s.arms)
  with figure(WIDE, 3.2, ncols=2) as (fig, (whole, near)):
    rows = _draw_runs_and_law(whole, s)
    _draw_runs_and_law(near, s)
    for arrow in s.arrows:
      _draw_arrow(near, arrow, style[arrow['arm']]['color'])
    window = np.array([0.25, 2.0]) * float(s.grid['flops'].max())
    levels = [curve.at(window).loss for curve in s.curves.values()]
    near.set_xlim(window)
    log_axis(near, 'training FLOPs')
    near.set_ylim(np.min(levels), np.max(levels))
    legend(fig, whole)
  caption = (
    'Loss against compute with the joint fit; right: near the largest runs. Arrows: compute that '
    f'{s.reference} needs for equal loss, with 95 % interval.'
  )
  return Drawing(fig, caption, pd.DataFrame(rows + s.arrows))


def _draw_arrow(ax: Axes, arrow: dict, colour: str) -> None:
  start, loss, m = arrow['flops'], arrow['loss'], arrow['multiplier']
  shape = {'arrowstyle': '-|>', 'color': colour, 'lw': 1.6, 'shrinkA': 0, 'shrinkB': 0}
  ax.annotate('', (start * m, loss), (start, loss), arrowprops=shape)
  ax.annotate(
    f'{arrow["arm"]} {m:.2f}x [{arrow["low"]:.2f}, {arrow["high"]:.2f}]',
    (start * max(m, 1), loss),
    (5, 3),
    textcoords='offset points',
    fontsize=7,
    color=colour,
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.75, 'pad': 0.8},
  )
