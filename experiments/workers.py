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
from ml_collections import ConfigDict

from mhc_jax import distributed, train
from mhc_jax.data import Corpus, load_corpus, tokenizer_of
from mhc_jax.errors import FULL_DISK, BusyError
from mhc_jax.log import say, tolerant_streams
from mhc_jax.plan import Run, resolve
from mhc_jax.run_folder import write_status
from mhc_jax.workdir import read_status

from . import progress

ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'


@functools.cache
def corpus_of(name: str, data_dir: str | None, tokenizer: str | None) -> Corpus:
  """The corpus, loaded once per process."""
  return load_corpus(name, data_dir, tokenizer_of(tokenizer))


def shapes(run: Run) -> tuple[Any, ...]:
  """What must be equal for two runs to share a compilation."""
  return run.shapes


@tolerant_streams()
def run_group(
  configs: list[ConfigDict], folder: str, quiet: bool, continue_diverged: bool = False
) -> list[tuple[str, str]]:
  """Trains runs one after another; returns (run_id, state) of each.

  After a stop, which may come at any moment, the last is 'interrupted': the run that it stopped or kept from
  beginning.
  """
  ended = []
  with distributed.stop_on_signal() as stops_at:
    for config in configs:
      corpus = corpus_of(config.data.name, config.data.dir, config.data.tokenizer)
      run_id = resolve(config, corpus.digest).run_id
      options = {'continue_diverged': continue_diverged, 'stops_at': stops_at}
      try:
        stopped = stops_at(0)
        status = {} if stopped else train.run(config, os.path.join(folder, run_id), corpus, quiet, **options)
        state = status.get('state', 'interrupted')
      except Exception as error:  # recorded in status.json by the loop; the sweep goes on
        if isinstance(error, OSError) and error.errno in FULL_DISK:
          raise
        state = 'busy' if isinstance(error, BusyError) else 'failed'
        say(f'{run_id} {state}: {type(error).__name__}: {error}')
      ended.append((run_id, state))
      if state == 'interrupted':
        break
  parent = multiprocessing.parent_process()
  if parent is not None and not parent.is_alive():
    os._exit(130)  # nobody takes the answer
  return ended


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
  configs: list[ConfigDict], planned: list[Run], folder: str, workers: int, continue_diverged: bool = False
) -> list[tuple[str, str]]:
  """Trains all runs in `workers` processes, groups of equal shapes together and the longest first."""
  groups: dict[tuple[Any, ...], list[int]] = {}
  for index, run in enumerate(planned):
    groups.setdefault(shapes(run), []).append(index)
  ordered = sorted(groups.values(), key=lambda group: -sum(planned[i].derived['flops'] for i in group))
  if workers == 1:
    with progress.watched(planned, folder):
      return run_group([configs[i] for group in ordered for i in group], folder, True, continue_diverged)
  # One thread per worker: small matrices do not feed two, and idle threads of XLA:CPU spin.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  workdirs = [os.path.join(folder, run.run_id) for run in planned]
  ended, todo = [], set(range(len(planned)))
  while todo:
    before = [_written(workdir) for workdir in workdirs]
    jobs = [[configs[i] for i in group if i in todo] for group in ordered]
    work = functools.partial(run_group, folder=folder, quiet=True, continue_diverged=continue_diverged)
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
