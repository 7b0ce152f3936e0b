"""Figures over training at the largest size that all arms share: loss, gaps to the reference, gradient norm.

Where: Study -> here -> all_figures.py. A diverged run is drawn as far as it came, with a cross at its end.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..runs import Run, curve
from ..selection import largest
from ..study import Study
from .draw import WIDE, Panel, figure, legend, log_axis, looks, mark_ends, save

SEEDS = 'seeds thin, their mean as far as all of them came'


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
    seeds = (
      rows[inside].groupby('arm', sort=False)['seed'].apply(lambda v: ' and '.join(f'{k:.0f}' for k in v))
    )
    if len(seeds):
      out.append(f'{words}: ' + ', '.join(f'{arm} seed {which}' for arm, which in seeds.items()))
  return '; '.join(out)


def _draw_seeds(
  ax: Axes, look: dict[str, str], arm: str, curves: list[tuple[str, np.ndarray, np.ndarray]]
) -> list[tuple[float, float]]:
  """An arm's curves (state, x, y), thin, their mean as far as all go; returns the ends of diverged ones."""
  line = {'color': look['color'], 'linestyle': look['linestyle']}
  several = len(curves) > 1
  for _, x, y in curves:
    ax.plot(x, y, **line, **({'lw': 0.5, 'alpha': 0.35} if several else {'lw': 1.1, 'label': arm}))
  if several:
    shortest = min((x for _, x, _ in curves), key=lambda x: x[-1])
    mean = np.mean([np.interp(shortest, x, y) for _, x, y in curves], 0)
    ax.plot(shortest, mean, **line, lw=1.2, label=arm)
  return [(x[-1], y[-1]) for state, x, y in curves if state == 'diverged']


def _finish(ax: Axes, arms: dict[str, list[tuple[str, np.ndarray, np.ndarray]]], ends: list) -> None:
  """Limits of y by the runs that did not diverge, with half their range beyond; crosses at the ends given."""
  curves = [one for own in arms.values() for one in own]
  sound = [y for state, _, y in curves if state != 'diverged']
  if sound and len(sound) < len(curves):
    to, back = (np.log, np.exp) if ax.get_yscale() == 'log' else (np.asarray, np.asarray)
    values = to(np.concatenate(sound))
    more = 0.5 * float(np.ptp(values))
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, back(values.min() - more)), min(high, back(values.max() + more)))
  mark_ends(ax, ends)


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
    for arm, own in shown.groupby('arm', sort=False):
      curves = []
      for _, run in own.iterrows():
        x, y = (np.array(v) for v in curve(s.sweep.runs[run['run_id']], 'train/loss'))
        if not len(x):
          continue
        y = smooth(y)
        curves.append((run['state'], x, y))
        tops.append(float(np.interp(0.04 * x[-1], x, y)))
        xv, yv = curve(s.sweep.runs[run['run_id']], 'validation/loss')
        ax.plot(xv, yv, style[arm]['marker'], color=style[arm]['color'], ms=3)
        rows += _rows(run, 'train/loss', x, y, 'tokens') + _rows(run, 'validation/loss', xv, yv, 'tokens')
      if curves:
        ends += _draw_seeds(ax, style[arm], arm, curves)
    if not rows:
      return 'Loss over training: no run logged train/loss.'
    ax.set_ylim(top=max(tops))  # the first steps would squeeze the rest
    mark_ends(ax, ends)
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    ax.set(xlabel='training tokens', ylabel='loss (nats per token)')
    legend(fig, ax)
  caption = (
    f'Training loss (running mean over 5 % of the run; markers: validation loss), {SEEDS}; '
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
  gaps: dict[str, list] = {}
  norms: dict[str, list] = {}
  for row, own, other in _pairs(s, shown):
    table = _difference(own, other, 'train/loss', 'step')
    if len(table):
      x, gap = table['x'].to_numpy(), smooth((table['own'] - table['other']).to_numpy())
      gaps.setdefault(row['arm'], []).append((row['state'], x, gap))
      rows += _rows(row, 'loss_gap', x, gap, 'step')
  if not rows:
    return 'Gap over training: no paired runs logged train/loss.'
  for _, row in shown.iterrows():
    x, y = (np.array(v) for v in curve(s.sweep.runs[row['run_id']], 'train/grad_norm', 'step'))
    if len(x):
      norms.setdefault(row['arm'], []).append((row['state'], x, y))
      rows += _rows(row, 'grad_norm', x, y, 'step')
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    labels = (f'training loss minus {s.reference}', 'gradient norm')
    for ax, arms, label in zip(axes, (gaps, norms), labels, strict=True):
      ends = [end for arm, own in arms.items() for end in _draw_seeds(ax, style[arm], arm, own)]
      ax.set(xlabel='update', ylabel=label)
      if arms is norms:
        ax.set_yscale('log')
      else:
        ax.axhline(0, color='#000000', lw=0.8)
      _finish(ax, arms, ends)
    log_axis(axes[1], 'gradient norm', 'y')
    legend(fig, *axes)
  caption = (
    f'Training-loss gap (running mean over 5 % of the run) and gradient norm, {SEEDS}; {place(s, shown)}.'
  )
  return save(fig, folder, 'paper_over_training', caption, pd.DataFrame(rows))


def _rows(run: pd.Series, name: str, x: Sequence[float], y: Sequence[float], against: str) -> list[dict]:
  base = {key: run[key] for key in ('arm', 'run_id', 'seed', 'state')}
  return [base | {against: a, 'metric': name, 'value': b} for a, b in zip(x, y, strict=True)]


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
      arms, ends = {}, []
      for arm, own in table.groupby('arm', sort=False):
        at = own.groupby('tokens')[name]
        mean = unit * at.mean()[at.size() == own['run_id'].nunique()]
        if len(mean):
          ax.plot(mean.index, mean, **style[arm], label=arm, ms=3)
          state = 'diverged' if (own['state'] == 'diverged').any() else 'finished'
          arms[arm] = [(state, mean.index.to_numpy(), mean.to_numpy())]
          ends += [(mean.index[-1], mean.iloc[-1])] if state == 'diverged' else []
      ax.axhline(zero, color='#000000', lw=0.8)
      log_axis(ax, 'training tokens')
      _finish(ax, arms, ends)
    axes[0].set_ylabel(f'validation loss minus {s.reference}')
    axes[1].set_ylabel(f'validation loss, % of {s.reference}')
    legend(fig, axes[0])
  caption = (
    'Gap and ratio along the runs of one size (mHC Fig. 6b), mean over seeds as far as all of them came; '
    f'{place(s, shown)}. The learning-rate schedule is part of these curves: points before its end are not '
    'finished runs.'
  )
  return save(fig, folder, 'paper_gap_tokens', caption, table)
