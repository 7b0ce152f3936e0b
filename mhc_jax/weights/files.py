"""Folders of published weights: safetensors in one file or in several with an index, and config.json.

safetensors is imported where tensors are read or written: the help of commands costs nothing.
"""

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from mhc_jax.errors import ConfigError, require
from mhc_jax.run_folder import load_json
from mhc_jax.storage import is_remote
from mhc_jax.weights.tensors import Flat

OURS = 'mhc_jax.json'  # of an export: what its run was
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
# bfloat16 is a dtype of numpy's once JAX is imported.
DTYPES = ('float64', 'float32', 'bfloat16', 'float16')
_MOST_INDEX_BYTES = 2**28
_STALE_SECONDS = 86_400


def read_object(folder: str, name: str, most: int = 2**24) -> dict[str, Any] | None:
  """A JSON object in the folder, None where it is not there; ConfigError where it is none."""
  value, trouble = load_json(os.path.join(folder, name), most)
  if trouble or not isinstance(value, dict | None):
    raise ConfigError(f'{folder}: {trouble or f"{name} is not an object"}')
  return value


def read_tensors(folder: str) -> Flat:
  """All tensors by name, in the dtypes that they have there.

  Raises ConfigError for files that are missing or damaged, names that two files have or the index lacks, and
  dtypes that are not floating point of 16 to 64 bits.
  """
  from safetensors import SafetensorError, safe_open

  index = read_object(folder, INDEX, _MOST_INDEX_BYTES)
  tensors: Flat = {}
  for name in _files(folder, index):
    try:
      with safe_open(os.path.join(folder, name), 'np') as file:
        for key in file.keys():
          require(key not in tensors, f'{folder}: two files have the tensor {key}')
          tensors[key] = _checked(key, file.get_tensor(key))
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, ValueError) as error:
      if isinstance(error, ConfigError):
        raise
      raise ConfigError(f'{folder}/{name} cannot be read: {type(error).__name__}: {error}') from None
  lost = sorted((index or {}).get('weight_map', {}).keys() - tensors.keys())
  require(not lost, f'{folder}: {INDEX} names {"".join(lost[:1])}, which no file has')
  return tensors


def _files(folder: str, index: dict[str, Any] | None) -> list[str]:
  if index is None:
    require(os.path.isfile(os.path.join(folder, SINGLE)), f'{folder} has neither {SINGLE} nor {INDEX}')
    return [SINGLE]
  names = index.get('weight_map')
  sound = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
  require(sound, f'{folder}: {INDEX} has no weight_map')
  files = sorted(set(names.values()))
  for name in files:
    require(name == os.path.basename(name), f'{folder}: {INDEX} names {name!r}, which is not in this folder')
  return files


def _checked(name: str, value: np.ndarray) -> np.ndarray:
  require(value.dtype.name in DTYPES, f'the tensor {name} is {value.dtype}: read are {", ".join(DTYPES)}')
  return value


def write_tensors(path: str, tensors: Flat) -> None:
  """Writes contiguous tensors as one file, marked as PyTorch's, which transformers asks for."""
  from safetensors.numpy import save_file

  with open(path, 'wb') as file:
    mode = os.fstat(file.fileno()).st_mode
  save_file(tensors, path, metadata={'format': 'pt'})
  os.chmod(path, mode)  # which the library narrows to the owner


def digest_of(tensors: Flat) -> str:
  """Of names, shapes, dtypes and numbers: 16 hex digits of SHA-256."""
  hashed = hashlib.sha256()
  for name, value in sorted(tensors.items()):
    hashed.update(f'{name} {value.dtype} {value.shape} '.encode())
    hashed.update(np.ascontiguousarray(value).view(np.uint8).reshape(-1))
  return hashed.hexdigest()[:16]


@contextlib.contextmanager
def whole_folder(to: str, option: str) -> Iterator[str]:
  """A new folder to write into, which gets its name when the block ends; until then nothing has that name.

  Raises ConfigError where `to` is there already, is remote, or cannot be made.
  """
  require(not is_remote(to), f'{option} {to}: takes a local folder; copy it to the store afterwards')
  to = os.path.abspath(to)
  require(not os.path.lexists(to), f'{option} {to} is there already: choose another, or move it away')
  parent, name = os.path.split(to)
  partial = os.path.join(parent, f'.{name}.{secrets.token_hex(8)}.partial')
  for left in glob.glob(
    os.path.join(glob.escape(parent), f'.{glob.escape(name)}.*.partial')
  ):  # of killed ones
    if time.time() - os.stat(left).st_mtime > _STALE_SECONDS:
      shutil.rmtree(left, ignore_errors=True)
  try:
    os.makedirs(partial)
  except OSError as error:
    raise ConfigError(f'{option} {to} cannot be made: {error.strerror}') from None
  try:
    yield partial
    for folder, _, files in os.walk(partial):
      for file in files:
        _sync(os.path.join(folder, file))
    os.rename(partial, to)
  except BaseException:
    shutil.rmtree(partial, ignore_errors=True)
    raise


def _sync(path: str) -> None:
  with open(path, 'rb') as file:
    os.fsync(file.fileno())
