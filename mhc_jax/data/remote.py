"""Files in an object store: text files are copied once to the local cache, then read like any other.

Main path: gs:// or s3:// -> **local files** -> text_files.py. Tables are read where they are (`tables.py`).
"""

import glob
import hashlib
import json
import os
import shutil
from pathlib import Path

import fsspec

from mhc_jax import storage
from mhc_jax.data.lock import abandoned, locked, writing
from mhc_jax.data.progress import progress
from mhc_jax.data.text_files import TextFiles, scan_pattern
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say

# What tells one version of an object from the next, by the names of all stores; absent ones do not count.
VERSION = ('size', 'md5Hash', 'ETag', 'etag', 'generation', 'mtime', 'LastModified', 'updated')

_EXTRAS = {'gs': 'cloud', 'gcs': 'cloud', 's3': 'cloud', 'hf': 'text'}


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
  """(file system, path in it) of what fsspec can open; ConfigError for what it does not know or lacks."""
  scheme = url.partition('://')[0]
  try:
    with storage.errors_of(url):
      return fsspec.core.url_to_fs(url)
  except storage.StorageError as error:
    if isinstance(error.__cause__, ImportError) and scheme in _EXTRAS:
      raise ConfigError(f'{url} needs a package: pip install "mhc_jax[{_EXTRAS[scheme]}]"') from None
    if isinstance(error.__cause__, ImportError | ValueError):
      raise ConfigError(f'{url}: {" ".join(str(error.__cause__).split())}') from None
    raise


def scan_copy(url: str, cache: Path) -> TextFiles:
  """The documents of the folder, object or glob that url names, read from a copy in a folder of `cache`.

  The copy belongs to the objects' names and versions: a changed source is copied anew, an equal one is found
  again without reading it, and one whose text is no longer what was copied is replaced. Raises ConfigError
  where there is nothing or it is no text, StorageError where the store fails.
  """
  storage.to_path(url)  # refuses stores that are not supported
  with storage.errors_of(url):
    files, root = fsspec.core.url_to_fs(url)
    pattern = ''
    if glob.has_magic(root):
      parts = root.split('/')
      fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
      listed = files.glob(root, detail=True)
      root, pattern = '/'.join(parts[:fixed]), '/'.join(parts[fixed:])
    else:
      listed = files.find(root, detail=True)
      if list(listed) == [root]:  # one object
        root, _, pattern = root.rpartition('/')
  # Some stores list a folder as an object of no bytes whose name ends with a slash.
  listed = {name: facts for name, facts in sorted(listed.items()) if facts['type'] != 'directory'}
  objects = {name: facts for name, facts in listed.items() if not name.endswith('/')}
  if not objects:
    raise ConfigError(f'{url}: no such object or folder, and no object matches')
  for name, facts in objects.items():
    require(facts['type'] == 'file', f'{url}: {name} is no object that can be read ({facts["type"]})')
  versions = [(name, [str(facts.get(field)) for field in VERSION]) for name, facts in objects.items()]
  key = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()
  folder = cache / key[:16]
  copy = os.path.join(folder, pattern)
  found = _scan(folder, copy)
  if found is None:
    with locked(folder.with_name(f'{folder.name}.lock')):
      found = _scan(folder, copy)  # another process may have been first
      if found is None:
        if folder.is_dir():
          say(f'warning: {folder} is damaged (not what was copied from {url}): copied again')
        with writing(cache):
          _copy(files, root, objects, folder, url)
        found = scan_pattern(copy)
        with writing(cache):
          storage.write_text(str(_record(folder)), found.digest)
  return found


def _record(folder: Path) -> Path:
  """Where the digest of a copy's text is kept."""
  return folder.with_name(f'{folder.name}.digest')


def _scan(folder: Path, copy: str) -> TextFiles | None:
  """The documents of a copy; None where there is none, or its text is no longer what was copied."""
  if not folder.is_dir():
    return None
  try:
    digest = _record(folder).read_bytes().decode()
  except (OSError, ValueError):  # killed right after the copy, or refused as no text
    return scan_pattern(copy)
  try:
    found = scan_pattern(copy)
  except ConfigError:
    return None
  return found if found.digest == digest else None


def _copy(files: fsspec.AbstractFileSystem, root: str, objects: dict, folder: Path, url: str) -> None:
  """All objects, or none: a killed copy leaves a folder of another name."""
  for left in abandoned(folder.parent):
    shutil.rmtree(left.with_name(f'{left.name}.partial'), ignore_errors=True)
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  places = {os.path.relpath(name, root): name for name in objects}
  inside = not any(place.startswith('..') for place in places)
  require(inside and len(places) == len(objects), f'{url}: names with .. or // have no place in a folder')
  try:
    for place, name in progress(places.items(), f'copying {url}', len(places)):
      path = partial / place
      path.parent.mkdir(parents=True, exist_ok=True)
      with storage.errors_of(url):
        files.get_file(name, str(path))
      size = objects[name].get('size')
      require(size in (None, path.stat().st_size), f'{url}: {name} changed while it was copied: start again')
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
