"""The processes of a sweep on this machine: each takes runs and trains them, and one bar watches.

What is to run comes from sweep.py, and which of it is this process's from claims.py; every run's outcome is
in its status.json.
"""

import contextlib
import functools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import jax
from ml_collections import ConfigDict

from mhc_jax import distributed, lease, storage, train
from mhc_jax.data import Corpus, load_corpus, tokenizer_of
from mhc_jax.errors import FULL_DISK, BusyError
from mhc_jax.lease import Lease, LeaseLostError
from mhc_jax.log import say, tolerant_streams
from mhc_jax.plan import Run, resolve
from mhc_jax.population import alike, most_members, on_one_device
from mhc_jax.workdir import ENDED, lease_of, read_status

from . import progress
from .claims import Claims, Job, fail, groups_of

ONE_THREAD = '--xla_cpu_multi_thread_eigen=false'
Ended = list[tuple[str, str]]  # (run_id, state)


@functools.cache
def _corpus_of(name: str, data_dir: str | None, tokenizer: str | None, column: str | None) -> Corpus:
  return load_corpus(name, data_dir, tokenizer_of(tokenizer), column)


def corpus_of(data: ConfigDict) -> Corpus:
  """The corpus that a configuration's section `data` names, loaded once per process."""
  return _corpus_of(data.name, data.dir, data.tokenizer, data.column)


@tolerant_streams()
def run_group(
  configs: list[ConfigDict],
  folder: str,
  quiet: bool,
  continue_diverged: bool = False,
  population: str = 'off',
  stops_at: Callable[[int], bool] | None = None,
  leases: dict[str, Lease] | None = None,
) -> Ended:
  """Trains runs one after another, or side by side; returns (run_id, state) of each.

  After a stop, which may come at any moment, the last is 'interrupted': the run that it stopped or kept from
  beginning. population: 'auto', 'off' or how many at the most (population.most_members). stops_at: the
  caller's distributed.stop_on_signal. leases: those that the caller has, by run.
  """
  ended = []
  with contextlib.nullcontext(stops_at) if stops_at else distributed.stop_on_signal() as stops_at:
    options = {'continue_diverged': continue_diverged, 'stops_at': stops_at}
    for members in side_by_side(configs, population):
      ended += _run_members(members, folder, quiet, options, leases or {})
      if any(state == 'interrupted' for _, state in ended):
        break
  return ended


def _run_members(
  configs: list[ConfigDict], folder: str, quiet: bool, options: dict[str, Any], leases: dict[str, Lease]
) -> Ended:
  """Trains one run, or several as a population; failures are in status.json too, and the sweep goes on."""
  corpus = corpus_of(configs[0].data)
  ids = [resolve(config, corpus.digest).run_id for config in configs]
  workdirs, held = [os.path.join(folder, run_id) for run_id in ids], [leases.get(run_id) for run_id in ids]
  try:
    if options['stops_at'](0):
      found = [{'state': 'interrupted'} for _ in ids]
    elif len(configs) > 1:
      found = train.run_population(configs, workdirs, corpus, quiet, held=held, **options)
    else:
      found = [train.run(configs[0], workdirs[0], corpus, quiet, held=held[0], **options)]
  except Exception as error:
    if isinstance(error, OSError) and error.errno in FULL_DISK:
      raise
    lost = isinstance(error, LeaseLostError)
    state = 'lost' if lost else 'busy' if isinstance(error, BusyError) else 'failed'
    found = [{'state': state, 'error': f'{type(error).__name__}: {error}'} for _ in ids]
  if len(configs) > 1 and any((status.get('error') or '').startswith('OutOfMemoryError') for status in found):
    say(f'{len(configs)} runs side by side need more memory than is here: now half as many')
    half, same = len(configs) // 2, (folder, quiet, options, leases)
    return _run_members(configs[:half], *same) + _run_members(configs[half:], *same)
  for run_id, status in zip(ids, found, strict=True):
    if status['state'] in ('busy', 'lost', 'failed'):
      say(f'{run_id} {status["state"]}: {status["error"]}')
  return [(run_id, status['state']) for run_id, status in zip(ids, found, strict=True)]


def side_by_side(configs: list[ConfigDict], population: str) -> Iterator[list[ConfigDict]]:
  """The runs, in the order of the first of each, as populations: alike, and of similar lengths."""
  if one_by_one(population):
    yield from ([config] for config in configs)
    return
  groups: dict[tuple[Any, ...], list[tuple[ConfigDict, Run]]] = {}
  for config in configs:
    run = _resolved(config)
    groups.setdefault(alike(run), []).append((config, run))
  for group in groups.values():
    most = _most(group[0][1], population)
    longest_first = [config for config, run in sorted(group, key=lambda pair: -pair[1].num_steps)]
    yield from (longest_first[i : i + most] for i in range(0, len(group), most))


def one_by_one(population: str) -> bool:
  """Whether no runs are to train side by side."""
  return population == 'off' or (population == 'auto' and jax.default_backend() == 'cpu')


def _most(run: Run, population: str) -> int:
  return most_members(run) if population == 'auto' else int(population) if on_one_device(run) else 1


def _resolved(config: ConfigDict) -> Run:
  return resolve(config, corpus_of(config.data).digest)


def work(
  groups: list[list[Job]],
  folder: str,
  quiet: bool,
  continue_diverged: bool = False,
  population: str = 'off',
  waits: bool = True,
) -> Ended:
  """Takes runs and trains them until all have ended; what became of those that this process took.

  waits: also for runs that others hold, which are this process's if those die. After a stop the last is
  'interrupted', as run_group has it.
  """
  claims, ended, said = Claims(groups, folder), [], -math.inf
  alone = one_by_one(population)
  with distributed.stop_on_signal() as stops_at:
    while left := claims.left():
      if stops_at(0):
        return [*ended, (left[0].run_id, 'interrupted')]
      taken = claims.take(lambda job: 1 if alone else _most(_resolved(job.config), population))
      if taken:
        ended += _train(taken, claims, folder, quiet, continue_diverged, population, stops_at)
        if 'interrupted' in dict(ended).values():
          break
      elif not waits:
        break
      elif claims.left():
        others = claims.others()
        if others and time.monotonic() > said + 60 and multiprocessing.parent_process() is None:
          said = time.monotonic()
          run_id, who = next(iter(others.items()))
          say(f'sweep: waits for {len(others)} runs that others train, {run_id} by {who}; Ctrl-C ends this')
        _pause(5.0 if storage.is_remote(folder) else 1.0, stops_at)
  return ended


def _train(
  taken: list[tuple[Job, Lease]],
  claims: Claims,
  folder: str,
  quiet: bool,
  continue_diverged: bool,
  population: str,
  stops_at: Callable[[int], bool],
) -> Ended:
  leases = {job.run_id: held for job, held in taken}
  try:
    configs = [job.config for job, _ in taken]
    ended = run_group(configs, folder, quiet, continue_diverged, population, stops_at, leases)
  finally:
    for held in leases.values():
      held.release()
  states = dict(ended)
  for job, _ in taken:  # a lost one is another's now, and this process's again if that one dies
    if states.get(job.run_id, 'lost') not in ('lost', 'interrupted'):
      claims.done(job)
  return ended


def _pause(seconds: float, stops_at: Callable[[int], bool]) -> None:
  end = time.monotonic() + min(seconds, lease.stale_seconds() / 4)
  while time.monotonic() < end and not stops_at(0):
    time.sleep(0.05)


def execute(
  configs: list[ConfigDict],
  planned: list[Run],
  folder: str,
  workers: int,
  continue_diverged: bool = False,
  population: str = 'off',
  environments: list[dict[str, str]] | None = None,
  waits: bool = True,
) -> Ended:
  """Trains the runs in `workers` processes, and beside any others that are at the same; see `work`.

  environments: of each worker (devices.environment), where this process must leave the devices to them.
  """
  groups = groups_of(configs, planned, folder)
  options = {'continue_diverged': continue_diverged, 'population': population, 'waits': waits}
  if workers == 1 and environments is None:
    with progress.watched(planned, folder):
      return work(groups, folder, quiet=True, **options)
  # One thread per worker: small matrices do not feed two, and idle threads of XLA:CPU spin.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  crew = Crew(functools.partial(work, groups, folder, quiet=True, **options), planned, folder)
  with signals_stop():
    try:
      for environment in environments or [{}] * workers:
        crew.start(environment)
      progress.watch(crew.at_work, planned, folder, workers)
    except KeyboardInterrupt:
      say(f'stopping: {len(crew)} running runs save and end; once more ends them at once')
      crew.stop()
      if 'interrupted' not in dict(crew.ended).values():  # told while they started: they say nothing
        crew.ended.append((planned[0].run_id, 'interrupted'))
  return crew.ended


class Crew:
  """The worker processes: started, watched, told to stop, and buried."""

  def __init__(self, work: Callable[[], Ended], planned: list[Run], folder: str):
    self._work, self._planned, self._folder = work, planned, folder
    self._processes: dict[Connection, tuple[BaseProcess, dict[str, str]]] = {}
    self.ended: Ended = []

  def __len__(self) -> int:
    return len(self._processes)

  def start(self, environment: dict[str, str]) -> None:
    """One more worker, that is told this of its devices."""
    context = multiprocessing.get_context('spawn')
    answers, to_answer = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(self._work, to_answer, environment))
    with _no_interrupt():
      process.start()
      self._processes[answers] = process, environment
    to_answer.close()

  def at_work(self, seconds: float) -> bool:
    """Waits so long at most for a worker to end; whether any is left. Raises what a worker raised."""
    for answers in wait(list(self._processes), seconds):
      process, environment = self._processes.pop(answers)
      try:
        ended, error = answers.recv()
      except EOFError:  # killed, or out of memory
        process.join()
        if self._bury(process.pid):
          self.start(environment)  # the runs that it had not begun are done all the same
        continue
      process.join()
      self.ended += ended
      if error is not None or 'interrupted' in dict(ended).values():
        self.stop()
        if error is not None:
          raise error
    return bool(self._processes)

  def stop(self) -> None:
    """Has the workers save and stop; Ctrl-C meanwhile ends them as a kill would, which runs survive too."""
    for process, _ in self._processes.values():
      with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGUSR1)
    try:
      for answers, (process, _) in list(self._processes.items()):
        with contextlib.suppress(EOFError):
          self.ended += answers.recv()[0]
        process.join()
    except KeyboardInterrupt:
      for process, _ in self._processes.values():
        process.kill()
      raise
    self._processes.clear()

  def _bury(self, pid: int) -> bool:
    """Records the run that a dead worker held as failed, and gives its lease back; whether it held one."""
    found = False
    workdirs = [os.path.join(self._folder, run.run_id) for run in self._planned]
    holders = lease.holders([lease_of(workdir) for workdir in workdirs], {})
    for workdir, holder in zip(workdirs, holders, strict=True):
      held = lease.bury(lease_of(workdir), pid) if holder and pid in holder.processes else None
      if held is not None:
        found = True
        if read_status(workdir)['state'] not in (*ENDED, 'interrupted'):
          fail(
            workdir,
            'the process died (killed, or out of memory); --retry-failed goes on from its last checkpoint',
          )
        held.release()
    return found


def _worker(work: Callable[[], Ended], answers: Connection, environment: dict[str, str]) -> None:
  """A worker's life, from before it starts JAX.

  The sweep's death, by whatever signal, ends its run as Ctrl-C would, after a checkpoint. What a terminal
  that closes tells the sweep, the sweep tells its workers.
  """
  os.environ.update(environment)
  signal.signal(signal.SIGHUP, signal.SIG_IGN)

  def watch() -> None:
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGUSR1)

  threading.Thread(target=watch, daemon=True).start()
  try:
    answer = work(), None
  except Exception as error:
    answer = [], error
  try:
    answers.send(answer)
  except OSError:
    os._exit(130)  # nobody takes the answer


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
  """Processes that start in the block never see a terminal's Ctrl-C, not while they import either: the sweep
  tells them."""
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def signals_stop() -> Iterator[None]:
  """SIGTERM (a batch system's) and SIGHUP (a closed terminal's) are a Ctrl-C, in the main thread."""
  with contextlib.ExitStack() as stack:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
          before = signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
          stack.callback(signal.signal, number, before)
    yield
