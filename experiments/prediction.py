"""What the largest size of the study ends at, predicted from the smaller ones; then, how far off that was.

  python -m experiments.prediction runs/study-gpu-small --scale gpu --out prediction_gpu.csv
  python -m experiments.prediction runs/study-gpu --scale gpu --score prediction_gpu.csv

By arm: `law`, the report's law through all arms with its 95 % interval for a new run, and `gap carried`, the
law's loss of the reference plus the arm's paired gap at the largest size that is trained.
"""

import argparse
import pathlib
import sys

import numpy as np
import pandas as pd

from analysis.fitting.intervals import band
from analysis.gaps import gaps
from analysis.runs import read_sweep
from analysis.selection import classify, reference_arm, to_points
from analysis.study import fit_law
from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError

from . import study
from .planning import plan

COLUMNS = {'params_matmul': ('params', 'matmul'), 'tokens': ('tokens',), 'flops': ('flops',)}


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


def planned(scale: str) -> pd.DataFrame:
  """The runs of the largest size of a scale."""
  width, depth = study.SCALES[scale]['sizes'][-1]
  rows = []
  for run in plan(f'study:{scale}')[1]:
    if (run.model.width, run.model.depth) == (width, depth):
      derived = run.derived
      row = {'arm': run.resolved['arm'], 'size': f'{width}x{depth}', 'width': width, 'depth': depth}
      rows.append(
        row | {'params_matmul': derived['params']['matmul']} | {k: derived[k] for k in ('tokens', 'flops')}
      )
  return pd.DataFrame(rows)


def scored(prediction: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
  """The prediction beside the arm's mean loss over seeds at that size; inside: runs within the interval."""
  size, rows = prediction['size'].iloc[0], []
  ended = table[(table['size'] == size) & (table['state'] == 'finished')]
  for _, row in prediction.iterrows():
    losses = ended[ended['arm'] == row['arm']]['validation_loss']
    inside = losses.between(row['low'], row['high'])
    errors = {f'{name} error': row[name] - losses.mean() for name in ('law', 'gap carried')}
    rows.append(
      dict(row) | {'measured': losses.mean(), 'runs': len(losses), 'inside': int(inside.sum())} | errors
    )
  return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the table."""
  parser = argparse.ArgumentParser(
    'python -m experiments.prediction',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('folder', type=pathlib.Path)
  parser.add_argument('--scale', choices=sorted(study.SCALES), required=True)
  parser.add_argument('--out', type=pathlib.Path, help='CSV to write')
  parser.add_argument('--score', type=pathlib.Path, metavar='CSV', help='an earlier prediction')
  a = parser.parse_args(argv)
  table = classify(read_sweep(a.folder).table)
  if a.score:
    found = scored(pd.read_csv(a.score), table)
  else:
    found = predicted(table, planned(a.scale))
  print(found.to_string(index=False))
  if a.out:
    a.out.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(a.out, index=False)
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
