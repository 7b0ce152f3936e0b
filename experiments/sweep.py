"""Runs an experiment: many runs, resumable, on one machine or many.

  python -m experiments.sweep quick              # all of it; finished runs are skipped
  python -m experiments.sweep quick --dry-run    # what it would do
  python -m experiments.sweep quick --only mhc --retry-failed
  python -m experiments.sweep quick --shard 0/8  # every 8th run: one per GPU, or a SLURM array

An experiment is a file of this folder with runs(arg) -> list of configs, named in EXPERIMENTS.
Results: runs/NAME/plan.json and runs/NAME/RUN_ID/{config.json, metrics.jsonl, status.json, checkpoints/}.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import filelock
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import ablation, identity_or_mixing, isoflop, learning_rate, quick, rank, stability
from mhc_jax.config import BusyError, ConfigError
from mhc_jax.log import ENDED, read_status, write_json

EXPERIMENTS: dict[str, Callable[[str | None], list[ConfigDict]]] = {
  'quick': quick.runs,
  'learning_rate': learning_rate.runs,
  'identity_or_mixing': identity_or_mixing.runs,
  'ablation': ablation.runs,
  'stability': stability.runs,
  'rank': rank.runs,
  'isoflop': isoflop.runs,
}

LEFT = ('missing', 'interrupted')  # states of runs that a broken pool did not come to
ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'
ASSUMED_FLOPS_PER_SECOND = 10e9  # of one worker, until a finished run of the sweep says better


def plan(name: str) -> tuple[list[ConfigDict], list[Any]]:
  """The experiment's configs and what they resolve to, in order; `name` may be NAME:argument.

  Raises ConfigError for an unknown experiment, an invalid config, or two equal runs.
  """
  from mhc_jax.run import resolve
  from mhc_jax.train import load_data

  name, _, argument = name.partition(':')
  if name not in EXPERIMENTS:
    raise ConfigError(f'no experiment {name!r}; there are {", ".join(EXPERIMENTS)}')
  try:
    configs = EXPERIMENTS[name](argument or None)
  except ValueError as error:
    raise ConfigError(f'{name}: {error}') from None
  planned, seen = [], {}
  for config in configs:
    corpus = _corpus(config.data.name, config.data.dir)
    run = resolve(config, corpus.digest)
    load_data(run, corpus)  # refuses what the corpus is too small for, before anything starts
    if run.run_id in seen:
      raise ConfigError(f'{name} plans run {run.run_id} ({run.resolved["arm"]}) twice')
    seen[run.run_id] = run
    planned.append(run)
  return configs, planned


@functools.cache
def _corpus(name: str, data_dir: str | None):
  from mhc_jax.data import load_corpus

  return load_corpus(name, data_dir)


def table(planned: list[Any], folder: str) -> str:
  """The plan as text: run, arm, parameters by group, tokens, FLOPs, estimated seconds, state."""
  groups = (
    'embedding',
    'unembedding',
    'attention',
    'feed_forward',
    'norm',
    'hc_dynamic',
    'hc_static',
  )
  head = (
    'run',
    'arm',
    'seed',
    'width',
    'depth',
    'n',
    'rank',
    'W rank',
    *groups,
    'tokens',
    'FLOPs',
    'seconds',
    'state',
  )
  rows, total, rate = [head], 0.0, _flops_per_second(planned, folder)
  for run in planned:
    c, params = run.resolved, run.derived['params']
    seconds = run.derived['flops'] / rate
    total += seconds
    rows.append(
      (
        run.run_id,
        c['arm'],
        c['seed'],
        c['model']['width'],
        c['model']['depth'],
        c['model']['connection']['streams'],
        c['model']['connection']['rank'] or '-',
        c['model']['weights']['rank'] or '-',
        *(f'{params[group]:,}' for group in groups),
        f'{run.derived["tokens"]:,}',
        f'{run.derived["flops"]:.2e}',
        f'{seconds:.0f}',
        read_status(os.path.join(folder, run.run_id))['state'],
      )
    )
  widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
  lines = ['  '.join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
  known = 'measured on finished runs' if rate != ASSUMED_FLOPS_PER_SECOND else 'assumed'
  lines.append(
    f'{len(planned)} runs, about {total / 60:.0f} minutes for one worker without compilation, '
    f'at {rate / 1e9:.1f} GFLOP/s ({known})'
  )
  return '\n'.join(lines)


def _flops_per_second(planned: list[Any], folder: str) -> float:
  flops = seconds = 0.0
  for run in planned:
    status = read_status(os.path.join(folder, run.run_id))
    if status['state'] == 'finished':
      flops, seconds = flops + run.derived['flops'], seconds + status['seconds']
  return flops / seconds if seconds else ASSUMED_FLOPS_PER_SECOND


def warn_of_mixtures(planned: list[Any], folder: str) -> None:
  """Says on stderr where ended runs come from other code or versions than this process."""
  from mhc_jax.run import git_revision, versions

  now = {'git revision': git_revision(), 'versions': versions()}
  for run in planned:
    status = read_status(os.path.join(folder, run.run_id))
    if status['state'] in ENDED:
      then = {'git revision': status['git_revision'], 'versions': status['versions']}
      for what, value in then.items():
        if value != now[what]:
          print(
            f'warning: {folder}/{run.run_id} and maybe more were made by another {what} ({value}) than '
            f'this one ({now[what]}); delete them to run again',
            file=sys.stderr,
          )
          return


def shapes(run: Any) -> str:
  """What must be equal for two runs to share a compilation."""
  c = run.resolved
  return repr((run.model, c['data']['batch_size'], c['data']['seq_len'], c['optimizer']['schedule']))


def run_group(configs: list[ConfigDict], folder: str, quiet: bool) -> list[tuple[str, str]]:
  """Trains runs of equal shapes one after another; returns (run_id, state) of each."""
  from mhc_jax import train
  from mhc_jax.command import FULL_DISK
  from mhc_jax.run import resolve

  ended = []
  for config in configs:
    corpus = _corpus(config.data.name, config.data.dir)
    run_id = resolve(config, corpus.digest).run_id
    try:
      state = train.run(config, os.path.join(folder, run_id), corpus, quiet)['state']
    except Exception as error:  # recorded in status.json by the loop; the sweep goes on
      if isinstance(error, OSError) and error.errno in FULL_DISK:
        raise
      state = 'busy' if isinstance(error, BusyError) else 'failed'
      print(f'{run_id} {state}: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
    ended.append((run_id, state))
    if state == 'interrupted':
      break
  parent = multiprocessing.parent_process()
  if parent is not None and not parent.is_alive():
    os._exit(130)  # nobody takes the answer
  return ended


def _stop_with_parent() -> None:
  """In a worker: the sweep's death, by whatever signal, ends its runs as Ctrl-C would, after a checkpoint."""

  def watch() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=watch, daemon=True).start()


def execute(
  configs: list[ConfigDict], planned: list[Any], folder: str, workers: int
) -> list[tuple[str, str]]:
  """Trains all runs in `workers` processes, groups of equal shapes together and the longest first."""
  groups: dict[str, list[int]] = {}
  for index, run in enumerate(planned):
    groups.setdefault(shapes(run), []).append(index)
  ordered = sorted(groups.values(), key=lambda group: -sum(planned[i].derived['flops'] for i in group))
  jobs = [[configs[i] for i in group] for group in ordered]
  if workers == 1:
    ended = []
    for job in jobs:
      ended += run_group(job, folder, quiet=False)
      if any(state == 'interrupted' for _, state in ended):
        break
    return ended
  # One thread per worker: small matrices do not feed two, and idle threads of XLA:CPU spin.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  ended = []
  while jobs:
    ended += _in_workers(jobs, planned, folder, workers)
    # A worker that died (out of memory, kill) breaks its pool: its run is recorded, the others go on.
    dead = [run for run in planned if read_status(os.path.join(folder, run.run_id))['state'] == 'running']
    for run in dead:
      _record_death(os.path.join(folder, run.run_id))
    states = {run.run_id: read_status(os.path.join(folder, run.run_id))['state'] for run in planned}
    again = [[configs[i] for i in group if states[planned[i].run_id] in LEFT] for group in ordered]
    jobs = [job for job in again if job] if dead else []
  return ended


def _record_death(workdir: str) -> None:
  lock = filelock.FileLock(os.path.join(workdir, '.lock'), timeout=0)
  with contextlib.suppress(filelock.Timeout), lock:  # locked: another sweep's
    error = 'the process died (killed, or out of memory); --retry-failed goes on from its last checkpoint'
    status = read_status(workdir) | {'state': 'failed', 'error': error}
    write_json(os.path.join(workdir, 'status.json'), status)
    print(f'{os.path.basename(workdir)} failed: {error}', file=sys.stderr, flush=True)


def _in_workers(
  jobs: list[list[ConfigDict]], planned: list[Any], folder: str, workers: int
) -> list[tuple[str, str]]:
  """Runs the jobs in a pool of processes; what a broken pool took with it is not in the result."""
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, context, _stop_with_parent) as pool:
    futures = [pool.submit(run_group, job, folder, True) for job in jobs]
    try:
      _watch(futures, planned, folder)
    except KeyboardInterrupt:  # workers got it too: they save and stop, and no new group starts
      pool.shutdown(wait=True, cancel_futures=True)
  ended = []
  for future in futures:
    if not future.cancelled() and not isinstance(future.exception(), BrokenProcessPool):
      ended += future.result()
  return ended


def _watch(futures: list[concurrent.futures.Future], planned: list[Any], folder: str) -> None:
  """One bar over all runs, in FLOPs done, read from their metrics; after Ctrl-C no new group starts."""
  total = sum(run.derived['flops'] for run in planned)
  plain, printed = not sys.stderr.isatty(), 0.0
  began, at_start = time.monotonic(), sum(_flops_done(run, folder) for run in planned)
  form = '{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}'
  with tqdm(total=total, initial=at_start, desc='sweep', bar_format=form, disable=plain) as bar:
    while True:
      done, waiting = concurrent.futures.wait(futures, 1, return_when=concurrent.futures.FIRST_EXCEPTION)
      stopped = [f for f in done if not f.cancelled() and (f.exception() or _interrupted(f.result()))]
      if stopped:
        for future in waiting:
          future.cancel()
      states = [read_status(os.path.join(folder, run.run_id))['state'] for run in planned]
      ended, now = sum(state in ENDED for state in states), time.monotonic()
      flops = sum(_flops_done(run, folder) for run in planned)
      bar.set_postfix_str(f'{ended}/{len(planned)} runs', refresh=False)
      bar.update(flops - bar.n)
      if plain and (now - printed > 15 or not waiting):
        printed = now
        left = (now - began) * (total - flops) / (flops - at_start) if flops > at_start else None
        text = 'compiling' if left is None else f'about {left:.0f} s left'
        print(
          f'sweep: {ended}/{len(planned)} runs, {flops / total:.0%} of the FLOPs, {text}',
          file=sys.stderr,
          flush=True,
        )
      if not waiting:
        return


def _interrupted(ended: list[tuple[str, str]]) -> bool:
  return any(state == 'interrupted' for _, state in ended)


def _flops_done(run: Any, folder: str) -> float:
  """FLOPs of a run so far, from the last line of its metrics."""
  status = read_status(os.path.join(folder, run.run_id))
  if status['state'] in (*ENDED, 'failed'):
    return run.derived['flops']
  path = os.path.join(folder, run.run_id, 'metrics.jsonl')
  if not os.path.exists(path):
    return 0.0
  with open(path, 'rb') as file:
    file.seek(max(0, os.path.getsize(path) - 20000))
    lines = [line for line in file.read().split(b'\n')[:-1] if line.endswith(b'}')]
  try:
    return json.loads(lines[-1])['flops'] if lines else 0.0
  except ValueError:
    return 0.0


def select(
  planned: list[Any], folder: str, only: str | None, shard: str | None, retry: bool
) -> tuple[list[int], list[int]]:
  """Indices of the runs asked for, and of those to do now; ConfigError for an unknown arm or shard."""
  arms = {run.resolved['arm'] for run in planned}
  if only is not None and only not in arms:
    raise ConfigError(f'no arm {only!r} in this experiment; there are {", ".join(sorted(arms))}')
  index, count = _parse_shard(shard)
  asked, chosen = [], []
  for i, run in enumerate(planned):
    state = read_status(os.path.join(folder, run.run_id))['state']
    if i % count == index and only in (None, run.resolved['arm']):
      asked.append(i)
      if state not in ENDED and (state != 'failed' or retry):
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
    prog='python -m experiments.sweep',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('name', help=f'{", ".join(EXPERIMENTS)}, with :argument if it takes one')
  parser.add_argument('--dry-run', action='store_true', help='print the plan and stop')
  parser.add_argument('--only', metavar='ARM', help='only the runs of one arm')
  parser.add_argument('--retry-failed', action='store_true', help='also runs that failed before')
  parser.add_argument('--shard', metavar='i/k', help='only every k-th planned run, from the i-th on')
  parser.add_argument('--workers', type=int, default=1, help='processes on this machine (default 1)')
  parser.add_argument('--out', default='runs', help='folder above the sweep (default runs)')
  args = parser.parse_args(argv)
  if args.workers < 1:
    raise ConfigError(f'--workers must be at least 1, got {args.workers}')
  if '://' in args.out:
    raise ConfigError(f'--out {args.out} must be a local folder: copy it to the store after the sweep')
  folder = os.path.join(args.out, args.name.replace(':', '-'))
  configs, planned = plan(args.name)
  asked, chosen = select(planned, folder, args.only, args.shard, args.retry_failed)
  if args.dry_run:
    print(table(planned, folder))
    return 0
  warn_of_mixtures(planned, folder)
  os.makedirs(folder, exist_ok=True)
  runs = [{'run_id': run.run_id, 'arm': run.resolved['arm']} for run in planned]
  write_json(os.path.join(folder, 'plan.json'), {'sweep': args.name, 'runs': runs})
  print(f'{args.name}: {len(chosen)} of {len(planned)} runs to do, in {folder}', file=sys.stderr)
  if chosen:
    execute([configs[i] for i in chosen], [planned[i] for i in chosen], folder, args.workers)
  states = [read_status(os.path.join(folder, planned[i].run_id))['state'] for i in asked]
  print(
    ', '.join(f'{states.count(s)} {s}' for s in sorted(set(states))),
    '; --retry-failed tries failed runs again' if 'failed' in states else '',
    sep='',
    file=sys.stderr,
  )
  return 130 if 'interrupted' in states else int(any(state not in ENDED for state in states))


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
