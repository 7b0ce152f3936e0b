"""Tokens, windows and batches: what a training step sees, and in what order."""

import gc
import threading
import time

import numpy as np
import pytest

from mhc_jax.data import (
  BYTES,
  check_enough_tokens,
  train_batches,
  validation_batches,
  windows,
)
from mhc_jax.errors import ConfigError

SEQ_LEN = 8


@pytest.fixture
def tokens(rng: np.random.Generator) -> np.ndarray:
  """A stream of documents of 0 to 20 bytes: 100 windows and a rest."""
  documents = []
  while sum(map(len, documents)) < 100 * SEQ_LEN + 1:
    documents.append(np.append(BYTES.bos, rng.integers(0, 256, rng.integers(0, 21))))
  return np.concatenate(documents)[: 100 * SEQ_LEN + 5].astype(np.uint16)


@pytest.fixture
def numbered():
  """50 windows whose first input is their index."""
  stream = np.append(np.repeat(np.arange(50), SEQ_LEN), BYTES.bos).astype(np.uint16)
  return windows(stream, BYTES.bos, SEQ_LEN, False)


def shown(batches) -> np.ndarray:
  """Window indices of batches of `numbered`, (steps, rows)."""
  return np.stack([batch['inputs'][:, 0] for batch in batches])


def test_tokenizer_round_trip():
  text = 'déjà vu 字\n'
  assert BYTES.decode(BYTES.encode(text)) == text
  assert BYTES.encode(text).dtype == np.uint16
  np.testing.assert_array_equal(BYTES.encode(b'\x00\xff'), [0, 255])
  np.testing.assert_array_equal(BYTES.encode('\udcff'), [255])  # an argument that is no UTF-8
  assert len(BYTES.encode('\ud800')) == 3
  assert BYTES.decode([BYTES.bos, 65, BYTES.bos, 0xFF, 66]) == 'A\ufffdB'
  with pytest.raises(ValueError, match='257'):
    BYTES.decode([65, 257])


@pytest.mark.parametrize('cross_documents', [False, True])
def test_windows_against_a_loop(tokens, cross_documents):
  source = windows(tokens, BYTES.bos, SEQ_LEN, cross_documents)
  assert len(source) == 100
  for i in range(len(source)):
    segment, inputs, targets, weights, segments = 0, [], [], [], []
    for place in range(i * SEQ_LEN, i * SEQ_LEN + SEQ_LEN):
      if tokens[place] == BYTES.bos and place > i * SEQ_LEN:
        segment += 1
      inputs.append(tokens[place])
      targets.append(tokens[place + 1])
      weights.append(tokens[place + 1] != BYTES.bos)
      segments.append(0 if cross_documents else segment)
    expected = {'inputs': inputs, 'targets': targets, 'weights': weights, 'segments': segments}
    assert source[i].keys() == expected.keys()
    for key, value in source[i].items():
      np.testing.assert_array_equal(value, expected[key])
      assert value.dtype == (np.float32 if key == 'weights' else np.int32)


def test_every_token_but_bos_is_a_target_once(tokens):
  source = windows(tokens, BYTES.bos, SEQ_LEN, False)
  batch = source.take(range(len(source)))
  np.testing.assert_array_equal(batch['targets'].reshape(-1), tokens[1 : 100 * SEQ_LEN + 1])
  assert (batch['weights'] == 0).sum() == (tokens[1 : 100 * SEQ_LEN + 1] == BYTES.bos).sum() > 0
  assert not batch['weights'][batch['targets'] == BYTES.bos].any()


def test_places_beyond_int32(tmp_path):
  """A file with a hole: 2**31 + 9 tokens, the last of them 7."""
  size = 2**31 + 9
  with open(tmp_path / 'tokens', 'wb') as file:
    file.truncate(2 * size - 2)
    file.seek(2 * size - 2)
    file.write(b'\7\0')
  source = windows(np.memmap(tmp_path / 'tokens', '<u2', mode='r'), BYTES.bos, 1, False)
  assert len(source) == size - 1
  assert source[size - 2]['targets'] == 7 and source[size - 3]['targets'] == 0
  batches = train_batches(source, batch_size=2, seed=0, repeat=False, num_steps=2**30, start_step=2**30 - 1)
  assert next(batches)['inputs'].shape == (2, 1)


def test_window_count_at_the_edges():
  assert [len(windows(np.zeros(n, np.uint16), BYTES.bos, 4, False)) for n in (0, 1, 4, 5, 8, 9)] == [
    *(0, 0, 0, 1, 1, 2)
  ]
  for index in (-1, 2):
    with pytest.raises(IndexError):
      windows(np.zeros(9, np.uint16), BYTES.bos, 4, False)[index]
  with pytest.raises(ConfigError, match='seq_len=0'):
    windows(np.zeros(9, np.uint16), BYTES.bos, 0, False)


def test_an_epoch_shows_every_window_once_in_a_new_order(numbered):
  # 20 steps of 10 rows are 4 epochs of 50 windows.
  steps = shown(train_batches(numbered, batch_size=10, seed=3, repeat=True, num_steps=20))
  epochs = steps.reshape(4, 50)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(50), (4, 1)))
  assert len({tuple(epoch) for epoch in epochs}) == 4
  # A grain that shuffles otherwise would break resumed runs: to be noticed at its upgrade.
  np.testing.assert_array_equal(epochs[0, :8], [37, 12, 21, 24, 19, 20, 38, 1])


def test_seeds_share_no_epoch(numbered):
  def epochs(seed):
    batches = train_batches(numbered, batch_size=50, seed=seed, repeat=True, num_steps=4)
    return {tuple(step) for step in shown(batches)}

  assert epochs(0) == epochs(0)
  assert len(epochs(0) | epochs(1) | epochs(2)) == 12


def test_batches_are_a_function_of_seed_and_step_alone(numbered):
  arguments = {'batch_size': 8, 'seed': 1, 'repeat': True}
  whole = shown(train_batches(numbered, num_steps=30, **arguments))
  for start in (0, 1, 17, 29):  # other starts, other ends
    part = shown(train_batches(numbered, num_steps=30, start_step=start, **arguments))
    np.testing.assert_array_equal(part, whole[start:])
  np.testing.assert_array_equal(shown(train_batches(numbered, num_steps=12, **arguments)), whole[:12])
  assert not list(train_batches(numbered, num_steps=30, start_step=30, **arguments))


def test_a_late_start_reads_nothing_before_it(numbered):
  begin = time.perf_counter()
  batches = train_batches(numbered, batch_size=8, seed=0, repeat=True, num_steps=10**9, start_step=10**8)
  assert next(batches)['inputs'].shape == (8, SEQ_LEN)
  assert time.perf_counter() - begin < 1


@pytest.mark.parametrize('count', [2, 4])
def test_processes_cut_the_same_global_batch(numbered, count):
  arguments = {'batch_size': 8, 'seed': 5, 'repeat': True, 'num_steps': 10}
  whole = list(train_batches(numbered, **arguments))
  parts = [list(train_batches(numbered, rows=rows, **arguments)) for rows in np.arange(8).reshape(count, -1)]
  for step, batch in enumerate(whole):
    for key, value in batch.items():
      rows = [part[step][key] for part in parts]
      assert all(len(row) == 8 // count for row in rows)
      np.testing.assert_array_equal(np.concatenate(rows), value)


def test_a_process_reads_its_own_rows_alone(numbered, monkeypatch):
  read = []
  take = type(numbered).take
  monkeypatch.setattr(
    type(numbered), 'take', lambda self, indices: read.extend(indices) or take(self, indices)
  )
  batches = train_batches(numbered, batch_size=8, seed=5, repeat=False, num_steps=6, rows=[2, 3])
  assert sorted(shown(batches).reshape(-1)) == sorted(read)
  assert len(read) == 6 * 2


@pytest.mark.parametrize('dropped', [True, False])
def test_no_thread_outlives_the_iteration(numbered, dropped):
  def prefetching():
    return [t for t in threading.enumerate() if t.name.startswith('grain-prefetch')]

  batches = train_batches(numbered, batch_size=8, seed=0, repeat=True, num_steps=20)
  next(batches)
  assert prefetching()
  if dropped:
    del batches
    gc.collect()
  else:
    assert len(list(batches)) == 19
  deadline = time.monotonic() + 5
  while prefetching() and time.monotonic() < deadline:
    time.sleep(0.01)
  assert not prefetching()


def test_repetition_is_refused_unless_asked_for(numbered):
  check_enough_tokens(numbered, 400, repeat=False)
  check_enough_tokens(numbered, 10**9, repeat=True)
  with pytest.raises(ConfigError, match=r'needs 401 .* has 400 .*data\.repeat=True'):
    check_enough_tokens(numbered, 401, repeat=False)
  with pytest.raises(ConfigError, match='less than one window'):
    check_enough_tokens(windows(np.zeros(5, np.uint16), BYTES.bos, 8, False), 1, repeat=True)
  with pytest.raises(ConfigError, match=r'data\.repeat=True'):
    train_batches(numbered, batch_size=8, seed=0, repeat=False, num_steps=7)


def test_validation_windows_are_spread_distinct_and_fixed(numbered):
  chosen = shown(validation_batches(numbered, 4, 3)).reshape(-1)
  edges = np.arange(13) * 50 // 12  # one from each of 12 stretches
  assert ((edges[:-1] <= chosen) & (chosen < edges[1:])).all()
  # Part of every published number: a change here makes results incomparable.
  np.testing.assert_array_equal(chosen, [2, 6, 9, 14, 17, 23, 27, 32, 34, 37, 43, 46])
  parts = [shown(validation_batches(numbered, 4, 3, rows)) for rows in ([0, 1], [2, 3])]
  np.testing.assert_array_equal(np.concatenate(parts, axis=1).reshape(-1), chosen)


def test_validation_without_any_target_is_refused():
  """Possible with windows of one token alone: documents are never empty."""
  stream = np.tile(np.array([BYTES.bos, 65], np.uint16), 20)  # windows 0, 2, ... predict, 1, 3, ... do not
  assert len(validation_batches(windows(stream, BYTES.bos, 1, False), 4, 4)) == 4
  stream = np.array([65, *[BYTES.bos] * 9], np.uint16)
  for rows in (None, [0]):
    with pytest.raises(ConfigError, match=r'seq_len=1 hold nothing to predict.*raise seq_len'):
      validation_batches(windows(stream, BYTES.bos, 1, False), 2, 2, rows)


def test_validation_split_too_small(numbered):
  assert len(validation_batches(numbered, 10, 5)) == 5
  for batch_size, num_batches in ((17, 3), (7, 0)):
    with pytest.raises(ConfigError, match=f'{num_batches} x {batch_size} windows .* has 50'):
      validation_batches(numbered, batch_size, num_batches)
