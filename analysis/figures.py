"""Figures of the law: loss against compute, at equal compute, the multipliers, the rollout.

Where: Study -> here -> all_figures.py. A figure whose data are absent returns the sentence that says so
instead of a Panel.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis.draw import Panel, figure, legend, log_axis, looks, save
from analysis.identify import doubts
from analysis.intervals import Band, band
from analysis.laws import Points
from analysis.study import Study

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


def rollout_plot(s: Study, folder: Path) -> Panel | str:
  """Held-out error of fits to the k smallest sizes."""
  table = pd.DataFrame([vars(step) for step in s.rollout])
  done = [step for step in s.rollout if step.problem is None]
  if not done:
    return 'Rollout: too few sizes to fit the small ones and predict the large ones.'
  with figure() as (fig, ax):
    k = [step.sizes_fitted for step in done]
    ax.plot(k, [100 * step.held_out_error for step in done], 'o-', label='held-out sizes')
    ax.plot(k, [100 * step.in_sample_error for step in done], 's--', label='fitted sizes')
    ax.set_xticks(k)
    ax.set_ylim(bottom=0)
    ax.set(xlabel='sizes fitted (smallest first)', ylabel='mean |error| (% of loss)')
    legend(fig, ax)
  caption = 'Rollout: the law fitted to the k smallest sizes predicts the larger ones.'
  left = [str(step.sizes_fitted) for step in s.rollout if step.problem is not None]
  if left:
    caption += f' No fit: k = {", ".join(left)} (the reasons are in the table).'
  return save(fig, folder, 'rollout', caption, table)
