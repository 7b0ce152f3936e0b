"""Tokenizers of libraries: from text to training, evaluation, samples and sweeps; exact bits per byte."""

import importlib.util
import json
import math
import random
import shutil

import numpy as np
import pytest

from experiments import sweep, workers
from mhc_jax import evaluate, tokenizer_training, train
from mhc_jax.config_file import parse
from mhc_jax.data import BYTES, corpus_of, load_corpus, tokenizer_libraries, tokenizer_of, windows
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve, run_id

TEXTS = ['déjà vu 字 naïve', 'a' * 50, ' \n\t ', '🙂🙂 x', 'Ünïcödé <|bos|> text', 'don\'t 1234 "x"']
INVALID = [b'\xff', b'ab\xe2\x82 caf\xc3\xa9 \xff\xfe', 'é字🙂'.encode()[:-1], b'\xed\xa0\x80 surrogate']


def needs(package):
  return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f'needs {package}')


pytestmark = needs('tokenizers')


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """200 small documents."""
  folder, words = tmp_path_factory.mktemp('texts') / 'text', random.Random(0)
  folder.mkdir()
  for index in range(200):
    (folder / f'{index}.txt').write_text(
      ' '.join(''.join(words.choices('abcdéfgh', k=3)) for _ in range(200))
    )
  return folder


@pytest.fixture(scope='module')
def trained(texts):
  """A tokenizer.json of 300 tokens, trained on them by the command."""
  out = texts.parent / 'tokenizer.json'
  arguments = ['--data', f'text_files:{texts}', '--vocab', '300', '--out', str(out)]
  assert tokenizer_training.main(['train', *arguments, '--data-dir', str(texts.parent / 'data')]) == 0
  return out


@pytest.fixture
def overrides(texts, trained):
  """Of a run of two updates on the documents in these tokens."""
  data = {'name': f'text_files:{texts}', 'dir': texts.parent / 'data', 'tokenizer': trained}
  fields = [f'data.{name}={value}' for name, value in data.items()]
  fields += ['duration.steps=2', 'evaluation.sequences=16', 'evaluation.batch_size=16']
  return [f'--config.{field}' for field in (*fields, 'log.diagnostics_every_steps=None')]


def smoke(*overrides):
  return parse('configs/laptop.py:smoke', list(overrides))


def kinds(trained):
  """A tokenizer of each library that is here."""
  yield tokenizer_of(str(trained))
  if importlib.util.find_spec('tiktoken'):
    yield tokenizer_of('tiktoken:tiny')
  if importlib.util.find_spec('sentencepiece'):
    yield tokenizer_of(f'sentencepiece:{trained.parent}/model.model')


@pytest.fixture
def tokenizers(texts, trained, monkeypatch):
  """One of each library that is here."""
  if importlib.util.find_spec('tiktoken'):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b'aa': 256, b'aaa': 257, 'é'.encode(): 258}
    special = {'<|endoftext|>': 259}
    tiny = tiktoken.Encoding('tiny', pat_str=r'\S+|\s+', mergeable_ranks=ranks, special_tokens=special)
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: tiny)
  if importlib.util.find_spec('sentencepiece'):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
      input=str(texts / '0.txt'), model_prefix=str(texts.parent / 'model'), vocab_size=280,
      byte_fallback=True, character_coverage=1.0, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
  tokenizer_libraries._of_tiktoken.cache_clear()
  return list(kinds(trained))


def test_bytes_of_tokens_sum_to_those_of_the_document(tokenizers):
  """Also of what is no UTF-8; and tokens are as many."""
  for tokenizer in tokenizers:
    for text in [*(text.encode() for text in TEXTS), *INVALID]:
      ids, ends = tokenizer.encode_many(
        np.frombuffer(text + text, np.uint8), np.array([len(text)] * 2 + [2 * len(text)])
      )
      lengths = tokenizer.byte_lengths(text)
      assert len(lengths) == ends[0] == len(tokenizer.encode(text)), (tokenizer.name, text)
      assert lengths.sum() == (len(text) if len(lengths) else 0) and (lengths >= 0).all()
      assert ends.tolist() == [ends[0], ends[0], 2 * ends[0]] and len(ids) == ends[-1]
      assert not len(ids) or ids.max() < tokenizer.vocab_size
      assert tokenizer.bos not in ids  # though a document spells it


def test_text_comes_back(tokenizers):
  for tokenizer in tokenizers[:2]:  # sentencepiece normalises
    for text in TEXTS:
      assert tokenizer.decode([tokenizer.bos, *tokenizer.encode(text)]) == text


def test_each_byte_is_counted_where_its_token_ends(trained):
  tokenizer = tokenizer_of(str(trained))
  text = 'abc é 字 xyz'
  ids, lengths = tokenizer.encode(text), tokenizer.byte_lengths(text.encode())
  decoded = [tokenizer.decode([token]) for token in ids]
  whole = ['\ufffd' not in token for token in decoded]  # tokens of part of a character decode to that
  sizes = np.array([len(token.encode()) for token in decoded])
  np.testing.assert_array_equal(lengths[whole], sizes[whole])
  assert sum(whole) < len(ids) and lengths.sum() == len(text.encode())


@pytest.mark.slow
def test_two_updates_evaluation_sample_and_sweep(overrides, texts, tmp_path, monkeypatch, capsys):
  config, workdir = smoke(*overrides), str(tmp_path / 'run')
  status = train.run(config, workdir, quiet=True)
  resolved, model, step, params = evaluate.load(workdir)
  assert (step, model.vocab_size) == (2, 300)
  corpus = corpus_of(config.data)
  final, data = status['final'], resolved['data']
  # The bytes behind the scored targets, by decoding every one of them: no character is cut by these windows.
  split = windows(corpus.validation, corpus.tokenizer.bos, data['seq_len'], data['cross_documents'])
  assert len(corpus.byte_lengths) == len(corpus.validation)
  per_token = evaluate.validation_bytes_per_token(resolved, split, corpus)
  batches = evaluate.validation_batches(split, 16, 1)
  assert (batches[0]['weights'] == 0).any()  # beginnings of documents, which count for nothing
  targets = batches[0]['targets'][batches[0]['weights'] > 0]
  decoded = b''.join(corpus.tokenizer.decode([token]).encode() for token in targets)
  assert b'\xef\xbf\xbd' not in decoded and per_token == pytest.approx(len(decoded) / len(targets), rel=1e-12)
  assert per_token > 1.5
  assert final['validation/bits_per_byte'] == pytest.approx(
    final['validation/loss'] / math.log(2) / per_token, rel=1e-9
  )
  assert evaluate.validation(resolved, model, params, corpus) == pytest.approx(
    {name: value for name, value in final.items() if name.startswith('validation/')}, rel=1e-6
  )
  assert evaluate.main([workdir, '--prompt', 'aaa', '--bytes', '9', '--temperature', '0']) == 0
  assert 'aaa' in capsys.readouterr().out
  monkeypatch.setitem(sweep.EXPERIMENTS, 'one', lambda arg: [config])
  [planned] = sweep.plan('one')[1]
  assert planned.run_id == run_id(resolved)
  assert workers.run_group([config], str(tmp_path / 'sweep'), quiet=True) == [(planned.run_id, 'finished')]


def test_ids_and_digests_are_of_the_content_not_of_the_path(overrides, trained, tmp_path):
  moved, other = tmp_path / 'moved.json', tmp_path / 'other.json'
  shutil.copy(trained, moved)
  changed = json.loads(trained.read_text())
  first, second = changed['model']['merges'][-2:]
  changed['model']['merges'][-2:] = [second, first]
  other.write_text(json.dumps(changed))
  found = []
  for path in (trained, moved, other, None):
    config = smoke(*overrides, f'--config.data.tokenizer={path}')
    digest = corpus_of(config.data).digest
    found.append((digest, resolve(config, digest).run_id))
  assert found[0] == found[1] and len(set(found)) == 3
  loaded = load_corpus(config.data.name, config.data.dir)
  with pytest.raises(ConfigError, match='the corpus is in tokens of bytes, not tokenizers-300-'):
    train.run(smoke(*overrides), str(tmp_path / 'run'), loaded)


def test_training_is_deterministic_and_leaves_validation_out(texts, trained, tmp_path):
  arguments = ['train', '--data', f'text_files:{texts}', '--vocab', '300', '--data-dir', str(tmp_path)]
  assert tokenizer_training.main([*arguments, '--out', str(tmp_path / 'again.json')]) == 0
  assert (tmp_path / 'again.json').read_bytes() == trained.read_bytes()
  validation = BYTES.decode(load_corpus(f'text_files:{texts}', str(tmp_path)).validation)
  marked = next(path for path in texts.iterdir() if path.read_text() in validation)
  try:
    text = marked.read_text()
    marked.write_text('QQQQ' * len(text))  # the split is by path
    assert tokenizer_training.main([*arguments, '--out', str(tmp_path / 'again.json')]) == 0
    assert (tmp_path / 'again.json').read_bytes() == trained.read_bytes()
  finally:
    marked.write_text(text)


def test_large_vocabularies_have_wider_tokens(texts, trained, tmp_path):
  made = json.loads(trained.read_text())
  made['model']['vocab']['never in the text'] = 70000
  (tmp_path / 'large.json').write_text(json.dumps(made))
  large = tokenizer_of(str(tmp_path / 'large.json'))
  found = [load_corpus(f'text_files:{texts}', str(tmp_path), t) for t in (large, tokenizer_of(str(trained)))]
  assert [corpus.train.dtype for corpus in found] == [np.uint32, np.uint16]
  np.testing.assert_array_equal(found[0].train, found[1].train)


def test_a_vocabulary_without_a_beginning_gets_one(trained, tmp_path):
  made = json.loads(trained.read_text().replace('<|bos|>', '<|none|>'))
  (tmp_path / 'none.json').write_text(json.dumps(made))
  found = tokenizer_of(str(tmp_path / 'none.json'))
  assert (found.vocab_size, found.bos) == (301, 300)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('bpe', r"data\.tokenizer='bpe': no such file; takes bytes, a tokenizer\.json"),
    ('{folder}', 'Is a directory|no tokenizer.json'),
    ('{folder}/wrong.json', r"no tokenizer\.json of Hugging Face's tokenizers"),
    ('ftp9://x/tokenizer.json', 'ftp9'),
    ('sentencepiece:{folder}/wrong.json', 'is no model of sentencepiece|needs the package'),
    ('tiktoken:nothing', 'tiktoken:nothing|needs the package'),
  ],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, name, message):
  (tmp_path / 'wrong.json').write_text('{}')
  with pytest.raises(ConfigError, match=message) as error:
    tokenizer_of(name.format(folder=tmp_path))
  assert '\n' not in str(error.value)


def test_a_missing_package_says_what_to_install(trained, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
  tokenizer_libraries._of_tokenizers.cache_clear()
  with pytest.raises(ConfigError, match=r'pip install "mhc_jax\[text\]"'):
    tokenizer_of(str(trained))


def test_a_plan_with_a_vocabulary_reads_no_tokenizer(tmp_path):
  absent = f'--config.data.tokenizer={tmp_path}/absent.json'
  assert resolve(smoke(absent, '--config.model.vocab_size=32768'), '').model.vocab_size == 32768
  with pytest.raises(ConfigError, match='no such file'):
    resolve(smoke(absent), '')


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ([], 'exactly one of --data and --config'),
    (['--data', 'x', '--vocab', '10'], '--vocab 10: from 258'),
    (['--data', 'x', '--sample', '0'], '--sample 0: at least'),
    (['--data', 'text_files:{folder}/none'], 'no such file or folder'),
    (['--data', 'x', '--out', '{folder}/a/b.json'], 'there is no such folder'),
  ],
)
def test_mistakes_of_the_command_are_one_line(tmp_path, arguments, message):
  given = ['train', '--out', str(tmp_path / 'out.json'), '--data-dir', str(tmp_path)]
  with pytest.raises(ConfigError, match=message):
    tokenizer_training.main(given + [argument.format(folder=tmp_path) for argument in arguments])
