"""The learning rate of every arm: the best of a grid at each size, and how far it moves between sizes.

  python -m experiments.sweep learning_rate --workers 2
  python -m analysis.learning_rate runs/learning_rate

Reads a sweep's folder, prints a table and writes learning_rates.csv beside the runs. A transfer rule has
carried over an arm's optimum if it moves by less than one step of the grid (mup's criterion).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.isoflop import best_learning_rate
from analysis.runs import read_sweep
from mhc_jax.config import ConfigError


def optima(table: pd.DataFrame) -> pd.DataFrame:
  """One row per arm and size: best rate of the grid, interpolated optimum or why there is none, losses.

  Diverged runs count as infinitely bad; seeds are averaged.
  """
  rows = []
  ended = table[table['state'].isin(['finished', 'diverged'])]
  for (arm, width, depth), runs in ended.groupby(['arm', 'width', 'depth'], sort=False):
    finite = runs['validation_loss'].where(runs['state'] == 'finished', np.inf)
    losses = finite.groupby(runs['lr']).mean()
    found = best_learning_rate(losses.index.to_numpy(float), losses.to_numpy(float))
    rows.append(
      {
        'arm': arm,
        'width': int(width),
        'depth': int(depth),
        'best_lr': float(losses.idxmin()),
        'optimal_lr': None if found.problem else float(np.exp(found.log_x)),
        'problem': found.problem,
        'grid_step': float(np.diff(np.log(losses.index)).mean()) if len(losses) > 1 else np.nan,
        **{f'loss at {lr:g}': loss for lr, loss in losses.items()},
      }
    )
  return pd.DataFrame(rows)


def shifts(best: pd.DataFrame) -> dict[str, float | None]:
  """Largest move of each arm's interpolated optimum between sizes, in grid steps.

  None where a size has no optimum inside the grid, or where there is one size.
  """
  moves: dict[str, float | None] = {}
  for arm, rows in best.groupby('arm', sort=False):
    log_lr = np.log(rows['optimal_lr'].astype(float))
    known = len(rows) > 1 and log_lr.notna().all()
    moves[str(arm)] = float(np.ptp(log_lr) / rows['grid_step'].mean()) if known else None
  return moves


def picks(best: pd.DataFrame) -> dict[str, float]:
  """The one rate of the grid for each arm: that of the lowest loss averaged over the sizes that tried it."""
  columns = [name for name in best.columns if name.startswith('loss at ')]
  means = best.groupby('arm', sort=False)[columns].agg(lambda losses: losses.mean(skipna=False))
  return {str(arm): float(name.removeprefix('loss at ')) for arm, name in means.idxmin(axis=1).items()}


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m analysis.learning_rate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', type=Path, help='folder of a sweep over learning rates')
  folder = parser.parse_args(argv).runs
  best = optima(read_sweep(folder).table)
  if best.empty:
    raise ConfigError(f'{folder}: no run has ended yet')
  best.to_csv(folder / 'learning_rates.csv', index=False)
  print(best.drop(columns=['grid_step']).to_string(index=False, na_rep='-', float_format='%.4g'))
  for arm, steps in shifts(best).items():
    moved = 'cannot be told' if steps is None else f'{steps:.2f} grid steps'
    print(f'{arm}: move of the optimum between sizes: {moved}')
  print(f'lowest mean loss over sizes: {picks(best)}')
  return 0


if __name__ == '__main__':
  try:
    sys.exit(main())
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
