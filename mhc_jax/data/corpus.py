"""A corpus by name -> train and validation token streams, prepared once and memory-mapped.

Main path: config -> **load_corpus** -> windows -> batches -> train_step. Everything prepared lies
in DATA_DIR/mhc_jax/<name>-<tokenizer>-<key>/, keyed by the content or version of the source: a changed
source gets a folder of its own, and old ones can be deleted at will. The text itself is not copied. TFDS's
own datasets are prepared at TFDS's usual place in DATA_DIR.
"""

import contextlib
import dataclasses
import os
import shutil
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mhc_jax.data import source, splits, tables, text_files, tfds_text, token_files, wheels
from mhc_jax.data.find_files import expanded
from mhc_jax.data.lock import abandoned, full_disk, locked, writing
from mhc_jax.data.remote import scan_copy
from mhc_jax.data.source import Source
from mhc_jax.data.tokenizer import BYTES, Tokenizer
from mhc_jax.data.tokenizer_libraries import tokenizer_of
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.storage import is_remote

KEPT_SECONDS = 7 * 86400  # what a killed preparation left and nobody has gone on with


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Tokenised text: BOS document BOS document ..., uint16 or uint32, read-only.

  `digest` (hex) covers both streams and the tokenizer's name, which has a hash of its content: equal digests,
  equal data.
  """

  name: str
  digest: str
  train: np.ndarray
  validation: np.ndarray
  tokenizer: Tokenizer
  byte_lengths: np.ndarray | None = None  # bytes that each validation token stands for; None: one each


def corpus_of(data: Mapping[str, Any]) -> Corpus:
  """The corpus that a configuration's section `data` names; fields newer than it may be absent."""
  tokenizer, column = (data[field] if field in data else None for field in ('tokenizer', 'column'))
  return load_corpus(data['name'], data['dir'], tokenizer_of(tokenizer), column)


def load_corpus(
  name: str, data_dir: str | None = None, tokenizer: Tokenizer = BYTES, column: str | None = None
) -> Corpus:
  """Loads a corpus and prepares it first where needed; processes that start together do it once.

  name: see open_source. data_dir: a local folder; None is TFDS's default ($TFDS_DATA_DIR or
  ~/tensorflow_datasets). column: of a table, None is 'text'. Raises ConfigError if the corpus is unknown,
  missing, empty or cannot be prepared, or data_dir cannot be written.
  """
  root = data_folder(data_dir)
  return load_source(name, open_source(name, root, column), root, tokenizer)


def open_source(name: str, root: Path, column: str | None = None) -> Source:
  """What the corpus is read from, found but not read.

  name: 'python_wheels' (source files of pinned wheels, fetched once into root), 'python_wheels:FOLDER' (of
  the wheels there), 'python_stdlib' (of this Python's standard library), 'text_files:' a folder or glob (also
  gs:// or s3://), 'parquet:', 'jsonl:' or 'arrow:' a file, folder or glob (also gs://, s3:// or hf://), 'hf:'
  a data set of the Hugging Face hub, or a TFDS dataset ('lm1b', 'name/config:version').
  """
  kind, separator, pattern = name.partition(':')
  if name == wheels.NAME:
    return wheels.default(wheel_folder(root))
  if kind == wheels.NAME and separator:
    return wheels.of_folder(pattern)
  if name == 'python_stdlib':
    return _of_files(name, text_files.scan_stdlib(Path(sysconfig.get_path('stdlib'))))
  if kind == 'text_files' and separator:
    if is_remote(pattern):
      return _of_files(kind, scan_copy(pattern, root / 'mhc_jax' / 'copies'))
    return _of_files(kind, text_files.scan_pattern(pattern))
  if kind in tables.KINDS and separator:
    return tables.KINDS[kind](pattern, column)
  return tfds_text.prepare(name, root, root / 'mhc_jax').source()


def _of_files(kind: str, files: text_files.TextFiles) -> Source:
  return source.of_pieces(kind, files.digest, files.documents)


def is_here(name: str, data_dir: str | None = None) -> bool:
  """Whether load_corpus(name, data_dir) would find the text on this machine; asks no network."""
  kind, separator, pattern = name.partition(':')
  if name == wheels.NAME:
    root = data_folder(data_dir)
    prepared = root.joinpath('mhc_jax').glob(f'{wheels.NAME}-*-{wheels.default(root).key[:16]}/corpus.json')
    return any(prepared) or wheels.all_there(wheel_folder(root))
  if name == 'python_stdlib':
    return True
  if separator and kind in ('text_files', wheels.NAME, *tables.KINDS):
    return kind != 'hf' and not is_remote(pattern)
  return any(data_folder(data_dir).joinpath(kind).glob('**/dataset_info.json'))


def wheel_folder(root: Path) -> Path:
  """Where the wheels of the default corpus lie."""
  return root / 'mhc_jax' / 'wheels'


def load_source(name: str, source: Source, root: Path, tokenizer: Tokenizer) -> Corpus:
  """The tokens of a source, kept below root."""
  folder = root / 'mhc_jax' / f'{source.slug}-{tokenizer.name}-{source.key[:16]}'

  def build(folder: Path) -> dict[str, int | str]:
    for tails in (False, True):
      facts = token_files.write(folder, source, tokenizer, tails)
      sizes = [facts[split] for split in splits.SPLITS]
      if source.splits_itself or splits.enough_documents(sizes[1], sum(sizes)):
        break
    if not all(sizes):
      raise ConfigError(f'data.name={name!r}: too little text for training and validation')
    return facts

  prepared = _prepared(folder, tokenizer, build)
  return Corpus(name, prepared.digest, prepared.train, prepared.validation, tokenizer, prepared.byte_lengths)


def _prepared(
  folder: Path, tokenizer: Tokenizer, build: Callable[[Path], dict[str, int | str]]
) -> token_files.Prepared:
  """Reads the streams in folder, after building them under a lock if they are not there as once written."""
  prepared = token_files.read(folder, tokenizer)
  if prepared is None:
    with locked(folder.with_name(f'{folder.name}.lock')):
      prepared = token_files.read(folder, tokenizer)  # another process may have been first
      if prepared is None:
        if os.path.lexists(folder / 'corpus.json'):
          say(f'warning: {folder} is damaged (not what was written there): prepared again')
        with writing(folder.parent):
          _prepare(folder, build)
        prepared = token_files.read(folder, tokenizer)
  require(prepared is not None, f'{folder} does not read back as written: choose another data_dir')
  return prepared


def _prepare(folder: Path, build: Callable[[Path], dict[str, int | str]]) -> None:
  """Builds a folder, whole or not at all, and removes what killed processes left beside it long ago.

  Goes on with what is in the folder where token_files.write saved its place.
  """
  for left in abandoned(folder.parent):
    with contextlib.suppress(OSError):
      recent = token_files.goes_on(left) and time.time() - left.stat().st_mtime < KEPT_SECONDS
      if left != folder and 'corpus.json' not in os.listdir(left) and not recent:
        shutil.rmtree(left)
  if os.path.lexists(folder / 'corpus.json') or not token_files.goes_on(folder):
    _remove(folder)
  folder.mkdir(exist_ok=True)
  try:
    token_files.finish(folder, build(folder))
  except BaseException as error:
    if not token_files.goes_on(folder) or full_disk(error):
      _remove(folder)
    raise


def _remove(folder: Path) -> None:
  shutil.rmtree(folder, ignore_errors=True)
  if folder.is_symlink() or folder.is_file():
    with contextlib.suppress(OSError):
      folder.unlink()


def data_folder(data_dir: str | None) -> Path:
  """Where corpora are kept: data_dir, or TFDS's default, read at the call and not when TFDS is imported."""
  chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  if is_remote(chosen):
    raise ConfigError(
      f'data_dir={chosen!r}: must be a local folder (tokens are memory-mapped); text in a'
      ' store is data.name=text_files:gs://BUCKET/FOLDER'
    )
  with writing(Path(chosen)):  # a relative one, when the current folder is gone
    return Path(expanded(chosen, f'data_dir={chosen!r}')).absolute()
