"""Stability over depth and learning rate: diverged share, final loss, gradient norm, composite gain.

Where: Study -> here -> all_figures.py, for sweeps like experiments/stability.py.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ..runs import Run, curve, last_list
from ..study import Study
from .draw import WIDE, Panel, figure, legend, log_axis, looks, save

MEASURES = {
  'diverged': 'share diverged',
  'validation_loss': 'validation loss',
  'gradient_norm': 'largest gradient norm',
  'composite_gain': 'composite gain',
}


def measured(s: Study) -> pd.DataFrame:
  """One row per run that started: depth, lr, state, and what MEASURES names (NaN where it is not known).

  gradient_norm: the largest logged after the first tenth of the updates; composite_gain: the largest of the
  last logged forward and backward gains of the product of all H_res. A diverged run has no final loss.
  """
  rows = []
  for line in s.table.to_dict('records'):
    run = s.sweep.runs[line['run_id']]
    if run.config is None or run.state not in ('finished', 'diverged'):
      continue
    rows.append(
      {name: line[name] for name in ('arm', 'run_id', 'depth', 'lr', 'seed', 'state')}
      | {'diverged': float(run.state == 'diverged')}
      | {'validation_loss': line['validation_loss'] if run.state == 'finished' else np.nan}
      | {'gradient_norm': _largest_norm(run), 'composite_gain': _gain(run)}
    )
  return pd.DataFrame(rows)


def _largest_norm(run: Run) -> float:
  start = 0.1 * (run.status.get('num_steps') or 0)
  rows = zip(*curve(run, 'train/grad_norm', 'step'), strict=True)
  return max((norm for step, norm in rows if step > start), default=np.nan)


def _gain(run: Run) -> float:
  ends = [last_list(run, f'diagnostics/composite_gain_{way}') for way in ('forward', 'backward')]
  return max((values[-1] for values in ends if values), default=np.nan)


def stability(s: Study, folder: Path) -> Panel | str:
  """Each measure (rows) against learning rate at each depth (columns); mean over seeds."""
  table = measured(s)
  if table.empty or (table.groupby('arm')[['lr', 'depth']].nunique().min(axis=1) < 2).all():
    return 'Stability: no arm has ended at two depths and two learning rates.'
  depths, style = sorted(table['depth'].unique()), looks(list(dict.fromkeys(s.table['arm'])))
  mean = table.groupby(['arm', 'depth', 'lr'], sort=False)[list(MEASURES)].mean().reset_index()
  shown = {name: label for name, label in MEASURES.items() if table[name].notna().any()}
  size = {'nrows': len(shown), 'ncols': len(depths), 'squeeze': False, 'sharex': True, 'sharey': 'row'}
  with figure(WIDE, 1.7 * len(shown) + 0.4, **size) as (fig, axes):
    for row, (name, label) in zip(axes, shown.items(), strict=True):
      for ax, depth in zip(row, depths, strict=True):
        for arm, own in mean[mean['depth'] == depth].groupby('arm', sort=False):
          own = own.sort_values('lr')
          ax.plot(own['lr'], own[name], **style[arm], ms=3.5, label=arm)
        ax.set_xscale('log')
      row[0].set_ylabel(label)
      if name in ('gradient_norm', 'composite_gain'):
        log_axis(row[0], label, 'y')
    for ax, depth in zip(axes[0], depths, strict=True):
      ax.set_title(f'depth {depth:.0f}')
      ax.set_ylim(-0.05, 1.05)
    for ax in axes[-1]:
      log_axis(ax, 'learning rate')
    legend(fig, axes[0][0])
  caption = (
    'Stability over depth and learning rate (of the base size), mean over seeds: share of diverged runs, '
    'final loss of the others, largest gradient norm after a tenth of the updates, composite gain at the end.'
  )
  return save(fig, folder, 'paper_stability', caption, table)
