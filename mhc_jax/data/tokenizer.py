"""Tokenizers as data, and the one by default: 256 bytes and one mark for the beginning of a document.

Main path: text -> **token ids** -> fixed windows -> batches. Others come from libraries
(`tokenizer_libraries.py`), by what data.tokenizer names.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back, and what a model and its losses need to know of them."""

  name: str  # library, size, bos and a hash of the content: part of the digest and of prepared folders' names
  vocab_size: int  # ids lie below it
  bos: int  # beginning of a document; read by the model, predicted by no loss term
  encode: Callable[[bytes | str], np.ndarray]  # a text's ids, without bos
  decode: Callable[[Iterable[int]], str]  # leaves bos out
  # Documents (text uint8, ends) -> (ids, ends), without bos.
  encode_many: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
  # A document -> how many of its bytes each of its tokens stands for: they sum to its length. None: one each.
  byte_lengths: Callable[[bytes], np.ndarray] | None

  @property
  def dtype(self) -> np.dtype:
    """Of token ids on disk: uint16 where they fit, little endian."""
    return np.dtype('<u2' if self.vocab_size <= 2**16 else '<u4')


def as_bytes(text: bytes | str) -> bytes:
  """The bytes of a text; a str counts as its UTF-8 bytes, of surrogates too."""
  if isinstance(text, str):
    try:
      return text.encode('utf-8', errors='surrogateescape')  # arguments that are no UTF-8
    except UnicodeEncodeError:
      return text.encode('utf-8', errors='surrogatepass')
  return text


def _encode_bytes(text: bytes | str) -> np.ndarray:
  """Token ids of a text, uint16 (bytes,)."""
  return np.frombuffer(as_bytes(text), np.uint8).astype(np.uint16)


def _decode_bytes(ids: Iterable[int]) -> str:
  """Text of token ids (any integers); bytes that are no UTF-8 become U+FFFD.

  Raises ValueError for an id outside [0, 256].
  """
  ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
  if ids.size and (ids.min() < 0 or ids.max() > BYTES.bos):
    raise ValueError(f'token ids must lie in [0, {BYTES.bos}], got {ids.min()} to {ids.max()}')
  return ids[ids != BYTES.bos].astype(np.uint8).tobytes().decode('utf-8', errors='replace')


BYTES = Tokenizer('bytes', 257, 256, _encode_bytes, _decode_bytes, lambda text, ends: (text, ends), None)
