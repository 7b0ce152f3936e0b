"""Token streams on disk: a folder with train.tokens, validation.tokens and corpus.json.

Main path: documents -> **BOS document BOS document ...** (uint16 or uint32, little endian) -> windows. Where
tokens are not bytes, validation.bytes says how many bytes of its document each validation token stands for.
corpus.json is written last and in one step, so a folder without it is never taken for complete; it holds the
digest of the streams, so one with other bytes in them is not either. unfinished.json says from where a killed
preparation goes on.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import numpy as np

from mhc_jax.data.progress import reading
from mhc_jax.data.source import Documents, Source, each
from mhc_jax.data.splits import SPLITS
from mhc_jax.data.tokenizer import Tokenizer

BYTES_FILE = 'validation.bytes'
SHORT = 256  # tokens of a document, on average
_LENGTH = np.dtype('<u4')  # of validation.bytes
_SAVE_SECONDS = 15.0  # between places from which a killed preparation goes on
_UNFINISHED = 'unfinished.json'
_digests: dict[tuple[int, ...], str] = {}  # version of a file -> SHA-256: a process reads each once
_T = TypeVar('_T')


class Prepared(NamedTuple):
  """What a folder holds."""

  digest: str  # hex
  train: np.ndarray
  validation: np.ndarray
  byte_lengths: np.ndarray | None  # of validation's tokens; None: one byte each


def write(folder: Path, source: Source, tokenizer: Tokenizer, tails: bool = False) -> dict[str, int | str]:
  """Writes the streams and returns what goes into corpus.json: tokenizer, tokens of each, digest (hex).

  Goes on where a killed one of the same source, tokenizer and tails has saved its place, to the same bytes.
  Empty documents are left out. The digest covers both streams and the tokenizer's name. At most three batches
  of documents are in memory: one read ahead, one in work, one being written.
  """
  with contextlib.ExitStack() as stack:
    at, files = _start(folder, _names(tokenizer), tails, stack)
    writer = stack.enter_context(ThreadPoolExecutor(1))
    written, saved = None, time.monotonic()
    batches = _ahead(source.read(at, tails))
    for batch in reading(batches, f'tokenising {source.slug}', source.size, source.unit):
      streams = _streams(batch, tokenizer)
      if written:
        written.result()
      save = time.monotonic() - saved > _SAVE_SECONDS
      saved = time.monotonic() if save else saved
      written = writer.submit(
        _append, folder, files, streams, {'at': batch.at, 'tails': tails} if save else None
      )
    if written:
      written.result()
    for file, digest in files.values():
      _sync(file)
      _digests[_version(file)] = digest.hexdigest()  # of what was written: it need not be read for that
    lengths = {split: files[f'{split}.tokens'][0].tell() // tokenizer.dtype.itemsize for split in SPLITS}
  return _facts(tokenizer, lengths, {name: digest.hexdigest() for name, (_, digest) in files.items()})


def _names(tokenizer: Tokenizer) -> list[str]:
  return [f'{split}.tokens' for split in SPLITS] + [BYTES_FILE] * (tokenizer.byte_lengths is not None)


def _start(
  folder: Path, names: list[str], tails: bool, stack: contextlib.ExitStack
) -> tuple[Any, dict[str, tuple[BinaryIO, Any]]]:
  """(where reading begins, open files with the hashes of what is in them), from what a killed write left."""
  with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
    state = json.loads((folder / _UNFINISHED).read_bytes())
    files = {name: (stack.enter_context(open(folder / name, 'r+b')), hashlib.sha256()) for name in names}
    whole = state['tails'] == tails
    for name, (file, digest) in files.items():
      size, expected = state['files'][name]
      _hash(file, size, digest)
      whole = whole and digest.hexdigest() == expected
      file.truncate(size)
      file.seek(size)
    if whole:
      return state['at'], files
  (folder / _UNFINISHED).unlink(missing_ok=True)
  return None, {name: (stack.enter_context(open(folder / name, 'wb')), hashlib.sha256()) for name in names}


def _hash(file: BinaryIO, size: int, digest: Any) -> None:
  while size > 0 and (block := file.read(min(size, 1 << 22))):
    digest.update(block)
    size -= len(block)


def _append(folder: Path, files: dict, streams: dict[str, np.ndarray], state: dict | None) -> None:
  """Adds to the files; with a state, saves that a killed write may go on from here."""
  for name, stream in streams.items():
    file, digest = files[name]
    file.write(stream.data)
    digest.update(stream.data)
  if state is not None:
    for file, _ in files.values():
      _sync(file)
    state['files'] = {name: [file.tell(), digest.hexdigest()] for name, (file, digest) in files.items()}
    _write_json(folder / _UNFINISHED, state)


def _streams(batch: Documents, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
  """What a batch adds to each file."""
  ids, ends = tokenizer.encode_many(batch.text, batch.ends)
  tokens, ends = with_bos(ids, ends, tokenizer.bos, tokenizer.dtype)
  held = batch.held_out
  edges = np.concatenate([[0], np.flatnonzero(held[1:] != held[:-1]) + 1, [len(held)]])  # of equal neighbours
  starts = np.concatenate([[0], ends])
  parts: dict[bool, list[np.ndarray]] = {False: [], True: []}
  for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
    if first < last:
      parts[bool(held[first])].append(tokens[starts[first] : starts[last]])
  nothing = np.zeros(0, tokenizer.dtype)
  streams = {f'{split}.tokens': np.concatenate([nothing, *parts[split == 'validation']]) for split in SPLITS}
  if tokenizer.byte_lengths is not None:
    streams[BYTES_FILE] = _lengths(batch, tokenizer)
  return streams


def with_bos(ids: np.ndarray, ends: np.ndarray, bos: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
  """(stream, ends in it): bos before each document that is not empty."""
  starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
  full = ends > starts
  count = np.count_nonzero(full)
  places = starts[full] + np.arange(count)
  stream = np.empty(len(ids) + count, dtype)
  stream[places] = bos
  if len(ids) > SHORT * count:  # copies of slices are five times as fast as a mask, a document costs 0.4 us
    for place, start, end in zip(places.tolist(), starts[full].tolist(), ends[full].tolist(), strict=True):
      stream[place + 1 : place + 1 + end - start] = ids[start:end]
  else:
    is_id = np.ones(len(stream), bool)
    is_id[places] = False
    stream[is_id] = ids
  return stream, ends + np.cumsum(full)


def _lengths(batch: Documents, tokenizer: Tokenizer) -> np.ndarray:
  """Of the batch's validation stream: bytes that each token stands for, 0 for bos."""
  lengths = [np.zeros(0, _LENGTH)]
  for text, held in zip(each(batch.text, batch.ends), batch.held_out.tolist(), strict=True):
    if held and len(of_tokens := tokenizer.byte_lengths(text)):
      lengths += [np.zeros(1, _LENGTH), of_tokens.astype(_LENGTH)]
  return np.concatenate(lengths)


def _ahead(items: Iterable[_T]) -> Iterator[_T]:
  """The items, each made while the one before it is used."""
  items = iter(items)
  with ThreadPoolExecutor(1) as pool:
    made = pool.submit(next, items, None)
    while (item := made.result()) is not None:
      made = pool.submit(next, items, None)
      yield item


def _facts(tokenizer: Tokenizer, lengths: dict[str, int], digests: dict[str, str]) -> dict[str, int | str]:
  parts = [tokenizer.name, *(digests[name] for name in _names(tokenizer))]
  return {
    'tokenizer': tokenizer.name,
    **lengths,
    'digest': hashlib.sha256(' '.join(parts).encode()).hexdigest(),
  }


def finish(folder: Path, facts: dict[str, int | str]) -> None:
  """Declares the folder complete: writes corpus.json atomically."""
  _write_json(folder / 'corpus.json', facts)
  (folder / _UNFINISHED).unlink(missing_ok=True)


def goes_on(folder: Path) -> bool:
  """Whether a killed preparation can go on in this folder."""
  return (folder / _UNFINISHED).is_file()


def _write_json(path: Path, value: dict[str, Any]) -> None:
  unfinished = path.with_name(f'{path.name}.unfinished')
  with open(unfinished, 'w', encoding='utf-8') as file:
    json.dump(value, file, indent=2)
    _sync(file)
  os.replace(unfinished, path)


def _sync(file: Any) -> None:
  file.flush()
  os.fsync(file.fileno())


def read(folder: Path, tokenizer: Tokenizer) -> Prepared | None:
  """The streams, memory-mapped; None if the folder does not hold what was written there."""
  names = _names(tokenizer)
  try:
    if not (folder / 'corpus.json').is_file():
      return None
    facts = json.loads((folder / 'corpus.json').read_bytes())
    mapped = [_map(folder / name, _LENGTH if name == BYTES_FILE else tokenizer.dtype) for name in names]
  except (OSError, ValueError, RecursionError):
    return None
  streams = [stream for stream, _ in mapped]
  lengths = {split: len(stream) for split, stream in zip(SPLITS, streams, strict=False)}
  digests = {name: digest for name, (_, digest) in zip(names, mapped, strict=True)}
  if facts != _facts(tokenizer, lengths, digests):
    return None
  byte_lengths = streams[2] if len(streams) == 3 else None
  if byte_lengths is not None and len(byte_lengths) != lengths['validation']:
    return None
  return Prepared(facts['digest'], streams[0], streams[1], byte_lengths)


def _version(file: BinaryIO) -> tuple[int, ...]:
  status = os.fstat(file.fileno())
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _map(path: Path, dtype: np.dtype) -> tuple[np.ndarray, str]:
  """A stream and the SHA-256 of its bytes; ValueError for an empty file or half a token, OSError."""
  if not path.is_file():  # to open a pipe would wait for its other end
    raise FileNotFoundError(path)
  with open(path, 'rb') as file:
    version = _version(file)
    if version not in _digests:
      _digests[version] = hashlib.file_digest(file, 'sha256').hexdigest()
    return np.asarray(np.memmap(file, dtype, mode='r')), _digests[version]
