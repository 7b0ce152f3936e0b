"""Adaptation while reading: scores before learning, nothing from document to document, exact counts."""

import functools
import itertools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from analysis import plots
from analysis.figures.adaptation import read as read_rows
from analysis.figures.adaptation import summary
from experiments import adaptation
from experiments.adaptation import Documents, documents, matching, size, subsets
from mhc_jax import train
from mhc_jax.config import build_optimizer
from mhc_jax.data import BYTES, Corpus
from mhc_jax.errors import ConfigError
from mhc_jax.parameters import path_name
from mhc_jax.plan import resolve
from mhc_jax.train_step import evaluate_sums, init_state
from tests.test_train import config

T, M = 8, 3  # tokens of a segment, segments of a document
STREAM = [*itertools.chain(*([BYTES.bos, *range(97, 97 + n)] for n in (25, 3, 20, 25, 12, 25, 19, 25)))]


@pytest.fixture(scope='module')
def model():
  c = config(model__connection__name='mhc', model__connection__streams=2, model__width=8, model__heads=1)
  made = resolve(c, 'd').model
  init = jax.jit(init_state, static_argnums=(1, 2))
  return made, init(jax.random.key(0), made, build_optimizer(c)).params


@pytest.fixture(scope='module')
def text():
  """Three documents of random bytes, the last one short."""
  tokens_DX = np.random.default_rng(0).integers(97, 105, (3, M * T + 1)).astype(np.int32)
  return adaptation._cut(
    [(row[:n], np.ones(n)) for row, n in zip(tokens_DX, (25, 25, 14), strict=True)], T, M
  )


@pytest.fixture(scope='module')
def read(model):
  """(lr, decay, pattern, batch) -> (nats, tokens), each (D, M)."""
  mode, params = model

  def run(lr, decay, pattern, batch):
    one = jax.tree.map(jnp.ones_like, params)
    sums, _ = adaptation.read(params, matching(pattern, params), one, lr, decay, batch, mode)
    return tuple(map(np.asarray, sums))

  return run


@functools.partial(jax.jit, static_argnums=0)
def plain(model, params, segment):
  return evaluate_sums(params, {name: value[None] for name, value in segment.items()}, model)


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, segment):
  return jax.grad(lambda p: plain(model, p, segment)[0] / jnp.maximum(segment['weights'].sum(), 1))(params)


def segment_of(text, d, m):
  return {name: value[d, m] for name, value in text.batch.items()}


def test_documents_are_cut_without_a_token_lost_or_scored_twice():
  lengths = np.arange(len(STREAM)) % 3 + 1
  corpus = Corpus('s', 'd', np.array(STREAM), np.array(STREAM, np.uint16), BYTES, lengths)
  fit, report = documents(corpus, T, 3, M)
  starts = np.flatnonzero(np.array(STREAM) == BYTES.bos)
  long = [k for k, (a, b) in enumerate(itertools.pairwise([*starts, len(STREAM)])) if b - a > T + 1]
  assert len(long) == 7
  wanted = [long[k * 7 // 6] for k in range(6)]  # spread, in turns
  for found, chosen in ((fit, wanted[::2]), (report, wanted[1::2])):
    for d, k in enumerate(chosen):
      end = starts[k + 1] if k + 1 < len(starts) else len(STREAM)
      own = slice(starts[k], min(end, starts[k] + M * T + 1))
      scored = found.batch['weights'][d].ravel() > 0
      assert list(found.batch['targets'][d].ravel()[scored]) == STREAM[own][1:]
      assert list(found.batch['inputs'][d].ravel()[scored]) == STREAM[own][:-1]
      assert found.bytes_D[d] == lengths[own][1:].sum()
  with pytest.raises(ConfigError, match='7 documents are longer than a segment of 8 tokens, 8 are needed'):
    documents(corpus, T, 4, M)


def test_without_a_rate_it_is_the_plain_loss(model, text, read):
  """Of the same windows; another program's sums of 8 terms: 1e-6. To the bit what no scalar adapts."""
  nats_DM, tokens_DM = read(0.0, 0.0, '.*', text.batch)
  for d, m in itertools.product(range(3), range(M)):
    total, count = plain(*model, segment_of(text, d, m))
    assert tokens_DM[d, m] == count and nats_DM[d, m] == pytest.approx(float(total), rel=1e-6), (d, m)
  assert (read(0.3, 0.1, 'none', text.batch)[0] == nats_DM).all()
  assert tokens_DM.sum(1).tolist() == [24, 24, 13]


def test_what_comes_later_changes_no_score(text, read):
  """The last segment of the first document in another order; its own score changes, adaptation is on."""
  later = {name: value.copy() for name, value in text.batch.items()}
  for name in ('inputs', 'targets'):
    later[name][0, 2] = later[name][0, 2, ::-1]
  first, second = (read(0.3, 0.1, '.*', batch)[0] for batch in (text.batch, later))
  assert (first[0, :2] == second[0, :2]).all() and first[0, 2] != second[0, 2]
  assert (read(0.0, 0.0, '.*', text.batch)[0][0, 1:] != first[0, 1:]).all(), 'it does adapt'


def test_a_document_leaves_nothing_to_the_others(text, read):
  others = {name: value.copy() for name, value in text.batch.items()}
  for name in ('inputs', 'targets'):
    others[name][:2] = 98 + (others[name][:2] % 5)
  first, second = (read(0.3, 0.1, '.*', batch)[0] for batch in (text.batch, others))
  assert (first[2] == second[2]).all() and (first[0] != second[0]).any()
  order = {name: value[::-1] for name, value in text.batch.items()}
  np.testing.assert_array_equal(read(0.3, 0.1, '.*', order)[0][::-1], first)


def test_the_steps_are_those_of_the_paper(model, text):
  """By a loop of its own; rel 1e-5: float32 over a chain of three segments."""
  c, params = model
  mask, lr, decay = matching(adaptation.PATTERNS['maps'], params), 0.05, 0.25
  one = jax.tree.map(jnp.ones_like, params)
  _, squares = adaptation.read(params, mask, one, 0.0, 0.0, text.batch, c)
  scale = jax.tree.map(lambda x: 0.3 * jnp.sqrt(x) + 1e-6, squares)
  (nats, _), squares = adaptation.read(params, mask, scale, lr, decay, text.batch, c)
  begin, sums = jax.tree.map(np.asarray, params), jax.tree.map(lambda p: np.zeros(p.shape), params)
  cut = []
  for d in range(3):
    now = begin
    for m in range(M):
      segment = segment_of(text, d, m)
      assert nats[d, m] == pytest.approx(float(plain(c, now, segment)[0]), rel=1e-5)
      grads = gradient(c, now, segment)
      sums = jax.tree.map(lambda a, g: a + np.asarray(g) ** 2, sums, grads)

      def moved(p, g, p0, k, s):
        cut.append(np.abs(k * g / s) > 3)
        return np.asarray(p - k * (lr * np.clip(g / s, -3, 3) + decay * (p - p0)))

      now = jax.tree.map(moved, now, grads, begin, mask, scale)
  share = np.concatenate([np.ravel(one) for one in cut]).mean()
  assert 0 < share < 0.5, 'some steps are cut'
  for found, own in zip(jax.tree.leaves(squares), jax.tree.leaves(sums), strict=True):
    np.testing.assert_allclose(found, own / 8, rtol=1e-3, atol=1e-9)  # of nine segments one is padding


def test_controls_are_as_large_and_lie_elsewhere(model):
  _, params = model
  masks = subsets(params, adaptation.PATTERNS, {'maps': 9, 'connection': 9}, seed=1)
  sizes = {name: size(mask) for name, mask in masks.items()}
  norms = size(matching(adaptation.NORMS, params))
  assert 0 < sizes['maps'] < sizes['connection'] and norms == 24
  for name in adaptation.PATTERNS:
    assert sizes[f'random, as many as {name}'] == sizes[name]
    assert sizes[f'norms, as many as {name}'] == min(sizes[name], norms)
  of_random = jax.tree_util.tree_leaves_with_path(masks['random, as many as connection'])
  assert not any(leaf.any() for path, leaf in of_random if '_connection' in path_name(path))
  module = {'mtp': {'e_proj': np.zeros((8, 8))}}
  with_module = subsets(params | module, {'maps': adaptation.PATTERNS['maps']}, {'maps': 9}, seed=1)
  assert not with_module['random, as many as maps']['mtp']['e_proj'].any()
  plain_arm = {name: leaf for name, leaf in params.items() if name != 'layers'}
  alone = subsets(plain_arm, adaptation.PATTERNS, {'maps': 9, 'connection': 11}, seed=1)
  assert {name: size(mask) for name, mask in alone.items()} == {
    **{'norms, as many as maps': 8, 'random, as many as maps': 9},
    **{'norms, as many as connection': 8, 'random, as many as connection': 11},
  }


def test_rates_come_from_the_documents_to_fit_alone(model, text, monkeypatch):
  """Those that would be best on the reported documents are not taken; a loss that is not finite is none."""
  c, params = model
  report = Documents(text.batch, text.bytes_D + 1)
  asked = []

  def fake(params, mask, scale, lr, decay, batch, model):
    asked.append((lr, decay, batch is report.batch))
    best = lr == 0.1 and decay
    nats = 8 + (batch is not fit.batch) if best else 10 + (lr if batch is fit.batch else -lr)
    sums = np.full((3, M), nats if lr != 1.0 else np.nan), np.ones((3, M))
    return sums, jax.tree.map(jnp.ones_like, params)

  fit = Documents({name: value.copy() for name, value in text.batch.items()}, text.bytes_D)
  monkeypatch.setattr(adaptation, 'read', fake)
  mask = {'maps': matching(adaptation.PATTERNS['maps'], params)}
  rows = pd.DataFrame(adaptation.adapted(params, c, mask, fit, report, 'sgd'))
  assert set(zip(rows['lr'], rows['decay'], strict=True)) == {(0.1, 0.05)}
  assert rows['nats'].tolist() == [27.0] * 3 and rows['nats_before'].tolist() == [30.0] * 3
  assert rows['bytes'].tolist() == (text.bytes_D + 1).tolist()
  assert [one for one in asked if one[2]] == [(0.0, 0.0, True), (0.1, 0.05, True)], 'one look at the reported'


def test_intervals_are_of_paired_documents():
  """Documents differ by far more than the gain, which is the same in each: its interval has no width."""
  rows = []
  for subset, seed, d in itertools.product(('maps', 'random, as many as maps'), (0, 1), range(5)):
    gain = 0.1 * (seed + 1) if subset == 'maps' else 0.05
    row = {'arm': 'mhc', 'seed': seed, 'subset': subset, 'scalars': 3, 'lr': 0.1, 'decay': 0.0, 'document': d}
    rows.append(row | {'bytes': 10.0, 'nats_before': 20.0 + 7 * d, 'nats': 20.0 + 7 * d - 10 * gain})
  found = summary(pd.DataFrame(rows), draws=50).set_index('subset')
  maps = found.loc['maps']
  assert maps['change'] == pytest.approx(-0.15 / np.log(2)) and maps['before'] == pytest.approx(
    3.4 / np.log(2)
  )
  assert maps['low'] == pytest.approx(maps['change']) and maps['high'] == pytest.approx(maps['change'])
  assert maps['minus_random'] == pytest.approx(-0.1 / np.log(2)) == pytest.approx(maps['minus_random_high'])
  assert np.isnan(found['minus_random'].iloc[1]) and found['documents'].tolist() == [5, 5]
  unequal = pd.DataFrame(rows)
  unequal.loc[unequal['document'] == 0, 'nats'] += 5
  ends = summary(unequal, draws=500).iloc[0]
  assert ends['low'] < ends['change'] < ends['high'] and ends['high'] - ends['low'] > 0.1


def test_a_finished_run_from_its_folder_to_the_figure(tmp_path, capsys):
  words, folder = random.Random(0), tmp_path / 'text'
  folder.mkdir()
  for index in range(60):
    (folder / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(60)))
  c = config(data__name=f'text_files:{folder}', data__dir=str(tmp_path), duration__steps=2)
  run_id = resolve(c, '').run_id
  status = train.run(c, str(tmp_path / 'sweep' / run_id), quiet=True)
  assert status['state'] == 'finished'
  plan = {'sweep': 's', 'options': [], 'runs': [{'run_id': run_id, 'arm': 'residual'}]}
  (tmp_path / 'sweep' / 'plan.json').write_text(json.dumps(plan))
  arguments = [str(tmp_path / 'sweep'), '--documents', '2', '--segments', '2', '--out', str(tmp_path / 'out')]
  with pytest.raises(ConfigError, match='no parameter of any arm matches maps'):
    adaptation.main(arguments)
  assert adaptation.main([*arguments, '--pattern', '(.*/)?final_norm']) == 0
  rows = read_rows(tmp_path / 'out')
  assert rows['subset'].nunique() == 3 and set(rows['scalars']) == {16} and (rows['tokens'] == 32).all()
  assert plots.main(['adaptation', str(tmp_path / 'out')]) == 0
  assert (
    tmp_path / 'out' / 'figures' / 'adaptation.png'
  ).is_file() and 'minus_random' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('arguments', 'said'),
  [
    (['--documents', '1'], '--documents 1: at least 2'),
    (['--pattern', '('], 'is not a regular expression'),
    ([], 'plan.json is missing'),
  ],
)
def test_mistakes_are_one_line(tmp_path, arguments, said):
  with pytest.raises(ConfigError, match=said):
    adaptation.main([str(tmp_path), *arguments])
