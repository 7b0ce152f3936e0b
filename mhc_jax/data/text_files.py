"""Text files on disk: which files make up a corpus, its digest, and what of it is validation.

Main path: **files** -> TFDS array_record (`text_builders.py`) -> token streams -> windows. Every
load reads and hashes all files (about 1 GB/s), so an edited corpus is never mistaken for the
prepared one.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from mhc_jax.data import splits
from mhc_jax.errors import ConfigError

# Longer files become several documents: TFDS holds one in memory, its records end at 2 GiB.
MAX_DOCUMENT_BYTES = 16 << 20
_FORMAT = 'text files 1'  # in the digest; change it when files are split or cut in another way
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of the corpus as it was when scanned; `relative` is its path as bytes, with '/'."""

  path: Path
  relative: bytes
  size: int  # bytes
  modified_ns: int
  digest: str


@dataclasses.dataclass(frozen=True)
class Piece:
  """One document: the bytes [start, stop) of a file."""

  file: SourceFile
  start: int
  stop: int

  def read(self) -> bytes:
    """The document. Raises ConfigError if the file changed since it was scanned."""
    status = self.file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (self.file.size, self.file.modified_ns):
      raise ConfigError(f'{self.file.path} changed while the corpus was prepared: start again')
    with open(self.file.path, 'rb') as file:
      file.seek(self.start)
      return file.read(self.stop - self.start)


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """The documents of a corpus by split, and a digest (hex) of all paths and contents."""

  digest: str
  documents: dict[str, tuple[Piece, ...]]


def scan_stdlib(root: Path) -> TextFiles:
  """The Python source files under a standard library's folder, without installed packages.

  Raises ConfigError if there are none (some installations ship compiled files alone).
  """
  skipped = {'site-packages', 'dist-packages', '__pycache__'}
  paths = [path for path in _walk(root, skipped.__contains__) if path.suffix == '.py']
  if not paths:
    raise ConfigError(
      f"data.name='python_stdlib': no Python source files under {root}; use"
      ' data.name=text_files:FOLDER with text of your own'
    )
  return _scan('python_stdlib', paths, root)


def scan_pattern(pattern: str) -> TextFiles:
  """The files of a folder (all but hidden ones, recursively), a file, or a glob ('**' recurses).

  A folder must hold nothing but text: a file with a zero byte is refused, and a glob is the way
  to choose among files. Files named by a glob are taken as they are. Raises ConfigError if there
  is nothing to read.
  """
  name = f'text_files:{pattern}'
  if not pattern:
    raise ConfigError(f'data.name={name!r}: name a folder, a file or a glob after the colon')
  path = Path(pattern).expanduser()
  if path.is_dir():
    return _scan(name, list(_walk(path, lambda part: part.startswith('.'))), path, binary=False)
  if path.is_file():
    return _scan(name, [path], path.parent)
  matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
  if not matches:
    raise ConfigError(f'data.name={name!r}: no such file or folder, and no file matches')
  fixed = Path(*_before_wildcard(path.parts))
  return _scan(name, [match for match in matches if match.is_file()], fixed)


def _before_wildcard(parts: tuple[str, ...]) -> Iterator[str]:
  """Leading parts of a glob without wildcards: the folder that paths are relative to."""
  for part in parts[:-1]:
    if glob.has_magic(part):
      return
    yield part


def _walk(root: Path, skip) -> Iterator[Path]:
  """Regular files below root; skip(name) leaves out a file or a whole folder."""
  for folder, folders, files in os.walk(root):
    folders[:] = [name for name in folders if not skip(name)]
    paths = (Path(folder, name) for name in files if not skip(name))
    yield from (path for path in paths if path.is_file())


def _scan(name: str, paths: list[Path], root: Path, binary: bool = True) -> TextFiles:
  """Reads every file once: exact duplicates and empty files go, the rest is split and hashed."""
  files: dict[str, SourceFile] = {}  # by content: of equal files the first path stays
  keys = {path: os.fsencode(path.relative_to(root).as_posix()) for path in paths}
  for path in tqdm(sorted(paths, key=keys.get), f'reading {name}', disable=None, delay=1):
    try:
      file = _read_file(path, keys[path], binary)
    except OSError as error:
      raise ConfigError(f'data.name={name!r}: cannot read {path}: {error.strerror}') from error
    if file.size:
      files.setdefault(file.digest, file)
  digest = hashlib.sha256(_FORMAT.encode())
  for file in files.values():
    digest.update(b'%d %s %s\n' % (len(file.relative), file.relative, file.digest.encode()))
  documents = _split(files.values())
  if not all(documents.values()):
    raise ConfigError(f'data.name={name!r}: too little text in {root} for training and validation')
  return TextFiles(digest.hexdigest(), documents)


def _read_file(path: Path, relative: bytes, binary: bool) -> SourceFile:
  digest = hashlib.sha256()
  status = path.stat()
  with open(path, 'rb') as file:
    while block := file.read(_BLOCK_BYTES):
      if not binary and b'\0' in block:
        raise ConfigError(
          f'{path} is no text (it holds a zero byte): choose files by a glob, such as'
          ' text_files:FOLDER/**/*.txt'
        )
      digest.update(block)
  return SourceFile(path, relative, status.st_size, status.st_mtime_ns, digest.hexdigest())


def _split(files: Iterable[SourceFile]) -> dict[str, tuple[Piece, ...]]:
  """Holds out files by the hash of their paths or, with too few files, the end of each file."""
  held_out = sum(file.size for file in files if splits.in_validation(file.relative))
  whole_files = splits.enough_documents(held_out, sum(file.size for file in files))
  documents: dict[str, list[Piece]] = {split: [] for split in splits.SPLITS}
  for file in files:
    if whole_files:
      cut = 0 if splits.in_validation(file.relative) else file.size
    else:
      cut = splits.tail_start(file.size)
    for split, start, stop in (('train', 0, cut), ('validation', cut, file.size)):
      for at in range(start, stop, MAX_DOCUMENT_BYTES):
        documents[split].append(Piece(file, at, min(at + MAX_DOCUMENT_BYTES, stop)))
  return {split: tuple(pieces) for split, pieces in documents.items()}
