"""A lock between processes, held by the operating system: gone when its process is."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import filelock

from mhc_jax.errors import ConfigError


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
  """Holds the lock file at path, whose folder is made; ConfigError if it cannot be written."""
  lock = filelock.FileLock(path)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock.acquire()
  except OSError as error:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise ConfigError(
      f'data_dir: cannot write to {path.parent} ({error.strerror}); choose another folder'
    ) from error
  try:
    yield
  finally:
    lock.release()
