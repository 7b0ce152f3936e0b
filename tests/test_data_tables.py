"""Parquet, JSON lines and Arrow: equal text gives equal tokens, in little memory, killed or not."""

import bz2
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from mhc_jax.data import BYTES, load_corpus, open_source, source, splits, tables, token_files
from mhc_jax.errors import ConfigError, StorageError


@pytest.fixture(scope='module')
def texts() -> list[bytes]:
  """Documents of 0 bytes to 40 kB, equal ones, and some that are no UTF-8."""
  rng = np.random.default_rng(0)
  sizes = [0, 1, 40_000, *rng.integers(0, 3, 50), *np.exp(rng.normal(4, 1.5, 400)).astype(int)]
  letters = np.frombuffer(b'abc \n"\\\xc3\xa9', np.uint8)
  made = [rng.choice(letters, size).tobytes() for size in sizes]
  return [*made, made[9], b'\xff\xfe no text', 'é字🙂\x00'.encode(), made[2]]


def clean(texts: list[bytes]) -> list[str]:
  return [text.decode('utf-8', errors='replace') for text in texts]


def write_parquet(folder: Path, texts: list[bytes]) -> str:
  """Two files, small row groups, nulls for empty documents, the column binary."""
  folder.mkdir(parents=True, exist_ok=True)
  half = len(texts) // 2
  for name, part in (('b', texts[half:]), ('a', texts[:half])):
    column = pa.array([text or None for text in part], pa.binary())
    table = pa.table({'id': range(len(part)), 'text': column})
    pa.parquet.write_table(table, folder / f'{name}.parquet', row_group_size=70)
  (folder / 'readme.md').write_text('# not read')
  return f'parquet:{folder}'


def write_jsonl(folder: Path, texts: list[bytes], how: str = '') -> str:
  folder.mkdir(parents=True, exist_ok=True)
  lines = b''
  for index, text in enumerate(texts):  # as programs write it that do not look: the raw bytes
    raw = json.dumps({'id': index, 'text': text.decode('utf-8', 'surrogateescape')}, ensure_ascii=False)
    lines += raw.encode('utf-8', 'surrogateescape') + (b'\n\n' if index % 9 == 0 else b'\n')
  lines = lines.rstrip(b'\n')  # the last line ends with the file
  half = lines.index(b'\n', len(lines) // 3) + 1
  for name, part in (('b', lines[half:]), ('a', lines[:half])):
    if how == '.gz':  # two members
      part = gzip.compress(part[:1000]) + gzip.compress(part[1000:])
    if how == '.bz2':
      part = bz2.compress(part)
    if how == '.zst':
      part = pa.compress(part, 'zstd', asbytes=True)
    (folder / f'{name}.jsonl{how}').write_bytes(part)
  return f'jsonl:{folder}'


def write_arrow(folder: Path, texts: list[bytes], make=pa.ipc.new_file) -> str:
  folder.mkdir(parents=True, exist_ok=True)
  column = pa.array(texts, pa.large_binary())
  table = pa.table({'text': column, 'id': range(len(texts))})
  with pa.OSFile(str(folder / 'a.arrow'), 'wb') as file, make(file, table.schema) as writer:
    writer.write_table(table, max_chunksize=100)
  return f'arrow:{folder}'


WRITERS = {
  'parquet': write_parquet,
  **{
    how or 'jsonl': lambda folder, texts, how=how: write_jsonl(folder, texts, how)
    for how in ('', '.gz', '.bz2', '.zst')
  },
  'file': write_arrow,
  'stream': lambda folder, texts: write_arrow(folder, texts, pa.ipc.new_stream),
}


def by_loop(texts: list[bytes]) -> tuple[list[int], list[int]]:
  """The streams, document by document."""
  streams = [], []
  for text in texts:
    if text:
      streams[splits.in_validation(text)].extend([BYTES.bos, *text])
  return streams


@pytest.mark.parametrize(('batch_bytes', 'short'), [(1 << 20, 1), (700, 1000)])
@pytest.mark.parametrize('kind', WRITERS)
def test_every_format_gives_the_streams_of_a_loop(texts, tmp_path, monkeypatch, kind, batch_bytes, short):
  monkeypatch.setattr(token_files, 'SHORT', short)
  for module in (source, tables):
    monkeypatch.setattr(module, 'BATCH_BYTES', batch_bytes)
  found = load_corpus(WRITERS[kind](tmp_path / 'text', texts), str(tmp_path / 'data'))
  train, validation = by_loop(texts)
  np.testing.assert_array_equal(found.train, train)
  np.testing.assert_array_equal(found.validation, validation)
  assert min(len(train), len(validation)) > 1000 / 20


@pytest.mark.parametrize('kind', ['parquet', 'jsonl', '.gz', 'stream'])
def test_reading_goes_on_from_every_place(texts, tmp_path, monkeypatch, kind):
  for module in (source, tables):
    monkeypatch.setattr(module, 'BATCH_BYTES', 5000)
  found = open_source(WRITERS[kind](tmp_path / 'text', texts), tmp_path)
  batches = list(found.read(None, False))
  assert len(batches) > 4 and [b.done for b in batches] == sorted(b.done for b in batches)
  assert 0.9 * found.size < batches[-1].done <= found.size  # a stream ends with a mark
  for index, batch in enumerate(batches):
    place = json.loads(json.dumps(batch.at))
    rest = [later.text.tobytes() for later in found.read(place, False)]
    assert b''.join(rest) == b''.join(later.text.tobytes() for later in batches[index + 1 :])


KILLED = """
import os, signal, sys
from mhc_jax.data import load_corpus, source, tables, token_files

name, data, at = sys.argv[1:]
source.BATCH_BYTES = tables.BATCH_BYTES = 3000
token_files._SAVE_SECONDS = 0.0
append, calls = token_files._append, 0

def killing(*rest):
  global calls
  calls += 1
  if calls == int(at):
    append(rest[0], rest[1], rest[2], None)  # written, but its place not saved
    for file, _ in rest[1].values():
      file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
  append(*rest)

token_files._append = killing
print(load_corpus(name, data).digest)
"""


@pytest.fixture(scope='module', params=['parquet', 'jsonl'])
def killed(request, texts, tmp_path_factory):
  """A preparation killed on its way: (name, what it left, the digest of a whole one)."""
  folder = tmp_path_factory.mktemp('killed')
  name = WRITERS[request.param](folder / 'text', texts)
  expected = load_corpus(name, str(folder / 'whole')).digest
  command = [sys.executable, '-c', KILLED, name, str(folder / 'data'), '6']
  assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
  return name, folder / 'data', expected


def test_a_killed_preparation_goes_on_to_the_same_digest(killed, tmp_path, monkeypatch):
  name, left, expected = killed
  data = shutil.copytree(left, tmp_path / 'data')
  [folder] = data.glob('mhc_jax/*/')
  state = json.loads((folder / 'unfinished.json').read_text())
  assert state['at'] and state['files']['train.tokens'][0] > 0
  starts, start = [], token_files._start
  monkeypatch.setattr(token_files, '_start', lambda *rest: starts.append(start(*rest)) or starts[-1])
  assert load_corpus(name, str(data)).digest == expected
  assert starts[0][0] == state['at'], 'it began anew'
  assert not (folder / 'unfinished.json').exists()


@pytest.mark.parametrize('damage', ['tokens', 'shorter', 'place', 'json'])
def test_what_a_killed_one_left_is_not_trusted_where_it_is_damaged(killed, tmp_path, damage):
  name, left, expected = killed
  data = shutil.copytree(left, tmp_path / 'data')
  [folder] = data.glob('mhc_jax/*/')
  stream, state = folder / 'train.tokens', folder / 'unfinished.json'
  if damage == 'tokens':
    stream.write_bytes(b'\1' + stream.read_bytes()[1:])
  elif damage == 'shorter':
    os.truncate(stream, 10)
  else:
    state.write_text('{"at": 1' if damage == 'json' else '{"at": [0, 1], "tails": false, "files": {}}')
  assert load_corpus(name, str(data)).digest == expected


def test_far_files_are_read_where_they_are(texts, tmp_path, monkeypatch):
  """Through fsspec, as gs://, s3:// and hf:// are; a changed one is another corpus, a dead store one line."""
  local = write_parquet(tmp_path / 'text', texts)
  store = fsspec.filesystem('memory')
  for path in (tmp_path / 'text').iterdir():
    store.pipe(f'/bucket/text/{path.name}', path.read_bytes())
  data = str(tmp_path / 'data')
  found = load_corpus('parquet:memory://bucket/text/*.parquet', data)
  assert found.digest == load_corpus(local, data).digest
  assert not list(Path(data).rglob('*.parquet'))
  opened, real = [], type(store).open
  monkeypatch.setattr(type(store), 'open', lambda self, *a, **k: opened.append(a) or real(self, *a, **k))
  load_corpus('parquet:memory://bucket/text/*.parquet', data)
  assert not opened
  store.rm('/bucket/text/b.parquet')
  assert load_corpus('parquet:memory://bucket/text', data).digest != found.digest

  def dead(self, *rest, **kwargs):
    raise TimeoutError('no answer')

  monkeypatch.setattr(type(store), 'open', dead)
  with pytest.raises(StorageError, match=r'memory://bucket/text/\*\*: TimeoutError: no answer'):
    load_corpus('parquet:memory://bucket/text/**', str(tmp_path / 'other'))


@pytest.fixture
def hub(monkeypatch):
  """The Hugging Face hub, in memory."""
  store = fsspec.filesystem('memory')
  monkeypatch.setattr(tables, 'filesystem', lambda url: (store, url.replace('hf:/', '/hub')))

  def upload(path: str, texts: list[bytes]) -> None:
    file = pa.BufferOutputStream()
    pa.parquet.write_table(pa.table({'text': clean(texts)}), file)
    store.pipe(f'/hub/datasets/{path}', file.getvalue().to_pybytes())

  yield upload
  store.rm('/hub', recursive=True)


def test_splits_of_a_hub_data_set(hub, tmp_path):
  for name, part in (('train', b'one'), ('test', b'two'), ('validation', b'three')):
    hub(f'owner/name/data/{name}-00000-of-00001.parquet', [part] * 30)
  found = load_corpus('hf:owner/name', str(tmp_path))
  texts = {BYTES.decode(stream)[:5] for stream in (found.train, found.validation)}
  assert texts == {'oneon', 'three'}
  hub('owner/plain/part.parquet', [b'text %d' % i for i in range(400)])
  found = load_corpus('hf:owner/plain', str(tmp_path))
  assert 0.02 < len(found.validation) / len(found.train) < 0.1
  with pytest.raises(ConfigError, match='no parquet files or JSON lines there'):
    load_corpus('hf:owner/none', str(tmp_path))


def test_few_documents_are_split_at_their_ends(tmp_path):
  long = [b'first ' * 500, b'second ' * 500]
  found = load_corpus(write_jsonl(tmp_path / 'text', long), str(tmp_path / 'data'))
  ends = [round(len(text) * splits.VALIDATION_SHARE) for text in long]
  for text, cut in zip(long, ends, strict=True):
    assert text[-cut:].decode() in BYTES.decode(found.validation)
  assert len(found.validation) == sum(ends) + 2


@pytest.mark.parametrize('shift', [0, 3])
def test_tails_are_those_of_tail_start(shift):
  sizes = np.arange(shift, 200)
  ends, held = splits.held_out(np.zeros(sizes.sum(), np.uint8), np.cumsum(sizes), tails=True)
  starts = np.cumsum(sizes) - sizes
  np.testing.assert_array_equal(ends[::2] - starts, [splits.tail_start(size) for size in sizes.tolist()])
  assert held.tolist() == [False, True] * len(sizes)


@pytest.mark.parametrize(
  ('kind', 'content', 'message'),
  [
    ('jsonl', b'{"body": "x", "n": 1}\n', r"a\.x: no column 'text'; set data.column to one of body, n"),
    ('jsonl', b'{"text": "x"}\n{"text": 5}\n', r"'text' is no text in a line: .*\"text\": 5"),
    ('jsonl', b'{"text": "x"}\nnonsense\n', r"a\.x: a line is no JSON .*: b'nonsense'"),
    ('jsonl', b'[1]\n', 'a line is no JSON object'),
    ('jsonl', b'', 'too little text'),
    ('jsonl', b'{"text": null}\n', 'too little text'),
    ('parquet', b'nonsense', r'a\.x cannot be read: .*(magic|too small|smaller)'),
    ('arrow', b'ARROW1 nonsense', r'a\.x cannot be read'),
    ('parquet', {'body': ['x'], 'n': [1]}, "no column 'text'; set data.column to one of body, n"),
    ('parquet', {'text': [1, 2]}, "column 'text' holds int64, not text"),
    ('parquet', {'text': [['x']]}, "column 'text' holds list"),
  ],
)
def test_what_is_no_text_is_one_line_that_names_the_file(tmp_path, kind, content, message):
  if isinstance(content, dict):
    pa.parquet.write_table(pa.table(content), tmp_path / 'a.x')
  else:
    (tmp_path / 'a.x').write_bytes(content)
  with pytest.raises(ConfigError, match=message) as error:
    load_corpus(f'{kind}:{tmp_path}/a.x', str(tmp_path / 'data'))
  assert '\n' not in str(error.value) and not list(tmp_path.rglob('corpus.json'))


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('parquet:', 'name a file, a folder or a glob after the colon'),
    ('parquet:{tmp}/none', 'no such file or folder, and no file matches'),
    ('jsonl:{tmp}/*.jsonl', 'no file matches'),
    ('parquet:nosuch://bucket/x', 'nosuch'),
    ('parquet:~nosuchuser/x', 'no such user'),
  ],
)
def test_names_that_lead_nowhere_are_one_line(tmp_path, name, message):
  with pytest.raises(ConfigError, match=message) as error:
    load_corpus(name.format(tmp=tmp_path), str(tmp_path / 'data'))
  assert '\n' not in str(error.value)


def test_a_missing_package_of_a_store_says_what_to_install(tmp_path, monkeypatch):
  def missing(url):
    raise ImportError('Install huggingface_hub to access HuggingFaceFileSystem')

  monkeypatch.setattr(fsspec.core, 'url_to_fs', missing)
  for name in ('hf:owner/name', 'parquet:hf://datasets/owner/name'):
    with pytest.raises(ConfigError, match=r'hf://datasets/owner/name needs .*pip install "mhc_jax\[text\]"'):
      load_corpus(name, str(tmp_path))


def test_another_column_and_the_types_of_text(tmp_path):
  words = ['ab', '', 'é', None, 'word ' * 9] * 40
  kinds = [
    pa.string(),
    pa.large_string(),
    pa.binary(),
    pa.dictionary(pa.int32(), pa.string()),
    pa.string_view(),
  ]
  digests = set()
  for index, kind in enumerate(kinds):
    column = pa.array([None if w is None else f'{w}{i}' for i, w in enumerate(words)]).cast(kind)
    with pa.OSFile(str(tmp_path / f'{index}.arrow'), 'wb') as file:
      batch = pa.record_batch({'body': column[3:], 'head': column[:-3], 'text': range(len(words) - 3)})
      with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    digests.add(load_corpus(f'arrow:{tmp_path}/{index}.arrow', str(tmp_path / 'data'), column='body').digest)
  assert len(digests) == 1
  other = load_corpus(f'arrow:{tmp_path}/0.arrow', str(tmp_path / 'data'), column='head')
  assert other.digest not in digests, 'the tokens of the column that was prepared before'


def test_memory_does_not_grow_with_a_row_group(tmp_path):
  """One row group of 60 MB of text in batches of 1 MB: below a third of it at any time, by Arrow's count."""
  rng = np.random.default_rng(0)
  words = rng.integers(97, 123, (60_000, 1000), np.uint8)
  column = pa.array([row.tobytes() for row in words], pa.binary())
  pa.parquet.write_table(
    pa.table({'text': column}), tmp_path / 'a.parquet', row_group_size=60_000, use_dictionary=False
  )
  del words, column
  before, most = pa.total_allocated_bytes(), 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tables, 'BATCH_BYTES', 1 << 20)
    for batch in open_source(f'parquet:{tmp_path}/a.parquet', tmp_path).read(None, False):
      assert len(batch.text) < 3 << 20
      most = max(most, pa.total_allocated_bytes() - before)
  assert most < 20e6
