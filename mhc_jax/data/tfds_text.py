"""Documents of any TFDS dataset that has a text feature.

Main path: **TFDS dataset** -> token streams (`corpus.py`). Datasets are prepared as array_record
and read by `as_data_source`, which needs no TensorFlow; some builders import it to download and
parse their sources, and then the user's own installation is needed.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from absl import logging

from mhc_jax.data import splits
from mhc_jax.data.lock import full_disk, locked
from mhc_jax.data.source import Documents, Source, batched
from mhc_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class TextDataset:
  """A prepared dataset: its full name as a file name, and its examples by split.

  'validation' is absent if the dataset has no such split.
  `key` (hex) changes with the dataset's version, splits, sizes and files on disk.
  """

  slug: str
  folder: str  # where TFDS keeps it
  sources: dict[str, Sequence]
  feature: str
  key: str

  def __len__(self) -> int:
    return sum(map(len, self.sources.values()))

  def source(self) -> Source:
    """Its documents in the data set's order.

    Without a validation split, documents are held out by the hash of their content (so equal
    documents stay together); or, with `tails`, the last 5 % of every document. Raises ConfigError for a
    damaged file.
    """
    given = 'validation' in self.sources

    def read(at: Any, tails: bool) -> Iterator[Documents]:
      for batch in batched(self._texts(at or 0), at or 0):
        if given:
          yield batch
        else:
          ends, held = splits.held_out(batch.text, batch.ends, tails)
          yield batch._replace(ends=ends, held_out=held)

    return Source(self.slug, self.key, len(self), ' documents', read, splits_itself=given)

  def _texts(self, start: int) -> Iterator[tuple[bytes, bool]]:
    """(document, whether it is of the validation split) from the start-th on."""
    for split, source in self.sources.items():
      for index in range(min(start, len(source)), len(source)):
        with _readable(self.folder):
          text = source[index][self.feature]
          text = text.encode() if isinstance(text, str) else bytes(text)
        yield text, split == 'validation'
      start -= min(start, len(source))


def prepare(name: str, data_dir: Path, lock_folder: Path) -> TextDataset:
  """Opens a TFDS dataset ('name', 'name/config', 'name/config:1.0.0'), prepared where needed.

  Validation is the split 'validation', else 'test', else part of 'train'. Raises ConfigError if
  TFDS does not know or cannot prepare the dataset, or it has no train split or no text.
  """
  tfds.display_progress_bar(sys.stderr.isatty())
  with _one_line_errors(name):
    builder = tfds.builder(name, data_dir=str(data_dir))
    feature = _text_feature(name, builder.info.features)
    if not builder.data_path.exists():
      _warn_about_tensorflow(name, builder)
      with locked(lock_folder / f'{slug(builder.info.full_name)}.lock'):
        builder = tfds.builder(name, data_dir=str(data_dir))  # now perhaps prepared by another
        builder.download_and_prepare(file_format='array_record')
    known = list(builder.info.splits) or ['train']  # datasets mocked from code know no splits
    if 'train' not in known:
      raise ConfigError(f"data.name={name!r}: no split 'train', only {', '.join(known)}")
    chosen = {'train': 'train'}
    if held_out := [split for split in ('validation', 'test') if split in known]:
      chosen['validation'] = held_out[0]
    folder = os.fspath(builder.data_path)
    with _readable(folder):
      sources = {split: builder.as_data_source(s) for split, s in chosen.items()}
      for source in sources.values():
        if len(source):
          source[0]  # so that a decoder which cannot be imported shows here
    full_name = builder.info.full_name
    facts = [full_name, feature]
    facts += [(s, len(sources[split]), _files(builder, s)) for split, s in chosen.items()]
  key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
  return TextDataset(slug(full_name), folder, sources, feature, key)


def _warn_about_tensorflow(name: str, builder: tfds.core.DatasetBuilder) -> None:
  """Says before a long download that it will probably end in an error."""
  imports_it = hasattr(sys.modules[type(builder).__module__], 'tf')
  if imports_it and importlib.util.find_spec('tensorflow') is None:
    logging.warning('%s: its TFDS builder imports TensorFlow, which is not installed', name)


def slug(full_name: str) -> str:
  """A dataset's full name as the name of a file."""
  return re.sub(r'[^\w.-]+', '_', full_name)


def _files(builder: tfds.core.DatasetBuilder, split: str) -> list[tuple[str, int, int]]:
  """(name, bytes, modification time) of the split's files that exist."""
  info = builder.info.splits.get(split)
  paths = [os.fspath(path) for path in info.filepaths] if info else []
  return [
    (os.path.basename(path), os.stat(path).st_size, os.stat(path).st_mtime_ns)
    for path in paths
    if os.path.exists(path)
  ]


def _text_feature(name: str, features) -> str:
  """'text', or the only Text feature, or else the only string."""
  if not isinstance(features, tfds.features.FeaturesDict):
    raise ConfigError(f'data.name={name!r}: the dataset has no named features, so no text')
  strings = [key for key, f in features.items() if f.shape == () and f.np_dtype in (str, bytes, object)]
  texts = [key for key in strings if isinstance(features[key], tfds.features.Text)]
  media = tfds.features.Image, tfds.features.Video, tfds.features.Audio
  if 'text' in strings:
    return 'text'
  if not any(isinstance(f, media) for f in features.values()):  # whose only text is a file name
    for candidates in (texts, strings):
      if len(candidates) == 1:
        return candidates[0]
  raise ConfigError(
    f"data.name={name!r}: needs a feature 'text' or a single text feature; the dataset has"
    f' {", ".join(f"{key} ({type(f).__name__})" for key, f in features.items())}'
  )


@contextlib.contextmanager
def _readable(folder: str) -> Iterator[None]:
  """Turns what reading a damaged data set raises into ConfigError; what else may be wrong passes through."""
  try:
    yield
  except Exception as error:
    if isinstance(error, NotImplementedError) or _missing_package(error):
      raise
    reason = f'{type(error).__name__}: {error}'
    raise ConfigError(f'{folder} is damaged ({reason}): delete it, and it is prepared again') from error


@contextlib.contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
  """Turns TFDS's failures into ConfigError; a full disk passes through."""
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints banners about TensorFlow
      yield
  except ConfigError:
    raise
  except tfds.core.DatasetNotFoundError as error:
    names = {
      'python_wheels',
      'python_stdlib',
      'text_files:FOLDER',
      'parquet:GLOB',
      'jsonl:GLOB',
      'arrow:GLOB',
    }
    names.update(tfds.list_builders(with_community_datasets=False))
    near = difflib.get_close_matches(name.split('/')[0], sorted(names))
    hint = f'; did you mean {" or ".join(near)}?' if near else ''
    raise ConfigError(f'data.name={name!r}: TFDS has no such dataset{hint}') from error
  except NotImplementedError as error:  # as_data_source, of files in another format
    raise ConfigError(
      f'data.name={name!r}: prepared in data_dir in a format without random access (tfrecord):'
      ' choose another data_dir, or delete the dataset there'
    ) from error
  except Exception as error:
    if full := full_disk(error):
      raise full from error
    if package := _missing_package(error):
      what = 'your own TensorFlow' if package == 'tensorflow' else f'the package {package}'
      raise ConfigError(
        f"data.name={name!r}: this dataset's TFDS builder needs {what}, which is not installed:"
        f' pip install {package}'
      ) from error
    reason = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise ConfigError(f'data.name={name!r}: TFDS cannot prepare it: {reason}') from error


def _missing_package(error: BaseException | None) -> str | None:
  """The package whose import failed, if that is what lies behind an error."""
  while error is not None:
    if isinstance(error, ImportError) and error.name:
      return error.name.split('.')[0]
    error = error.__cause__ or error.__context__
  return None
