"""Runs an experiment: many runs, resumable, on one machine or many.

  mhc sweep quick              # all of it; finished runs are skipped
  mhc sweep quick --dry-run    # what it would do
  mhc sweep quick --only mhc --retry-failed
  mhc sweep quick --workers 4  # four processes; on other machines the same command takes runs of it too
  mhc sweep quick --seeds 4 --config.optimizer.lr=8e-3 --out runs/slow
  mhc sweep --list             # the experiments

--config.section.field=value, any number of them, holds for every run and enters its id, as in mhc train.
Results: OUT/NAME/plan.json and OUT/NAME/RUN_ID/{config.json, metrics.jsonl, status.json, checkpoints/}.
plan.json keeps the overrides and --seeds: without any, the command goes on with those of the folder. Others
may add runs to a folder's plan (more seeds), and are refused where they would drop one.
"""

import argparse
import math
import os
import re
import shlex
import sys

import jax
from ml_collections import ConfigDict

from mhc_jax import runtime, storage
from mhc_jax.command import end_with_message
from mhc_jax.errors import FULL_DISK, ConfigError, require
from mhc_jax.log import say
from mhc_jax.paths import expand
from mhc_jax.plan import Run
from mhc_jax.workdir import ENDED, read_statuses, revision, versions

from . import devices, engine_ray, forecast, plans
from .planning import EXPERIMENTS, check_extends, keep, listing, options_of, plan
from .workers import execute


def states_of(planned: list[Run], folder: str) -> list[str]:
  """The runs' states; 'damaged' also where one has ended and its config.json is gone."""
  workdirs = [os.path.join(folder, run.run_id) for run in planned]
  states = [status['state'] for status in read_statuses(workdirs)]
  ended = [workdir for workdir, state in zip(workdirs, states, strict=True) if state in ENDED]
  configs = storage.read_many([os.path.join(workdir, 'config.json') for workdir in ended])
  bare = {workdir for workdir, config in zip(ended, configs, strict=True) if config is None}
  return ['damaged' if workdir in bare else state for workdir, state in zip(workdirs, states, strict=True)]


def warn_of_mixtures(planned: list[Run], folder: str) -> None:
  """Says on stderr where ended runs come from other code or versions than this process."""
  now = {'git revision': revision(), 'versions': versions()}
  statuses = read_statuses([os.path.join(folder, run.run_id) for run in planned])
  for run, status in zip(planned, statuses, strict=True):
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
  planned: list[Run], folder: str, only: str | None, again: tuple[str, ...]
) -> tuple[list[int], list[int]]:
  """Indices of the runs asked for, and of those to do now; ConfigError for an unknown arm.

  again: states, of failed and diverged, whose runs are to do too.
  """
  arms = {run.resolved['arm'] for run in planned}
  if only is not None and only not in arms:
    raise ConfigError(f'no arm {only!r} in this experiment; there are {", ".join(sorted(arms))}')
  asked, chosen = [], []
  for i, (run, state) in enumerate(zip(planned, states_of(planned, folder), strict=True)):
    if only in (None, run.resolved['arm']):
      asked.append(i)
      if state not in (*ENDED, 'failed') or state in again:
        chosen.append(i)
  return asked, chosen


def _make(folder: str, out: str) -> None:
  try:
    os.makedirs(folder, exist_ok=True)
  except OSError as error:
    if error.errno in FULL_DISK:
      raise
    raise ConfigError(f'--out {out} cannot hold runs: {error.strerror}') from None


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mhc sweep', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', nargs='?', help=f'{", ".join(EXPERIMENTS)}, with :argument if it takes one')
  parser.add_argument('--list', action='store_true', help='print the experiments and stop')
  parser.add_argument('--dry-run', action='store_true', help='print the plan and stop; downloads nothing')
  parser.add_argument('--only', metavar='ARM', help='only the runs of one arm')
  parser.add_argument('--retry-failed', action='store_true', help='also runs that failed before')
  parser.add_argument(
    '--continue-diverged',
    action='store_true',
    help='also runs that were called diverged, from their last checkpoints; only NaN and inf end them then',
  )
  parser.add_argument(
    '--workers',
    type=int,
    help='processes on this machine (default: one per accelerator, else 1); the same command on other '
    "machines takes runs of the same folder too: each run is one process's, and what a dead one held is "
    'taken after a minute',
  )
  parser.add_argument(
    '--engine',
    choices=('processes', 'ray'),
    default='processes',
    help='processes of this command, or tasks on the Ray cluster of RAY_ADDRESS (pip install "mhc_jax[ray]")',
  )
  parser.add_argument(
    '--no-wait',
    action='store_true',
    help='end when all runs left are held by others; else it waits, and takes over what they do not finish',
  )
  parser.add_argument(
    '--per-device',
    type=int,
    default=1,
    metavar='K',
    help="workers that share one GPU, each with 1/K of its memory (default 1); a TPU chip is one worker's",
  )
  parser.add_argument(
    '--population',
    default='auto',
    metavar='P',
    help='runs of equal shapes in one program: auto (on accelerators, as many as a small run leaves room '
    'for), off, or at most P',
  )
  parser.add_argument(
    '--out', default='runs', help='folder above the sweep, or gs:// or s3:// (default runs)'
  )
  parser.add_argument(
    '--seeds',
    type=int,
    metavar='K',
    help="every configuration of the plan at seeds 0 to K - 1, in place of the plan's own seeds",
  )
  runtime.add_flag(parser)
  return parser


def _check(args: argparse.Namespace) -> None:
  """Raises ConfigError for options that are wrong whatever is planned."""
  require(args.name is not None, 'name an experiment; mhc sweep --list shows them')
  for name in ('workers', 'per_device', 'seeds'):
    value = getattr(args, name)
    require(value is None or value >= 1, f'--{name.replace("_", "-")} must be at least 1, got {value}')
  if args.population not in ('auto', 'off') and not re.fullmatch('[1-9][0-9]{0,3}', args.population):
    raise ConfigError(f'--population takes auto, off or a number from 1 to 9999, got {args.population!r}')
  require(args.engine == 'processes' or args.workers is None, '--engine ray places runs: leave --workers out')


def _for_workers(args: argparse.Namespace) -> devices.Accelerators | None:
  """The accelerators that workers share out, and this process then leaves alone; None: it trains itself."""
  if args.engine == 'ray':
    jax.config.update('jax_platforms', 'cpu')  # the devices are the tasks'
    return None
  found = devices.find(os.environ)
  require(found is not None or args.per_device == 1, '--per-device: no accelerator is here')
  if found is None or (args.workers or len(found.names) * args.per_device) == 1:
    return None
  if args.dry_run:  # nothing is trained, but a rate may be measured: on a device, beside whatever is there
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  else:
    jax.config.update('jax_platforms', 'cpu')  # of this process: workers have the environment's
  return found


def _seats(
  found: devices.Accelerators | None, args: argparse.Namespace, configs: list[ConfigDict]
) -> tuple[int, list[dict[str, str]] | None]:
  """(number of workers, what each is told of its devices)."""
  if found is None:
    return args.workers or 1, None
  each = max(math.prod(config.mesh.to_dict().values()) for config in configs)
  most = devices.most_workers(found, each, args.per_device)
  workers = args.workers or most
  require(
    workers <= most,
    f'--workers {workers}: {len(found.names)} devices take {most}; --per-device K lets K workers share a GPU',
  )
  told = [devices.environment(i, found, each, args.per_device, os.environ) for i in range(workers)]
  left = len(found.names) - len({name for one in told for name in one[found.variable].split(',')})
  say(f'{workers} workers on {len(found.names) - left} of {len(found.names)} {found.kind} devices')
  return workers, told


def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0 if every selected run ended, 1 if some failed, 130 if interrupted."""
  parser = _parser()
  args, overrides = parser.parse_known_args(argv)
  if args.list:
    print(listing())
    return 0
  _check(args)
  folder = os.path.join(expand(args.out), args.name.replace(':', '-'))
  storage.to_path(folder)  # refuses what is no place for runs
  given = overrides + ([] if args.seeds is None else ['--seeds', f'{args.seeds}'])
  options = options_of(folder, given)
  if options != given:
    say(f'{args.name} goes on with {shlex.join(options)}, as {folder}/plan.json says')
    kept, overrides = parser.parse_known_args(options)
    args.seeds = kept.seeds
  runtime.prepare(args)
  say(f'{args.name}: planning')
  found = _for_workers(args)
  how = {'download': not args.dry_run, 'elsewhere': found is not None or args.engine == 'ray'}
  how['devices'] = len(found.names) if found else None
  configs, planned = plan(args.name, overrides, args.seeds, **how)
  check_extends(folder, args.name, options, planned)
  again = ('failed',) * args.retry_failed + ('diverged',) * args.continue_diverged
  asked, chosen = select(planned, folder, args.only, again)
  workers, environments = _seats(found, args, configs)
  if args.dry_run:
    states = states_of(planned, folder)
    print(forecast.report(planned, states, chosen, workers, forecast.speed_of(planned, folder)))
    if hours := plans.sentence([planned[i] for i in chosen]):
      print(*forecast.wrapped(hours), sep='\n')
    return 0
  warn_of_mixtures(planned, folder)
  if not storage.is_remote(folder):
    _make(folder, args.out)
  keep(folder, args.name, options, planned)
  say(f'{args.name}: {len(chosen)} of {len(planned)} runs to do, in {folder}')
  ended = []
  if chosen:
    todo = [configs[i] for i in chosen], [planned[i] for i in chosen]
    how = args.continue_diverged, args.population
    if args.engine == 'ray':
      ended = engine_ray.execute(*todo, folder, *how, args.per_device)
    else:
      ended = execute(*todo, folder, workers, *how, environments, not args.no_wait)
    forecast.remember([run for run in planned if (run.run_id, 'finished') in ended], folder)
  states = states_of([planned[i] for i in asked], folder)
  hint = '; --retry-failed tries failed runs again' if 'failed' in states else ''
  say(', '.join(f'{states.count(s)} {s}' for s in sorted(set(states))) + hint)
  stopped = 'interrupted' in {state for _, state in ended}  # now, not before
  return 130 if stopped else int(any(state not in ENDED for state in states))


if __name__ == '__main__':
  sys.exit(end_with_message(main))
