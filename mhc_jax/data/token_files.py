"""Token streams on disk: a folder with train.tokens, validation.tokens and corpus.json.

Main path: documents -> **BOS document BOS document ...** (uint16, little endian) -> windows.
corpus.json is written last and in one step, so a folder without it is never taken for complete; it holds the
digest of the streams, so one with other bytes in them is not either.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mhc_jax.data.splits import SPLITS
from mhc_jax.data.tokenizer import Tokenizer
from mhc_jax.errors import require

_TOKEN = np.dtype('<u2')
_digests: dict[tuple[int, ...], str] = {}  # version of a file -> SHA-256: a process reads each once


def write(folder: Path, documents: Iterable[tuple[str, bytes]], tokenizer: Tokenizer) -> dict[str, int | str]:
  """Writes both streams and returns what goes into corpus.json: tokenizer, tokens of each, digest (hex).

  Empty documents are left out. The digest covers both streams and the tokenizer's name.
  """
  size = tokenizer.vocab_size
  require(size <= 2**16, f'data.tokenizer={tokenizer.name}: {size} tokens, streams have room for {2**16}')
  bos = np.array([tokenizer.bos], _TOKEN).tobytes()
  lengths = dict.fromkeys(SPLITS, 0)
  digests = {split: hashlib.sha256() for split in SPLITS}
  with contextlib.ExitStack() as stack:
    files = {s: stack.enter_context(open(_path(folder, s), 'wb')) for s in SPLITS}
    for split, text in documents:
      if text:
        data = bos + tokenizer.encode(text).astype(_TOKEN).tobytes()
        files[split].write(data)
        digests[split].update(data)
        lengths[split] += len(data) // _TOKEN.itemsize
    for file in files.values():
      file.flush()
      os.fsync(file.fileno())
  return _facts(tokenizer, lengths, {split: digest.hexdigest() for split, digest in digests.items()})


def _facts(tokenizer: Tokenizer, lengths: dict[str, int], digests: dict[str, str]) -> dict[str, int | str]:
  parts = [tokenizer.name, *(digests[split] for split in SPLITS)]
  return {
    'tokenizer': tokenizer.name,
    **lengths,
    'digest': hashlib.sha256(' '.join(parts).encode()).hexdigest(),
  }


def finish(folder: Path, facts: dict[str, int | str]) -> None:
  """Declares the folder complete: writes corpus.json atomically."""
  unfinished = folder / 'corpus.json.unfinished'
  with open(unfinished, 'w', encoding='utf-8') as file:
    json.dump(facts, file, indent=2)
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, folder / 'corpus.json')


def read(folder: Path, tokenizer: Tokenizer) -> tuple[str, dict[str, np.ndarray]] | None:
  """(digest, {split: token ids, memory-mapped}); None if the folder does not hold what was written there."""
  try:
    if not (folder / 'corpus.json').is_file():
      return None
    facts = json.loads((folder / 'corpus.json').read_bytes())
    mapped = {split: _map(_path(folder, split)) for split in SPLITS}
  except (OSError, ValueError, RecursionError):
    return None
  streams = {split: stream for split, (stream, _) in mapped.items()}
  lengths = {split: len(stream) for split, stream in streams.items()}
  if facts != _facts(tokenizer, lengths, {split: digest for split, (_, digest) in mapped.items()}):
    return None
  return facts['digest'], streams


def _map(path: Path) -> tuple[np.ndarray, str]:
  """A stream and the SHA-256 of its bytes; ValueError for an empty file or half a token, OSError."""
  if not path.is_file():  # to open a pipe would wait for its other end
    raise FileNotFoundError(path)
  with open(path, 'rb') as file:
    status = os.fstat(file.fileno())
    version = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    if version not in _digests:
      _digests[version] = hashlib.file_digest(file, 'sha256').hexdigest()
    return np.asarray(np.memmap(file, _TOKEN, mode='r')), _digests[version]


def _path(folder: Path, split: str) -> Path:
  return folder / f'{split}.tokens'
