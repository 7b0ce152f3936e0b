"""Byte-level tokenizer: 256 bytes and one mark for the beginning of a document.

Main path: text -> **token ids** -> fixed windows -> batches. Every predicted token stands for
exactly one byte, so bits per byte = nats per token / ln 2.
"""

from collections.abc import Iterable

import numpy as np

NAME = 'bytes'
BOS = 256  # beginning of a document; read by the model, predicted by no loss term
VOCAB_SIZE = 257
BYTES_PER_TOKEN = 1.0  # of predicted tokens, which are never BOS


def encode(text: bytes | str) -> np.ndarray:
  """Token ids of a text, uint16 (bytes,); a str counts as its UTF-8 bytes. BOS is not added."""
  if isinstance(text, str):
    text = text.encode('utf-8', errors='surrogateescape')
  return np.frombuffer(text, np.uint8).astype(np.uint16)


def decode(ids: Iterable[int] | np.ndarray) -> str:
  """Text of token ids (any integers); BOS is left out, bytes that are no UTF-8 become U+FFFD.

  Raises ValueError for an id outside [0, 256].
  """
  ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
  if ids.size and (ids.min() < 0 or ids.max() > BOS):
    raise ValueError(f'token ids must lie in [0, {BOS}], got {ids.min()} to {ids.max()}')
  return ids[ids != BOS].astype(np.uint8).tobytes().decode('utf-8', errors='replace')
