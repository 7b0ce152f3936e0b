"""Tokenizers as data, and the one by default: 256 bytes and one mark for the beginning of a document.

Main path: text -> **token ids** -> fixed windows -> batches. A new one: a Tokenizer in TOKENIZERS, and its
name at config.py's `data.tokenizer`.
"""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np

from mhc_jax.errors import require


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Text to token ids and back, and what a model and its losses need to know of them."""

  name: str  # part of the digest and of the folder of prepared text
  vocab_size: int  # ids lie below it; at most 2**16
  bos: int  # beginning of a document; read by the model, predicted by no loss term
  bytes_per_token: float  # of predicted tokens, which are never bos
  encode: Callable[[bytes | str], np.ndarray]  # a text's ids, without bos
  decode: Callable[[Iterable[int]], str]  # leaves bos out


def _encode_bytes(text: bytes | str) -> np.ndarray:
  """Token ids of a text, uint16 (bytes,); a str counts as its UTF-8 bytes, of surrogates too."""
  if isinstance(text, str):
    try:
      text = text.encode('utf-8', errors='surrogateescape')  # arguments that are no UTF-8
    except UnicodeEncodeError:
      text = text.encode('utf-8', errors='surrogatepass')
  return np.frombuffer(text, np.uint8).astype(np.uint16)


def _decode_bytes(ids: Iterable[int]) -> str:
  """Text of token ids (any integers); bytes that are no UTF-8 become U+FFFD.

  Raises ValueError for an id outside [0, 256].
  """
  ids = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), np.int64).reshape(-1)
  if ids.size and (ids.min() < 0 or ids.max() > BYTES.bos):
    raise ValueError(f'token ids must lie in [0, {BYTES.bos}], got {ids.min()} to {ids.max()}')
  return ids[ids != BYTES.bos].astype(np.uint8).tobytes().decode('utf-8', errors='replace')


BYTES = Tokenizer('bytes', 257, 256, 1.0, _encode_bytes, _decode_bytes)
TOKENIZERS = {'bytes': BYTES}


def tokenizer_of(name: str | None) -> Tokenizer:
  """The tokenizer that data.tokenizer names, None being bytes; ConfigError for an unknown one."""
  known = name is None or name in TOKENIZERS
  require(known, f'data.tokenizer must be one of {", ".join(TOKENIZERS)}, got {name!r}')
  return TOKENIZERS[name or 'bytes']
