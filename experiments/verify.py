"""`mhc verify docs/results/NAME`: are published results still those of this code?

Plans the folder's sweep anew (plan.json), trains the cheapest of its finished runs again and compares final
losses with results.csv. A run may differ from itself by a machine's rounding: by how much was measured
(rounding.py), and the tolerance follows from that. Exit code 1 where anything is stale.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mhc_jax import runtime
from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError, require
from mhc_jax.run_folder import load_options, load_plan
from mhc_jax.workdir import read_status

from .planning import plan
from .workers import execute

EXAMPLES = """examples:
  mhc verify docs/results/quick
  mhc verify docs/results/* --runs 1
"""
ROUNDING = Path(__file__).with_name('rounding.csv')
LEVEL = 0.99  # of the difference between two machines: of a hundred good runs one is called stale


def tolerance(connection: str | None, updates: float, table: pd.DataFrame) -> float:
  """Nats by which two trainings of a run may differ: t x sqrt(2) x the deviation over roundings.

  The deviation is that of the connection, pooled over seeds, at the number of updates where it is largest;
  beyond the most updates of the table it grows as it did between the fewest and the most, until it is that of
  the loudest connection, which is also taken where there is none (None, or not measured).
  table: columns connection, updates, seed, rounding, validation_loss.
  """
  groups = table.groupby(['connection', 'updates', 'seed'])['validation_loss'].agg(['var', 'count'])
  cells = groups.groupby(['connection', 'updates'])
  freedom = cells['count'].sum() - cells.size()
  allowed = np.sqrt(2 * cells['var'].mean()) * stats.t.ppf(0.5 + LEVEL / 2, freedom)
  loudest = float(allowed.max())
  if connection not in allowed.index.get_level_values('connection'):
    return loudest
  own = allowed[connection].sort_index()
  growth = np.log(own.iloc[-1] / own.iloc[0]) / (own.index[-1] - own.index[0])
  beyond = max(updates - own.index[-1], 0)
  return float(min(own.max() * np.exp(max(growth, 0) * beyond), loudest))


def cheapest(table: pd.DataFrame, count: int) -> pd.DataFrame:
  """Of the finished runs the cheapest, of different arms first."""
  finished = table[table['state'] == 'finished'].sort_values('flops')
  turn = finished.groupby('arm').cumcount()
  return finished.assign(turn=turn).sort_values(['turn', 'flops'], kind='stable').head(count)


def verify(folder: Path, count: int, out: str) -> bool:
  """Prints a line for each run that is trained again; whether all agree. Raises ConfigError for a folder
  without what it takes.
  """
  for name in ('results.csv', 'plan.json'):
    require((folder / name).is_file(), f'{folder} has no {name}: no published sweep to train again')
  table, name = pd.read_csv(folder / 'results.csv'), load_plan(str(folder))[0]
  options = load_options(str(folder))
  seeds = int(options[options.index('--seeds') + 1]) if '--seeds' in options else None
  overrides = [option for option in options if option.startswith('--config.')]
  configs, planned = plan(name, overrides, seeds)
  known = {run.run_id: (config, run) for config, run in zip(configs, planned, strict=True)}
  digests = {run.derived['data_digest'] for run in planned}
  published = set(table['data_digest'].dropna())
  if not published <= digests:
    raise ConfigError(
      f'{folder}: made of the corpus {", ".join(published)}, this one is {", ".join(digests)}'
    )
  gone = table[~table['run_id'].isin(known)]
  command = shlex.join(['mhc', 'sweep', name, *options])
  if len(gone):
    print(f'{folder}: STALE: {len(gone)} of {len(table)} runs are not those that `{command}` plans now')
  chosen = cheapest(table[table['run_id'].isin(known)], count)
  runs = [known[run_id] for run_id in chosen['run_id']]
  execute([config for config, _ in runs], [run for _, run in runs], out, workers=1)
  measured, stale = pd.read_csv(ROUNDING), len(gone)
  for (_, row), (_, run) in zip(chosen.iterrows(), runs, strict=True):
    status = read_status(os.path.join(out, run.run_id))
    final = (status.get('final') or {}).get('validation/loss', np.nan)
    same = row.get('device_kind') == status.get('device_kind')  # another chip multiplies otherwise
    name = run.resolved['model']['connection']['name'] if same else None
    allowed = tolerance(name, run.num_steps, measured)
    ok = bool(abs(final - row['validation_loss']) <= allowed)
    stale += not ok
    print(
      f'{folder.name} {run.run_id} {row["arm"]} {run.model.width}x{run.model.depth}: published '
      f'{row["validation_loss"]:.6f}, now {final:.6f}, difference {final - row["validation_loss"]:+.6f}, '
      f'allowed {allowed:.6f}: {"ok" if ok else "STALE"}'
    )
  return not stale


def main(argv: list[str] | None = None) -> int:
  """Command line; 0 where all agree, 1 where a folder is stale."""
  parser = argparse.ArgumentParser(
    'mhc verify',
    description='Train the cheapest runs behind published results again, and compare.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('folders', nargs='+', type=Path, help='as docs/results/quick')
  parser.add_argument('--runs', type=int, default=3, help='of each folder (default %(default)s)')
  parser.add_argument('--out', help='folder to keep the runs in (default: a temporary one)')
  runtime.add_flag(parser)
  a = parser.parse_args(argv)
  require(a.runs >= 1, f'--runs must be at least 1, got {a.runs}')
  runtime.prepare(a)
  agree, unknown = True, []
  with tempfile.TemporaryDirectory() as scratch:
    for folder in a.folders:
      try:
        agree &= verify(folder, a.runs, os.path.join(a.out or scratch, folder.name))
      except ConfigError as error:
        if len(a.folders) == 1:
          raise
        unknown.append(folder)
        print(f'not verified: {error}')
  print(f'{len(a.folders) - len(unknown)} folders: {"all agree" if agree else "STALE"}')
  return 0 if agree else 1


if __name__ == '__main__':
  sys.exit(end_with_message(main))
