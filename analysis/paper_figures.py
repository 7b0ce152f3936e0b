"""Composite figures in the layout of the papers (mHC 2512.24880, xHC 2607.14530, Hoffmann 2203.15556).

Where: Study -> here -> `python -m analysis.plots paper`. Each returns a Panel, or the sentence that says
why it is absent.
"""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter
from scipy import stats

from analysis.draw import Panel, figure, legend, log_axis, looks, save
from analysis.figures import curve_at, draw_gap, draw_loss_vs_flops, has_curve
from analysis.runs import Run, curve
from analysis.selection import pair_up
from analysis.shape_figures import GAINS, draw_gain, largest, smooth
from analysis.study import Multiplier, Study

MATRICES = ('res_mean', 'composite_res_mean')
WIDE = 7.0  # inches: a text width


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
  if not s.gaps:
    return 'Gap and ratio against FLOPs: there are no paired runs.'
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, relative in zip(axes, (False, True), strict=True):
      draw_gap(ax, s, relative)
    legend(fig, axes[0])
  caption = f'Loss against {s.reference}: absolute gap and relative ratio over compute (mHC Fig. 6a).'
  return save(fig, folder, 'paper_gap_flops', caption, pd.DataFrame([vars(g) for g in s.gaps]))


def _pairs_at_largest(s: Study) -> list[tuple[str, Run, Run]]:
  """(arm, its run, the reference's run) at the reference's largest budget that the arm has pairs of."""
  out = []
  for arm, pairs in pair_up(s.table, s.reference).items() if s.reference else ():
    size, duration = pairs.loc[pairs['flops_ref'].idxmax(), ['size', 'duration']]
    for _, pair in pairs[(pairs['size'] == size) & (pairs['duration'] == duration)].iterrows():
      out.append((arm, s.sweep.runs[pair['run_id_own']], s.sweep.runs[pair['run_id_ref']]))
  return out


def _difference(own: Run, other: Run, metric: str) -> pd.DataFrame:
  """Metric of two runs at the arm's tokens (the reference interpolated): tokens, own, other."""
  (x, y), (xr, yr) = curve(own, metric), curve(other, metric)
  if len(x) < 2 or len(xr) < 2:
    return pd.DataFrame()
  x, y = np.array(x), np.array(y)
  inside = x <= xr[-1]
  return pd.DataFrame({'tokens': x[inside], 'own': y[inside], 'other': np.interp(x[inside], xr, yr)})


def over_training(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 2 and 5: training-loss gap to the reference and gradient norm over training."""
  pairs = _pairs_at_largest(s)
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  with figure(WIDE, 2.8, ncols=2) as (fig, (left, right)):
    for arm, own, other in pairs:
      table = _difference(own, other, 'train/loss')
      if not len(table):
        continue
      gap = smooth((table['own'] - table['other']).to_numpy())
      label = None if any(row['arm'] == arm for row in rows) else arm
      look = {'color': style[arm]['color'], 'linestyle': style[arm]['linestyle']}
      left.plot(table['tokens'], gap, **look, lw=1.0, label=label)
      rows += [
        {'arm': arm, 'run_id': own.run_id, 'tokens': x, 'loss_gap': v}
        for x, v in zip(table['tokens'], gap, strict=True)
      ]
    if not rows:
      return 'Gap over training: no paired runs logged train/loss.'
    named = {run.run_id: (arm, run) for arm, run, _ in pairs}
    named |= {run.run_id: (s.reference, run) for _, _, run in pairs}
    for arm, run in named.values():
      x, y = curve(run, 'train/grad_norm')
      right.plot(x, y, color=style[arm]['color'], ls=style[arm]['linestyle'], lw=0.8)
      rows += [
        {'arm': arm, 'run_id': run.run_id, 'tokens': a, 'grad_norm': b} for a, b in zip(x, y, strict=True)
      ]
    left.axhline(0, color='#000000', lw=0.8)
    for ax in (left, right):
      ax.set_xlabel('training tokens')
      ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    left.set_ylabel(f'training loss minus {s.reference}')
    log_axis(right, 'gradient norm', 'y')
    legend(fig, left)
  caption = 'Training-loss gap (running mean over 5 % of the run) and gradient norm at the largest size.'
  return save(fig, folder, 'paper_over_training', caption, pd.DataFrame(rows))


def token_scaling(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 6b: validation gap and ratio along the tokens of the largest runs."""
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  for arm, own, other in _pairs_at_largest(s):
    table = _difference(own, other, 'validation/loss')
    rows += [
      {'arm': arm, 'run_id': own.run_id, 'tokens': t, 'gap': a - b, 'ratio': a / b}
      for t, a, b in table.itertuples(index=False)
      if t > 0
    ]
  if not rows:
    return 'Gap along tokens: no paired runs logged validation/loss.'
  table = pd.DataFrame(rows)
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, name, unit, zero in zip(axes, ('gap', 'ratio'), (1, 100), (0, 100), strict=True):
      for arm, own in table.groupby('arm', sort=False):
        mean = own.groupby('tokens')[name].mean()
        ax.plot(mean.index, unit * mean, **style[arm], label=arm, ms=3)
      ax.axhline(zero, color='#000000', lw=0.8)
      log_axis(ax, 'training tokens')
    axes[0].set_ylabel(f'validation loss minus {s.reference}')
    axes[1].set_ylabel(f'validation loss, % of {s.reference}')
    legend(fig, axes[0])
  caption = (
    'Gap and ratio along one run at the largest size (mHC Fig. 6b). The learning-rate schedule is part '
    'of these curves: points before its end are not finished runs.'
  )
  return save(fig, folder, 'paper_gap_tokens', caption, table)


def gains(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 3 and 7: single and composite gains, forward and backward."""
  tables = []
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    for ax, name in zip(axes.flat, GAINS, strict=True):
      rows = draw_gain(ax, s, name)
      tables += [row | {'gain': name, 'value': row.pop(name)} for row in rows]
    if not tables:
      return 'Gains by sublayer: no run logged diagnostics.'
    legend(fig, axes.flat[0])
  caption = (
    'Amax gains of H_res by sublayer l at the largest size: single (top) and of the product of sublayers '
    '1 to l (bottom), forward and backward.'
  )
  return save(fig, folder, 'paper_gains', caption, pd.DataFrame(tables))


def heat_maps(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 8: token-mean H_res of the first, middle and last sublayer, single and composite.

  Reads metrics rows 'diagnostics/res_mean' and 'diagnostics/composite_res_mean': one n x n matrix per
  sublayer. Row sums are written at the right, column sums below.
  """
  found = []
  for arm, own in largest(s, finished=True).groupby('arm', sort=False):
    matrices = _matrices(s.sweep.runs[own['run_id'].iloc[0]])
    if any(len(stack[0]) > 1 for stack in matrices.values()):  # one stream has nothing to show
      found.append((arm, own['run_id'].iloc[0], matrices))
  if not found:
    return 'Heat maps of H_res: no run of several streams logged diagnostics/res_mean.'
  rows = []
  with figure(WIDE, 1.5 * len(found) + 0.3, nrows=len(found), ncols=6, squeeze=False) as (fig, axes):
    for line, (arm, run_id, matrices) in zip(axes, found, strict=True):
      line[0].set_ylabel(textwrap.fill(arm.replace('_', ' '), 14), fontsize=6.5)
      for k, name in enumerate(MATRICES):
        stack = matrices.get(name)
        for j, ax in enumerate(line[3 * k : 3 * k + 3]):
          if stack is None:
            ax.set_axis_off()
            continue
          sublayer = (0, len(stack) // 2, len(stack) - 1)[j]
          _heat(ax, stack[sublayer], f'{"product to " if k else "sublayer "}{sublayer + 1}')
          rows += [
            {'arm': arm, 'run_id': run_id, 'kind': name, 'sublayer': sublayer + 1}
            | {'row': a, 'column': b, 'value': float(v)}
            for (a, b), v in np.ndenumerate(stack[sublayer])
          ]
  caption = 'Token-mean H_res (left) and products of them (right), with row and column sums.'
  return save(fig, folder, 'paper_heat_maps', caption, pd.DataFrame(rows))


def _matrices(run: Run) -> dict[str, np.ndarray]:
  for row in reversed(run.rows):
    if row.get('diagnostics/res_mean') is not None:
      given = {name: row.get(f'diagnostics/{name}') for name in MATRICES}
      return {name: np.array(v, float) for name, v in given.items() if v is not None}
  return {}


def _heat(ax: Axes, matrix: np.ndarray, title: str) -> None:
  limit = max(1.0, float(np.nanmax(np.abs(matrix))))
  ax.imshow(matrix, cmap='RdBu_r', vmin=-limit, vmax=limit)
  ax.set_title(title, fontsize=6.5)
  ax.set(xticks=[], yticks=[])
  ax.grid(visible=False)
  n = len(matrix)
  for k in range(n):
    ax.text(n - 0.4, k, f'{matrix[k].sum():.2f}', fontsize=5, va='center')
    ax.text(k, n - 0.1, f'{matrix[:, k].sum():.2f}', fontsize=5, ha='center', va='center')
    if n <= 4:
      for j in range(n):
        ink = 'white' if abs(matrix[k, j]) > 0.6 * limit else 'black'
        ax.text(j, k, f'{matrix[k, j]:.2f}', fontsize=4.5, ha='center', va='center', color=ink)


def residual_panels(s: Study, folder: Path) -> Panel | str:
  """Log residuals of the joint fit against N, D and C, and their normal quantiles."""
  if s.fit is None:
    return 'Residual panels: no law was fitted.'
  style, points = looks(list(dict.fromkeys(s.table['arm']))), s.fit.points
  residual = 100 * s.fit.residual_R / s.fit.problem.weight_R
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    labels = {'N': 'parameters (matmul)', 'D': 'training tokens', 'C': 'training FLOPs'}
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
  table = pd.DataFrame({'arm': points.arm, 'run_id': points.run, 'residual_percent': -residual})
  for name in labels:
    table[name] = np.exp(points.log_x[name])
  return save(fig, folder, 'paper_residuals', 'Residuals of the joint fit, and their quantiles.', table)


def final_losses(s: Study) -> pd.DataFrame:
  """Table 1 style: final loss and bits per byte by arm, size and budget, with the gap to the reference."""
  gap = {(g.arm, g.size, round(g.log_flops, 2)): g for g in s.gaps}
  rows = []
  for (arm, size, _), own in s.grid.groupby(['arm', 'size', 'duration'], sort=False):
    g = gap.get((arm, size, round(float(np.log(own['flops']).mean()), 2)))
    rows.append(
      {
        'arm': arm,
        'size': size,
        'tokens': own['tokens'].mean(),
        'seeds': own['seed'].nunique(),
        'runs': len(own),
      }
      | {'validation_loss': own['validation_loss'].mean(), 'standard_deviation': own['validation_loss'].std()}
      | {'bits_per_byte': own['validation_bits_per_byte'].mean(), 'flops': own['flops'].mean()}
      | {name: None if g is None else getattr(g, name) for name in ('difference', 'low', 'high')}
      | {'run_ids': ' '.join(own['run_id'])}
    )
  return pd.DataFrame(rows)
