"""What guards a folder of prepared text: locks held by the operating system, gone when their process is."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from mhc_jax.errors import FULL_DISK, ConfigError
from mhc_jax.log import say


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds the lock file at path, whose folder is made; ConfigError if it cannot be written.

  Waits for as long as another process holds it, and says so after 10 seconds and then every 30.
  """
  lock = filelock.FileLock(path)
  with writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    for seconds in itertools.chain([10], itertools.repeat(30)):
      try:
        lock.acquire(timeout=seconds)
        break
      except filelock.Timeout:
        say(f'waiting for another process that prepares this corpus (it holds {path})')
  try:
    yield
  finally:
    lock.release()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
  """Turns what the operating system refuses below folder into ConfigError; full disks are OSErrors."""
  try:
    yield
  except (OSError, RuntimeError) as error:
    if full := full_disk(error):
      raise full from error
    if getattr(error, 'errno', None) is None:
      raise
    raise ConfigError(
      f'data_dir: cannot write to {folder} ({error.strerror}); choose another folder'
    ) from error


def full_disk(error: Exception) -> OSError | None:
  """The error of a full disk where that is what lies behind: array_record has it in words alone."""
  for code in FULL_DISK:
    if getattr(error, 'errno', None) == code or os.strerror(code) in str(error):
      return OSError(code, os.strerror(code))
  return None


def abandoned(parent: Path) -> Iterator[Path]:
  """What the lock files of a folder guard and no process holds; the lock is held while it is looked at."""
  for path in sorted(parent.glob('*.lock')):
    with contextlib.suppress(OSError), filelock.FileLock(path, timeout=0):
      yield path.with_suffix('')
