"""Figures of the law: loss against compute, at equal compute, the multipliers, the rollout.

Where: Study -> here -> all_figures.py. A figure whose data are absent returns the sentence that says so
instead of a Panel.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..fitting.identify import doubts
from ..fitting.intervals import Band, band
from ..fitting.laws import Points
from ..study import Multiplier, Study
from .draw import WIDE, Panel, figure, legend, log_axis, looks, save

EXTRAPOLATE = 4.0  # how far past the largest run a fitted curve is drawn, as a factor of compute


def has_curve(s: Study, arm: str) -> bool:
  """Whether the law may be drawn for an arm: a sound fit, with both exponents for L(N, D)."""
  if s.fit is None or doubts(s.fit) or arm not in s.fit.points.arms:
    return False
  return s.fit.law.name != 'chinchilla' or not set(s.fit.law.exponents) & set(s.document['verdicts'])


def curve_at(s: Study, arm: str, flops: np.ndarray) -> Band:
  """The law of an arm at given FLOPs; for L(N, D) along its compute-optimal frontier."""
  log_x = {'C': np.log(flops)}
  if s.fit.law.name == 'chinchilla':
    own = s.table[s.table['excluded'].isna() & (s.table['arm'] == arm)]
    largest = own.loc[own['flops'].idxmax()]
    p = s.fit.parameters
    alpha, beta = p['alpha'], p['beta']
    # C = kappa N D with the arm's own kappa (6 plus attention and hyper-connections).
    kappa = largest['flops'] / (largest[f'params_{s.params}'] * largest['tokens'])
    balance = (np.log(alpha * p['A']) - np.log(beta * p['B'])) / (alpha + beta)
    log_n = balance + beta / (alpha + beta) * np.log(flops / kappa)
    log_x |= {'N': log_n, 'D': np.log(flops / kappa) - log_n}
  n = len(flops)
  return band(s.fit, Points(log_x, np.ones(n), np.full(n, arm), *[np.arange(n)] * 3))


def fitted_curve(s: Study, arm: str) -> tuple[np.ndarray, Band] | None:
  """(FLOPs, band) of an arm over its runs and, where E is identified, further; or None."""
  if not has_curve(s, arm):
    return None
  own = s.table[s.table['excluded'].isna() & (s.table['arm'] == arm)]
  beyond = 1.0 if 'E' in s.document['verdicts'] else EXTRAPOLATE
  flops = np.geomspace(own['flops'].min(), own['flops'].max() * beyond, 60)
  return flops, curve_at(s, arm, flops)


def loss_vs_flops(s: Study, folder: Path) -> Panel | str:
  """Validation loss against training FLOPs, with the fitted curve and 95 % band of each arm."""
  if not len(s.grid):
    return 'Loss against compute: no run has finished.'
  with figure() as (fig, ax):
    rows = draw_loss_vs_flops(ax, s)
    legend(fig, ax)
  caption = 'Validation loss against training compute; every marker is one run.'
  if any(row['kind'] == 'fit' for row in rows):
    caption += (
      ' Lines: the joint fit'
      + ('' if 'E' in s.document['verdicts'] else ', dotted beyond the largest run')
      + (', along the compute-optimal frontier' if s.fit.law.name == 'chinchilla' else '')
      + '. Shaded: 95 % band of the curve (a single new run scatters more; see the CSV).'
    )
  return save(fig, folder, 'loss_vs_flops', caption, pd.DataFrame(rows))


def draw_loss_vs_flops(ax: Axes, s: Study) -> list[dict]:
  """Draws runs, curves and bands; returns their numbers."""
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  for arm, own in s.grid.groupby('arm', sort=False):
    look = style[arm]
    edge = {'markeredgecolor': 'white', 'markeredgewidth': 0.4, 'zorder': 3}
    ax.plot(own['flops'], own['validation_loss'], look['marker'], color=look['color'], label=arm, **edge)
    rows += [
      {'arm': arm, 'kind': 'run', 'run_id': i, 'flops': x, 'loss': y}
      for i, x, y in zip(own['run_id'], own['flops'], own['validation_loss'], strict=True)
    ]
    fitted = fitted_curve(s, arm)
    if fitted is None:
      continue
    c, b = fitted
    inside = c <= own['flops'].max() * (1 + 1e-9)
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


def equal_flops(s: Study, folder: Path) -> Panel | str:
  """Every run's loss over the reference's fitted loss at the same FLOPs, with each arm's curve."""
  if not has_curve(s, s.reference) or len(s.fit.points.arms) < 2:
    return 'Loss at equal FLOPs: there is no fitted curve of several arms.'
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []

  def reference_at(flops: np.ndarray) -> np.ndarray:
    return curve_at(s, s.reference, np.asarray(flops)).loss

  with figure() as (fig, ax):
    for arm, own in s.grid.groupby('arm', sort=False):
      look, fitted = style[arm], fitted_curve(s, arm)
      y = 100 * own['validation_loss'] / reference_at(own['flops'])
      ax.plot(own['flops'], y, look['marker'], color=look['color'], label=arm, ms=4)
      rows += [
        {'arm': arm, 'kind': 'run', 'run_id': i, 'flops': x, 'percent_of_reference_fit': v}
        for i, x, v in zip(own['run_id'], own['flops'], y, strict=True)
      ]
      if fitted is None:
        continue
      c, b = fitted
      c, low, mid, high = (v[c <= own['flops'].max() * (1 + 1e-9)] for v in (c, b.low, b.loss, b.high))
      low, mid, high = (100 * v / reference_at(c) for v in (low, mid, high))
      ax.plot(c, mid, color=look['color'], ls=look['linestyle'], lw=1.2)
      rows += [
        {
          'arm': arm,
          'kind': 'fit',
          'flops': x,
          'percent_of_reference_fit': v,
          'low': lo,
          'high': hi,
        }
        for x, v, lo, hi in zip(c, mid, low, high, strict=True)
      ]
    log_axis(ax, 'training FLOPs')
    ax.set(ylabel=f'loss, % of the fit to {s.reference}')
    legend(fig, ax)
  caption = (
    f'The same at equal FLOPs: loss as a percentage of the fitted {s.reference} curve. Markers: '
    'runs; lines: each arm with its compute multiplier.'
  )
  return save(fig, folder, 'loss_at_equal_flops', caption, pd.DataFrame(rows))


def multiplier_plot(s: Study, folder: Path) -> Panel | str:
  """Compute multiplier of each arm with its interval."""
  shown = [m for m in s.multipliers if m.flops is not None]
  if not shown:
    return 'Compute multipliers: none is identified.'
  style = looks(list(dict.fromkeys(s.table['arm'])))
  with figure(height=0.9 + 0.4 * len(shown)) as (fig, ax):
    for y, m in enumerate(reversed(shown)):
      low, high = m.flops_interval
      ax.errorbar(
        m.flops,
        y,
        xerr=[[m.flops - low], [high - m.flops]],
        fmt=style[m.arm]['marker'],
        color=style[m.arm]['color'],
      )
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
  return save(fig, folder, 'compute_multiplier', caption, pd.DataFrame([vars(m) for m in shown]))


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
    bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.75, 'pad': 0.8},
  )
  row = {'arm': m.arm, 'kind': 'arrow', 'flops': start, 'loss': loss}
  return row | {'multiplier': m.flops, 'low': low, 'high': high}
