"""Sweeps over the learning rate: optimum, edge and sensitivity per arm, size and budget."""

import dataclasses

import numpy as np
import pandas as pd

from .minima import best_learning_rate, learning_rate_sensitivity
from .selection import rate_losses


@dataclasses.dataclass(frozen=True)
class RateSweep:
  """Runs of one arm, size and budget at three or more learning rates."""

  arm: str
  size: str
  budget: str  # in words, where the size has several; else ''
  params: float
  rows: pd.DataFrame  # run_id, seed, lr, state, validation_loss
  losses: pd.Series  # lr -> mean over seeds; infinite where one diverged
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
    losses = rate_losses(rows)
    if len(losses) < 3:
      continue
    lowest = best_learning_rate(losses.index.to_numpy(float), losses.to_numpy(float))
    best = None if lowest.log_x is None else float(np.exp(lowest.log_x))
    budget = f'{rows["flops"].median():.2g} FLOPs' if budgets[size] > 1 else ''
    count = float(rows[f'params_{params}'].iloc[0])
    out.append(RateSweep(arm, size, budget, count, rows, losses, best, lowest.problem, _sensitivity(rows)))
  return out


def _sensitivity(rows: pd.DataFrame) -> float | None:
  """Of the mean over seeds, each run capped at the loss before the first update."""
  initial = float(rows['initial_loss'].median())
  finished = rows['validation_loss'].where(rows['state'] == 'finished')
  if finished.isna().all() or (np.isnan(initial) and finished.isna().any()):
    return None
  initial = np.inf if np.isnan(initial) else initial
  capped = finished.fillna(initial).clip(upper=initial).groupby(rows['lr']).mean()
  return learning_rate_sensitivity(capped.index.to_numpy(float), capped.to_numpy(float), initial)
