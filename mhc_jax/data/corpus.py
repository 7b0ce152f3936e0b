"""A corpus by name -> train and validation token streams, prepared once and memory-mapped.

Main path: config -> **load_corpus** -> windows -> batches -> train_step. Everything prepared lies
in DATA_DIR/mhc_jax/<name>-<tokenizer>-<key>/, keyed by the content of the source: a changed
source gets a folder of its own, and old ones can be deleted at will. TFDS's own datasets are
prepared at TFDS's usual place in DATA_DIR.
"""

import contextlib
import dataclasses
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mhc_jax.data import splits, text_builders, text_files, tfds_text, token_files
from mhc_jax.data.find_files import expanded
from mhc_jax.data.lock import abandoned, locked, writing
from mhc_jax.data.progress import progress
from mhc_jax.data.remote import scan_copy
from mhc_jax.data.tokenizer import BYTES, Tokenizer
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.storage import is_remote


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
  """Tokenised text: BOS document BOS document ..., uint16, read-only.

  `digest` (hex) covers both streams and the tokenizer's name: equal digests, equal data.
  """

  name: str
  digest: str
  train: np.ndarray
  validation: np.ndarray
  tokenizer: Tokenizer


def load_corpus(name: str, data_dir: str | None = None, tokenizer: Tokenizer = BYTES) -> Corpus:
  """Loads a corpus and prepares it first where needed; processes that start together do it once.

  name: 'python_stdlib' (source files of this Python's standard library), 'text_files:FOLDER',
  'text_files:GLOB', both also gs:// or s3://, or a TFDS dataset ('lm1b', 'name/config:version').
  data_dir: a local folder; None is TFDS's default ($TFDS_DATA_DIR or ~/tensorflow_datasets). Raises
  ConfigError if the corpus is unknown, missing, empty or cannot be prepared, or data_dir cannot be
  written.
  """
  root = data_folder(data_dir)
  kind, separator, pattern = name.partition(':')
  if name == 'python_stdlib':
    stdlib = Path(sysconfig.get_path('stdlib'))
    return load_files(name, text_files.scan_stdlib(stdlib), root, tokenizer)
  if kind == 'text_files' and separator:
    if is_remote(pattern):
      return load_files(name, scan_copy(pattern, root / 'mhc_jax' / 'copies'), root, tokenizer)
    return load_files(name, text_files.scan_pattern(pattern), root, tokenizer)
  return _load_tfds(name, root, tokenizer)


def is_here(name: str, data_dir: str | None = None) -> bool:
  """Whether load_corpus(name, data_dir) would find the text on this machine; asks no network."""
  kind, separator, pattern = name.partition(':')
  if name == 'python_stdlib':
    return True
  if kind == 'text_files' and separator:
    return not is_remote(pattern)
  return any(data_folder(data_dir).joinpath(kind).glob('**/dataset_info.json'))


def load_files(name: str, files: text_files.TextFiles, root: Path, tokenizer: Tokenizer) -> Corpus:
  """Loads a corpus of text files; `name` is 'python_stdlib' or begins with 'text_files:'."""
  kind = name.partition(':')[0]

  def build(folder: Path) -> dict[str, int | str]:
    documents = text_builders.prepare(kind, files, folder / 'tfds')
    total = sum(map(len, files.documents.values()))
    return token_files.write(folder, progress(documents, f'tokenising {kind}', total), tokenizer)

  return _load(name, _folder(root, kind, tokenizer, files.digest), tokenizer, build)


def _load_tfds(name: str, root: Path, tokenizer: Tokenizer) -> Corpus:
  dataset = tfds_text.prepare(name, root, root / 'mhc_jax')

  def build(folder: Path) -> dict[str, int | str]:
    for tails in (False, True):
      documents = progress(dataset.documents(tails=tails), f'tokenising {name}', len(dataset))
      facts = token_files.write(folder, documents, tokenizer)
      sizes = [facts[split] for split in splits.SPLITS]
      if 'validation' in dataset.sources or splits.enough_documents(sizes[1], sum(sizes)):
        break
    if not all(sizes):
      raise ConfigError(f'data.name={name!r}: too little text for training and validation')
    return facts

  return _load(name, _folder(root, dataset.slug, tokenizer, dataset.key), tokenizer, build)


def _load(
  name: str, folder: Path, tokenizer: Tokenizer, build: Callable[[Path], dict[str, int | str]]
) -> Corpus:
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
  digest, tokens = prepared
  return Corpus(name, digest, tokens['train'], tokens['validation'], tokenizer)


def _prepare(folder: Path, build: Callable[[Path], dict[str, int | str]]) -> None:
  """Builds a folder anew, whole or not at all, and removes what killed processes left beside it."""
  for left in abandoned(folder.parent):
    with contextlib.suppress(OSError):
      if 'corpus.json' not in os.listdir(left):
        shutil.rmtree(left)
  _remove(folder)
  folder.mkdir()
  try:
    token_files.finish(folder, build(folder))
  except BaseException:
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


def _folder(root: Path, slug: str, tokenizer: Tokenizer, key: str) -> Path:
  return root / 'mhc_jax' / f'{slug}-{tokenizer.name}-{key[:16]}'
