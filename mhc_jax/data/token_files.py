"""Token streams on disk: a folder with train.tokens, validation.tokens and corpus.json.

Main path: documents -> **BOS document BOS document ...** (uint16, little endian) -> windows.
corpus.json is written last and in one step, so a folder without it is never taken for complete.
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
  parts = [tokenizer.name, *(digests[split].hexdigest() for split in SPLITS)]
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


def read(folder: Path) -> tuple[str, dict[str, np.ndarray]] | None:
  """(digest, {split: token ids, memory-mapped}); None if the folder is absent or not complete."""
  try:
    facts = json.loads((folder / 'corpus.json').read_text(encoding='utf-8'))
    sizes = {split: _path(folder, split).stat().st_size for split in SPLITS}
  except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
    return None
  if any(sizes[split] != facts[split] * _TOKEN.itemsize for split in SPLITS):
    return None
  streams = {s: np.asarray(np.memmap(_path(folder, s), _TOKEN, mode='r')) for s in SPLITS}
  return facts['digest'], streams


def _path(folder: Path, split: str) -> Path:
  return folder / f'{split}.tokens'
