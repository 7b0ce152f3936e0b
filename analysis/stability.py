"""Stability over depth and learning rate: diverged share, final loss, gradient norm, composite gain.

Where: classified table and the runs' files -> here -> study.py, for sweeps like experiments/stability.py.
"""

import dataclasses

import numpy as np
import pandas as pd

from .runs import Run, curve, last_list

MEASURES = ('diverged', 'validation_loss', 'gradient_norm', 'composite_gain')


@dataclasses.dataclass(frozen=True)
class Stability:
  """MEASURES of every run that ended, and their means over seeds by arm, depth and rate; or both empty."""

  runs: pd.DataFrame
  means: pd.DataFrame


def stability(table: pd.DataFrame, runs: dict[str, Run]) -> Stability:
  """Empty where no arm has ended at two depths and two learning rates.

  diverged: 1 or 0, in means the share. gradient_norm: the largest logged after the first tenth of the
  updates. composite_gain: the largest of the last logged forward and backward gains of the product of all
  H_res. A diverged run has no final loss; what is not known is NaN.
  """
  ended = [line for line in table.to_dict('records') if line['state'] in ('finished', 'diverged')]
  measured = pd.DataFrame([_measured(line, runs[line['run_id']]) for line in ended])
  if measured.empty or (measured.groupby('arm')[['lr', 'depth']].nunique().min(axis=1) < 2).all():
    return Stability(pd.DataFrame(), pd.DataFrame())
  groups = measured.groupby(['arm', 'depth', 'lr'], sort=False)
  means = groups[list(MEASURES)].mean().assign(runs=groups.size()).reset_index()
  return Stability(measured, means)


def _measured(line: dict, run: Run) -> dict[str, object]:
  return (
    {name: line[name] for name in ('arm', 'run_id', 'depth', 'lr', 'seed', 'state')}
    | {'diverged': float(run.state == 'diverged')}
    | {'validation_loss': line['validation_loss'] if run.state == 'finished' else np.nan}
    | {'gradient_norm': _largest_norm(run), 'composite_gain': _gain(run)}
  )


def _largest_norm(run: Run) -> float:
  start = 0.1 * (run.status.get('num_steps') or 0)
  rows = zip(*curve(run, 'train/grad_norm', 'step'), strict=True)
  return max((norm for step, norm in rows if step > start), default=np.nan)


def _gain(run: Run) -> float:
  ends = [last_list(run, f'diagnostics/composite_gain_{way}') for way in ('forward', 'backward')]
  return max((values[-1] for values in ends if values), default=np.nan)
