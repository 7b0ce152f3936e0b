"""Paths that may lie in an object store: gs:// (Google Cloud Storage), s3:// (S3 and what speaks like it).

An object is written whole or not at all; it cannot be appended to. So a run whose workdir is remote keeps its
metrics in a local scratch folder, and uploads them whole; a lease there (lease.py) keeps others out.
"""

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from etils import epath

from mhc_jax.errors import FULL_DISK, ConfigError, StorageError
from mhc_jax.paths import expand

_STALE_SECONDS = 600  # no write of a small file takes as long
_PACKAGES = {'gs': 'gcsfs', 's3': 's3fs'}


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether the path names an object store."""
  return '://' in os.fspath(path)


def to_path(path: str | os.PathLike[str]) -> epath.Path:
  """The path as an object that reads and writes files here and there alike; absolute if local.

  Raises ConfigError for a store that is not supported, or whose package is not installed.
  """
  path = expand(path)
  if not is_remote(path):
    return epath.Path(os.path.abspath(path))
  scheme = path.partition('://')[0]
  if scheme not in _PACKAGES:
    raise ConfigError(f'{path}: takes a local folder, gs://BUCKET/FOLDER or s3://BUCKET/FOLDER')
  for protocol in ('gcs', *_PACKAGES):  # else a process never sees what others have written since
    fsspec.config.conf.setdefault(protocol, {}).setdefault('use_listings_cache', False)
  try:
    fsspec.get_filesystem_class(scheme)
  except ImportError:
    package = _PACKAGES[scheme]
    raise ConfigError(f'{path} needs the package {package}: pip install "mhc_jax[cloud]"') from None
  return epath.Path(path)


@contextlib.contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
  """Turns whatever the client of a remote path raises into StorageError; local errors pass."""
  try:
    yield
  except ConfigError:
    raise
  except Exception as error:  # every client has classes of its own
    if not is_remote(path) or (isinstance(error, OSError) and error.errno in FULL_DISK):  # a copy's disk here
      raise
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:300]
    raise StorageError(f'{os.fspath(path)}: {reason}') from error


def read_json(path: str | os.PathLike[str]) -> Any | None:
  """The contents of a JSON file; None if there is none."""
  with errors_of(path):
    try:
      text = to_path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      return None
  return json.loads(text)


def read_many(paths: list[str]) -> list[bytes | None]:
  """The contents of files, None where there is none; of files in one store with many requests at once."""
  if not any(map(is_remote, paths)):
    return [_read_here(path) for path in paths]
  with errors_of(paths[0]):
    to_path(paths[0])  # refuses what is not supported
    client = fsspec.filesystem(paths[0].partition('://')[0])
    found = client.cat([client._strip_protocol(path) for path in paths], recursive=False, on_error='return')
    contents = []
    for path in paths:
      content = found.get(client._strip_protocol(path))
      if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
        raise content
      contents.append(content if isinstance(content, bytes) else None)
    return contents


def _read_here(path: str) -> bytes | None:
  try:
    return Path(path).read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None


def write_text(path: str, text: str) -> None:
  """Writes a file so that it is always whole: a local one to a neighbour first, then renamed over it."""
  if is_remote(path):
    with errors_of(path):
      to_path(path).write_text(text)
    return
  partial = f'{path}.{secrets.token_hex(8)}.partial'  # process ids repeat: every container has its own 1
  try:
    with open(partial, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.replace(partial, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.remove(partial)
    raise
  for stale in glob.glob(f'{glob.escape(path)}.*partial'):  # of killed processes
    with contextlib.suppress(OSError):
      if time.time() - os.stat(stale).st_mtime > _STALE_SECONDS:
        os.remove(stale)


def scratch(workdir: str) -> str:
  """The local folder for what a run cannot write to its workdir: the workdir itself where that is local.

  The same for every process of this machine's user; nothing in it outlives the process by intention.
  """
  if not is_remote(workdir):
    return workdir
  name = hashlib.sha256(workdir.rstrip('/').encode()).hexdigest()[:16]
  return os.path.join(tempfile.gettempdir(), f'mhc_jax-{os.getuid()}', name)


def upload(name: str, workdir: str) -> None:
  """Copies a file of the scratch folder to a remote workdir, whole; does nothing for a local one."""
  if is_remote(workdir):
    path = os.path.join(workdir, name)
    with errors_of(path):
      to_path(path).write_bytes(Path(scratch(workdir), name).read_bytes())


def download(name: str, workdir: str) -> None:
  """Makes a file of the scratch folder what it is in a remote workdir; does nothing for a local one."""
  if is_remote(workdir):
    path, local = os.path.join(workdir, name), Path(scratch(workdir), name)
    local.unlink(missing_ok=True)
    with errors_of(path), contextlib.suppress(FileNotFoundError):
      local.write_bytes(to_path(path).read_bytes())


def write_json(path: str, value: Any) -> None:
  """Writes JSON so that the file is always whole."""
  write_text(path, json.dumps(finite(value), indent=1) + '\n')


def finite(value: Any) -> Any:
  """The value as JSON types: arrays as lists, dataclasses as objects, floats that are not finite as None."""
  if dataclasses.is_dataclass(value):
    value = vars(value)
  if isinstance(value, dict):
    return {key: finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [finite(item) for item in value]
  if hasattr(value, 'tolist'):  # arrays and scalars of numpy and JAX
    return finite(value.tolist())
  return None if isinstance(value, float) and not math.isfinite(value) else value
