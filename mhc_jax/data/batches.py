"""Batches of windows: a shuffled endless order for training, a fixed choice for validation.

Main path: windows -> **batches** -> train_step and evaluate. The global batch of step s is a
function of (seed, s) alone, cut by process after the shuffle; the pipeline's whole state is the
next step.
"""

import hashlib
from collections.abc import Iterator

import grain
import numpy as np

from mhc_jax.config import ConfigError
from mhc_jax.data.windows import Windows, check_enough_tokens

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
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Batches of steps start_step ... num_steps - 1, arrays (batch_size / process_count, T).

  Row r of the global batch of step s is the window at place s * batch_size + r in the order of
  `seed`; a process reads its rows alone. Each epoch has an order of its own and shows every
  window once; a batch may lie across two epochs. Starting late costs nothing. Raises ConfigError
  if the batch does not divide by processes, or the windows do not suffice without repeat.
  """
  rows = _process_rows(batch_size, process_index, process_count)
  check_enough_tokens(source, num_steps * batch_size * source.seq_len, repeat)
  order = grain.MapDataset.range(len(source)).shuffle(seed=_order_seed(seed))
  order = order.repeat(None if repeat else 1)  # reshuffles each epoch
  steps = grain.MapDataset.range(start_step, num_steps).map(
    lambda step: source.take([order[step * batch_size + row] for row in rows])
  )
  return _drain(steps.to_iter_dataset(_READ_OPTIONS))


def validation_batches(
  source: Windows,
  batch_size: int,
  num_batches: int,
  process_index: int = 0,
  process_count: int = 1,
) -> list[Batch]:
  """The same num_batches batches for every run, arrays (batch_size / process_count, T).

  The split is cut into batch_size * num_batches equal stretches and one window is taken from
  each, at a place given by the SHA-256 of the stretch's number: spread over the whole split,
  not aligned with it, independent of any seed. Raises ConfigError if the split is too small.
  """
  rows = _process_rows(batch_size, process_index, process_count)
  count = batch_size * num_batches
  if not 0 < count <= len(source):
    raise ConfigError(
      f'evaluation needs {num_batches} x {batch_size} windows of {source.seq_len} tokens, the'
      f' validation split has {len(source)}: lower the number of evaluation batches, batch_size'
      ' or seq_len, or take a bigger corpus'
    )
  edges = [stretch * len(source) // count for stretch in range(count + 1)]
  chosen = [edges[i] + _hash(f'validation window {i}') % (edges[i + 1] - edges[i]) for i in range(count)]
  return [source.take([chosen[batch * batch_size + row] for row in rows]) for batch in range(num_batches)]


def _process_rows(batch_size: int, process_index: int, process_count: int) -> range:
  """Rows of the global batch that this process holds: contiguous, in the order of processes."""
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError(
      f'data.batch_size={batch_size}: must be a positive multiple of the {process_count} processes'
    )
  local = batch_size // process_count
  return range(process_index * local, (process_index + 1) * local)


def _drain(dataset: grain.IterDataset) -> Iterator[Batch]:
  """A generator, which lets go of grain's iterator and its thread at the end or when dropped."""
  yield from dataset


def _order_seed(seed: int) -> int:
  """grain seeds epoch e with seed + e: hashed, so that seeds 0, 1, ... share no epoch."""
  return _hash(f'order {seed}') % 2**32


def _hash(text: str) -> int:
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big')
