"""TFDS builders over text files: the standard library's sources, or somebody's own text.

Main path: files (`text_files.py`) -> **TFDS array_record** -> token streams (`corpus.py`). The
builders need the scanned files, so TFDS's global list of datasets does not get them; what they
prepared is opened by name all the same: `tfds.load(name, data_dir=FOLDER)`.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

from mhc_jax.data.progress import progress
from mhc_jax.data.text_files import Piece, TextFiles

# TFDS collects a split in memory and, above 1000 MiB, in files that it opens with TensorFlow.
# Larger corpora therefore become several TFDS splits: train, train_1, ...
_PART_BYTES = 256 << 20


class TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Documents as {'path': bytes, 'text': bytes}, in the order given."""

  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, parts: Mapping[str, Sequence[Piece]], **kwargs):
    self._parts = parts
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    features = {'path': tfds.features.Text(), 'text': tfds.features.Text()}
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    return {part: self._generate_examples(pieces) for part, pieces in self._parts.items()}

  def _generate_examples(self, pieces: Sequence[Piece]):
    for index, piece in enumerate(progress(pieces, f'preparing {self.name}', len(pieces))):
      yield index, {'path': piece.file.relative, 'text': piece.read()}


class PythonStdlib(TextBuilder, skip_registration=True):
  """Source files of a Python standard library."""


class OwnText(TextBuilder, skip_registration=True):
  """Text files of the user's."""

  name = 'text_files'


_BUILDERS = {'python_stdlib': PythonStdlib, 'text_files': OwnText}


def prepare(kind: str, files: TextFiles, folder: Path) -> Iterator[tuple[str, bytes]]:
  """Writes the documents as a TFDS dataset below folder and yields them as (split, document).

  Errors: OSError when the disk is full; ConfigError when a file changes meanwhile.
  """
  parts = {}  # TFDS split -> pieces
  splits = {}  # TFDS split -> split
  for split, pieces in files.documents.items():
    for index, part in enumerate(_parts(pieces)):
      part_name = f'{split}_{index}' if index else split
      parts[part_name], splits[part_name] = part, split
  builder = _BUILDERS[kind](parts=parts, data_dir=str(folder))
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes
    builder.download_and_prepare(file_format='array_record')
  for part_name, split in splits.items():
    for example in builder.as_data_source(part_name):
      yield split, example['text']


def _parts(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
  part, size = [], 0
  for piece in pieces:
    part.append(piece)
    size += piece.stop - piece.start
    if size >= _PART_BYTES:
      yield part
      part, size = [], 0
  if part:
    yield part
