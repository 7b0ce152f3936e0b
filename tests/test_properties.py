"""Properties that hold for any input: overrides, run ids, windows and the order of batches."""

import functools
import json
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from mhc_jax.config import NOT_IN_ID
from mhc_jax.config_file import parse
from mhc_jax.data.batches import train_batches
from mhc_jax.data.tokenizer import BYTES
from mhc_jax.data.windows import windows
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve, run_id

fixed = settings(derandomize=True, deadline=None, database=None)


def leaves(node, path=()):
  """Paths of all fields that are not sections."""
  if not isinstance(node, ConfigDict):
    return [path]
  return [leaf for key in node for leaf in leaves(node[key], (*path, key))]


FIELDS = [*leaves(parse('laptop:smoke', [])), ('model', 'connection', 'constraint_params', 'free')]
VALUES = st.one_of(
  st.integers(),
  st.floats(),
  st.booleans(),
  st.none(),
  st.text(max_size=8),
  st.lists(st.floats(), max_size=3),
  st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
NASTY = ('', '=', '1e400', '-nan', '1' * 400, '9' * 5000, '[' * 500, '-' * 5000 + '1', '{[]: 1}', '[1e400]')
NASTY += ("'\\d'", '\x00', '0x', '1_', '((', '"', '{1, 2}', 'b"a"', '1j', '...', '\ud800', '☃')


def at(config, path):
  return functools.reduce(lambda node, key: node[key], path, config)


def assert_taken_or_refused(path, text):
  """Whatever the text: ConfigError in one line and no other; what is taken is read again as the same."""
  name = '.'.join(path)
  try:
    value = at(parse('laptop:smoke', [f'--config.{name}={text}']), path)
  except ConfigError as error:
    assert name in str(error) and len(str(error)) < 300
    return
  section = at(parse('laptop:smoke', []), path[:-1])
  kind = section.get_type(path[-1]) if path[-1] in section else object
  assert value is None or isinstance(value, kind)
  assert json.loads(json.dumps(value, allow_nan=False)) == value or isinstance(value, tuple)
  assert isinstance(value, str) or at(parse('laptop:smoke', [f'--config.{name}={value}']), path) == value


@pytest.mark.parametrize('path', [('optimizer', 'lr'), ('model', 'width'), ('data', 'name'), FIELDS[-1]])
def test_nasty_texts_are_taken_or_refused(path):
  for text in NASTY:
    assert_taken_or_refused(path, text)


@settings(fixed, max_examples=200)
@given(st.sampled_from(FIELDS), st.one_of(VALUES.map(repr), VALUES.map(str), st.text(max_size=12)))
def test_an_override_is_taken_in_the_type_of_its_field_or_refused(path, text):
  assert_taken_or_refused(path, text)


@settings(fixed, max_examples=100)
@given(st.text('abcdefghijklmnopqrstuvwxyz_.', min_size=1, max_size=20))
def test_a_field_that_is_not_there_is_refused_by_name(name):
  if tuple(name.split('.')) not in FIELDS:
    try:
      parse('laptop:smoke', [f'--config.{name}=1'])
    except ConfigError as error:
      assert 'unknown config field' in str(error) or 'is a section' in str(error)
    else:
      raise AssertionError(name)


RESOLVED = json.loads(json.dumps(resolve(parse('laptop:smoke', []), 'digest').resolved))


def paths(node, path=()):
  if not isinstance(node, dict):
    return [path]
  return [leaf for key in node for leaf in paths(node[key], (*path, key))]


def changed(tree, path, value):
  """A copy with one value replaced."""
  head, *rest = path
  return {**tree, head: changed(tree[head], rest, value) if rest else value}


def shuffled(node, random):
  if not isinstance(node, dict):
    return node
  keys = list(node)
  random.shuffle(keys)
  return {key: shuffled(node[key], random) for key in keys}


@settings(fixed, max_examples=200)
@given(st.sampled_from(paths(RESOLVED)), st.integers(1000, 2000), st.randoms(use_true_random=False))
def test_an_id_is_that_of_the_values_that_decide_numbers(path, value, random):
  """Every field counts but the labels, paths and machines; the order of keys and what is off do not."""
  out = any(path[: len(skipped)] == skipped for skipped in NOT_IN_ID)
  is_text = isinstance(functools.reduce(operator.getitem, path, RESOLVED), str)
  other = changed(RESOLVED, path, str(value) if is_text else value)
  assert (run_id(other) == run_id(RESOLVED)) == out
  assert run_id(shuffled(other, random)) == run_id(json.loads(json.dumps(other))) == run_id(other)
  assert run_id({**other, 'new_section': {'off': None}}) != '' and run_id(
    {**other, 'model': {**other['model'], 'new_field': None}}
  ) == run_id(other)


DOCUMENTS = st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=1, max_size=12)


@settings(fixed, max_examples=200)
@given(DOCUMENTS, st.integers(1, 9), st.booleans())
def test_windows_make_every_token_a_target_once(documents, seq_len, cross):
  """Empty documents, ones longer than a window, and a rest shorter than one that is left out."""
  stream = np.array([t for document in documents for t in (BYTES.bos, *document)], np.uint16)
  source = windows(stream, BYTES.bos, seq_len, cross)
  batch = source.take(range(len(source)))
  used = len(source) * seq_len
  assert len(stream) - 1 - used < seq_len
  np.testing.assert_array_equal(batch['inputs'].reshape(-1), stream[:used])
  np.testing.assert_array_equal(batch['targets'].reshape(-1), stream[1 : used + 1])
  np.testing.assert_array_equal(batch['weights'], batch['targets'] != BYTES.bos)
  steps = np.diff(batch['segments'], axis=1)
  np.testing.assert_array_equal(steps, (batch['inputs'][:, 1:] == BYTES.bos) & (not cross))
  assert not len(source) or (batch['segments'][:, 0] == 0).all()


@settings(fixed, max_examples=12)
@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 2**31 - 1), st.integers(0, 7))
def test_batches_from_a_step_on_are_the_rest_and_an_epoch_shows_each_window_once(count, size, seed, start):
  source = windows(np.arange(2 * count + 1, dtype=np.uint16), BYTES.bos, 2, False)
  steps = 2 * count

  def firsts(start):
    order = {'batch_size': size, 'seed': seed, 'repeat': True, 'num_steps': steps, 'start_step': start}
    return [batch['inputs'][:, 0].tolist() for batch in train_batches(source, **order)]

  whole = firsts(0)
  assert firsts(min(start, steps)) == whole[min(start, steps) :]
  flat = [first for batch in whole for first in batch]
  for epoch in range(len(flat) // count):
    assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(0, 2 * count, 2))
