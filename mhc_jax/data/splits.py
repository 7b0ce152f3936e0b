"""Which part of a corpus is validation, decided by content or path alone: no state, no seed.

Used where a corpus brings no validation split of its own.
"""

import hashlib

import numpy as np

VALIDATION_SHARE = 0.05
SPLITS = ('train', 'validation')


def in_validation(key: bytes) -> bool:
  """Whether the document with this key (its path, or its content) is held out: 5 % of keys are."""
  digest = hashlib.sha256(b'validation split\0' + key).digest()
  return int.from_bytes(digest[:8], 'big') < VALIDATION_SHARE * 2**64


def enough_documents(validation_size: int, size: int) -> bool:
  """Whether holding out whole documents gave a usable share: within a factor 4 of the 5 % asked.

  With few documents, or one huge one, it does not; then the end of every document is held out.
  """
  return VALIDATION_SHARE / 4 <= validation_size / max(size, 1) <= VALIDATION_SHARE * 4


def tail_start(size: int) -> int:
  """Where the held-out end of a document of `size` bytes begins: its last 5 %."""
  return size - round(size * VALIDATION_SHARE)


def held_out(text: np.ndarray, ends: np.ndarray, tails: bool) -> tuple[np.ndarray, np.ndarray]:
  """(ends, whether held out) of the documents of text (uint8), by content: equal ones stay together.

  With tails every document becomes two, the second its held-out end.
  """
  if tails:
    lengths = np.diff(ends, prepend=0)
    cuts = ends - np.round(lengths * VALIDATION_SHARE).astype(np.int64)  # tail_start of each
    return np.stack([cuts, ends], 1).reshape(-1), np.tile([False, True], len(ends))
  held, start, whole = np.zeros(len(ends), bool), 0, memoryview(np.ascontiguousarray(text))
  beginning, limit = hashlib.sha256(b'validation split\0'), round(VALIDATION_SHARE * 2**64)
  for index, end in enumerate(ends.tolist()):
    digest = beginning.copy()
    digest.update(whole[start:end])
    held[index] = int.from_bytes(digest.digest()[:8], 'big') < limit  # in_validation of the document
    start = end
  return ends, held
