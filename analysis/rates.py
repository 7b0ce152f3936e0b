"""Sweeps over the learning rate: optimum, edge and sensitivity per arm, size and budget."""

import dataclasses

import numpy as np
import pandas as pd

from .minima import best_learning_rate, learning_rate_sensitivity
from .selection import rate_losses

HARDLY = 0.05  # a run that has learned less than this share of what the best of its grid has: not at all
LEAST = 0.01  # or less than this share of its loss before the first update


@dataclasses.dataclass(frozen=True)
class RateSweep:
  """Runs of one arm, size and budget at three or more learning rates."""

  arm: str
  size: str
  budget: str  # in words, where the size has several; else ''
  params: float
  rows: pd.DataFrame  # run_id, seed, lr, state, validation_loss, outcome (of `outcomes`)
  losses: pd.Series  # lr -> mean over seeds; infinite where one diverged; without rates of 0
  best: float | None  # interpolated optimum
  problem: str | None  # why there is no optimum inside the grid
  sensitivity: float | None  # nats; None where all diverged, or one did and no loss at step 0 is known

  @property
  def step(self) -> float:
    """Mean step of the grid in log lr."""
    return float(np.diff(np.log(self.losses.index)).mean())


def rate_sweeps(table: pd.DataFrame, params: str = 'matmul') -> list[RateSweep]:
  """Learning-rate grids of a classified table, without ranks; where a run diverged no rate is the optimum."""
  tried = table[table['axis'].isna() & table['state'].isin(['finished', 'diverged'])]
  budgets = tried.groupby('size')['duration'].nunique()
  out = []
  for (arm, size, _), rows in tried.groupby(['arm', 'size', 'duration'], sort=False):
    losses = rate_losses(rows[rows['lr'] > 0])  # a rate of 0 has no place on an axis of log rates
    if len(losses) < 3:
      continue
    lowest = best_learning_rate(losses.index.to_numpy(float), losses.to_numpy(float))
    best = None if lowest.log_x is None else float(np.exp(lowest.log_x))
    budget = f'{rows["flops"].median():.2g} FLOPs' if budgets[size] > 1 else ''
    count = float(rows[f'params_{params}'].iloc[0])
    sensitivity, rows = _sensitivity(rows[rows['lr'] > 0]), rows.assign(outcome=outcomes(rows))
    out.append(RateSweep(arm, size, budget, count, rows, losses, best, lowest.problem, sensitivity))
  return out


def outcomes(rows: pd.DataFrame) -> pd.Series:
  """How the runs of a grid ended: 'learned', 'diverged', 'too low', or 'not learned' at another rate.

  too low: it finished and has hardly left its loss before the first update, at a rate below the best one.
  A run without a logged loss there counts as learned.
  """
  done = rows['state'] == 'finished'
  learned = (rows['initial_loss'] - rows['validation_loss']).where(done)
  needed = np.maximum(HARDLY * learned.max(), LEAST * rows['initial_loss'])
  hardly = done & (learned < needed)
  sound = rows[done & ~hardly]
  best = (
    sound.loc[sound['validation_loss'].idxmin(), 'lr'] if sound['validation_loss'].notna().any() else np.inf
  )
  out = pd.Series('learned', rows.index).mask(hardly, 'not learned')
  return out.mask(hardly & (rows['lr'] < best), 'too low').mask(rows['state'] == 'diverged', 'diverged')


def _sensitivity(rows: pd.DataFrame) -> float | None:
  """Of the mean over seeds, each run capped at the loss before the first update."""
  initial = float(rows['initial_loss'].median())
  finished = rows['validation_loss'].where(rows['state'] == 'finished')
  if finished.isna().all() or (np.isnan(initial) and finished.isna().any()):
    return None
  initial = np.inf if np.isnan(initial) else initial
  capped = finished.fillna(initial).clip(upper=initial).groupby(rows['lr']).mean()
  return learning_rate_sensitivity(capped.index.to_numpy(float), capped.to_numpy(float), initial)
