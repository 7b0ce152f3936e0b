"""Fixed windows over a token stream: a random-access source of training examples.

Main path: token streams -> **windows** -> batches. Window i reads tokens [i T, i T + T] of the
stream BOS document BOS document ..., cut once: every token is a target exactly once per epoch.
"""

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from mhc_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
  """len() windows; [i] -> inputs, targets, weights and segments, each (T,).

  targets is inputs one token on. weights (float32) is 0 where the target is bos, else 1.
  segments (int32) numbers the documents within the window from 0, so that attention can be kept
  within them; with cross_documents all are 0. Shorter rest of the stream: left out.
  """

  tokens: np.ndarray
  bos: int
  seq_len: int
  cross_documents: bool

  def __len__(self) -> int:
    return max(len(self.tokens) - 1, 0) // self.seq_len

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    return {key: rows[0] for key, rows in self.take([index]).items()}

  def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
    """Several windows at once: arrays (len(indices), T). IndexError if one does not exist."""
    batch = as_batch(self.cut(indices), self.bos, self.cross_documents, np)
    return {name: np.ascontiguousarray(rows_BT) for name, rows_BT in batch.items()}

  def cut(self, indices: Sequence[int]) -> np.ndarray:
    """The tokens of several windows, (*shape of indices, T + 1). IndexError if one does not exist."""
    index_X = np.asarray(indices, np.int64)
    if not ((index_X >= 0) & (index_X < len(self))).all():
      raise IndexError(f'windows {indices} of {len(self)}')
    return self.tokens[index_X[..., None] * self.seq_len + np.arange(self.seq_len + 1)]


def as_batch(window_XS: Any, bos: int, cross_documents: bool, xp: ModuleType) -> dict[str, Any]:
  """What Windows says of tokens (*X, T + 1), by xp: numpy, or jax.numpy where they are on a device."""
  window_XS = window_XS.astype(xp.int32)
  inputs_XT, targets_XT = window_XS[..., :-1], window_XS[..., 1:]
  segments_XT = xp.zeros_like(inputs_XT)
  if not cross_documents:  # whatever document is open at the start has number 0
    begins_XT = (inputs_XT == bos).astype(xp.int32)
    segments_XT = xp.cumsum(begins_XT, -1, dtype=xp.int32) - begins_XT[..., :1]
  return {
    'inputs': inputs_XT,
    'targets': targets_XT,
    'weights': (targets_XT != bos).astype(xp.float32),
    'segments': segments_XT,
  }


def windows(tokens: np.ndarray, bos: int, seq_len: int, cross_documents: bool) -> Windows:
  """Windows of seq_len tokens over a stream whose documents begin with bos; ConfigError if seq_len < 1."""
  if seq_len < 1:
    raise ConfigError(f'data.seq_len={seq_len}: must be at least 1 token')
  return Windows(tokens, bos, seq_len, cross_documents)


def check_enough_tokens(source: Windows, tokens_needed: int, repeat: bool) -> None:
  """Raises ConfigError if a run of tokens_needed would see a token twice without asking for it."""
  available = len(source) * source.seq_len
  if not available:
    raise ConfigError(
      f'the training split has {len(source.tokens):,} tokens, less than one window of'
      f' data.seq_len={source.seq_len}: lower it or take a bigger corpus'
    )
  if tokens_needed > available and not repeat:
    raise ConfigError(
      f'the run needs {tokens_needed:,} training tokens, the corpus has {available:,}'
      f' ({tokens_needed / available:.2f} epochs): set data.repeat=True to see text more than'
      ' once, make the run shorter, or take a bigger corpus'
    )
