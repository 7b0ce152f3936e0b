"""The processes of a sweep: groups of runs of equal shapes, trained side by side, watched by one bar.

What is to run comes from sweep.py; every run's outcome is in its status.json.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import filelock
import jax
from ml_collections import ConfigDict

from mhc_jax import distributed, train
from mhc_jax.data import Corpus, load_corpus, tokenizer_of
from mhc_jax.errors import FULL_DISK, BusyError
from mhc_jax.log import say, tolerant_streams
from mhc_jax.plan import Run, resolve
from mhc_jax.population import alike, most_members, on_one_device
from mhc_jax.run_folder import write_status
from mhc_jax.workdir import read_status

from . import progress

ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'


@functools.cache
def corpus_of(name: str, data_dir: str | None, tokenizer: str | None) -> Corpus:
  """The corpus, loaded once per process."""
  return load_corpus(name, data_dir, tokenizer_of(tokenizer))


@tolerant_streams()
def run_group(
  configs: list[ConfigDict],
  folder: str,
  quiet: bool,
  continue_diverged: bool = False,
  population: str = 'off',
) -> list[tuple[str, str]]:
  """Trains runs one after another, or side by side; returns (run_id, state) of each.

  After a stop, which may come at any moment, the last is 'interrupted': the run that it stopped or kept from
  beginning. population: 'auto', 'off' or how many at the most (population.most_members).
  """
  ended = []
  with distributed.stop_on_signal() as stops_at:
    options = {'continue_diverged': continue_diverged, 'stops_at': stops_at}
    for members in side_by_side(configs, population):
      ended += _run_members(members, folder, quiet, options)
      if any(state == 'interrupted' for _, state in ended):
        break
  parent = multiprocessing.parent_process()
  if parent is not None and not parent.is_alive():
    os._exit(130)  # nobody takes the answer
  return ended


def _run_members(
  configs: list[ConfigDict], folder: str, quiet: bool, options: dict[str, Any]
) -> list[tuple[str, str]]:
  """Trains one run, or several as a population; failures are in status.json too, and the sweep goes on."""
  data = configs[0].data
  corpus = corpus_of(data.name, data.dir, data.tokenizer)
  ids = [resolve(config, corpus.digest).run_id for config in configs]
  workdirs = [os.path.join(folder, run_id) for run_id in ids]
  try:
    if options['stops_at'](0):
      found = [{'state': 'interrupted'} for _ in ids]
    elif len(configs) > 1:
      found = train.run_population(configs, workdirs, corpus, quiet, **options)
    else:
      found = [train.run(configs[0], workdirs[0], corpus, quiet, **options)]
  except Exception as error:
    if isinstance(error, OSError) and error.errno in FULL_DISK:
      raise
    state = 'busy' if isinstance(error, BusyError) else 'failed'
    found = [{'state': state, 'error': f'{type(error).__name__}: {error}'} for _ in ids]
  if len(configs) > 1 and any('RESOURCE_EXHAUSTED' in (status.get('error') or '') for status in found):
    say(f'{len(configs)} runs side by side need more memory than is here: now half as many')
    half = len(configs) // 2
    return [end for c in (configs[:half], configs[half:]) for end in _run_members(c, folder, quiet, options)]
  for run_id, status in zip(ids, found, strict=True):
    if status['state'] in ('busy', 'failed'):
      say(f'{run_id} {status["state"]}: {status["error"]}')
  return [(run_id, status['state']) for run_id, status in zip(ids, found, strict=True)]


def side_by_side(configs: list[ConfigDict], population: str) -> Iterator[list[ConfigDict]]:
  """The runs, in the order of the first of each, as populations: alike, and of similar lengths."""
  if population == 'off' or (population == 'auto' and jax.default_backend() == 'cpu'):
    yield from ([config] for config in configs)
    return
  groups: dict[tuple[Any, ...], list[tuple[ConfigDict, Run]]] = {}
  for config in configs:
    digest = corpus_of(config.data.name, config.data.dir, config.data.tokenizer).digest
    run = resolve(config, digest)
    groups.setdefault(alike(run), []).append((config, run))
  for group in groups.values():
    run = group[0][1]
    most = most_members(run) if population == 'auto' else int(population) if on_one_device(run) else 1
    longest_first = [config for config, run in sorted(group, key=lambda pair: -pair[1].num_steps)]
    yield from (longest_first[i : i + most] for i in range(0, len(group), most))


def _stop_with_parent() -> None:
  """In a worker: the sweep's death, by whatever signal, ends its runs as Ctrl-C would, after a checkpoint.

  What a terminal that closes tells the sweep, the sweep tells its workers.
  """
  signal.signal(signal.SIGHUP, signal.SIG_IGN)

  def watch() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGUSR1)

  threading.Thread(target=watch, daemon=True).start()


def execute(
  configs: list[ConfigDict],
  planned: list[Run],
  folder: str,
  workers: int,
  continue_diverged: bool = False,
  population: str = 'off',
) -> list[tuple[str, str]]:
  """Trains all runs in `workers` processes, groups of equal shapes together and the longest first."""
  groups: dict[tuple[Any, ...], list[int]] = {}
  for index, run in enumerate(planned):
    groups.setdefault(run.shapes, []).append(index)
  ordered = sorted(groups.values(), key=lambda group: -sum(planned[i].derived['flops'] for i in group))
  if workers == 1:
    with progress.watched(planned, folder):
      everything = [configs[i] for group in ordered for i in group]
      return run_group(everything, folder, True, continue_diverged, population)
  # One thread per worker: small matrices do not feed two, and idle threads of XLA:CPU spin.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  workdirs = [os.path.join(folder, run.run_id) for run in planned]
  ended, todo = [], set(range(len(planned)))
  while todo:
    before = [_written(workdir) for workdir in workdirs]
    jobs = [[configs[i] for i in group if i in todo] for group in ordered]
    options = {'continue_diverged': continue_diverged, 'population': population}
    work = functools.partial(run_group, folder=folder, quiet=True, **options)
    now, broken = _in_workers(work, [job for job in jobs if job], planned, folder, workers)
    ended += now
    reached = [i for i in todo if _written(workdirs[i]) != before[i]]
    if not (broken and reached):
      break
    # A worker that died (out of memory, kill) breaks its pool: its run is recorded, the others go on.
    states = {i: read_status(workdirs[i])['state'] for i in reached}
    for i in reached:
      if states[i] == 'running':
        _record_death(workdirs[i])
    todo -= {i for i in reached if states[i] != 'interrupted'}  # the pool's end interrupts the others
  return ended


def _written(workdir: str) -> int:
  """When status.json was last written, 0 for never: tells the runs that a pool came to."""
  path = os.path.join(workdir, 'status.json')
  return os.stat(path).st_mtime_ns if os.path.exists(path) else 0


def _record_death(workdir: str) -> None:
  lock = filelock.FileLock(os.path.join(workdir, '.lock'), timeout=0)
  with contextlib.suppress(filelock.Timeout), lock:  # locked: another sweep's
    error = 'the process died (killed, or out of memory); --retry-failed goes on from its last checkpoint'
    status = read_status(workdir) | {'state': 'failed', 'error': error}
    write_status(workdir, status)
    say(f'{os.path.basename(workdir)} failed: {error}')


def _in_workers(
  work: Callable[[list[ConfigDict]], list[tuple[str, str]]],
  jobs: list[list[ConfigDict]],
  planned: list[Run],
  folder: str,
  workers: int,
) -> tuple[list[tuple[str, str]], bool]:
  """Runs the jobs in a pool of processes; (what ended, whether a worker's death broke the pool).

  Ctrl-C, SIGTERM or SIGHUP: the workers are told, save and stop, and no new group starts.
  """
  context, stopped = multiprocessing.get_context('spawn'), False
  with concurrent.futures.ProcessPoolExecutor(workers, context, _stop_with_parent) as pool, _signals_stop():
    with _no_interrupt():
      futures = [pool.submit(work, job) for job in jobs]
    try:
      progress.watch(futures, planned, folder, workers)
    except KeyboardInterrupt:
      stopped = True
      _stop(pool, min(workers, sum(not future.done() for future in futures)))
  done = [future for future in futures if not future.cancelled()]
  broken = [future for future in done if isinstance(future.exception(), BrokenProcessPool)]
  ended = [item for future in done if future not in broken for item in future.result()]
  return ended, bool(broken) and not stopped


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
  """Processes that start in the block never see a terminal's Ctrl-C, not while they import either: the sweep
  tells them."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(pool: concurrent.futures.ProcessPoolExecutor, running: int) -> None:
  """Has the workers save and stop; a second Ctrl-C ends them as a kill would, which runs survive too."""
  say(f'stopping: {running} running runs save and end; once more ends them at once')
  children = multiprocessing.active_children()
  for process in children:
    os.kill(process.pid, signal.SIGUSR1)
  try:
    pool.shutdown(wait=True, cancel_futures=True)
  except KeyboardInterrupt:
    for process in children:
      process.kill()
    raise


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
  """SIGTERM (a batch system's) and SIGHUP (a closed terminal's) are a Ctrl-C, in the main thread."""
  with contextlib.ExitStack() as stack:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
          before = signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
          stack.callback(signal.signal, number, before)
    yield
