"""Figures over training at the largest size that all arms share: loss, gaps to the reference, gradient norm.

Where: Study -> here -> all_figures.py. A diverged run is drawn as far as it came, with a cross at its end.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from analysis.draw import WIDE, Panel, figure, legend, log_axis, looks, mark_ends, save
from analysis.runs import Run, curve
from analysis.selection import largest
from analysis.study import Study


def place(s: Study, rows: pd.DataFrame) -> str:
  """Where and what the runs of a figure are: size, and every arm that is absent, diverged or unfinished."""
  out = [f'width x depth {rows["size"].iloc[0]}']
  absent = [arm for arm in dict.fromkeys(s.table['arm']) if arm not in set(rows['arm'])]
  if absent:
    out.append(f'no run there: {", ".join(absent)}')
  for words, inside in (
    ('diverged (x)', rows['state'] == 'diverged'),
    ('not finished', ~rows['state'].isin(['finished', 'diverged'])),
  ):
    seeds = rows[inside].groupby('arm', sort=False)['seed'].apply(lambda v: ' and '.join(map(str, v)))
    if len(seeds):
      out.append(f'{words}: ' + ', '.join(f'{arm} seed {which}' for arm, which in seeds.items()))
  return '; '.join(out)


def _line(look: dict[str, str]) -> dict[str, str]:
  return {'color': look['color'], 'linestyle': look['linestyle']}


def _look_at(ax: Axes, curves: list[tuple[str, np.ndarray]]) -> None:
  """Limits of y by the runs that did not diverge, with half their range beyond."""
  sound = [y for state, y in curves if state != 'diverged' and len(y)]
  if not sound or len(sound) == len(curves):
    return
  to, back = (np.log, np.exp) if ax.get_yscale() == 'log' else (np.asarray, np.asarray)
  values = to(np.concatenate(sound))
  more = 0.5 * float(np.ptp(values))
  low, high = ax.get_ylim()
  ax.set_ylim(max(low, back(values.min() - more)), min(high, back(values.max() + more)))


def smooth(y: np.ndarray) -> np.ndarray:
  """Running mean over 5 % of the curve (edges: over what there is)."""
  width = max(1, len(y) // 20)
  kernel = np.ones(width)
  return np.convolve(y, kernel, 'same') / np.convolve(np.ones(len(y)), kernel, 'same')


def training_loss(s: Study, folder: Path) -> Panel | str:
  """Training loss (running mean) with the validation loss as markers, at the largest size."""
  style, rows, tops, ends = looks(list(dict.fromkeys(s.table['arm']))), [], [], []
  shown = largest(s.table, s.reference)
  with figure() as (fig, ax):
    for _, run in shown.iterrows():
      arm, files = run['arm'], s.sweep.runs[run['run_id']]
      x, y = (np.array(v) for v in curve(files, 'train/loss'))
      if not len(x):
        continue
      y = smooth(y)
      ax.plot(x, y, **_line(style[arm]), lw=1.0, label=arm)
      tops.append(float(np.interp(0.04 * x[-1], x, y)))
      xv, yv = curve(files, 'validation/loss')
      ax.plot(xv, yv, style[arm]['marker'], color=style[arm]['color'], ms=3)
      if run['state'] == 'diverged':
        ends.append((x[-1], y[-1]))
      for metric, xs, ys in (('train/loss', x, y), ('validation/loss', xv, yv)):
        rows += [
          {'arm': arm, 'run_id': run['run_id'], 'state': run['state'], 'metric': metric}
          | {'tokens': t, 'loss': v}
          for t, v in zip(xs, ys, strict=True)
        ]
    if not rows:
      return 'Loss over training: no run logged train/loss.'
    ax.set_ylim(top=max(tops))  # the first steps would squeeze the rest
    mark_ends(ax, ends)
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    ax.set(xlabel='training tokens', ylabel='loss (nats per token)')
    legend(fig, ax)
  caption = (
    'Training loss (running mean over 5 % of the run; markers: validation loss), one line per seed; '
    f'{place(s, shown)}. The first 4 % may lie above the axis.'
  )
  return save(fig, folder, 'training_loss', caption, pd.DataFrame(rows))


def _pairs(s: Study, shown: pd.DataFrame) -> list[tuple[pd.Series, Run, Run]]:
  """(row of an arm's run, its files, those of the reference's run of the same seed), however they ended."""
  base = shown[shown['arm'] == s.reference].set_index('seed')['run_id']
  own = shown[(shown['arm'] != s.reference) & shown['seed'].isin(base.index)]
  runs = s.sweep.runs
  return [(row, runs[row['run_id']], runs[base[row['seed']]]) for _, row in own.iterrows()]


def _difference(own: Run, other: Run, metric: str, against: str) -> pd.DataFrame:
  """Metric of two runs where the arm logged it (the reference interpolated): x, own, other."""
  (x, y), (xr, yr) = curve(own, metric, against), curve(other, metric, against)
  if len(x) < 2 or len(xr) < 2:
    return pd.DataFrame({'x': [], 'own': [], 'other': []})
  x, y = np.array(x), np.array(y)
  inside = x <= xr[-1]
  return pd.DataFrame({'x': x[inside], 'own': y[inside], 'other': np.interp(x[inside], xr, yr)})


def over_training(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 2 and 5: training-loss gap to the reference and gradient norm over the updates."""
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  shown = largest(s.table, s.reference)
  with figure(WIDE, 2.8, ncols=2) as (fig, (left, right)):
    curves, ends = [], []
    for row, own, other in _pairs(s, shown):
      table = _difference(own, other, 'train/loss', 'step')
      if not len(table):
        continue
      x, gap = table['x'].to_numpy(), smooth((table['own'] - table['other']).to_numpy())
      left.plot(x, gap, **_line(style[row['arm']]), lw=1.0, label=row['arm'])
      curves.append((row['state'], gap))
      if row['state'] == 'diverged':
        ends.append((x[-1], gap[-1]))
      rows += _rows(row, 'loss_gap', x, gap)
    if not rows:
      return 'Gap over training: no paired runs logged train/loss.'
    left.axhline(0, color='#000000', lw=0.8)
    _look_at(left, curves)
    mark_ends(left, ends)
    norms, ends = [], []
    for _, row in shown.iterrows():
      x, y = curve(s.sweep.runs[row['run_id']], 'train/grad_norm', 'step')
      if x:
        right.plot(x, y, **_line(style[row['arm']]), lw=0.8, label=row['arm'])
        norms.append((row['state'], np.array(y)))
        if row['state'] == 'diverged':
          ends.append((x[-1], y[-1]))
        rows += _rows(row, 'grad_norm', x, y)
    log_axis(right, 'gradient norm', 'y')
    _look_at(right, norms)
    log_axis(right, 'gradient norm', 'y')
    mark_ends(right, ends)
    for ax in (left, right):
      ax.set_xlabel('update')
    left.set_ylabel(f'training loss minus {s.reference}')
    legend(fig, left, right)
  caption = (
    'Training-loss gap (running mean over 5 % of the run) and gradient norm, one line per seed; '
    f'{place(s, shown)}.'
  )
  return save(fig, folder, 'paper_over_training', caption, pd.DataFrame(rows))


def _rows(run: pd.Series, name: str, x: np.ndarray, y: np.ndarray) -> list[dict]:
  base = {key: run[key] for key in ('arm', 'run_id', 'seed', 'state')}
  return [base | {'step': a, name: b} for a, b in zip(x, y, strict=True)]


def token_scaling(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 6b: validation gap and ratio along the tokens of the largest runs."""
  style, parts = looks(list(dict.fromkeys(s.table['arm']))), []
  shown = largest(s.table, s.reference)
  for row, own, other in _pairs(s, shown):
    d = _difference(own, other, 'validation/loss', 'tokens')
    d = d[d['x'] > 0]
    ids = {'arm': row['arm'], 'run_id': own.run_id, 'reference_id': other.run_id, 'state': row['state']}
    values = {'tokens': d['x'], 'gap': d['own'] - d['other'], 'ratio': d['own'] / d['other']}
    parts.append(pd.DataFrame(values).assign(**ids))
  table = pd.concat(parts) if parts else pd.DataFrame({'tokens': []})
  if table['tokens'].nunique() < 2:
    return 'Gap along tokens: no paired runs logged validation/loss twice.'
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, name, unit, zero in zip(axes, ('gap', 'ratio'), (1, 100), (0, 100), strict=True):
      curves, ends = [], []
      for arm, own in table.groupby('arm', sort=False):
        at = own.groupby('tokens')[name]
        mean = unit * at.mean()[at.size() == own['run_id'].nunique()]
        if not len(mean):
          continue
        ax.plot(mean.index, mean, **style[arm], label=arm, ms=3)
        lost = (own['state'] == 'diverged').any()
        curves.append(('diverged' if lost else 'finished', mean.to_numpy()))
        if lost:
          ends.append((mean.index[-1], mean.iloc[-1]))
      ax.axhline(zero, color='#000000', lw=0.8)
      log_axis(ax, 'training tokens')
      _look_at(ax, curves)
      mark_ends(ax, ends)
    axes[0].set_ylabel(f'validation loss minus {s.reference}')
    axes[1].set_ylabel(f'validation loss, % of {s.reference}')
    legend(fig, axes[0])
  caption = (
    'Gap and ratio along the runs of one size (mHC Fig. 6b), mean over seeds as far as all of them came; '
    f'{place(s, shown)}. The learning-rate schedule is part of these curves: points before its end are not '
    'finished runs.'
  )
  return save(fig, folder, 'paper_gap_tokens', caption, table)
