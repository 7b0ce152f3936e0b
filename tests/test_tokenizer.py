"""Another tokenizer is an entry of TOKENIZERS: from text to training, evaluation, samples and sweeps."""

import dataclasses
import math
import random

import numpy as np
import pytest

from experiments import sweep, workers
from mhc_jax import evaluate, train
from mhc_jax.config_file import parse
from mhc_jax.data import BYTES, Tokenizer, load_corpus, tokenizer, tokenizer_of
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve, run_id

LETTERS = b'abcdefgh .txprints'  # 18: a token is a pair of them, 1 + 18 * first + second; 0 is BOS


def _encode(text):
  text = text.encode() if isinstance(text, str) else text
  places = np.array([LETTERS.index(byte) for byte in text + b' ' * (len(text) % 2)], np.uint16).reshape(-1, 2)
  return 1 + len(LETTERS) * places[:, 0] + places[:, 1]


def _decode(ids):
  pairs = [divmod(min(int(i), 18**2) - 1, len(LETTERS)) for i in ids if i]
  return bytes(LETTERS[place] for pair in pairs for place in pair).decode()


PAIRS = Tokenizer('pairs', 400, 0, 2.0, _encode, _decode)


@pytest.fixture
def pairs(tmp_path, monkeypatch):
  """Overrides of a run of two updates on a small corpus in pairs."""
  monkeypatch.setitem(tokenizer.TOKENIZERS, 'pairs', PAIRS)
  words = random.Random(0)
  (tmp_path / 'text').mkdir()
  for index in range(200):
    (tmp_path / 'text' / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(60)))
  overrides = [f'--config.data.name=text_files:{tmp_path}/text', f'--config.data.dir={tmp_path}/data']
  overrides += [
    '--config.data.tokenizer=pairs',
    '--config.duration.steps=2',
    '--config.evaluation.sequences=4',
  ]
  return [*overrides, '--config.evaluation.batch_size=4', '--config.log.diagnostics_every_steps=None']


def smoke(*overrides):
  return parse('configs/laptop.py:smoke', list(overrides))


def test_two_updates_evaluation_sample_and_sweep(pairs, tmp_path, monkeypatch, capsys):
  config, workdir = smoke(*pairs), str(tmp_path / 'run')
  status = train.run(config, workdir, quiet=True)
  [folder] = (tmp_path / 'data' / 'mhc_jax').glob('text_files-*/')
  assert folder.name.startswith('text_files-pairs-')
  resolved, model, step, params = evaluate.load(workdir)
  assert (step, model.vocab_size, resolved['data']['tokenizer']) == (2, 400, 'pairs')
  final = status['final']
  assert final['validation/bits_per_byte'] == pytest.approx(final['validation/loss'] / math.log(2) / 2)
  corpus = load_corpus(config.data.name, config.data.dir, PAIRS)
  assert evaluate.validation(resolved, model, params, corpus) == pytest.approx(
    {name: value for name, value in final.items() if name.startswith('validation/')}, rel=1e-6
  )
  for split in train.load_data(resolve(config, corpus.digest), corpus):
    batch = split.take(range(len(split)))
    np.testing.assert_array_equal(batch['weights'] == 0, batch['targets'] == 0)
    assert batch['segments'].max() > 0
  assert evaluate.main([workdir, '--prompt', 'abcd', '--bytes', '6', '--temperature', '0']) == 0
  sample = capsys.readouterr().out.splitlines()[-1]
  assert sample.startswith('abcd') and len(sample) == 4 + 6 and set(sample.encode()) <= set(LETTERS)
  for sign in (1e6, -1e6):  # however likely BOS is, which decoding would leave out
    likely = {**params, 'unembedding': params['unembedding'].at[:, 0].multiply(sign)}
    assert len(evaluate.sample(model, likely, PAIRS, 'ab', 2, 16, 0.0, 0)) == 2 * (1 + 2)
  monkeypatch.setitem(sweep.EXPERIMENTS, 'one', lambda arg: [config])
  [planned] = sweep.plan('one')[1]
  assert planned.run_id == run_id(resolved)
  assert workers.run_group([config], str(tmp_path / 'sweep'), quiet=True) == [(planned.run_id, 'finished')]


def test_ids_folders_and_digests_tell_tokenizers_apart(pairs, tmp_path):
  ids, digests = set(), set()
  for name in (None, 'bytes', 'pairs'):
    config = smoke(*pairs, f'--config.data.tokenizer={name}')
    loaded = load_corpus(config.data.name, config.data.dir, tokenizer_of(name))
    ids.add(resolve(config, 'the same').run_id)
    digests.add(loaded.digest)
  assert len(ids) == len(digests) == 2
  with pytest.raises(ConfigError, match='the corpus is in tokens of pairs, not bytes'):
    train.run(smoke(*pairs, '--config.data.tokenizer=None'), str(tmp_path / 'run'), loaded)


def test_unknown_and_too_large_tokenizers_are_refused(pairs):
  with pytest.raises(ConfigError, match=r"data\.tokenizer must be one of bytes, pairs, got 'bpe'"):
    resolve(smoke('--config.data.tokenizer=bpe'), '')
  name, folder = (override.partition('=')[2] for override in pairs[:2])
  with pytest.raises(ConfigError, match='65537 tokens'):
    load_corpus(name, folder, dataclasses.replace(BYTES, name='huge', vocab_size=2**16 + 1))
