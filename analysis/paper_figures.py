"""Composite figures in the layout of the papers (mHC 2512.24880, xHC 2607.14530, Hoffmann 2203.15556).

Where: Study -> here -> all_figures.py. Each returns a Panel, or the sentence that says why it is absent.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from analysis.draw import WIDE, Panel, figure, legend, log_axis, looks, save
from analysis.figures import curve_at, draw_loss_vs_flops, has_curve
from analysis.selection import PARAMS
from analysis.study import Multiplier, Study


def compute_arrows(s: Study, folder: Path) -> Panel | str:
  """Loss against compute, whole and near the largest runs, with an arrow per arm to equal loss."""
  shown = [m for m in s.multipliers if m.flops is not None and has_curve(s, m.arm)]
  if not shown:
    return 'Arrows to equal loss: no compute multiplier is identified.'
  with figure(WIDE, 3.2, ncols=2) as (fig, (whole, near)):
    rows = draw_loss_vs_flops(whole, s)
    draw_loss_vs_flops(near, s)
    largest_c = float(s.grid['flops'].max())
    starts = np.geomspace(0.3, 0.9, len(shown)) * largest_c
    rows += [_arrow(near, s, m, start) for m, start in zip(shown, starts, strict=True)]
    window = np.array([0.25, 2.0]) * largest_c
    levels = [curve_at(s, arm, window).loss for arm in s.fit.points.arms if has_curve(s, arm)]
    near.set_xlim(window)
    log_axis(near, 'training FLOPs')
    near.set_ylim(np.min(levels), np.max(levels))
    legend(fig, whole)
  caption = (
    'Loss against compute with the joint fit; right: near the largest runs. Arrows: compute that '
    f'{s.reference} needs for equal loss, with 95 % interval.'
  )
  return save(fig, folder, 'paper_compute', caption, pd.DataFrame(rows))


def _arrow(ax: Axes, s: Study, m: Multiplier, start: float) -> dict:
  """An arrow from the arm's curve at `start` FLOPs to the reference's at equal loss; its numbers."""
  colour = looks(list(dict.fromkeys(s.table['arm'])))[m.arm]['color']
  loss = float(curve_at(s, m.arm, np.array([start])).loss[0])
  arrow = {'arrowstyle': '-|>', 'color': colour, 'lw': 1.6, 'shrinkA': 0, 'shrinkB': 0}
  ax.annotate('', (start * m.flops, loss), (start, loss), arrowprops=arrow)
  low, high = m.flops_interval
  ax.annotate(
    f'{m.arm} {m.flops:.2f}x [{low:.2f}, {high:.2f}]',
    (start * max(m.flops, 1), loss),
    (5, 3),
    textcoords='offset points',
    fontsize=7,
    color=colour,
  )
  row = {'arm': m.arm, 'kind': 'arrow', 'flops': start, 'loss': loss}
  return row | {'multiplier': m.flops, 'low': low, 'high': high}


def gap_and_ratio(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 6a: absolute gap and relative ratio against FLOPs, side by side."""
  if s.reference is None:
    return 'Gap to the reference: no run has finished.'
  if not s.gaps:
    return (
      f'Gap to {s.reference}: no finished run of another arm has a {s.reference} run of the same '
      'size and seed.'
    )
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, relative in zip(axes, (False, True), strict=True):
      _draw_gap(ax, s, relative)
    legend(fig, axes[0])
  with_interval = any(g.low is not None for g in s.gaps)
  caption = (
    f'Absolute loss gap and relative loss ratio to {s.reference} over paired seeds (mHC Fig. 6a); '
    f'{_cost_words(s)} '
  )
  caption += (
    'Bars: 95 % interval from the spread of paired differences, pooled over arms and sizes.'
    if with_interval
    else 'No interval: no size has two seeds.'
  )
  return save(fig, folder, 'paper_gap_flops', caption, pd.DataFrame([vars(g) for g in s.gaps]))


def _draw_gap(ax: Axes, s: Study, relative: bool) -> None:
  """Draws the gap (nats) or the loss ratio (%) of every arm with its interval."""
  style, unit = looks(list(dict.fromkeys(s.table['arm']))), 100.0 if relative else 1.0
  for arm in dict.fromkeys(g.arm for g in s.gaps):
    own = [g for g in s.gaps if g.arm == arm]
    x = np.exp([g.log_flops for g in own])
    y = unit * np.array([g.ratio if relative else g.difference for g in own])
    low = [g.ratio_low if relative else g.low for g in own]
    ax.plot(x, y, **style[arm], label=arm)
    if low[0] is not None:
      half = y - unit * np.array(low)
      ax.errorbar(x, y, yerr=half, fmt='none', color=style[arm]['color'], lw=0.9)
  ax.axhline(100 if relative else 0, color='#000000', lw=0.8)
  log_axis(ax, 'training FLOPs')
  ax.set_ylabel(f'loss as % of {s.reference}' if relative else f'loss minus {s.reference} (nats)')


def _cost_words(s: Study) -> str:
  """What the pairs have in common: tokens, FLOPs, or neither."""
  tokens = max(abs(np.log(g.tokens_ratio)) for g in s.gaps)
  flops = [g.flops_ratio for g in s.gaps]
  if max(abs(np.log(f)) for f in flops) < 0.02:
    return 'pairs have equal FLOPs.'
  same = 'equal tokens' if tokens < 0.02 else 'neither equal tokens nor equal FLOPs'
  return f"pairs have {same} (FLOPs {min(flops):.2f} to {max(flops):.2f} times the reference's)."


def residual_panels(s: Study, folder: Path) -> Panel | str:
  """Log residuals of the joint fit against N, D and C, and their normal quantiles."""
  if s.fit is None:
    return 'Residual panels: no law was fitted.'
  style, points = looks(list(dict.fromkeys(s.table['arm']))), s.fit.points
  residual = 100 * s.fit.residual_R / s.fit.problem.weight_R
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    labels = {'N': PARAMS[s.params], 'D': 'training tokens', 'C': 'training FLOPs'}
    for ax, (name, label) in zip(axes.flat, labels.items(), strict=False):
      for arm in points.arms:
        own, look = points.arm == arm, style[arm]
        x = np.exp(points.log_x[name][own])
        ax.plot(x, -residual[own], look['marker'], color=look['color'], label=arm, ms=4)
      ax.axhline(0, color='#000000', lw=0.8)
      log_axis(ax, label)
      ax.set_ylabel('measured - fitted (%)')
    quantile, ordered = stats.probplot(-residual, fit=False)
    axes.flat[3].plot(quantile, ordered, 'k.')
    axes.flat[3].axline((0, 0), slope=float(np.std(residual)), color='#7F7F7F', lw=0.8)
    axes.flat[3].set(xlabel='normal quantile', ylabel='measured - fitted (%)')
    legend(fig, axes.flat[0])
  ids = {'arm': points.arm, 'run_id': points.run, 'residual_percent': -residual}
  table = pd.DataFrame(ids | {'loss': points.loss, 'cooks_distance': s.fit.influence_R})
  for name in labels:
    table[name] = np.exp(points.log_x[name])
  caption = (
    'Residuals of the joint fit, and their normal quantiles. A trend along an axis means that the law does '
    'not hold.'
  )
  return save(fig, folder, 'paper_residuals', caption, table)
