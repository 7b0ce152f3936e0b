"""Loss over bytes between clusters: what each scheme of experiments/clusters.py reaches, and what it sends.

  mhc sweep clusters --workers 2
  python -m analysis.clusters runs/clusters

Reads a sweep's folder, prints a table and writes clusters.csv beside the runs, and the figure clusters_loss:
validation loss over the bytes that all clusters together have sent, the mean over seeds.
"""

import argparse
import sys

import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .output import csv_text, write_file
from .runs import Run, read_sweep
from .stores import here

BYTES, LOSS = 'cluster/bytes', 'validation/loss'


def curves(runs: dict[str, Run]) -> pd.DataFrame:
  """A row for every evaluation: arm, seed, connection, step, tokens, bytes (0 without clusters), loss."""
  rows = [
    {'arm': run.arm, 'seed': run.config['seed'], 'connection': run.config['model']['connection']['name']}
    | {'step': row['step'], 'tokens': row['tokens'], 'bytes': row.get(BYTES, 0), 'loss': row[LOSS]}
    for run in runs.values()
    for row in run.rows
    if run.config and row.get(LOSS) is not None
  ]
  return pd.DataFrame(rows)


def summary(table: pd.DataFrame) -> pd.DataFrame:
  """One row per arm: bytes per token at the end, loss, and its paired difference to the connection's arm that
  sends most (mean and standard error over the seeds that both have)."""
  last = table.sort_values('step').groupby(['connection', 'arm', 'seed'], sort=False, as_index=False).tail(1)
  rows = []
  for connection, own in last.groupby('connection', sort=False):
    most = own.loc[own['bytes'].idxmax(), 'arm']
    reference = own[own['arm'] == most].set_index('seed')['loss']
    for arm, of_arm in own.groupby('arm', sort=False):
      pairs = (of_arm.set_index('seed')['loss'] - reference).dropna()
      sent = (of_arm['bytes'] / of_arm['tokens']).mean()
      row = {'connection': connection, 'arm': arm, 'seeds': len(of_arm), 'bytes_per_token': sent}
      row |= {'loss': of_arm['loss'].mean(), 'reference': most, 'difference': pairs.mean()}
      rows.append(row | {'standard_error': pairs.std(ddof=1) / len(pairs) ** 0.5})
  return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code. Raises ConfigError for a folder without clusters."""
  parser = argparse.ArgumentParser(
    prog='python -m analysis.clusters',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', help='folder of a sweep of clusters, or gs:// or s3://')
  folder = here(parser.parse_args(argv).runs)
  table = curves(read_sweep(folder).runs)
  require(not table.empty and table['bytes'].max() > 0, f'{folder}: no run has logged {BYTES}')
  found = summary(table)
  write_file(folder / 'clusters.csv', csv_text(found), 'table:')
  print(found.to_string(index=False, na_rep='-', float_format='%.4g'))
  from .figures.clusters import loss_over_bytes  # matplotlib takes longer to import than --help may take
  from .figures.draw import save

  panel = save(loss_over_bytes(table), folder, 'clusters_loss')
  print(f'wrote {folder / "clusters.csv"} and {folder / panel.name}.png: {panel.caption}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
