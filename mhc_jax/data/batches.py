"""Batches of windows: a shuffled endless order for training, a fixed choice for validation.

Main path: windows -> **batches** -> train_step and evaluate. The global batch of step s is a
function of (seed, s) alone, and a process takes its rows after the shuffle; the pipeline's whole state is the
next step.
"""

import hashlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from mhc_jax.data.windows import Windows, check_enough_tokens
from mhc_jax.errors import ConfigError

# One thread: windows are cheap to cut, and the order's statistics in grain are not thread-safe.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)

Batch = dict[str, np.ndarray]


def train_batches(
  source: Windows,
  *,
  batch_size: int,
  seed: int,
  repeat: bool,
  num_steps: int,
  start_step: int = 0,
  rows: Sequence[int] | None = None,
) -> Iterator[Batch]:
  """Batches of steps start_step ... num_steps - 1, arrays (len(rows), T).

  Row r of the global batch of step s is the window at place s * batch_size + r in the order of
  `seed`. A process gives the `rows` that lie on its devices and reads those alone; None is all. Each
  epoch has an order of its own and shows every window once; a batch may lie across two epochs.
  Starting late costs nothing. Raises ConfigError if the windows do not suffice without repeat.
  """
  rows = range(batch_size) if rows is None else rows
  check_enough_tokens(source, num_steps * batch_size * source.seq_len, repeat)
  order = train_order(source, seed, repeat)
  steps = grain.MapDataset.range(start_step, num_steps).map(
    lambda step: source.take([order[step * batch_size + row] for row in rows])
  )
  return _drain(steps.to_iter_dataset(_READ_OPTIONS))


def train_order(source: Windows, seed: int, repeat: bool) -> Sequence[int]:
  """The order of `seed`: its place s * batch_size + r has the window of row r of step s."""
  order = grain.MapDataset.range(len(source)).shuffle(seed=_order_seed(seed))
  return order.repeat(None if repeat else 1)  # reshuffles each epoch


def validation_batches(
  source: Windows,
  batch_size: int,
  num_batches: int,
  rows: Sequence[int] | None = None,
) -> list[Batch]:
  """The same num_batches batches for every run, arrays (len(rows), T).

  The split is cut into batch_size * num_batches equal stretches and one window is taken from
  each, at a place given by the SHA-256 of the stretch's number: spread over the whole split,
  not aligned with it, independent of any seed. Raises ConfigError if the split is too small, or nothing in
  these windows is predicted.
  """
  rows = range(batch_size) if rows is None else rows
  chosen = _validation_windows(source, batch_size, num_batches)
  if not any(source[i]['weights'].any() for i in chosen):  # of all rows: processes must agree
    raise ConfigError(
      f'the {len(chosen)} validation windows of data.seq_len={source.seq_len} hold nothing to predict, only'
      ' beginnings of documents: raise seq_len or the number of evaluation batches'
    )
  return [source.take([chosen[batch * batch_size + row] for row in rows]) for batch in range(num_batches)]


def bytes_per_token(
  source: Windows, byte_lengths: np.ndarray | None, batch_size: int, num_batches: int
) -> float:
  """Bytes that a target of the validation batches stands for, the mean over the very targets that are scored.

  byte_lengths: of each token of the validation stream; None: one each.
  """
  if byte_lengths is None:
    return 1.0
  lengths = Windows(byte_lengths, source.bos, source.seq_len, source.cross_documents)
  chosen = _validation_windows(source, batch_size, num_batches)
  scored = source.cut(chosen)[:, 1:] != source.bos
  return float(lengths.cut(chosen)[:, 1:][scored].mean(dtype=np.float64))


def _validation_windows(source: Windows, batch_size: int, num_batches: int) -> list[int]:
  count = batch_size * num_batches
  if not 0 < count <= len(source):
    raise ConfigError(
      f'evaluation needs {num_batches} x {batch_size} windows of {source.seq_len} tokens, the'
      f' validation split has {len(source)}: lower the number of evaluation batches, batch_size'
      ' or seq_len, or take a bigger corpus'
    )
  edges = [stretch * len(source) // count for stretch in range(count + 1)]
  return [edges[i] + _hash(f'validation window {i}') % (edges[i + 1] - edges[i]) for i in range(count)]


def _drain(dataset: grain.IterDataset) -> Iterator[Batch]:
  """A generator, which lets go of grain's iterator and its thread at the end or when dropped."""
  yield from dataset


def _order_seed(seed: int) -> int:
  """grain seeds epoch e with seed + e: hashed, so that seeds 0, 1, ... share no epoch."""
  return _hash(f'order {seed}') % 2**32


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')
