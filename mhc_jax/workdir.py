"""A run's folder: whose it is, what it holds, and which code and packages wrote it.

plan -> **workdir** -> train. config.json names the run, status.json says how far it is, a lock keeps a second
process out.
"""

import contextlib
import functools
import os
import subprocess
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import filelock
import jax

from mhc_jax import lease, storage
from mhc_jax.distributed import any_process
from mhc_jax.errors import FULL_DISK, BusyError, ConfigError
from mhc_jax.lease import Lease
from mhc_jax.log import say_once
from mhc_jax.plan import Run, deciding, run_id
from mhc_jax.run_folder import ENDED, Reader, load_config, load_status
from mhc_jax.storage import write_json

PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


def read_config(workdir: str) -> dict[str, Any] | None:
  """The resolved configuration in config.json, None without one; ConfigError where it is not a run's."""
  resolved, trouble = load_config(workdir)
  try:
    if resolved is not None:
      run_id(resolved)
  except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
    trouble = f'{type(error).__name__}: {error}'
  if trouble:
    path = os.path.join(workdir, 'config.json')
    raise ConfigError(
      f'{path} is not the configuration of a run ({trouble}): restore it, or choose another folder'
    )
  return resolved


def read_statuses(workdirs: list[str]) -> list[dict[str, Any]]:
  """Of each `read_status`; of folders in a store with many requests at once."""
  if not any(map(storage.is_remote, workdirs)):
    return [read_status(workdir) for workdir in workdirs]
  paths = [os.path.join(workdir, 'status.json') for workdir in workdirs]
  found = dict(zip(paths, storage.read_many(paths), strict=True))
  return [read_status(workdir, found.get) for workdir in workdirs]


def read_status(workdir: str, read: Reader | None = None) -> dict[str, Any]:
  """A run's status.json; its state is 'missing' without a file, 'damaged' for a damaged one: said once.

  read: of what has been read already.
  """
  status, trouble = load_status(workdir, read)
  if trouble:
    say_once(
      f'warning: {os.path.join(workdir, "status.json")} is damaged ({trouble}): the run goes on from its '
      'checkpoint, which does not need it'
    )
  return status


def lease_of(workdir: str) -> str:
  """Where the lease of a run lies: of every remote workdir, and of those of sweeps."""
  return os.path.join(workdir, '.lease')


@contextlib.contextmanager
def claim(workdir: str, run: Run, held: Lease | None = None) -> Iterator[tuple[dict[str, Any], Lease | None]]:
  """Holds a workdir for a run and yields its status and its lease; made, with config.json, where it is new.

  Process 0 looks, locks and writes for all. Of a local folder the operating system keeps the lock, on a file
  in it; a remote one is held by a lease there, and by the lock of a scratch folder. held: the caller's lease,
  which stays the caller's. None is yielded where there is no lease.

  Raises ConfigError, BusyError where another process holds it; OSError on a full disk; in every process.
  """
  refusal: Exception | None = None
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      try:
        stack.enter_context(_lock(workdir))
        if held is None and storage.is_remote(workdir):
          held = lease.wait_for(lease_of(workdir), workdir)
          stack.callback(held.release)
        check_workdir(workdir, run)  # under the lock: another process may have been first
        if read_status(workdir)['state'] not in ENDED:
          write_json(os.path.join(workdir, 'config.json'), run.resolved)
      except (ConfigError, OSError) as error:
        refusal = error
    if any_process(refusal is not None):
      raise refusal or ConfigError('process 0 cannot begin this run: see its message')
    yield read_status(workdir), held


def _lock(workdir: str) -> contextlib.AbstractContextManager:
  folder = storage.scratch(workdir)
  try:
    os.makedirs(folder, exist_ok=True)
    return filelock.FileLock(os.path.join(folder, '.lock'), timeout=0).acquire()
  except filelock.Timeout:
    raise BusyError(f'{workdir} is in use by another process') from None
  except OSError as error:
    if error.errno in FULL_DISK:
      raise
    raise ConfigError(f'--workdir {workdir} cannot be written: {error.strerror}') from None


def check_workdir(workdir: str, run: Run) -> None:
  """Raises ConfigError if workdir holds a run of another configuration, naming the first difference."""
  resolved = read_config(workdir)
  if resolved is None and (read_status(workdir)['state'] in ENDED or _has_checkpoints(workdir)):
    raise ConfigError(
      f'{workdir}/config.json is missing, and without it nobody knows whose results are there: '
      'restore it, or choose another --workdir'
    )
  if resolved is not None and resolved['data'].get('digest') == '':  # imported: its data is that of now
    resolved = resolved | {'data': resolved['data'] | {'digest': run.resolved['data']['digest']}}
  if resolved is not None and run_id(resolved) != run.run_id:
    name, old, new = _first_difference(deciding(resolved), deciding(run.resolved))
    raise ConfigError(
      f'{workdir} holds a run with {name}={old!r}, this one has {new!r}: choose another --workdir'
    )


def _has_checkpoints(workdir: str) -> bool:
  with storage.errors_of(workdir):
    folder = storage.to_path(os.path.join(workdir, 'checkpoints'))
    return folder.is_dir() and any(folder.iterdir())


def _first_difference(old: Any, new: Any, name: str = '') -> tuple[str, Any, Any]:
  if not (isinstance(old, dict) and isinstance(new, dict)):
    return name, old, new
  for key in sorted(old.keys() | new.keys()):
    path = f'{name}.{key}' if name else key
    if old.get(key) != new.get(key):
      return _first_difference(old.get(key), new.get(key), path)
  return name, old, new


def versions() -> dict[str, str]:
  """Versions of the packages that numbers depend on."""
  return {name: metadata.version(name) for name in PACKAGES}


@functools.cache
def revision() -> str:
  """The project's commit, '-dirty' where files differ from it; outside a checkout the package's version."""
  checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  top = _git('-C', checkout, 'rev-parse', '--show-toplevel')
  commit = _git('-C', checkout, 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*')
  # An environment may lie inside somebody else's checkout.
  ours = top is not None and os.path.realpath(top) == os.path.realpath(checkout)
  return commit if ours and commit else metadata.version('mhc_jax')


def _git(*arguments: str) -> str | None:
  try:
    answer = subprocess.run(['git', *arguments], capture_output=True, text=True, timeout=10, check=False)
  except (OSError, subprocess.TimeoutExpired):
    return None
  return answer.stdout.strip() or None
