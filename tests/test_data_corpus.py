"""Corpora of text files: what is read, how it is split, and that preparing it is safe."""

import errno
import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from mhc_jax.data import BYTES, corpus, load_corpus, source, splits, text_files, token_files
from mhc_jax.errors import ConfigError


@pytest.fixture
def library(tmp_path: Path, rng: np.random.Generator) -> Path:
  """A small standard library: 400 modules, a duplicate, an empty file, bytes that are no UTF-8."""
  root = tmp_path / 'library'
  for i in range(400):
    module = root / f'package{i % 7}' / f'module{i}.py'
    module.parent.mkdir(parents=True, exist_ok=True)
    module.write_bytes(b'# module %d\n' % i + rng.bytes(rng.integers(10, 200)))
  (root / 'package0' / 'zz_duplicate.py').write_bytes((root / 'package0/module0.py').read_bytes())
  (root / 'package0' / '__init__.py').write_bytes(b'')
  (root / 'latin.py').write_bytes(b'# -*- coding: latin-1 -*-\nname = "\xe9"\n')
  for skipped in ('site-packages/numpy/a.py', 'package1/__pycache__/b.py', 'package1/notes.txt'):
    (root / skipped).parent.mkdir(parents=True, exist_ok=True)
    (root / skipped).write_bytes(b'not part of the library')
  return root


def load(root: Path, data_dir: Path) -> corpus.Corpus:
  return load_files(text_files.scan_stdlib(root), data_dir)


def load_files(files: text_files.TextFiles, data_dir: Path) -> corpus.Corpus:
  found = source.of_pieces('python_stdlib', files.digest, files.documents)
  return corpus.load_source('python_stdlib', found, data_dir, BYTES)


def documents(stream: np.ndarray) -> list[bytes]:
  """Documents of BOS document BOS document ..."""
  assert stream[0] == BYTES.bos
  parts = np.split(stream, np.flatnonzero(stream == BYTES.bos))[1:]
  return [part[1:].astype(np.uint8).tobytes() for part in parts]


def test_stdlib_holds_every_source_once_in_order(library, tmp_path):
  loaded = load(library, tmp_path / 'data')
  modules = [path for path in library.glob('package*/module*.py')] + [library / 'latin.py']
  modules.sort(key=lambda path: path.relative_to(library).as_posix())
  train, validation = documents(loaded.train), documents(loaded.validation)
  assert sorted(train + validation) == sorted(path.read_bytes() for path in modules)
  in_order = [path.read_bytes() for path in modules]
  for part in (train, validation):
    places = [in_order.index(document) for document in part]
    assert places == sorted(places)
  assert not set(train) & set(validation)
  assert loaded.train.dtype == np.uint16 and not loaded.train.flags.writeable


def test_split_is_by_path_whatever_the_content_and_the_root(library, tmp_path):
  def held_out(root):
    pieces = text_files.scan_stdlib(root).documents['validation']
    return {piece.file.relative for piece in pieces}

  before = held_out(library)
  assert 4 <= len(before) <= 40  # 5 % of 400
  for path in library.glob('package*/module*.py'):
    path.write_bytes(path.read_bytes() + b'#')
  assert held_out(library.rename(tmp_path / 'moved')) == before


def test_second_load_reads_no_text(library, tmp_path, monkeypatch):
  first = load(library, tmp_path / 'data')
  monkeypatch.setattr(token_files, 'write', None)
  second = load(library, tmp_path / 'data')
  assert second.digest == first.digest
  np.testing.assert_array_equal(second.train, first.train)


def test_digest_is_that_of_the_content(library, tmp_path):
  first = load(library, tmp_path / 'a')
  assert load(library, tmp_path / 'b').digest == first.digest
  changed = library / 'package3' / 'module3.py'
  status, content = changed.stat(), changed.read_bytes()
  changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))  # size and time as before
  second = load(library, tmp_path / 'a')
  assert second.digest != first.digest
  assert changed.read_bytes() in documents(second.train) + documents(second.validation)
  changed.write_bytes(content)
  assert load(library, tmp_path / 'a').digest == first.digest


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_digest_covers_both_streams(tmp_path, split):
  def digest(folder, **texts):
    folder.mkdir()
    texts = {'train': b'one', 'validation': b'two', **texts}
    documents = [(text, split == 'validation') for split, text in texts.items()]
    found = source.Source('x', '', 6, 'B', lambda at, tails: source.batched(documents), True)
    return token_files.write(folder, found, BYTES)['digest']

  assert digest(tmp_path / 'a') == digest(tmp_path / 'b')
  assert digest(tmp_path / 'a2') != digest(tmp_path / 'c', **{split: b'six'})


def test_damaged_folder_is_built_again(library, tmp_path):
  first = load(library, tmp_path / 'data')
  expected = np.array(first.train)
  [folder] = (tmp_path / 'data' / 'mhc_jax').glob('python_stdlib-*/')
  os.truncate(folder / 'train.tokens', 100)
  np.testing.assert_array_equal(load(library, tmp_path / 'data').train, expected)
  (folder / 'corpus.json').write_text('{"tok')
  np.testing.assert_array_equal(load(library, tmp_path / 'data').train, expected)


LOAD = """
import os, signal, sys, time
from pathlib import Path
from mhc_jax.data import BYTES, corpus, source, text_files, token_files

library, data_dir, moment = sys.argv[1:]
calls = 0

def killing(function, at):
  def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == at:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
  return counted

def note(*args):
  with open(Path(data_dir).parent / 'prepared', 'a') as file:
    file.write('once ')
  time.sleep(0.5)  # so that a second process would come upon an unfinished folder
  return write(*args)

write, token_files.write = token_files.write, note
source.BATCH_BYTES = 1000
if moment == 'while text is read':
  text_files.Piece.read = killing(text_files.Piece.read, 100)
if moment == 'while tokens are written':
  token_files._append = killing(token_files._append, 10)
if moment == 'after its place is saved':
  token_files._SAVE_SECONDS = 0
  token_files._append = killing(token_files._append, 10)
if moment == 'before completion':
  os.replace = killing(os.replace, 1)
files = text_files.scan_stdlib(Path(library))
print('ready', flush=True)
input()
found = source.of_pieces('python_stdlib', files.digest, files.documents)
print(corpus.load_source('python_stdlib', found, Path(data_dir), BYTES).digest)
"""


def start(library: Path, data_dir: Path, moment: str) -> subprocess.Popen:
  arguments = [sys.executable, '-c', LOAD, library, data_dir, moment]
  pipe = subprocess.PIPE
  return subprocess.Popen(arguments, stdin=pipe, stdout=pipe, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
  'moment',
  ['while text is read', 'while tokens are written', 'after its place is saved', 'before completion'],
)
def test_killed_preparation_is_not_taken_for_complete(library, tmp_path, moment):
  process = start(library, tmp_path / 'data', moment)
  process.communicate('go\n', timeout=60)
  assert process.returncode == -signal.SIGKILL
  assert list((tmp_path / 'data').rglob('*')) and not list((tmp_path / 'data').rglob('corpus.json'))
  loaded, expected = load(library, tmp_path / 'data'), load(library, tmp_path / 'other')
  assert loaded.digest == expected.digest
  np.testing.assert_array_equal(loaded.train, expected.train)
  np.testing.assert_array_equal(loaded.validation, expected.validation)
  assert not list((tmp_path / 'data').rglob('incomplete*'))


@pytest.mark.slow
def test_processes_that_start_together_prepare_once(library, tmp_path):
  processes = [start(library, tmp_path / 'data', 'never') for _ in range(2)]
  assert [process.stdout.readline() for process in processes] == ['ready\n'] * 2
  for process in processes:
    process.stdin.write('go\n')
    process.stdin.flush()
  digests = [process.communicate(timeout=60)[0] for process in processes]
  assert [process.returncode for process in processes] == [0, 0]
  assert len(set(digests)) == 1
  assert (tmp_path / 'prepared').read_text() == 'once '


def test_full_disk_leaves_nothing_behind(library, tmp_path, monkeypatch):
  def no_space(fileno):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch, pytest.raises(OSError, match='No space'):
    patch.setattr(token_files.os, 'fsync', no_space)
    load(library, tmp_path / 'data')
  assert not list((tmp_path / 'data' / 'mhc_jax').glob('python_stdlib-*/'))
  load(library, tmp_path / 'data')


def test_file_that_changes_meanwhile_is_noticed(library, tmp_path):
  files = text_files.scan_stdlib(library)
  (library / 'latin.py').write_text('edited')
  with pytest.raises(ConfigError, match=r'latin\.py changed while'):
    load_files(files, tmp_path / 'data')
  assert not list((tmp_path / 'data').rglob('corpus.json'))


def test_large_corpora_and_files_are_cut(library, tmp_path, monkeypatch):
  """Many batches, and several documents of one file, lose no byte and keep the order."""
  expected = load(library, tmp_path / 'a')
  monkeypatch.setattr(source, 'BATCH_BYTES', 1000)
  monkeypatch.setattr(text_files, 'MAX_DOCUMENT_BYTES', 100)
  cut = load(library, tmp_path / 'a2')
  assert max(map(len, documents(cut.train))) == 100
  joined = b''.join(documents(cut.train))
  assert joined == b''.join(documents(expected.train))


def text_folder(folder: Path, count: int) -> Path:
  for i in range(count):
    file = folder / f'part{i % 3}' / f'{i}.txt'
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'chapter {i}: ' + 'lorem ipsum ' * (5 + i % 4))
  return folder


def test_text_files_of_a_folder(tmp_path):
  folder = text_folder(tmp_path / 'books', 300)
  (folder / '.hidden').write_bytes(b'\0')
  (folder / '.git').mkdir()
  (folder / '.git' / 'config').write_text('hidden')
  name = f'text_files:{folder}'
  loaded = load_corpus(name, str(tmp_path / 'data'))
  assert loaded.name == name
  train, validation = documents(loaded.train), documents(loaded.validation)
  assert sorted(train + validation) == sorted(p.read_bytes() for p in folder.rglob('*.txt'))
  assert 3 <= len(validation) <= 40 and not set(train) & set(validation)
  for path in folder.rglob('*.txt'):
    relative = os.fsencode(path.relative_to(folder))
    assert (path.read_bytes() in validation) == splits.in_validation(relative)


@pytest.mark.parametrize('count', [1, 3])
def test_few_files_are_split_at_their_ends(tmp_path, count):
  folder = text_folder(tmp_path / 'books', count)
  texts = [path.read_bytes() for path in sorted(folder.rglob('*.txt'))]
  loaded = load_corpus(f'text_files:{folder}', str(tmp_path / 'data'))
  train, validation = documents(loaded.train), documents(loaded.validation)
  assert len(train) == len(validation) == count
  assert [head + tail for head, tail in zip(train, validation, strict=True)] == texts
  for tail, text in zip(validation, texts, strict=True):
    assert len(tail) == round(len(text) * 0.05) > 0


def test_text_files_by_glob_and_single_file(tmp_path, monkeypatch):
  folder = text_folder(tmp_path / 'books', 6)
  (folder / 'image.png').write_bytes(b'\0\1')
  monkeypatch.chdir(tmp_path)

  def text(pattern):
    loaded = load_corpus(f'text_files:{pattern}', str(tmp_path / 'data'))
    return BYTES.decode(loaded.train) + BYTES.decode(loaded.validation)

  for pattern in (f'{folder}/**/*.txt', 'books/**/*.txt', 'books/part[0-2]/*.txt'):
    assert all(f'chapter {i}' in text(pattern) for i in range(6))
  assert 'chapter 4' in text('books/part1/*') and 'chapter 3' not in text('books/part1/*')
  assert 'chapter 5' in text('books/part2/5.txt') and 'chapter 2' not in text('books/part2/5.txt')
  with pytest.raises(ConfigError, match=r'image\.png is no text .*FOLDER/\*\*/\*\.txt'):
    text('books')


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('', 'after the colon'),
    ('{tmp}/nothing', 'no such file'),
    ('{tmp}/*.txt', 'no file matches'),
    ('{tmp}/empty', 'too little text'),
    ('{tmp}/empty/*', 'too little text'),
    ('{tmp}/tiny.md', 'too little text'),
  ],
)
def test_missing_and_empty_text_is_refused(tmp_path, pattern, message):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'file').write_bytes(b'')
  (tmp_path / 'tiny.md').write_text('hi')
  with pytest.raises(ConfigError, match=message) as error:
    load_corpus('text_files:' + pattern.format(tmp=tmp_path), str(tmp_path / 'data'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'data').exists()


def test_library_without_sources_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='no Python source files under'):
    text_files.scan_stdlib(tmp_path)


def test_unusable_data_dir_is_refused(library, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match=r'data_dir: cannot write to .*file'):
    load(library, tmp_path / 'file')
  with pytest.raises(ConfigError, match='must be a local folder'):
    load_corpus('python_stdlib', 'gs://bucket/data')


def test_data_dir_defaults_to_that_of_tfds(tmp_path, monkeypatch):
  folder = text_folder(tmp_path / 'books', 2)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'default'))
  load_corpus(f'text_files:{folder}')
  assert list((tmp_path / 'default').rglob('corpus.json'))


def test_the_real_standard_library(tmp_path):
  loaded = load_corpus('python_stdlib', str(tmp_path))
  assert len(loaded.train) > 5e6
  assert 0.02 < len(loaded.validation) / len(loaded.train) < 0.12
  source = Path(sysconfig.get_path('stdlib'), 'argparse.py').read_text()
  assert source in BYTES.decode(loaded.train) or source in BYTES.decode(loaded.validation)
