"""Figures of the law: loss against compute, at equal compute, the multipliers, arrows to equal loss.

Where: Study -> here -> catalogue.py. A figure whose data are absent is the sentence that says so.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..needs import Need, need, needs, shown
from ..study import Study
from . import grids
from .draw import Drawing, by_arm, explain, figure, hollow, legend, line, log_axis, looks

BAND = {'linestyle': '-', 'linewidth': 0.4}
BEYOND = {'alpha': 0.45}


def loss_vs_flops(s: Study) -> Drawing | str:
  """Validation loss against training FLOPs, with the fitted curve and 95 % band of each arm."""
  if not len(s.grid):
    return 'Loss against compute: no run has finished.'
  with figure(height=3.0) as (fig, ax):
    rows = _draw_runs_and_law(ax, s)
    _explain(ax, s)
    legend(fig, ax)
  caption = 'Validation loss against training compute; every marker is one run.'
  if s.curves:
    along = ', along the compute-optimal frontier' if s.fit.law.name == 'chinchilla' else ''
    caption += f' Lines: the joint fit of all arms{along}; one new run scatters more than the band (CSV).'
  return Drawing(fig, caption, pd.DataFrame(rows))


def _explain(ax: Axes, s: Study) -> None:
  """Entries of the legend for what all arms have: band, and the part beyond their runs."""
  if s.curves:
    explain(ax, '95 % band of the curve', **BAND)
    if any((~curve.up_to(_largest(s, arm))).any() for arm, curve in s.curves.items()):
      explain(ax, 'beyond the runs', linestyle='-', **BEYOND)


def _largest(s: Study, arm: str) -> float:
  return s.grid.loc[s.grid['arm'] == arm, 'flops'].max()


def _draw_runs_and_law(ax: Axes, s: Study) -> list[dict]:
  """Draws runs, curves and the edges of bands; returns their numbers."""
  style, rows = looks(s.arms), []
  for arm, own in by_arm(s.grid, s.arms):
    look = style[arm]
    ax.plot(own['flops'], own['validation_loss'], **hollow(look), zorder=3)
    ax.plot([], [], **hollow(look) | (line(look) if arm in s.curves else {}), label=arm)
    rows += [
      {'arm': arm, 'kind': 'run', 'run_id': i, 'flops': x, 'loss': y}
      for i, x, y in zip(own['run_id'], own['flops'], own['validation_loss'], strict=True)
    ]
    if arm not in s.curves:
      continue
    curve = s.curves[arm]
    c, b, inside = curve.flops, curve.band, curve.up_to(own['flops'].max())
    ax.plot(c[inside], b.loss[inside], **line(look))
    ax.plot(c[~inside], b.loss[~inside], **line(look), **BEYOND)
    for edge in (b.low, b.high):
      ax.plot(c, edge, color=look['color'], **BAND)
    names = ('flops', 'loss', 'low', 'high', 'new_run_low', 'new_run_high')
    values = (c, b.loss, b.low, b.high, b.new_low, b.new_high)
    rows += [
      {'arm': arm, 'kind': 'fit'} | dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)
    ]
  log_axis(ax, 'training FLOPs')
  ax.set_ylabel('validation loss (nats per token)')
  return rows


def equal_flops(s: Study) -> Drawing | str | None:
  """Every run's loss over the reference's fitted loss at the same FLOPs, with each arm's curve."""
  if not (grids.arms(s) and grids.sizes(s)):
    return None
  if s.at_equal_flops.empty:
    return 'Loss at equal FLOPs: there is no fitted curve of several arms.'
  style, percent = looks(s.arms), 'percent_of_reference_fit'
  with figure() as (fig, ax):
    for arm, own in by_arm(s.at_equal_flops, s.arms):
      look, runs, curve = style[arm], own[own['kind'] == 'run'], own[own['kind'] == 'fit']
      ax.plot(runs['flops'], runs[percent], **hollow(look), zorder=3)
      ax.plot([], [], **hollow(look) | (line(look) if len(curve) else {}), label=arm)
      ax.plot(curve['flops'], curve[percent], **line(look))
    log_axis(ax, 'training FLOPs')
    ax.set(ylabel=f'loss, % of the fit to {s.reference}')
    legend(fig, ax)
  caption = (
    f'Loss as a percentage of the fitted {s.reference} curve at equal FLOPs. Markers: '
    'runs; lines: each arm with its compute multiplier.'
  )
  return Drawing(fig, caption, s.at_equal_flops)


def multiplier_plot(s: Study) -> Drawing | str | None:
  """Compute that each arm needs over the reference's, with its interval."""
  if not (grids.arms(s) and grids.sizes(s)):
    return None
  arms = shown(s.multipliers, s.arms)
  if not arms:
    return 'Compute multipliers: none is identified.'
  style = looks(s.arms)
  with figure(height=1.25 + 0.3 * len(arms)) as (fig, ax):
    for y, m in enumerate(reversed(arms)):
      known = needs(m)
      for k, one in enumerate(known):  # two: at the smallest size, hollow, and at the largest
        ends = [[one.value - one.low], [one.high - one.value]]
        mark = {'fmt': style[m.arm]['marker'], 'color': style[m.arm]['color']}
        face = 'white' if k + 1 < len(known) else style[m.arm]['color']
        ax.errorbar(one.value, y + 0.15 * (len(known) - 1) * (1 - 2 * k), xerr=ends, mfc=face, **mark)
    explain(ax, f'{s.reference}: 1', linestyle='--', linewidth=0.8)
    ax.axvline(1, color='#555555', lw=0.8, ls='--')
    ax.set_yticks(range(len(arms)), [m.arm for m in reversed(arms)])
    ax.set_ylim(-0.6, len(arms) - 0.4)
    ax.grid(axis='y', visible=False)
    ax.set(xlabel=f'compute that the arm needs,\nrelative to {s.reference}')
    legend(fig, ax)
  caption = (
    f'Compute that an arm needs for the same loss, over that of {s.reference}, with 95 % interval: left '
    'of 1 it saves compute.'
  )
  if any(len(needs(m)) > 1 for m in arms):
    caption += (
      ' Where the gain is not the same at all sizes: at the smallest (hollow) and the largest (filled).'
    )
  rows = [{'arm': m.arm} | vars(one) | {'verdict': one.verdict} for m in arms for one in needs(m)]
  return Drawing(fig, caption, pd.DataFrame(rows))


def compute_arrows(s: Study) -> Drawing | str | None:
  """Loss against compute near the largest runs, with an arrow per arm from the reference."""
  if not (grids.arms(s) and grids.sizes(s)):
    return None
  if not s.arrows:
    return 'Arrows to equal loss: no compute multiplier is identified.'
  style, known = looks(s.arms), {m.arm: need(m) for m in s.multipliers}
  with figure(height=3.0 + 0.15 * len(s.arrows)) as (fig, near):  # a line for each arrow, above the axes
    rows = _draw_runs_and_law(near, s)
    _explain(near, s)
    legend(fig, near)
    ends = [arrow['flops'] * m for arrow in s.arrows for m in (1, arrow['multiplier'])]
    largest = float(s.grid['flops'].max())
    window = np.array([min(0.25 * largest, 0.8 * min(ends)), max(2 * largest, 1.25 * max(ends))])
    levels = [curve.at(window).loss for curve in s.curves.values()]
    near.set_xlim(window)
    log_axis(near, 'training FLOPs')
    near.set_ylim(np.min(levels), np.max(levels))
    entries = [
      _draw_arrow(near, arrow, style[arrow['arm']], known[arrow['arm']])
      for arrow in sorted(s.arrows, key=lambda arrow: s.arms.index(arrow['arm']))
    ]
    above = {'loc': 'lower left', 'bbox_to_anchor': (0, 1), 'alignment': 'left'}  # covers no curve
    near.legend(handles=entries, title=f"compute over {s.reference}'s (95 %)", **above)
  caption = (
    f'Near the largest runs. Arrows: from the compute that {s.reference} needs to that which the arm needs '
    'for the same loss, by the joint fit.'
  )
  rows += [
    arrow | {'needed': n.value, 'needed_low': n.low, 'needed_high': n.high}
    for arrow in s.arrows
    for n in [known[arrow['arm']]]
  ]
  return Drawing(fig, caption, pd.DataFrame(rows))


def _draw_arrow(ax: Axes, arrow: dict, look: dict, needed: Need) -> Line2D:
  """From the reference's compute to the arm's at one loss; returns its entry of the legend."""
  start, loss, colour = arrow['flops'] * arrow['multiplier'], arrow['loss'], look['color']
  shape = {'arrowstyle': '-|>', 'color': colour, 'lw': 1.6, 'shrinkA': 0, 'shrinkB': 0}
  ax.annotate('', (arrow['flops'], loss), (start, loss), arrowprops=shape)
  words = f'{arrow["arm"]} {needed.value:.2f} ({needed.low:.2f} to {needed.high:.2f})'
  return explain(
    ax, words, marker='>' if needed.value > 1 else '<', color=colour, linestyle='-', linewidth=1.6
  )
