"""The report's figures, one panel each (panels stack on a narrow screen), with their numbers.

Where: Study -> here -> page.py. A figure whose data are absent is not drawn; `draw_all` returns the
sentence that says so instead.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import shape_figures
from analysis.draw import Panel, figure, legend, log_axis, looks, save
from analysis.identify import doubts
from analysis.intervals import Band, band
from analysis.laws import Points
from analysis.selection import AXIS_LABEL
from analysis.study import Study

EXTRAPOLATE = 4.0  # how far past the largest run a fitted curve is drawn, as a factor of compute


def draw_all(s: Study, folder: Path) -> tuple[list[Panel], list[str]]:
  """Saves every figure that the data carry; returns them and the reasons for those left out."""
  panels, absent = [], []
  makers: list[Callable[[Study, Path], Panel | str]] = [
    loss_vs_flops,
    equal_flops,
    multiplier_plot,
    gap_absolute,
    gap_relative,
    shape_figures.loss_vs_width,
    shape_figures.loss_vs_depth,
    *(lambda s, f, axis=axis: shape_figures.rank_plot(s, f, axis) for axis in AXIS_LABEL),
    *(lambda s, f, name=name: shape_figures.gain_plot(s, f, name) for name in shape_figures.GAINS),
    shape_figures.training_loss,
    shape_figures.gradient_norm,
    residual_plot,
    rollout_plot,
  ]
  for make in makers:
    made = make(s, folder)
    (panels if isinstance(made, Panel) else absent).append(made)
  panels += shape_figures.rate_plots(s, folder)
  return panels, list(dict.fromkeys(absent))


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
    kappa = largest['flops'] / (largest['params_matmul'] * largest['tokens'])
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


def _gap_plot(s: Study, folder: Path, relative: bool) -> Panel | str:
  if s.reference is None:
    return 'Gap to the reference: no run has finished.'
  if not s.gaps:
    return (
      f'Gap to {s.reference}: no finished run of another arm has a {s.reference} run of the same '
      'size and seed.'
    )
  with figure() as (fig, ax):
    draw_gap(ax, s, relative)
    legend(fig, ax)
  what = 'Relative loss ratio' if relative else 'Absolute loss gap'
  with_interval = any(g.low is not None for g in s.gaps)
  caption = f'{what} to {s.reference} over paired seeds; {_cost_words(s)} ' + (
    'Bars: 95 % interval from the spread of paired differences, pooled over arms and sizes.'
    if with_interval
    else 'No interval: no size has two seeds.'
  )
  name = 'gap_relative' if relative else 'gap_absolute'
  return save(fig, folder, name, caption, pd.DataFrame([vars(g) for g in s.gaps]))


def draw_gap(ax: Axes, s: Study, relative: bool) -> None:
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


def gap_absolute(s: Study, folder: Path) -> Panel | str:
  """Loss minus the reference's, against FLOPs (mHC Fig. 6a)."""
  return _gap_plot(s, folder, relative=False)


def gap_relative(s: Study, folder: Path) -> Panel | str:
  """Loss over the reference's, against FLOPs (mHC Fig. 6a)."""
  return _gap_plot(s, folder, relative=True)


def residual_plot(s: Study, folder: Path) -> Panel | str:
  """Log residuals of the joint fit against compute."""
  if s.fit is None:
    return 'Residuals: no law was fitted.'
  style = looks(list(dict.fromkeys(s.table['arm'])))
  points = s.fit.points
  loss = band(s.fit, points).loss
  table = pd.DataFrame(
    {
      'arm': points.arm,
      'run_id': points.run,
      'flops': np.exp(points.log_x['C']),
      'loss': points.loss,
      'fitted': loss,
      'log_residual': np.log(points.loss / loss),
      'cooks_distance': s.fit.influence_R,
    }
  )
  with figure() as (fig, ax):
    for arm, own in table.groupby('arm', sort=False):
      look = style[arm]
      ax.plot(own['flops'], 100 * own['log_residual'], look['marker'], color=look['color'], label=arm)
    ax.axhline(0, color='#000000', lw=0.8)
    log_axis(ax, 'training FLOPs')
    ax.set(ylabel='measured - fitted (% of loss)')
    legend(fig, ax)
  caption = 'Residuals of the joint fit. A trend along compute means that the law does not hold.'
  return save(fig, folder, 'residuals', caption, table)


def rollout_plot(s: Study, folder: Path) -> Panel | str:
  """Held-out error of fits to the k smallest sizes."""
  if not s.rollout:
    return 'Rollout: too few sizes to fit the small ones and predict the large ones.'
  table = pd.DataFrame([vars(step) for step in s.rollout])
  with figure() as (fig, ax):
    ax.plot(table['sizes_fitted'], 100 * table['held_out_error'], 'o-', label='held-out sizes')
    ax.plot(table['sizes_fitted'], 100 * table['in_sample_error'], 's--', label='fitted sizes')
    ax.set_xticks(table['sizes_fitted'])
    ax.set_ylim(bottom=0)
    ax.set(xlabel='sizes fitted (smallest first)', ylabel='mean |error| (% of loss)')
    legend(fig, ax)
  caption = 'Rollout: the law fitted to the k smallest sizes predicts the larger ones.'
  return save(fig, folder, 'rollout', caption, table)
