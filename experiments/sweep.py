"""Runs an experiment: many runs, resumable, on one machine or many.

  mhc sweep quick              # all of it; finished runs are skipped
  mhc sweep quick --dry-run    # what it would do
  mhc sweep quick --only mhc --retry-failed
  mhc sweep quick --shard 0/8  # every 8th run: one per GPU, or a SLURM array
  mhc sweep quick --seeds 4 --config.optimizer.lr=8e-3 --out runs/slow
  mhc sweep --list             # the experiments

--config.section.field=value, any number of them, holds for every run and enters its id, as in mhc train.
Results: OUT/NAME/plan.json and OUT/NAME/RUN_ID/{config.json, metrics.jsonl, status.json, checkpoints/}.
plan.json keeps the overrides and --seeds: without any, the command goes on with those of the folder. Others
may add runs to a folder's plan (more seeds), and are refused where they would drop one.
"""

import argparse
import os
import re
import shlex
import sys

import pandas as pd

from mhc_jax import runtime
from mhc_jax.command import end_with_message
from mhc_jax.errors import FULL_DISK, ConfigError, require
from mhc_jax.log import say
from mhc_jax.paths import expand
from mhc_jax.plan import Run, warnings_of
from mhc_jax.workdir import ENDED, read_status, revision, versions

from .planning import EXPERIMENTS, check_extends, keep, listing, options_of, plan
from .workers import execute

ASSUMED_FLOPS_PER_SECOND = 10e9  # of one worker, until a finished run of the sweep says better


def table(planned: list[Run], folder: str) -> str:
  """The plan as text: run, arm, parameters by group, tokens, FLOPs, estimated seconds, state."""
  sums = ('total', 'active', 'matmul', 'non_embedding')
  groups = dict.fromkeys(name for run in planned for name in run.derived['params'] if name not in sums)
  rows, rate = [], _flops_per_second(planned, folder)
  for run in planned:
    c, model, params = run.resolved, run.resolved['model'], run.derived['params']
    rows.append(
      {
        'run': run.run_id,
        'arm': c['arm'],
        'seed': c['seed'],
        'width': model['width'],
        'depth': model['depth'],
        'n': model['connection']['streams'],
        'rank': model['connection']['rank'] or '-',
        'W rank': model['weights']['rank'] or '-',
        **{group: f'{params.get(group, 0):,}' for group in groups},
        'tokens': f'{run.derived["tokens"]:,}',
        'FLOPs': f'{run.derived["flops"]:.2e}',
        'seconds': f'{run.derived["flops"] / rate:.0f}',
        'state': state_of(run, folder),
      }
    )
  hardly_meant = [line for run in planned for line in warnings_of(run)]
  minutes = sum(run.derived['flops'] for run in planned) / rate / 60
  known = 'measured on finished runs' if rate != ASSUMED_FLOPS_PER_SECOND else 'assumed'
  return (
    ''.join(f'warning: {line} ({hardly_meant.count(line)} runs)\n' for line in dict.fromkeys(hardly_meant))
    + f'{pd.DataFrame(rows).to_string(index=False)}\n'
    f'{len(planned)} runs, about {minutes:.0f} minutes for one worker without compilation, '
    f'at {rate / 1e9:.1f} GFLOP/s ({known})'
  )


def state_of(run: Run, folder: str) -> str:
  """A run's state; 'damaged' also where it has ended and its config.json is gone."""
  workdir = os.path.join(folder, run.run_id)
  state = read_status(workdir)['state']
  return 'damaged' if state in ENDED and not os.path.exists(os.path.join(workdir, 'config.json')) else state


def _flops_per_second(planned: list[Run], folder: str) -> float:
  flops = seconds = 0.0
  for run in planned:
    status = read_status(os.path.join(folder, run.run_id))
    if status['state'] == 'finished' and (status.get('seconds') or 0) > 0:
      flops, seconds = flops + run.derived['flops'], seconds + status['seconds']
  return flops / seconds if seconds else ASSUMED_FLOPS_PER_SECOND


def warn_of_mixtures(planned: list[Run], folder: str) -> None:
  """Says on stderr where ended runs come from other code or versions than this process."""
  now = {'git revision': revision(), 'versions': versions()}
  for run in planned:
    status = read_status(os.path.join(folder, run.run_id))
    if status['state'] in ENDED:
      then = {'git revision': status.get('git_revision'), 'versions': status.get('versions')}
      for what, value in then.items():
        if value != now[what]:
          say(
            f'warning: {folder}/{run.run_id} and maybe more were made by another {what} ({value}) than '
            f'this one ({now[what]}); delete them to run again'
          )
          return


def select(
  planned: list[Run], folder: str, only: str | None, shard: str | None, again: tuple[str, ...]
) -> tuple[list[int], list[int]]:
  """Indices of the runs asked for, and of those to do now; ConfigError for an unknown arm or shard.

  again: states, of failed and diverged, whose runs are to do too.
  """
  arms = {run.resolved['arm'] for run in planned}
  if only is not None and only not in arms:
    raise ConfigError(f'no arm {only!r} in this experiment; there are {", ".join(sorted(arms))}')
  index, count = _parse_shard(shard)
  asked, chosen = [], []
  for i, run in enumerate(planned):
    state = state_of(run, folder)
    if i % count == index and only in (None, run.resolved['arm']):
      asked.append(i)
      if state not in (*ENDED, 'failed') or state in again:
        chosen.append(i)
  return asked, chosen


def _parse_shard(shard: str | None) -> tuple[int, int]:
  try:
    index, count = (0, 1) if shard is None else map(int, shard.split('/'))
  except ValueError:
    raise ConfigError(f'--shard takes i/k, for example 0/8, got {shard!r}') from None
  if not 0 <= index < count:
    raise ConfigError(f'--shard i/k needs 0 <= i < k, got {shard}')
  return index, count


def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0 if every selected run ended, 1 if some failed, 130 if interrupted."""
  parser = argparse.ArgumentParser(
    prog='mhc sweep', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', nargs='?', help=f'{", ".join(EXPERIMENTS)}, with :argument if it takes one')
  parser.add_argument('--list', action='store_true', help='print the experiments and stop')
  parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
  parser.add_argument('--only', metavar='ARM', help='only the runs of one arm')
  parser.add_argument('--retry-failed', action='store_true', help='also runs that failed before')
  parser.add_argument(
    '--continue-diverged',
    action='store_true',
    help='also runs that were called diverged, from their last checkpoints; only NaN and inf end them then',
  )
  parser.add_argument('--shard', metavar='i/k', help='only every k-th planned run, from the i-th on')
  parser.add_argument('--workers', type=int, default=1, help='processes on this machine (default 1)')
  parser.add_argument(
    '--population',
    default='auto',
    metavar='P',
    help='runs of equal shapes in one program: auto (on accelerators, as many as a small run leaves room '
    'for), off, or at most P',
  )
  parser.add_argument('--out', default='runs', help='folder above the sweep (default runs)')
  parser.add_argument(
    '--seeds',
    type=int,
    metavar='K',
    help="every configuration of the plan at seeds 0 to K - 1, in place of the plan's own seeds",
  )
  runtime.add_flag(parser)
  args, overrides = parser.parse_known_args(argv)
  if args.list:
    print(listing())
    return 0
  require(args.name is not None, 'name an experiment; mhc sweep --list shows them')
  if args.workers < 1:
    raise ConfigError(f'--workers must be at least 1, got {args.workers}')
  if args.population not in ('auto', 'off') and not re.fullmatch('[1-9][0-9]{0,3}', args.population):
    raise ConfigError(f'--population takes auto, off or a number from 1 to 9999, got {args.population!r}')
  if '://' in args.out:
    raise ConfigError(f'--out {args.out} must be a local folder: copy it to the store after the sweep')
  folder = os.path.join(expand(args.out), args.name.replace(':', '-'))
  given = overrides + ([] if args.seeds is None else ['--seeds', f'{args.seeds}'])
  options = options_of(folder, given)
  if options != given:
    say(f'{args.name} goes on with {shlex.join(options)}, as {folder}/plan.json says')
    kept, overrides = parser.parse_known_args(options)
    args.seeds = kept.seeds
  require(args.seeds is None or args.seeds >= 1, f'--seeds must be at least 1, got {args.seeds}')
  runtime.prepare(args)
  say(f'{args.name}: planning')
  configs, planned = plan(args.name, overrides, args.seeds)
  check_extends(folder, args.name, options, planned)
  again = ('failed',) * args.retry_failed + ('diverged',) * args.continue_diverged
  asked, chosen = select(planned, folder, args.only, args.shard, again)
  if args.dry_run:
    print(table(planned, folder))
    return 0
  warn_of_mixtures(planned, folder)
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as error:
    if error.errno in FULL_DISK:
      raise
    raise ConfigError(f'--out {args.out} cannot hold runs: {error.strerror}') from None
  keep(folder, args.name, options, planned)
  say(f'{args.name}: {len(chosen)} of {len(planned)} runs to do, in {folder}')
  ended = []
  if chosen:
    todo = [configs[i] for i in chosen], [planned[i] for i in chosen]
    ended = execute(*todo, folder, args.workers, args.continue_diverged, args.population)
  states = [state_of(planned[i], folder) for i in asked]
  hint = '; --retry-failed tries failed runs again' if 'failed' in states else ''
  say(', '.join(f'{states.count(s)} {s}' for s in sorted(set(states))) + hint)
  stopped = 'interrupted' in {state for _, state in ended}  # now, not before
  return 130 if stopped else int(any(state not in ENDED for state in states))


if __name__ == '__main__':
  sys.exit(end_with_message(main))
