"""Documents in the text column of parquet, JSON lines or Arrow files, here or in a store.

Main path: **tables** -> documents -> token streams. Files are read in the order of their names, a piece at a
time: a file or row group larger than memory is no trouble, a document must fit. A document's content decides
whether it is held out.
"""

import contextlib
import functools
import hashlib
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from mhc_jax import storage
from mhc_jax.data import splits
from mhc_jax.data.find_files import expanded
from mhc_jax.data.remote import VERSION, filesystem
from mhc_jax.data.source import BATCH_BYTES, BATCH_DOCUMENTS, Documents, Source
from mhc_jax.errors import ConfigError, require
from mhc_jax.storage import is_remote

ENDINGS = {
  'parquet': ('.parquet',),
  'jsonl': ('.jsonl', '.json', '.jsonl.gz', '.json.gz', '.jsonl.zst', '.json.zst', '.jsonl.bz2', '.jsonl.xz'),
  'arrow': ('.arrow', '.feather', '.ipc'),
}
_FORMAT = 'tables 1'  # in the key; change it when documents are read or split in another way
_COMPRESSED = {'.gz': 'gzip', '.zst': 'zstd', '.bz2': 'bz2', '.xz': 'xz'}


class _File(NamedTuple):
  """A file of the corpus."""

  path: str  # as its file system has it
  size: int  # bytes


class _Read(NamedTuple):
  """A part of a file's column."""

  column: pa.Array
  place: Any  # in the file, where reading goes on after it
  done: int  # bytes of the file, with it


def of_glob(kind: str, pattern: str, column: str | None) -> Source:
  """The documents of all files that pattern names: a file, a folder (those with ENDINGS) or a glob.

  Raises ConfigError where there is none or, when it is read, no such column or a damaged file.
  """
  name = f'data.name={f"{kind}:{pattern}"!r}'
  require(bool(pattern), f'{name}: name a file, a folder or a glob after the colon')
  path = pattern if is_remote(pattern) else expanded(pattern, name)
  store, root = filesystem(path) if is_remote(path) else (fsspec.filesystem('file'), path)
  with _errors_of(path, name):
    listed = _listed(store, root, ENDINGS[kind])
  require(bool(listed), f'{name}: no such file or folder, and no file matches')
  return of_files(kind, pattern, store, listed, column)


def of_files(
  kind: str,
  pattern: str,
  store: fsspec.AbstractFileSystem,
  listed: dict[str, dict],
  column: str | None,
  validation: dict[str, dict] | None = None,
) -> Source:
  """The documents of these files (path -> what the store says of it); of `validation`'s if it has a split."""
  column = column or 'text'
  groups = [(False, sorted(listed)), (True, sorted(validation or ()))]
  facts = listed | (validation or {})
  files = [(held, _File(path, facts[path].get('size') or 0)) for held, paths in groups for path in paths]
  root = posixpath.commonpath([posixpath.dirname(path) for path in facts])
  versions = [
    [held, posixpath.relpath(path, root), *(str(facts[path].get(field)) for field in VERSION)]
    for held, (path, _) in files
  ]
  key = hashlib.sha256(json.dumps([_FORMAT, kind, column, versions]).encode()).hexdigest()
  parts = {'parquet': _parquet, 'jsonl': _jsonl, 'arrow': _arrow}[kind]
  where = pattern if is_remote(pattern) else 'here'

  def read(at: Any, tails: bool) -> Iterator[Documents]:
    first, place = at or (0, None)
    done = sum(file.size for _, file in files[:first])
    for index in range(first, len(files)):
      held, file = files[index]
      with _errors_of(where, file.path):
        for part in parts(store, file, column, place if index == first else None):
          text, ends = _buffers(part.column, column, file.path)
          kept = (ends, np.full(len(ends), held)) if validation else splits.held_out(text, ends, tails)
          yield Documents(text, *kept, (index, part.place), done + min(part.done, file.size))
      done += file.size

  return Source(kind, key, sum(file.size for _, file in files), 'B', read, splits_itself=bool(validation))


def of_hugging_face(dataset: str, column: str | None) -> Source:
  """A data set of the Hugging Face hub: 'owner/name', and below it a folder or glob; extra `text`.

  Of its parquet files, else its JSON lines. Where names of files tell splits apart, 'train' is read, and
  'validation' or 'test' is what is held out.
  """
  name = f'data.name={f"hf:{dataset}"!r}'
  url = f'hf://datasets/{dataset}'
  store, root = filesystem(url)
  with _errors_of(url, name):
    for kind in ('parquet', 'jsonl'):
      if listed := _listed(store, root, ENDINGS[kind]):
        of_split = {split: _of_split(listed, split) for split in ('train', 'validation', 'test')}
        held = of_split['validation'] or of_split['test']
        train = of_split['train'] or {path: fact for path, fact in listed.items() if path not in held}
        require(bool(train), f'{name}: no file of a split train')
        return of_files(kind, url, store, train, column, held if of_split['train'] else None)
  raise ConfigError(f'{name}: no parquet files or JSON lines there; name a folder or glob below it')


def _of_split(listed: dict[str, dict], split: str) -> dict[str, dict]:
  words = split, f'{split}s'
  return {
    path: fact
    for path, fact in listed.items()
    if any(word in words for word in path.replace('-', '/').replace('_', '/').replace('.', '/').split('/'))
  }


def _listed(store: fsspec.AbstractFileSystem, root: str, endings: tuple[str, ...]) -> dict[str, dict]:
  if fsspec.core.has_magic(root):
    found = store.glob(root, detail=True)
  else:
    found = store.find(root, detail=True)
    if list(found) != [store._strip_protocol(root)]:  # a folder
      found = {path: fact for path, fact in found.items() if path.endswith(endings)}
  return {path: fact for path, fact in found.items() if fact['type'] == 'file'}


@contextlib.contextmanager
def _errors_of(url: str, what: str) -> Iterator[None]:
  """What a damaged file raises as ConfigError, what a store raises as StorageError."""
  try:
    with storage.errors_of(url):
      try:
        yield
      except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, EOFError) as error:
        raise ConfigError(f'{what} cannot be read: {" ".join(str(error).split())[:200]}') from error
  except OSError as error:
    if isinstance(error, storage.StorageError):
      raise
    reason = error.strerror or ' '.join(str(error).split())[:200]
    raise ConfigError(f'{what} cannot be read: {reason}') from error


def _buffers(column: pa.Array, name: str, path: str) -> tuple[np.ndarray, np.ndarray]:
  """(text uint8, ends) of a column of strings; a null is an empty document."""
  kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
  strings = 'is_string', 'is_large_string', 'is_binary', 'is_large_binary', 'is_string_view', 'is_binary_view'
  good = any(getattr(pa.types, check)(kind) for check in (*strings, 'is_null'))
  require(good, f'{path}: column {name!r} holds {kind}, not text; name another by data.column')
  column = column.cast(pa.string() if pa.types.is_null(kind) else kind).cast(pa.large_binary())
  column = column.fill_null(b'') if column.null_count else column
  _, offsets, data = column.buffers()
  offsets = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset)
  if data is None or offsets[-1] == offsets[0]:
    return np.zeros(0, np.uint8), offsets[1:] - offsets[0]
  return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]


def _missing(name: str, path: str, there: list[str]) -> ConfigError:
  return ConfigError(f'{path}: no column {name!r}; set data.column to one of {", ".join(there) or "none"}')


def _open(store: fsspec.AbstractFileSystem, path: str) -> BinaryIO:
  return store.open(path, 'rb', **({} if 'file' in store.protocol else {'block_size': 8 << 20}))


def _parquet(store: fsspec.AbstractFileSystem, file: _File, column: str, place: Any) -> Iterator[_Read]:
  """Row groups one after another, each in parts of BATCH_BYTES; place: row group, row in it."""
  with _open(store, file.path) as opened:
    table = pa.parquet.ParquetFile(opened, buffer_size=1 << 20, pre_buffer=False)
    there = table.schema_arrow.names
    if column not in there:
      raise _missing(column, file.path, there)
    leaf = next(i for i in range(len(table.schema)) if table.schema.column(i).path.split('.')[0] == column)
    first, skipped = place or (0, 0)
    groups = table.num_row_groups
    for group in range(first, groups):
      facts = table.metadata.row_group(group)
      per_row = max(facts.column(leaf).total_uncompressed_size / max(facts.num_rows, 1), 1.0)
      size = int(min(max(BATCH_BYTES / per_row, 1), BATCH_DOCUMENTS))
      read, skip = 0, skipped if group == first else 0
      for batch in table.iter_batches(size, row_groups=[group], columns=[column], use_threads=False):
        fresh = batch.column(0)[max(skip - read, 0) :]
        read += len(batch)
        if len(fresh):
          done = (group + read / facts.num_rows) / groups
          yield _Read(fresh, (group, read), round(file.size * done))


def _arrow(store: fsspec.AbstractFileSystem, file: _File, column: str, place: Any) -> Iterator[_Read]:
  """Record batches of a file or stream, in parts; place: record batch, row in it."""
  with _open(store, file.path) as opened:
    start = opened.read(6)
    opened.seek(0)
    reader = pa.ipc.open_file(opened) if start == b'ARROW1' else pa.ipc.open_stream(opened)
    if column not in reader.schema.names:
      raise _missing(column, file.path, reader.schema.names)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if start == b'ARROW1' else reader
    first, skip = place or (0, 0)
    for index, batch in enumerate(batches):
      whole = batch.column(column)
      rows = int(min(max(BATCH_BYTES * len(whole) / max(whole.nbytes, 1), 1), BATCH_DOCUMENTS))
      for row in range(0 if index > first else skip, len(whole) if index >= first else 0, rows):
        part = whole.slice(row, rows)
        yield _Read(part, (index, row + len(part)), opened.tell())


def _jsonl(store: fsspec.AbstractFileSystem, file: _File, column: str, place: Any) -> Iterator[_Read]:
  """Blocks of whole lines; place: the byte of the text, decompressed, where the next line begins."""
  compression = next((how for ending, how in _COMPRESSED.items() if file.path.endswith(ending)), None)
  start = place or 0
  with _open(store, file.path) as raw, _decompressed(raw, compression) as opened:
    if compression is None:
      opened.seek(start)
    else:
      _skip(opened, start)
    rest, first = b'', place is None
    while block := opened.read(BATCH_BYTES):
      head, newline, tail = block.rpartition(b'\n')
      if not newline:  # a line as long as that
        rest += block
        continue
      lines, rest = rest + head + b'\n', tail
      start += len(lines)
      yield _Read(_column_of(lines, column, file.path, first), start, raw.tell())
      first = False
    if rest.strip():
      yield _Read(_column_of(rest, column, file.path, first), start + len(rest), file.size)


@contextlib.contextmanager
def _decompressed(raw: BinaryIO, compression: str | None) -> Iterator[Any]:
  if compression is None:
    yield raw
  elif compression == 'zstd':
    with pa.CompressedInputStream(pa.PythonFile(raw, 'r'), compression) as opened:
      yield opened
  else:
    with fsspec.compression.compr[compression](raw, mode='rb') as opened:
      yield opened


def _skip(opened: Any, size: int) -> None:
  while size > 0 and (block := opened.read(min(size, BATCH_BYTES))):
    size -= len(block)


def _column_of(lines: bytes, column: str, path: str, first: bool) -> pa.Array:
  """The column of whole lines. Those that Arrow refuses are read one by one, so that one can be named."""
  parse = pa.json.ParseOptions(
    explicit_schema=pa.schema([(column, pa.string())]), unexpected_field_behavior='ignore'
  )
  options = pa.json.ReadOptions(use_threads=False, block_size=max(len(lines) + 1, 1 << 20))
  try:
    found = pa.json.read_json(io.BytesIO(lines), options, parse).column(0).combine_chunks()
  except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
    found = pa.array(
      [_text_of(line, column, path) for line in lines.splitlines() if line.strip()], pa.binary()
    )
  if first and 0 < len(found) == found.null_count:
    there = json.loads(next(line for line in lines.splitlines() if line.strip()))
    if column not in there:
      raise _missing(column, path, list(there))
  return found


def _text_of(line: bytes, column: str, path: str) -> bytes | None:
  try:
    row = json.loads(line.decode('utf-8', errors='surrogateescape'))
    require(isinstance(row, dict), f'{path}: a line is no JSON object: {line[:60]!r}')
  except (json.JSONDecodeError, RecursionError) as error:
    raise ConfigError(f'{path}: a line is no JSON ({error}): {line[:60]!r}') from None
  text = row.get(column)
  require(text is None or isinstance(text, str), f'{path}: {column!r} is no text in a line: {line[:60]!r}')
  try:
    return None if text is None else text.encode('utf-8', errors='surrogateescape')
  except UnicodeEncodeError:  # half of a pair, \ud800
    return text.encode('utf-8', errors='surrogatepass')


KINDS: dict[str, Callable[[str, str | None], Source]] = {
  **{kind: functools.partial(of_glob, kind) for kind in ENDINGS},
  'hf': of_hugging_face,
}
