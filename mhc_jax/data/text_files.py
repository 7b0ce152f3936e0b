"""Text files on disk: which files make up a corpus, its digest, and what of it is validation.

Main path: **files** -> token streams -> windows. Every load reads and hashes all files (about 1 GB/s), so an
edited corpus is never mistaken for the prepared one.
"""

import contextlib
import dataclasses
import errno
import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from mhc_jax.data import splits
from mhc_jax.data.find_files import expanded, find
from mhc_jax.data.progress import progress
from mhc_jax.errors import ConfigError, require

# Longer files become several documents: one is held in memory.
MAX_DOCUMENT_BYTES = 16 << 20
_FORMAT = 'text files 1'  # in the digest; change it when files are split or cut in another way
_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class SourceFile:
  """A file of the corpus as it was when scanned; `relative` is its path as bytes, with '/'."""

  path: str
  relative: bytes
  size: int  # bytes
  modified_ns: int
  digest: str

  def read(self, start: int, stop: int) -> bytes:
    """The bytes [start, stop). Raises ConfigError if the file is gone or changed since it was scanned."""
    try:
      with open(self.path, 'rb') as file:
        file.seek(start)
        text = file.read(stop - start)
        status = os.fstat(file.fileno())
    except OSError as error:
      raise ConfigError(f'{self.path} cannot be read now ({error.strerror}): start again') from error
    if (status.st_size, status.st_mtime_ns) != (self.size, self.modified_ns):
      raise ConfigError(f'{self.path} changed while the corpus was prepared: start again')
    return text


class Readable(Protocol):
  """A file of a corpus: one on disk, or one inside a wheel (`wheels.py`)."""

  relative: bytes
  size: int
  digest: str

  def read(self, start: int, stop: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Piece:
  """One document: the bytes [start, stop) of a file."""

  file: Readable
  start: int
  stop: int

  def __len__(self) -> int:
    return self.stop - self.start

  def read(self) -> bytes:
    """The document; raises ConfigError where its file can no longer be read."""
    return self.file.read(self.start, self.stop)


@dataclasses.dataclass(frozen=True)
class TextFiles:
  """The documents of a corpus by split, and a digest (hex) of all paths and contents."""

  digest: str
  documents: dict[str, tuple[Piece, ...]]


def scan_stdlib(root: Path) -> TextFiles:
  """The Python source files under a standard library's folder, without installed packages.

  Raises ConfigError if there are none (some installations ship compiled files alone), or one cannot be read.
  """
  skipped = {'site-packages', 'dist-packages', '__pycache__'}
  with _whole('python_stdlib'):
    paths = find(str(root), ['**', '?*.py'], skipped.__contains__) if root.is_dir() else {}
  if not paths:
    raise ConfigError(
      f"data.name='python_stdlib': no Python source files under {root}; use"
      ' data.name=text_files:FOLDER with text of your own'
    )
  return _scan('python_stdlib', paths, root)


def scan_pattern(pattern: str) -> TextFiles:
  """The files of a folder (all but hidden ones, recursively), a file, or a glob ('**' recurses).

  Linked folders and files are followed, and their text counts once. A folder must hold nothing but
  text: a file with a zero byte is refused, and a glob is the way to choose among files. Files named
  by a glob are taken as they are. Raises ConfigError if there is nothing to read, or any part of it
  cannot be read: a corpus is whole or refused.
  """
  name = f'text_files:{pattern}'
  if not pattern:
    raise ConfigError(f'data.name={name!r}: name a folder, a file or a glob after the colon')
  path = expanded(pattern, f'data.name={name!r}')
  folder = os.path.isdir(path)
  with _whole(name, path):
    if folder:
      root, paths = path, find(path, ['**'], _hidden)
    elif os.path.lexists(path):
      root, paths = os.path.dirname(path), {path: os.path.basename(path)}
    else:
      parts = Path(path).parts
      fixed = tuple(_before_wildcard(parts))
      root = os.path.join('.', *fixed)
      paths = {} if _absent(root) else find(root, parts[len(fixed) :], _hidden)
  if not (paths or folder):
    raise ConfigError(f'data.name={name!r}: no such file or folder, and no file matches')
  return _scan(name, paths, root, binary=not folder)


def _absent(path: str) -> bool:
  """Whether there is no such path; OSError where that cannot be told."""
  try:
    os.stat(path)
  except (FileNotFoundError, NotADirectoryError):
    return True
  return False


def _hidden(name: str) -> bool:
  return name.startswith('.')


def _before_wildcard(parts: tuple[str, ...]) -> Iterator[str]:
  """Leading parts of a glob without wildcards: the folder that paths are relative to."""
  for part in parts[:-1]:
    if glob.has_magic(part):
      return
    yield part


@contextlib.contextmanager
def _whole(name: str, path: str = '') -> Iterator[None]:
  """Refuses a corpus of which a part cannot be read."""
  try:
    yield
  except OSError as error:
    path = os.fsdecode(error.filename or path)
    link = f' (a link to {os.readlink(path)})' if os.path.islink(path) else ''
    raise ConfigError(
      f'data.name={name!r}: cannot read {path}{link}: {error.strerror}; text is read whole or not at all:'
      ' mend this, remove it or choose by a glob'
    ) from error


def _scan(name: str, paths: Mapping[str, str], root: str | Path, binary: bool = True) -> TextFiles:
  """Reads every file once.

  paths: what to read -> its name in the corpus.
  """
  in_order = sorted((os.fsencode(relative), path) for path, relative in paths.items())
  files = []
  for relative, path in progress(in_order, f'reading {name}', len(in_order)):
    with _whole(name, path):
      files.append(_read_file(path, relative, binary))
  return as_documents(files, f'data.name={name!r}: too little text in {root} for training and validation')


def as_documents(files: Iterable[Readable], too_little: str) -> TextFiles:
  """What is read of the files: the first of equal ones, no empty ones; ConfigError(too_little)."""
  distinct: dict[str, Readable] = {}
  for file in files:
    if file.size:
      distinct.setdefault(file.digest, file)
  digest = hashlib.sha256(_FORMAT.encode())
  for file in distinct.values():
    digest.update(b'%d %s %s\n' % (len(file.relative), file.relative, file.digest.encode()))
  documents = _split(distinct.values())
  require(all(documents.values()), too_little)
  return TextFiles(digest.hexdigest(), documents)


def _read_file(path: str, relative: bytes, binary: bool) -> SourceFile:
  digest, size = hashlib.sha256(), 0
  status = os.stat(path)
  if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its other end
    raise OSError(errno.EINVAL, 'neither a file nor a folder', path)
  with open(path, 'rb', buffering=0) as file:
    while size <= status.st_size and (block := file.read(_BLOCK_BYTES)):
      if not binary and b'\0' in block:
        raise ConfigError(
          f'{path} is no text (it holds a zero byte): choose files by a glob, such as'
          ' text_files:FOLDER/**/*.txt'
        )
      digest.update(block)
      size += len(block)
    after = os.fstat(file.fileno())
  if not (size == status.st_size == after.st_size and status.st_mtime_ns == after.st_mtime_ns):
    raise ConfigError(f'{path} changed while it was read: start again when nothing writes to it')
  return SourceFile(path, relative, status.st_size, status.st_mtime_ns, digest.hexdigest())


def _split(files: Iterable[Readable]) -> dict[str, tuple[Piece, ...]]:
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
