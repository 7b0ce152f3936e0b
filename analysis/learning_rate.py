"""The learning rate of every arm: the best of a grid at each size, how far it moves, how much it matters.

  mhc sweep learning_rate --workers 2
  python -m analysis.learning_rate runs/learning_rate

Reads a sweep's folder, prints a table and writes learning_rates.csv beside the runs. A transfer rule has
carried over an arm's optimum if it moves by less than one step of the grid (mup's criterion). sensitivity:
what a rate drawn from the grid's range costs on average (Wortsman et al. 2309.14322).
"""

import argparse
import sys

import numpy as np
import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .output import csv_text, write_file
from .rates import RateSweep, rate_sweeps
from .runs import read_sweep
from .selection import classify
from .stores import here


def summary(sweeps: list[RateSweep]) -> pd.DataFrame:
  """One row per grid: best rate, interpolated optimum or why there is none, sensitivity, range, losses."""
  return pd.DataFrame(
    [
      {'arm': r.arm, 'size': r.size, 'budget': r.budget}
      | {'best_lr': r.losses.idxmin() if np.isfinite(r.losses.min()) else None, 'optimal_lr': r.best}
      | {'problem': r.problem, 'sensitivity': r.sensitivity}
      | {name.replace(' ', '_'): _rates(r, name) for name in ('too low', 'diverged', 'not learned')}
      | {'lowest_lr': r.losses.index.min(), 'highest_lr': r.losses.index.max()}
      | {f'loss at {lr:g}': value for lr, value in r.losses.items()}
      for r in sweeps
    ]
  )


def _rates(r: RateSweep, outcome: str) -> str | None:
  """The rates at which a run ended so."""
  rates = sorted(set(r.rows.loc[r.rows['outcome'] == outcome, 'lr']))
  return ' '.join(f'{lr:g}' for lr in rates) or None


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
  """The command line; returns the exit code. Raises ConfigError for a folder without a grid."""
  parser = argparse.ArgumentParser(
    prog='python -m analysis.learning_rate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', help='folder of a sweep over learning rates, or gs:// or s3://')
  folder = here(parser.parse_args(argv).runs)
  sweeps = rate_sweeps(classify(read_sweep(folder).table))
  require(bool(sweeps), f'{folder}: no arm has ended at three learning rates of one size')
  table = summary(sweeps)
  write_file(folder / 'learning_rates.csv', csv_text(table), 'table:')
  print(table.to_string(index=False, na_rep='-', float_format='%.4g'))
  for arm, steps in shifts(sweeps).items():
    moved = 'cannot be told' if steps is None else f'{steps:.2f} grid steps'
    print(f'{arm}: move of the optimum between sizes: {moved}')
  for arm, lr in picks(sweeps).items():
    chosen = 'none, as no rate finished at every size' if lr is None else f'{lr:g}'
    print(f'{arm}: rate of the lowest mean loss over sizes: {chosen}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
