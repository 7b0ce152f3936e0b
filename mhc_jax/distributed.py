"""Several processes of one run: found in the cluster or named by flags, stopped and ended together.

JAX's own runtime is the only distributed engine: it finds the processes, watches their heartbeats, agrees on
the step at which a preempted run stops, and moves the data. One process alone starts nothing of this.

  mhc train ... --coordinator HOST:PORT --processes N --process I   # on each of N hosts
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Container, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say

_DETECT_SECONDS = 300  # that JAX's detection may wait for the names of other hosts
_MOST_PROCESSES = 2**20  # far above any machine; the runtime takes 32 bits
_WORD_SECONDS = 10  # between words about a wait
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_LAST_SECONDS = 0.5  # that the second Ctrl-C leaves for an orderly end
_END_SECONDS = 20  # that a process which ends, by a mistake for example, waits for the others to end too
_CHILD = 'MHC_JAX_PROCESS'  # environment variable in which `supervise` tells its child who it is
# The first line of what the runtime says, at some length, when it aborts a process that lost another.
_LAST_WORDS = re.compile(
  r"[EFW]\d{4} .*(coordination_service|preemption_sync_manager|client\.h)|terminate called .* 'gloo::"
)
# What an error of the runtime says where it is another process that failed, and not this one.
_PEER = re.compile(r'gloo|nccl|connection (reset|closed)|UNAVAILABLE', re.IGNORECASE)
_LOST = 255  # what a child tells its parent then, in place of its exit code


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run and this one's place among them."""

  coordinator: str  # host:port, of process 0
  processes: int
  process: int
  local_device_ids: tuple[int, ...] | None = None  # None: all of this machine's


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags that name the processes of a run; without them they are found in the environment."""
  group = parser.add_argument_group(
    'several processes (SLURM, MPI, TPU slices and Kubernetes jobs are found without these)'
  )
  group.add_argument('--coordinator', metavar='HOST:PORT', help='where process 0 listens')
  group.add_argument('--processes', type=int, metavar='N', help='how many there are')
  group.add_argument('--process', type=int, metavar='I', help='which one this is, from 0')
  group.add_argument(
    '--heartbeat',
    type=int,
    default=30,
    metavar='S',
    help='a process silent for S seconds is dead (default 30)',
  )
  group.add_argument(
    '--join-timeout',
    type=int,
    default=300,
    metavar='S',
    help='give up where a process is missing after S seconds at the start (default 300)',
  )
  group.add_argument('--local-devices', type=int, metavar='D', help='split the CPU into D devices, for tests')


def find(args: argparse.Namespace) -> Cluster | None:
  """The cluster that the flags or the environment describe; None for a single process.

  Raises ConfigError for flags that do not fit together, or a cluster that is only half described.
  """
  if is_supervised():
    *fields, local_device_ids, _ = _inherited()
    return Cluster(*fields, local_device_ids and tuple(local_device_ids))
  for name in ('heartbeat', 'join_timeout', 'local_devices'):
    value, flag = getattr(args, name), name.replace('_', '-')
    require(value is None or 1 <= value < 2**31, f'--{flag} must be at least 1, got {value}')
  given = (args.coordinator, args.processes, args.process)
  if given == (None, None, None):
    return _detect()
  if None in given:
    raise ConfigError('--coordinator, --processes and --process need each other')
  if not 1 <= args.processes <= _MOST_PROCESSES:
    raise ConfigError(f'--processes must lie between 1 and {_MOST_PROCESSES:,}, got {args.processes}')
  if not 0 <= args.process < args.processes:
    raise ConfigError(f'--process must lie between 0 and {args.processes - 1}, got {args.process}')
  host, _, port = args.coordinator.rpartition(':')
  if not host or not re.fullmatch('[0-9]{1,5}', port) or not 0 < int(port) < 2**16:
    raise ConfigError(f'--coordinator takes HOST:PORT, got {args.coordinator!r}')
  return Cluster(*given) if args.processes > 1 else None


def _detect() -> Cluster | None:
  """What JAX's own detection finds: SLURM, Open MPI, TPU slices, Kubernetes jobs."""
  # An interactive step of one task: nobody has started the job's others.
  if os.environ.get('SLURM_STEP_NUM_TASKS') == '1':
    return None
  # The function behind jax.distributed.initialize(), which cannot say "alone" without starting a service.
  from jax._src.clusters import ClusterEnv

  try:
    with warnings.catch_warnings(), _words('looks for the other processes of this job'):
      warnings.simplefilter('ignore')  # in any pod: that the package kubernetes is not installed
      cluster = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, _DETECT_SECONDS)
  except (LookupError, ValueError) as error:  # half of a job's variables, or odd ones
    what = f'{error} is missing' if isinstance(error, KeyError) else error
    raise ConfigError(f'the environment names the processes of a job wrongly: {what}') from None
  except RuntimeError as error:
    if 'JOB_COMPLETION_INDEX' not in os.environ:
      return None  # a pod by itself, no indexed job
    raise ConfigError(f'cannot find the other processes: {" ".join(str(error).split())}') from None
  coordinator, processes, process, local_device_ids = cluster
  if None in (coordinator, processes, process) or processes == 1:
    return None
  require(
    0 <= process < processes <= _MOST_PROCESSES and all(0 <= i < 2**15 for i in local_device_ids or ()),
    f'the environment names the processes of a job wrongly: this is process {process} of {processes}, '
    f'with devices {local_device_ids or "of its own"}',
  )
  return Cluster(coordinator, processes, process, local_device_ids and tuple(local_device_ids))


def initialize(cluster: Cluster | None, args: argparse.Namespace) -> None:
  """Joins the other processes; must come before anything that touches a device. args: of `add_flags`.

  Raises ConfigError where they cannot be reached.
  """
  if args.local_devices is not None:
    jax.config.update('jax_num_cpu_devices', args.local_devices)
  if cluster is None:
    return
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')  # of CPU devices; others have their own
  others = f'the other {cluster.processes - 1} of {cluster.processes} processes at {cluster.coordinator}'
  try:
    with _words(f'process {cluster.process} waits for {others}, for {args.join_timeout} s at most'):
      jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        cluster.local_device_ids,
        cluster_detection_method='deactivate',  # it has been done
        initialization_timeout=args.join_timeout,
        heartbeat_timeout_seconds=args.heartbeat,
        shutdown_timeout_seconds=_END_SECONDS,
      )
  except RuntimeError as error:
    what = ' '.join(str(error).split())[:300]
    raise ConfigError(f'cannot join the other processes at {cluster.coordinator}: {what}') from None


@contextlib.contextmanager
def _words(line: str) -> Iterator[None]:
  """Says the line now and then while the block lasts, from a thread: the block may be one call."""
  over = threading.Event()

  def talk() -> None:
    while not over.wait(_WORD_SECONDS):
      say(line)

  threading.Thread(target=talk, daemon=True).start()
  try:
    yield
  finally:
    over.set()


def supervise(cluster: Cluster, command: list[str]) -> int:
  """Runs the command as a child, that takes part in the run, and returns its exit code.

  When another process is dead the runtime aborts this one, and no Python of it is left to say so: the parent
  does, in one line. It passes signals on, and its own death is the child's.
  """
  ours, theirs = socket.socketpair()
  who = json.dumps([*dataclasses.astuple(cluster), theirs.fileno()])
  environment = os.environ | {_CHILD: who}
  child = subprocess.Popen(
    command, env=environment, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True, errors='replace'
  )
  theirs.close()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
      signal.signal(number, lambda number, _: child.send_signal(number))
  last_words: list[str] = []
  for line in child.stderr:
    if last_words or _LAST_WORDS.match(line):
      last_words.append(line)
    else:
      print(line, end='', file=sys.stderr, flush=True)
  code = child.wait()
  told = ours.recv(1)  # how it ended before it waited for the others
  if told and told[0] != _LOST:
    return told[0]
  if told or (code == -signal.SIGABRT and last_words):
    status = re.search(r'absl::Status: (.*\n.*)', ''.join(last_words))
    reason = ' '.join(status[1].split()) if status else 'an exchange with them failed'
    say(
      f'error: process {cluster.process} of {cluster.processes} lost the other processes ({reason}): see '
      'what the others say; the same command goes on from the last checkpoint'
    )
    return 1
  sys.stderr.writelines(last_words)
  return code if code >= 0 else 128 - code


def ended(command: Callable[[], int]) -> int:
  """Runs a command, as a child of `supervise` or not, and returns its exit code, which the parent learns too.

  At exit a process waits for the others, and the runtime aborts it where they do not come: then the code
  would be lost. The death of another process can show as an error of the runtime before it aborts this one.
  """
  if not is_supervised():
    return command()
  parent = socket.socket(fileno=_inherited()[-1])

  def watch() -> None:
    parent.recv(1)  # returns when the parent is dead
    os.kill(os.getpid(), signal.SIGKILL)

  threading.Thread(target=watch, daemon=True).start()
  code = 1
  try:
    code = command()
  except jax.errors.JaxRuntimeError as error:
    if not _PEER.search(str(error)):
      raise
    parent.send(bytes([_LOST]))
    sys.exit(1)
  except BaseException:
    parent.send(bytes([1]))
    raise
  parent.send(bytes([code]))
  return code


def is_supervised() -> bool:
  """Whether this process is the child of `supervise`."""
  return _CHILD in os.environ


def _inherited() -> list:
  """What `supervise` told its child: the fields of its Cluster and the number of the socket."""
  return json.loads(os.environ[_CHILD])


def any_process(flag: bool) -> bool:
  """True if `flag` is true in any process, so that all of them decide alike; also a barrier."""
  if jax.process_count() == 1:
    return flag
  return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def require_same(what: str, value: str) -> None:
  """Raises ConfigError, in every process, unless all of them have the same value."""
  if jax.process_count() == 1:
    return
  digest = np.frombuffer(hashlib.sha256(value.encode()).digest(), np.uint32)
  digests = multihost_utils.process_allgather(digest)
  different = [i for i, other in enumerate(digests) if (other != digests[0]).any()]
  if different:
    raise ConfigError(f'process {different[0]} has another {what} than process 0')


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Callable[[int], bool]]:
  """A function that says after each step whether to stop: Ctrl-C, SIGTERM, a closed terminal, of any process.

  Every process must ask after every step; all get the same answer. In a single process the same signal twice
  kills; and a sweep tells its workers by SIGUSR1, which adds to a Ctrl-C that they got too. A signal that the
  process was started to ignore, as nohup does with SIGHUP, stays ignored.
  """
  several = jax.process_count() > 1
  received: list[int] = []

  def handler(number: int, _: object) -> None:
    if several:
      os.kill(os.getpid(), signal.SIGTERM)  # which the runtime caught when it started, and tells the others
    else:
      received.append(number)
      signal.signal(number, previous[number])

  numbers = (signal.SIGINT, signal.SIGHUP) if several else _STOP_SIGNALS
  previous: dict[int, Any] = {}
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(ValueError):  # not the main thread: its owner handles signals
      for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
          previous[number] = signal.signal(number, handler)
          stack.callback(signal.signal, number, previous[number])
      if not several and multiprocessing.parent_process() is None:  # a sweep answers for its workers
        stack.enter_context(_answered(previous))
    yield multihost_utils.reached_preemption_sync_point if several else lambda step: bool(received)


@contextlib.contextmanager
def _answered(numbers: Container[int]) -> Iterator[None]:
  """Says at once that a signal has been heard; the same one again ends the process.

  The main thread may be in a compilation for half a minute, and runs no handler before it is back: this is a
  thread, which the interpreter tells of signals when they come. A run survives any end. ValueError outside
  of the main thread.
  """
  ours, theirs = socket.socketpair()
  theirs.setblocking(False)
  before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
  over = threading.Event()

  def answer() -> None:
    heard: set[int] = set()
    while number := ours.recv(1)[0]:  # 0 is ours, at the end
      if number in heard and not over.wait(_LAST_SECONDS):
        say('ended at once; the same command goes on from the last checkpoint')
        os._exit(128 + number)
      elif number in numbers and number not in heard:
        heard.add(number)
        say('stopping: the run is saved at its next step; once more ends it at once')

  thread = threading.Thread(target=answer, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    over.set()
    theirs.send(bytes(1))
    thread.join()
    ours.close()
    theirs.close()
