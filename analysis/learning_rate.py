"""The learning rate of every arm: the best of a grid at each size, how far it moves, how much it matters.

  python -m experiments.sweep learning_rate --workers 2
  python -m analysis.learning_rate runs/learning_rate

Reads a sweep's folder, prints a table and writes learning_rates.csv beside the runs. A transfer rule has
carried over an arm's optimum if it moves by less than one step of the grid (mup's criterion). sensitivity:
what a rate drawn from the grid's range costs on average (Wortsman et al. 2309.14322).
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.isoflop import best_learning_rate, learning_rate_sensitivity
from analysis.runs import read_sweep
from analysis.selection import classify, rate_losses
from mhc_jax.config import ConfigError


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
    found = best_learning_rate(losses.index.to_numpy(float), losses.to_numpy(float))
    best = None if found.log_x is None else float(np.exp(found.log_x))
    budget = f'{rows["flops"].median():.2g} FLOPs' if budgets[size] > 1 else ''
    count = float(rows[f'params_{params}'].iloc[0])
    out.append(RateSweep(arm, size, budget, count, rows, losses, best, found.problem, _sensitivity(rows)))
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


def summary(sweeps: list[RateSweep]) -> pd.DataFrame:
  """One row per grid: best rate, interpolated optimum or why there is none, sensitivity, range, losses."""
  return pd.DataFrame(
    [
      {'arm': r.arm, 'size': r.size, 'budget': r.budget}
      | {'best_lr': r.losses.idxmin() if np.isfinite(r.losses.min()) else None, 'optimal_lr': r.best}
      | {'problem': r.problem, 'sensitivity': r.sensitivity}
      | {'lowest_lr': r.losses.index.min(), 'highest_lr': r.losses.index.max()}
      | {f'loss at {lr:g}': value for lr, value in r.losses.items()}
      for r in sweeps
    ]
  )


def shifts(sweeps: list[RateSweep]) -> dict[str, float | None]:
  """Largest move of each arm's interpolated optimum between its grids, in grid steps.

  None where a grid has no optimum inside, or where there is one.
  """
  moves: dict[str, float | None] = {}
  for arm in dict.fromkeys(r.arm for r in sweeps):
    own = [r for r in sweeps if r.arm == arm]
    known = len(own) > 1 and all(r.best is not None for r in own)
    moves[arm] = (
      float(np.ptp(np.log([r.best for r in own])) / np.mean([r.step for r in own])) if known else None
    )
  return moves


def picks(sweeps: list[RateSweep]) -> dict[str, float | None]:
  """The one rate for each arm: of lowest mean loss over its grids; None where none finished in all."""
  out: dict[str, float | None] = {}
  for arm in dict.fromkeys(r.arm for r in sweeps):
    means = pd.concat([r.losses for r in sweeps if r.arm == arm], axis=1).mean(axis=1, skipna=False)
    known = means[np.isfinite(means)]
    out[arm] = float(known.idxmin()) if len(known) else None
  return out


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code (2 and one line for a folder without a grid)."""
  parser = argparse.ArgumentParser(
    prog='python -m analysis.learning_rate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', type=Path, help='folder of a sweep over learning rates')
  folder = parser.parse_args(argv).runs
  try:
    sweeps = rate_sweeps(classify(read_sweep(folder).table))
    if not sweeps:
      raise ConfigError(f'{folder}: no arm has ended at three learning rates of one size')
  except ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  table = summary(sweeps)
  table.to_csv(folder / 'learning_rates.csv', index=False)
  print(table.to_string(index=False, na_rep='-', float_format='%.4g'))
  for arm, steps in shifts(sweeps).items():
    moved = 'cannot be told' if steps is None else f'{steps:.2f} grid steps'
    print(f'{arm}: move of the optimum between sizes: {moved}')
  for arm, lr in picks(sweeps).items():
    chosen = 'none, as no rate finished at every size' if lr is None else f'{lr:g}'
    print(f'{arm}: rate of the lowest mean loss over sizes: {chosen}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
