"""What the largest size of the study ends at, predicted from the smaller ones; then, how far off that was.

  python -m experiments.study --largest gpu > largest.csv
  python -m analysis.prediction runs/study-gpu-small --runs largest.csv --out prediction_gpu.csv
  python -m analysis.prediction runs/study-gpu --score prediction_gpu.csv

By arm: `law`, the report's law through all arms with its 95 % interval for a new run, and `gap carried`, the
law's loss of the reference plus the arm's paired gap at the largest size that is trained.
"""

import argparse
import pathlib
import sys

import numpy as np
import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError

from .fitting.intervals import band
from .gaps import gaps
from .runs import read_sweep
from .selection import classify, reference_arm, to_points
from .study import fit_law


def predicted(table: pd.DataFrame, largest: pd.DataFrame) -> pd.DataFrame:
  """A row for each arm of `largest` (arm, size, width, depth, params_matmul, tokens, flops).

  table: of a finished sweep, by selection.classify. Raises ConfigError where no law holds.
  """
  reference = reference_arm(table)
  choice, fitted = fit_law(to_points(table[table['excluded'].isna()]), reference)
  if fitted is None:
    raise ConfigError(choice.reason)
  rows = largest.drop_duplicates('arm').assign(validation_loss=1.0, cluster='new', run_id='new')
  b = band(fitted, to_points(rows))
  out = rows[['arm', 'size', 'flops']].assign(law=b.loss, low=b.new_low, high=b.new_high)
  last = {}
  for gap in sorted(gaps(table, reference), key=lambda gap: gap.flops):
    last[gap.arm] = gap.difference
  base = float(out.loc[out['arm'] == reference, 'law'].iloc[0])
  out['gap carried'] = [base + (0.0 if arm == reference else last.get(arm, np.nan)) for arm in out['arm']]
  return out.assign(name=choice.law.name).rename(columns={'name': 'law_name'})


def scored(prediction: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
  """The prediction beside what was measured at that size.

  measured: mean loss over the arm's runs, of which so many lie inside the interval; gap: to the reference, as
  predicted by the gap carried, and the mean over seeds that both have trained.
  """
  reference = reference_arm(table)
  ended = table[(table['size'] == prediction['size'].iloc[0]) & (table['state'] == 'finished')]
  loss = ended.pivot(index='seed', columns='arm', values='validation_loss')
  carried, rows = prediction.set_index('arm')['gap carried'], []
  for _, row in prediction.iterrows():
    own = loss.get(row['arm'], pd.Series(dtype=float)).dropna()
    found = {'measured': own.mean(), 'runs': len(own), 'law error': row['law'] - own.mean()}
    gaps = {'gap': row['gap carried'] - carried[reference], 'measured gap': (own - loss[reference]).mean()}
    rows.append(dict(row) | found | {'inside': int(own.between(row['low'], row['high']).sum())} | gaps)
  return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the table."""
  parser = argparse.ArgumentParser(
    'python -m analysis.prediction',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('folder', type=pathlib.Path)
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument('--runs', type=pathlib.Path, metavar='CSV', help='what to predict, of `predicted`')
  what.add_argument('--score', type=pathlib.Path, metavar='CSV', help='an earlier prediction')
  parser.add_argument('--out', type=pathlib.Path, help='CSV to write')
  a = parser.parse_args(argv)
  table = classify(read_sweep(a.folder).table)
  found = scored(pd.read_csv(a.score), table) if a.score else predicted(table, pd.read_csv(a.runs))
  print(found.to_string(index=False))
  if a.out:
    a.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(a.out, index=False)
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
