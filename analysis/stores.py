"""A sweep in gs:// or s3://, read: the small files of its runs copied to a folder here, many at once.

Where: between the command lines and runs.py, which reads a folder. What is derived (results.csv, report/)
lies in that folder too: analysis writes nothing into a store.
"""

import os
import shutil
from pathlib import Path

import fsspec

from mhc_jax import storage
from mhc_jax.log import say
from mhc_jax.paths import expand
from mhc_jax.run_folder import ENDED, load_plan, load_status

AT_ONCE = 200  # runs whose files are in memory together
SMALL = ('config.json', 'status.json')


def here(address: str) -> Path:
  """The folder of a sweep: itself, or its copy runs/SCHEME/BUCKET/FOLDER, brought up to date.

  Metrics of runs that have ended are not copied again. Raises ConfigError where there is no plan, and
  StorageError for a store out of reach.
  """
  address = expand(address)
  if not storage.is_remote(address):
    return Path(address)
  address = address.rstrip('/')
  scheme, _, rest = address.partition('://')
  folder = Path('runs', scheme, *rest.split('/'))
  _copy(address, folder, '', ('plan.json',))
  planned, found = list(load_plan(str(folder))[1]), _folders(address)
  for old in folder.glob('*/config.json'):
    if old.parent.name not in found:
      shutil.rmtree(old.parent)
  there = [run_id for run_id in planned if run_id in found]
  for first in range(0, len(there), AT_ONCE):
    _copy_runs(address, folder, there[first : first + AT_ONCE])
  for stranger in found - set(planned):  # named in a warning where it is a run
    _copy(address, folder, stranger, ('config.json',))
  say(f'{address}: {len(there)} runs copied to {folder}, where the results go')
  return folder


def _folders(address: str) -> set[str]:
  with storage.errors_of(address):
    entries = fsspec.filesystem(address.partition('://')[0]).ls(address, detail=True)
  return {entry['name'].rstrip('/').rpartition('/')[2] for entry in entries if entry['type'] == 'directory'}


def _copy_runs(address: str, folder: Path, run_ids: list[str]) -> None:
  before = [_content(folder / run_id / 'status.json') for run_id in run_ids]
  contents = storage.read_many([f'{address}/{run_id}/{name}' for run_id in run_ids for name in SMALL])
  for index, run_id in enumerate(run_ids):
    for name, content in zip(SMALL, contents[2 * index : 2 * index + 2], strict=True):
      _write(folder / run_id / name, content)
  changed = [
    run_id
    for run_id, content in zip(run_ids, before, strict=True)
    if content != _content(folder / run_id / 'status.json')
    or load_status(str(folder / run_id))[0]['state'] not in ENDED
    or not (folder / run_id / 'metrics.jsonl').exists()
  ]
  rows = storage.read_many([f'{address}/{run_id}/metrics.jsonl' for run_id in changed])
  for run_id, content in zip(changed, rows, strict=True):
    _write(folder / run_id / 'metrics.jsonl', content)


def _copy(address: str, folder: Path, below: str, names: tuple[str, ...]) -> None:
  contents = storage.read_many([os.path.join(address, below, name) for name in names])
  for name, content in zip(names, contents, strict=True):
    _write(folder / below / name, content)


def _content(path: Path) -> bytes | None:
  return path.read_bytes() if path.is_file() else None


def _write(path: Path, content: bytes | None) -> None:
  """None: there is no such file any more."""
  if content is None:
    path.unlink(missing_ok=True)
  elif content != _content(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.partial')
    partial.write_bytes(content)
    os.replace(partial, path)
