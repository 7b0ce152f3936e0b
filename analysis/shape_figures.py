"""Figures of the report by model shape, manifold rank, sublayer and training time.

Where: Study -> here -> figures.draw_all. A figure whose data are absent returns the sentence that
says so instead of a Panel.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

from analysis.draw import Panel, figure, legend, log_axis, looks, save
from analysis.runs import curve, last_list
from analysis.selection import AXIS_LABEL
from analysis.study import RankSweep, Study

GAINS = {
  'gain_forward': 'forward gain of one sublayer (largest row sum of |H_res|)',
  'gain_backward': 'backward gain of one sublayer (largest column sum)',
  'composite_gain_forward': 'forward gain of the product of sublayers 1 to l',
  'composite_gain_backward': 'backward gain of the product of sublayers 1 to l',
}


def _plain_log2(ax: Axes, values: list) -> None:
  """A log axis whose ticks are the values that occur."""
  ax.set_xscale('log', base=2)
  ax.set_xticks(sorted(set(values)))
  ax.xaxis.set_major_formatter(ScalarFormatter())
  ax.xaxis.set_minor_locator(LogLocator(subs=()))
  ax.xaxis.set_minor_formatter(NullFormatter())


def _shape_plot(s: Study, folder: Path, name: str, other: str) -> Panel | str:
  runs = s.grid
  if not len(runs) or runs[name].nunique() < 2:
    return f'Loss against {name}: the finished runs have one {name}.'
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  with figure() as (fig, ax):
    for arm, own in runs.groupby('arm', sort=False):
      look, first = style[arm], True
      for (fixed, _), line in own.groupby([other, 'duration']):
        mean = line.groupby(name)['validation_loss'].mean()
        ax.plot(mean.index, mean, **look, lw=1.0, label=arm if first else None)
        first = False
        if arm == s.reference:
          ax.annotate(
            f' {other} {fixed:.0f}',
            (mean.index[-1], mean.iloc[-1]),
            fontsize=7,
            color='#444444',
            va='bottom',
          )
      rows += own[['arm', 'run_id', 'seed', name, other, 'flops', 'validation_loss']].to_dict('records')
    _plain_log2(ax, runs[name])
    ax.margins(x=0.12)
    ax.set(xlabel=f'{name} of the model', ylabel='validation loss (nats per token)')
    legend(fig, ax)
  caption = (
    f'Loss against {name}, mean over seeds; lines join runs of equal {other}'
    f'{", written beside the " + s.reference + " points" if s.reference else ""}. '
    'Compute grows along the axis.'
  )
  return save(fig, folder, f'loss_vs_{name}', caption, pd.DataFrame(rows))


def loss_vs_width(s: Study, folder: Path) -> Panel | str:
  """Loss against model width, lines at equal depth."""
  return _shape_plot(s, folder, 'width', 'depth')


def loss_vs_depth(s: Study, folder: Path) -> Panel | str:
  """Loss against model depth, lines at equal width."""
  return _shape_plot(s, folder, 'depth', 'width')


def rank_plot(s: Study, folder: Path, axis: str) -> Panel | str:
  """Loss against one manifold rank, with the full-rank and residual models as levels."""
  sweeps = [r for r in s.ranks if r.axis == axis]
  if not sweeps:
    return f'Loss against the {AXIS_LABEL[axis]}: fewer than two values have finished.'
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  with figure() as (fig, ax):
    for r in sweeps:
      look = style[r.arm]
      mean = r.rows.groupby('rank')['validation_loss'].mean()
      ax.plot(mean.index, mean, **look, label=f'{r.arm}, {r.size}')
      if s.seed_spread is not None:
        bar = s.seed_spread / np.sqrt(r.rows.groupby('rank')['validation_loss'].size())
        ax.errorbar(mean.index, mean, yerr=bar, fmt='none', color=look['color'], lw=0.9)
      levels = [(f'{r.arm}, full rank', r.full, look['color'])]
      residual = _residual_like(s, r)
      if residual is not None:
        levels.append((s.reference, residual, '#000000'))
      for label, level, colour in levels:
        if len(level):
          ax.axhline(level['validation_loss'].mean(), color=colour, ls=':', lw=1.2, label=label)
      rows += _rank_rows(r)
    _plain_log2(ax, [v for r in sweeps for v in r.rows['rank']])
    ax.set(xlabel=AXIS_LABEL[axis], ylabel='validation loss (nats per token)')
    legend(fig, ax)
  caption = f'Loss against the {AXIS_LABEL[axis]}, at one size, mean over seeds.'
  if s.seed_spread is not None:
    caption += f' Bars: one standard error, from the spread between seeds ({s.seed_spread:.3f} nats).'
  for r in sweeps:
    caption += f' {r.arm}, {r.size}: {exponent_words(r)}'
  return save(fig, folder, f'loss_vs_{axis}', caption, pd.DataFrame(rows))


def exponent_words(r: RankSweep) -> str:
  """The fitted exponent of m = r^phi in a sentence, or why there is none."""
  if r.phi is None:
    return f'no exponent of m = r^phi: {r.problem}.'
  low, high = r.phi_interval
  # + 0.0 after rounding: no "-0.00".
  phi, low, high = (round(v, 2) + 0.0 for v in (r.phi, low, high))
  return f'm = r^phi with phi = {phi:.2f} (95 % {low:.2f} to {high:.2f}).'


def rate_plots(s: Study, folder: Path) -> list[Panel]:
  """Final loss against learning rate, one panel per size, with each arm's interpolated optimum."""
  style, panels = looks(list(dict.fromkeys(s.table['arm']))), []
  for size in dict.fromkeys(r.size for r in s.rates):
    rows = []
    with figure() as (fig, ax):
      for r in (r for r in s.rates if r.size == size):
        mean = r.rows.groupby('lr')['validation_loss'].mean().dropna()
        ax.plot(mean.index, mean, **style[r.arm], label=r.arm)
        if r.best is not None:
          ax.axvline(r.best, color=style[r.arm]['color'], ls=':', lw=0.9)
        columns = ['arm', 'size', 'run_id', 'seed', 'lr', 'state', 'validation_loss']
        rows += r.rows.reindex(columns=columns).to_dict('records')
      diverged = [row['lr'] for row in rows if row['state'] == 'diverged']
      ax.plot(diverged, [0.97] * len(diverged), 'x', color='#D00000', transform=ax.get_xaxis_transform())
      log_axis(ax, 'learning rate (of the base size)')
      ax.set_ylabel('validation loss (nats per token)')
      legend(fig, ax)
    caption = f'Final loss against learning rate at {size}; dotted: interpolated optimum, x: diverged.'
    panels.append(save(fig, folder, f'learning_rate_{size}', caption, pd.DataFrame(rows)))
  return panels


def _residual_like(s: Study, r: RankSweep) -> pd.DataFrame | None:
  if r.arm == s.reference:
    return None
  runs = s.grid
  same = runs[(runs['arm'] == s.reference) & (runs['size'] == r.size)]
  near = np.abs(np.log(same['tokens'] / r.rows['tokens'].median())) < 0.05
  same = same[near | same['duration'].isin(r.rows['duration'])]
  return same if len(same) else None


def _rank_rows(r: RankSweep) -> list[dict]:
  columns = ['run_id', 'seed', 'rank', 'tokens', 'flops', 'validation_loss']
  rows = r.rows.reindex(columns=columns).to_dict('records')
  rows += r.full.assign(rank='full').reindex(columns=columns).to_dict('records')
  return [{'arm': r.arm, 'size': r.size} | row for row in rows]


def largest(s: Study, finished: bool) -> pd.DataFrame:
  """Per arm the grid's runs of most parameters, and of those the ones of most tokens (finished, if asked)."""
  grid = s.grid if finished else s.table[s.table['axis'].isna() & s.table['flops'].notna()]
  most = grid.sort_values(['params_matmul', 'tokens']).groupby('arm').tail(1).set_index('arm')
  same_size = grid['size'] == grid['arm'].map(most['size'])
  return grid[same_size & (grid['duration'] == grid['arm'].map(most['duration']))]


def _sizes(s: Study, finished: bool) -> str:
  """'every arm at width x depth 128x4', or each arm's own size."""
  size = largest(s, finished).groupby('arm', sort=False)['size'].first()
  if size.nunique() == 1:
    return f'every arm at width x depth {size.iloc[0]}'
  return 'width x depth: ' + ', '.join(f'{arm} {name}' for arm, name in size.items())


def gain_plot(s: Study, folder: Path, name: str) -> Panel | str:
  """Amax gain by sublayer at the largest size, the last logged value, mean over seeds."""
  with figure() as (fig, ax):
    rows = draw_gain(ax, s, name)
    if not rows:
      return f'{GAINS[name]}: no run logged it.'
    legend(fig, ax)
  caption = f'{GAINS[name].capitalize()}, mean over tokens; {_sizes(s, True)}.'
  return save(fig, folder, name, caption.replace('h_res', 'H_res'), pd.DataFrame(rows))


def draw_gain(ax: Axes, s: Study, name: str) -> list[dict]:
  """Draws one gain of every arm; returns its numbers, none where no run logged it."""
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  for arm, own in largest(s, finished=True).groupby('arm', sort=False):
    lists = {i: last_list(s.sweep.runs[i], f'diagnostics/{name}') for i in own['run_id']}
    lists = {i: v for i, v in lists.items() if v and not np.isnan(v).all()}
    longest = max(map(len, lists.values()), default=0)
    kept = {i: v for i, v in lists.items() if len(v) == longest}
    if not kept:
      continue
    x = np.arange(1, longest + 1)
    ax.plot(x, np.array(list(kept.values())).mean(0), **style[arm], label=arm, ms=3)
    rows += [
      {'arm': arm, 'run_id': i, 'sublayer': k, name: v}
      for i, row in kept.items()
      for k, v in zip(x, row, strict=True)
    ]
  if not rows:
    return rows
  ax.axhline(1, color='#7F7F7F', lw=0.8, ls='--')
  y = np.array([row[name] for row in rows], float)
  if np.nanmax(y) > 10 * max(np.nanmin(y), 1e-30):
    log_axis(ax, '', 'y')
  elif np.nanmax(y) - np.nanmin(y) < 1e-3:
    ax.set_ylim(np.nanmin(y) - 0.05, np.nanmax(y) + 0.05)
  ax.set(xlabel='sublayer (attention, feed-forward, ...)', ylabel=name.replace('_', ' '))
  return rows


def training_loss(s: Study, folder: Path) -> Panel | str:
  """Training loss (running mean) with the validation loss as markers, at the largest size."""
  style, rows, seen = looks(list(dict.fromkeys(s.table['arm']))), [], set()
  with figure() as (fig, ax):
    tops = []
    for _, run in largest(s, finished=False).iterrows():
      arm, files = run['arm'], s.sweep.runs[run['run_id']]
      x, y = (np.array(v) for v in curve(files, 'train/loss'))
      if not len(x):
        continue
      y, look = smooth(y), style[arm]
      label = None if arm in seen else arm
      seen.add(arm)
      ax.plot(x, y, color=look['color'], ls=look['linestyle'], lw=1.0, label=label)
      tops.append(float(np.interp(0.04 * x[-1], x, y)))
      xv, yv = curve(files, 'validation/loss')
      ax.plot(xv, yv, look['marker'], color=look['color'], ms=3)
      if run['state'] == 'diverged':
        ax.plot(x[-1], y[-1], 'x', color='#D00000', ms=7)
      for metric, xs, ys in (('train/loss', x, y), ('validation/loss', xv, yv)):
        rows += [
          {'arm': arm, 'run_id': run['run_id'], 'metric': metric, 'tokens': t, 'loss': v}
          for t, v in zip(xs, ys, strict=True)
        ]
    if not rows:
      return 'Loss over training: no run logged train/loss.'
    ax.set_ylim(top=max(tops))  # the first steps would squeeze the rest
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    ax.set(xlabel='training tokens', ylabel='loss (nats per token)')
    legend(fig, ax)
  caption = (
    'Training loss (running mean over 5 % of the run; markers: validation loss), one line per seed; '
    f'{_sizes(s, False)}. The first 4 % may lie above the axis.'
  )
  return save(fig, folder, 'training_loss', caption, pd.DataFrame(rows))


def smooth(y: np.ndarray) -> np.ndarray:
  """Running mean over 5 % of the curve (edges: over what there is)."""
  width = max(1, len(y) // 20)
  kernel = np.ones(width)
  return np.convolve(y, kernel, 'same') / np.convolve(np.ones(len(y)), kernel, 'same')


def gradient_norm(s: Study, folder: Path) -> Panel | str:
  """Gradient norm over training (mHC Fig. 2b, 5b)."""
  style, rows, seen = looks(list(dict.fromkeys(s.table['arm']))), [], set()
  with figure() as (fig, ax):
    for _, run in largest(s, finished=False).iterrows():
      arm = run['arm']
      x, y = curve(s.sweep.runs[run['run_id']], 'train/grad_norm')
      if not x:
        continue
      look, label = style[arm], None if arm in seen else arm
      seen.add(arm)
      ax.plot(x, y, color=look['color'], ls=look['linestyle'], lw=0.9, label=label)
      if run['state'] == 'diverged':
        ax.plot(x[-1], y[-1], 'x', color='#D00000', ms=7)
      rows += [
        {'arm': arm, 'run_id': run['run_id'], 'tokens': a, 'grad_norm': b} for a, b in zip(x, y, strict=True)
      ]
    if not rows:
      return 'Gradient norm over training: no run logged train/grad_norm.'
    log_axis(ax, 'gradient norm', 'y')
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    ax.set_xlabel('training tokens')
    legend(fig, ax)
  caption = f'Gradient norm over training, one line per seed; {_sizes(s, False)}.'
  return save(fig, folder, 'gradient_norm', caption, pd.DataFrame(rows))
