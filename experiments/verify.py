"""`mhc verify docs/results/NAME`: are published results still those of this code?

Plans the folder's sweep anew (plan.json), trains the cheapest of its runs again and compares final losses
with results.csv; of an arm that only diverged, that it does. A run may differ from itself by a machine's
rounding: by how much was measured (rounding.py), and the tolerance follows from that. Exit code 1 where
anything is stale, else 2 where a folder could not be verified.
"""

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mhc_jax import runtime
from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.run_folder import load_options, load_plan
from mhc_jax.workdir import read_status, read_statuses, revision

from . import protocol
from .planning import plan
from .workers import execute

EXAMPLES = """examples:
  mhc verify docs/results/quick
  mhc verify docs/results/* --runs 1
"""
ROUNDING = Path(__file__).with_name('rounding.csv')
LEVEL = 0.99  # of the difference between two machines: of a hundred good runs one is called stale
COLUMNS = ('run_id', 'arm', 'state', 'flops', 'validation_loss', 'data_digest')


def deviations(table: pd.DataFrame) -> pd.DataFrame:
  """Of one run over roundings, per connection and updates: pooled over seeds, with its degrees of freedom.

  Roundings by which a run ends at the same bits are one of them: the same sums in the same order. No
  deviation is below the spacing of float32. table: columns connection, updates, seed, rounding,
  validation_loss.
  """
  run = ['connection', 'updates', 'seed']
  groups = table.drop_duplicates([*run, 'validation_loss']).groupby(run)['validation_loss']
  runs = pd.DataFrame({'freedom': groups.count() - 1, 'squares': groups.var().fillna(0)})
  cells = runs.assign(squares=runs['squares'] * runs['freedom']).groupby(['connection', 'updates']).sum()
  least = np.spacing(np.float32(table['validation_loss'].max()))
  cells['deviation'] = np.sqrt(cells['squares'] / cells['freedom'].clip(lower=1)).clip(lower=least)
  return cells[['deviation', 'freedom']]


def tolerance(connection: str | None, updates: float, table: pd.DataFrame) -> float:
  """Nats by which two trainings of a run may differ: t x sqrt(2) x the deviation over roundings.

  The deviation is that of the connection at the number of updates where it is largest; beyond the most
  updates of the table it grows as it did between the fewest and the most, until it is that of the loudest
  connection, which is also taken where there is none (None, or not measured). table: as of `deviations`.
  """
  over = deviations(table)
  quantile = stats.t.ppf(0.5 + LEVEL / 2, over['freedom'].clip(lower=1))
  allowed = np.sqrt(2) * over['deviation'] * quantile
  loudest = float(allowed.max())
  if connection not in allowed.index.get_level_values('connection'):
    return loudest
  own = allowed[connection].sort_index()
  growth = np.log(own.iloc[-1] / own.iloc[0]) / (own.index[-1] - own.index[0])
  beyond = max(updates - own.index[-1], 0)
  return float(min(own.max() * np.exp(max(growth, 0) * beyond), loudest))


def measured_as(resolved: dict[str, Any]) -> str | None:
  """The connection of rounding.csv that a run is like; None for one at a higher rate, which is louder."""
  connection = resolved['model']['connection']
  name, constraint = connection['name'], connection['constraint']
  if name == 'mhc' and constraint != 'birkhoff_sinkhorn':
    name = constraint
  rate = protocol.LEARNING_RATES.get(name, protocol.LEARNING_RATE)
  return name if resolved['optimizer']['lr'] <= rate else None


def cheapest(table: pd.DataFrame, count: int) -> pd.DataFrame:
  """Of the runs that ended the cheapest, of different arms first, of an arm those that did not diverge."""
  ended = table[table['state'].isin(['finished', 'diverged'])]
  ended = ended.assign(diverged=ended['state'] == 'diverged')
  ended = ended.sort_values(['diverged', 'flops'], kind='stable')
  turn = ended.groupby('arm').cumcount()
  return ended.assign(turn=turn).sort_values(['turn', 'flops'], kind='stable').head(count)


def has_runs(folder: Path) -> bool:
  """Whether there is anything to train again in a folder."""
  return (folder / 'results.csv').is_file()


def read(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
  """A published table; ConfigError in one line where it is not one with these columns."""
  try:
    table = pd.read_csv(path)
  except (OSError, ValueError) as error:  # not there, empty, no table, or not in UTF-8
    raise ConfigError(f'{path} cannot be read: {error}') from None
  missing = [name for name in columns if name not in table]
  require(not missing, f'{path} has no column {", ".join(missing)}')
  return table


def verify(folder: Path, count: int, out: str) -> bool:
  """Prints a line for each run that is trained again; whether all agree. Raises ConfigError for a folder
  without what it takes, KeyboardInterrupt after a stop.
  """
  require(folder.exists(), f'{folder}: no such folder')
  require(has_runs(folder), f'{folder} has no results.csv: no runs to train again')
  require((folder / 'plan.json').is_file(), f'{folder} has no plan.json: its runs cannot be planned again')
  table, name = read(folder / 'results.csv', COLUMNS), load_plan(str(folder))[0]
  require(name is not None, f'{folder}: plan.json does not name its sweep')
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
  require(len(chosen) or len(gone), f'{folder}: none of its runs has ended: nothing to compare')
  runs = [known[run_id] for run_id in chosen['run_id']]
  train_again(runs, out)
  measured, stale = pd.read_csv(ROUNDING), len(gone)
  for (_, row), (_, run) in zip(chosen.iterrows(), runs, strict=True):
    told, ok = compared(row, run, read_status(os.path.join(out, run.run_id)), measured)
    stale += not ok
    print(f'{folder.name} {run.run_id} {row["arm"]} {run.model.width}x{run.model.depth}: {told}')
  return not stale


def train_again(runs: list[tuple[Any, Run]], out: str) -> None:
  """Trains (config, run) in `out`, or goes on there with what exactly this code began."""
  workdirs, now = [os.path.join(out, run.run_id) for _, run in runs], revision()
  for workdir, status in zip(workdirs, read_statuses(workdirs), strict=True):
    if status['state'] != 'missing' and (status.get('git_revision') != now or now.endswith('-dirty')):
      made = status.get('git_revision')
      raise ConfigError(
        f'{workdir} is there, of revision {made} and not surely of this code: choose another --out'
      )
  ended = dict(execute([config for config, _ in runs], [run for _, run in runs], out, workers=1))
  if 'interrupted' in ended.values():
    raise KeyboardInterrupt
  failed = [run_id for run_id, state in ended.items() if state not in ('finished', 'diverged')]
  require(not failed, f'{", ".join(failed)} could not be trained again: nothing to compare')


def compared(row: pd.Series, run: Run, status: dict[str, Any], measured: pd.DataFrame) -> tuple[str, bool]:
  """(in words, whether they agree): a published run, and what it is now."""
  if 'diverged' in (row['state'], status['state']):
    ok = row['state'] == status['state']
    return f'published {row["state"]}, now {status["state"]}: {"ok" if ok else "STALE"}', ok
  before, now = row['validation_loss'], status['final']['validation/loss']
  same = row.get('device_kind') == status.get('device_kind')  # another chip multiplies otherwise
  allowed = tolerance(measured_as(run.resolved) if same else None, run.num_steps, measured)
  ok = bool(abs(now - before) <= allowed)
  told = f'published {before:.6f}, now {now:.6f}, difference {now - before:+.6f}, allowed {allowed:.6f}'
  return f'{told}: {"ok" if ok else "STALE"}', ok


def main(argv: list[str] | None = None) -> int:
  """Command line; 0 where all agree, 1 where a folder is stale, else 2 where one could not be verified."""
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
  agree, done, unknown = True, 0, 0
  with tempfile.TemporaryDirectory() as scratch:
    for folder in a.folders:
      if len(a.folders) > 1 and folder.exists() and not has_runs(folder):
        say(f'{folder}: no runs to train again')
        continue
      try:
        agree &= verify(folder, a.runs, os.path.join(a.out or scratch, folder.name))
        done += 1
      except KeyboardInterrupt:
        say('interrupted' + (': the same command goes on' if a.out else '; with --out the command can go on'))
        return 130
      except ConfigError as error:
        if len(a.folders) == 1:
          raise
        unknown += 1
        print(f'not verified: {error}')
  told = 'all agree' if agree else 'STALE'
  left = f', {unknown} not verified' if unknown else ''
  print(f'{done} folder{"s" * (done != 1)}: {told if done else "nothing verified"}{left}')
  return 1 if not agree else 2 if unknown or not done else 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
