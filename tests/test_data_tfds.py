"""Corpora from TFDS's own datasets: mocked ones, and a toy builder that is really prepared."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils.lazy_imports_utils import tensorflow

from mhc_jax.data import BYTES, load_corpus, token_files
from mhc_jax.errors import ConfigError

SPLITS = {
  'all_splits': {'train': 40, 'validation': 5, 'test': 7},
  'no_validation': {'train': 40, 'test': 7},
  'train_only': {'train': 400},
  'one_document': {'train': 1},
  'test_only': {'test': 7},
  'tensorflow': {'train': 40},
  'pictures': {'train': 2},
  'two_texts': {'train': 2},
  'other_name': {'train': 400},
  'broken': {'train': 2},
}


def text_of(split: str, index: int) -> bytes:
  return f'{split} {index}: '.encode() + b'\xff\0 and so on' * 20


class MhcToy(tfds.core.GeneratorBasedBuilder):
  """Small datasets, one by config."""

  VERSION = tfds.core.Version('1.0.0')
  BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SPLITS]  # noqa: RUF012

  def _info(self):
    text, number = tfds.features.Text(), tfds.features.Scalar(dtype=np.int64)
    features = {
      'pictures': {'image': tfds.features.Image(shape=(2, 2, 1)), 'file_name': text},
      'two_texts': {'question': text, 'answer': text, 'number': number},
      'other_name': {'number': number, 'article': text, 'url': np.str_},
    }.get(self.builder_config.name, {'title': text, 'text': text})
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    if self.builder_config.name == 'tensorflow':
      tensorflow.io.gfile.exists('somewhere')
    if self.builder_config.name == 'broken':
      raise RuntimeError('the source is gone\nand more lines')
    splits = SPLITS[self.builder_config.name]
    return {split: self._generate_examples(split, count) for split, count in splits.items()}

  def _generate_examples(self, split, count):
    for index in range(count):
      text = text_of(split, index)
      example = {'title': b'a title', 'text': text, 'number': 1, 'article': text, 'url': 'x'}
      yield index, {key: example[key] for key in self.info.features}


def documents(stream: np.ndarray) -> list[bytes]:
  parts = np.split(stream, np.flatnonzero(stream == BYTES.bos))[1:]
  return [part[1:].astype(np.uint8).tobytes() for part in parts]


def load(config: str, data_dir: Path) -> tuple[list[bytes], list[bytes]]:
  corpus = load_corpus(f'mhc_toy/{config}', str(data_dir))
  return documents(corpus.train), documents(corpus.validation)


@pytest.mark.parametrize(('config', 'held_out'), [('all_splits', 'validation'), ('no_validation', 'test')])
def test_given_splits_are_used(tmp_path, config, held_out):
  train, validation = load(config, tmp_path)
  assert sorted(train) == sorted(text_of('train', i) for i in range(40))
  assert sorted(validation) == sorted(text_of(held_out, i) for i in range(SPLITS[config][held_out]))


@pytest.mark.parametrize('config', ['train_only', 'other_name'])
def test_train_is_split_where_nothing_is_held_out(tmp_path, config):
  train, validation = load(config, tmp_path)
  assert sorted(train + validation) == sorted(text_of('train', i) for i in range(400))
  assert 5 <= len(validation) <= 40 and not set(train) & set(validation)


def test_a_single_document_is_split_at_its_end(tmp_path):
  [head], [tail] = load('one_document', tmp_path)
  assert head + tail == text_of('train', 0)
  assert len(tail) == round(0.05 * len(head + tail))


def test_second_load_tokenises_nothing(tmp_path, monkeypatch):
  first = load_corpus('mhc_toy/all_splits', str(tmp_path))
  monkeypatch.setattr(token_files, 'write', None)
  for name in ('mhc_toy/all_splits', 'mhc_toy/all_splits:1.0.0'):
    second = load_corpus(name, str(tmp_path))
    assert second.digest == first.digest
    np.testing.assert_array_equal(second.train, first.train)


def test_dataset_prepared_anew_is_tokenised_anew(tmp_path, monkeypatch):
  first = load_corpus('mhc_toy/all_splits', str(tmp_path))
  builder = tfds.builder('mhc_toy/all_splits', data_dir=tmp_path)
  builder.data_path.rmtree()
  monkeypatch.setitem(globals(), 'text_of', lambda split, index: b'other %d' % index)
  assert load_corpus('mhc_toy/all_splits', str(tmp_path)).digest != first.digest


@pytest.mark.skipif(importlib.util.find_spec('tensorflow') is not None, reason='TensorFlow is installed here')
def test_builder_that_needs_tensorflow_says_so(tmp_path, capfd):
  with pytest.raises(ConfigError, match='needs your own TensorFlow, which is not') as error:
    load_corpus('mhc_toy/tensorflow', str(tmp_path))
  assert '\n' not in str(error.value)
  assert 'TensorFlow' not in capfd.readouterr().out


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('lmb1', 'TFDS has no such dataset; did you mean lm1b'),
    ('python_stdlb', 'did you mean python_stdlib'),
    ('mhc_toy/no_such_config', 'no_such_config not found'),
    ('mhc_toy/all_splits:9.9.9', r'cannot be loaded at version 9\.9\.9'),
    ('mhc_toy/pictures', r"needs a feature 'text' .* image \(Image\), file_name \(Text\)"),
    ('mhc_toy/two_texts', r'single text feature; .* question \(Text\), answer \(Text\)'),
    ('mhc_toy/test_only', "no split 'train', only test"),
    ('mhc_toy/broken', 'TFDS cannot prepare it: RuntimeError: the source is gone$'),
    ('../up', 'TFDS cannot prepare it'),
    ('', 'TFDS cannot prepare it'),
  ],
)
def test_refusals(tmp_path, name, message):
  with pytest.raises(ConfigError, match=message) as error:
    load_corpus(name, str(tmp_path))
  assert '\n' not in str(error.value)
  assert not list(tmp_path.rglob('corpus.json'))


def test_tfrecord_of_another_tool_is_refused(tmp_path):
  load_corpus('mhc_toy/all_splits', str(tmp_path))
  [info] = tmp_path.rglob('dataset_info.json')
  info.write_text(info.read_text().replace('array_record', 'tfrecord'))
  with pytest.raises(ConfigError, match=r'without random access .* choose another data_dir'):
    load_corpus('mhc_toy/all_splits', str(tmp_path))


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros_inside(path: Path) -> None:
  data = path.read_bytes()
  path.write_bytes(data[:1000] + bytes(8000) + data[9000:])


def zeros_at_the_start(path: Path) -> None:
  path.write_bytes(bytes(200) + path.read_bytes()[200:])


@pytest.mark.parametrize('damage', [cut, zeros_inside, zeros_at_the_start, Path.unlink])
def test_damaged_data_set_is_refused_in_one_line(tmp_path, damage):
  load_corpus('mhc_toy/train_only', str(tmp_path))
  [records] = (path for path in tmp_path.rglob('*array_record*') if path.is_file())
  damage(records)
  with pytest.raises(ConfigError, match=rf'{records.parent} is damaged .*: delete it') as error:
    load_corpus('mhc_toy/train_only', str(tmp_path))
  assert '\n' not in str(error.value)
  assert len(list(tmp_path.rglob('corpus.json'))) == 1
  shutil.rmtree(records.parent)
  load_corpus('mhc_toy/train_only', str(tmp_path))


@pytest.mark.parametrize('name', ['lm1b', 'tiny_shakespeare'])
def test_mocked_datasets(tmp_path, name):
  with tfds.testing.mock_data(num_examples=300):
    corpus = load_corpus(name, str(tmp_path))
    source = tfds.data_source(name, split='train')
    texts = [source[i]['text'].encode() for i in range(300)]
  train, validation = documents(corpus.train), documents(corpus.validation)
  assert sorted(train + validation) == sorted(texts)
  assert 0 < len(validation) < 60


def test_mocked_dataset_with_its_splits(tmp_path):
  metadata = tmp_path / 'metadata' / 'lm1b' / '1.1.0'
  metadata.mkdir(parents=True)
  splits = [
    {'name': name, 'numBytes': '9', 'shardLengths': ['30'], 'filepathTemplate': '{DATASET}'}
    for name in ('train', 'test')
  ]
  info = {'name': 'lm1b', 'version': '1.1.0', 'fileFormat': 'array_record', 'splits': splits}
  (metadata / 'dataset_info.json').write_text(json.dumps(info))
  policy = tfds.testing.MockPolicy.USE_FILES
  with tfds.testing.mock_data(num_examples=30, policy=policy, data_dir=str(tmp_path / 'metadata')):
    corpus = load_corpus('lm1b', str(tmp_path / 'data'))
  assert documents(corpus.train) == documents(corpus.validation)  # mocked splits are equal
  assert len(documents(corpus.train)) == 30
