"""Curves over training at the largest size that all arms share: losses, gaps to the reference, gradients.

Where: the runs of `selection.largest` and their files -> here -> study.py. Every curve is a run's; their mean
over seeds ends where the first of them ends (`mean_curve`).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .runs import Run, curve


def smooth(y: np.ndarray) -> np.ndarray:
  """Running mean over 5 % of the curve (edges: over what there is)."""
  width = max(1, len(y) // 20)
  kernel = np.ones(width)
  return np.convolve(y, kernel, 'same') / np.convolve(np.ones(len(y)), kernel, 'same')


def mean_curve(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
  """Mean of curves (x, y) at the points of the shortest one."""
  shortest = min((x for x, _ in curves), key=lambda x: x[-1])
  return shortest, np.mean([np.interp(shortest, x, y) for x, y in curves], 0)


def _points(run: pd.Series, name: str, x: Sequence[float], y: Sequence[float], against: str) -> pd.DataFrame:
  ids = {key: run[key] for key in ('arm', 'run_id', 'seed', 'state')}
  return pd.DataFrame(ids | {against: x, 'metric': name, 'value': y}, index=range(len(x)))


def losses(shown: pd.DataFrame, runs: dict[str, Run]) -> pd.DataFrame:
  """Training loss (running mean) and validation loss by tokens, of every run that logged a training loss."""
  parts = []
  for _, own in shown.groupby('arm', sort=False):
    for _, run in own.iterrows():
      x, y = curve(runs[run['run_id']], 'train/loss')
      if x:
        parts.append(_points(run, 'train/loss', x, smooth(np.array(y)), 'tokens'))
        parts.append(
          _points(run, 'validation/loss', *curve(runs[run['run_id']], 'validation/loss'), 'tokens')
        )
  return pd.concat(parts) if parts else pd.DataFrame()


def _pairs(shown: pd.DataFrame, runs: dict[str, Run], reference: str | None) -> list:
  """(row of an arm's run, its files, those of the reference's run of the same seed), however they ended."""
  base = shown[shown['arm'] == reference].set_index('seed')['run_id']
  own = shown[(shown['arm'] != reference) & shown['seed'].isin(base.index)]
  return [(row, runs[row['run_id']], runs[base[row['seed']]]) for _, row in own.iterrows()]


def _both(own: Run, other: Run, metric: str, against: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(x, own, other): a metric of two runs where the arm logged it, the reference's interpolated."""
  (x, y), (xr, yr) = curve(own, metric, against), curve(other, metric, against)
  if len(x) < 2 or len(xr) < 2:
    return (np.array([]),) * 3
  x, y = np.array(x), np.array(y)
  inside = x <= xr[-1]
  return x[inside], y[inside], np.interp(x[inside], xr, yr)


def gaps_over_updates(shown: pd.DataFrame, runs: dict[str, Run], reference: str | None) -> pd.DataFrame:
  """Training-loss gap to the reference (running mean) and gradient norm by update (mHC Fig. 2 and 5).

  Empty where no pair logged a training loss.
  """
  parts = []
  for row, own, other in _pairs(shown, runs, reference):
    x, y, base = _both(own, other, 'train/loss', 'step')
    if len(x):
      parts.append(_points(row, 'loss_gap', x, smooth(y - base), 'step'))
  if not parts:
    return pd.DataFrame()
  norms = [(row, *curve(runs[row['run_id']], 'train/grad_norm', 'step')) for _, row in shown.iterrows()]
  return pd.concat(parts + [_points(row, 'grad_norm', x, y, 'step') for row, x, y in norms if x])


def gaps_over_tokens(shown: pd.DataFrame, runs: dict[str, Run], reference: str | None) -> pd.DataFrame:
  """Gap and ratio of the validation loss to the reference by tokens (mHC Fig. 6b); empty for one point."""
  parts = []
  for row, own, other in _pairs(shown, runs, reference):
    x, y, base = _both(own, other, 'validation/loss', 'tokens')
    values = pd.DataFrame({'tokens': x, 'gap': y - base, 'ratio': y / base})[x > 0]
    ids = {'arm': row['arm'], 'run_id': own.run_id, 'reference_id': other.run_id, 'state': row['state']}
    parts.append(values.assign(**ids))
  table = pd.concat(parts) if parts else pd.DataFrame({'tokens': []})
  return table if table['tokens'].nunique() >= 2 else pd.DataFrame()
