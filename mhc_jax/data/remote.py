"""Text in an object store: copied once to the local cache, then read like any other.

Main path: gs:// or s3:// -> **local files** -> text_files.py or tfds_text.py.
"""

import glob
import hashlib
import json
import os
import shutil
from pathlib import Path

import fsspec
from tqdm import tqdm

from mhc_jax import storage
from mhc_jax.data.lock import locked
from mhc_jax.errors import ConfigError

# What tells one version of an object from the next, by the names of all stores; absent ones do not count.
_VERSION = ('size', 'md5Hash', 'ETag', 'etag', 'generation', 'mtime', 'LastModified', 'updated')


def local_copy(url: str, cache: Path) -> str:
  """Copies what a folder, object or glob names into a folder of `cache`; returns its path (or glob) there.

  The copy belongs to the objects' names and versions: a changed source is copied anew, an equal one is found
  again without reading it. Raises ConfigError where there is nothing, StorageError where the store fails.
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
  objects = {name: facts for name, facts in sorted(listed.items()) if facts['type'] == 'file'}
  if not objects:
    raise ConfigError(f'{url}: no such object or folder, and no object matches')
  versions = [(name, [str(facts.get(field)) for field in _VERSION]) for name, facts in objects.items()]
  key = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()
  folder = cache / key[:16]
  with locked(folder.with_name(f'{folder.name}.lock')):
    if not folder.is_dir():
      _copy(files, root, list(objects), folder, url)
  return os.path.join(folder, pattern)


def _copy(files: fsspec.AbstractFileSystem, root: str, names: list[str], folder: Path, url: str) -> None:
  """All objects, or none: a killed copy leaves a folder of another name."""
  partial = folder.with_name(f'{folder.name}.partial')
  shutil.rmtree(partial, ignore_errors=True)
  for name in tqdm(names, f'copying {url}', disable=None, delay=1):
    local = partial / os.path.relpath(name, root)
    local.parent.mkdir(parents=True, exist_ok=True)
    with storage.errors_of(url):
      files.get_file(name, str(local))
  partial.rename(folder)
