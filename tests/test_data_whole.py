"""A corpus is whole or refused: links, what cannot be read, prepared text that is damaged, folders, locks."""

import errno
import glob
import json
import os
import shutil
import socket
from pathlib import Path

import filelock
import numpy as np
import pytest

from mhc_jax.data import BYTES, corpus, load_corpus, lock, source, text_files, token_files
from mhc_jax.data.find_files import find
from mhc_jax.errors import ConfigError


@pytest.fixture
def books(tmp_path: Path) -> Path:
  """Four texts in two folders."""
  folder = tmp_path / 'books'
  (folder / 'sub').mkdir(parents=True)
  for i in range(4):
    (folder / ('sub' if i % 2 else '.') / f'{i}.txt').write_text(f'chapter {i} ' * 50)
  return folder


def names(pattern: str | Path) -> set[str]:
  """Names, in the corpus, of the files that are read."""
  pieces = text_files.scan_pattern(str(pattern)).documents['train']
  return {os.fsdecode(piece.file.relative) for piece in pieces}


def hidden(name: str) -> bool:
  return name.startswith('.')


PLAIN = {'0.txt', '2.txt', 'sub/1.txt', 'sub/3.txt'}


@pytest.mark.parametrize('pattern', ['', '/**', '/**/*.txt', '/**/**/*.txt'])
def test_links_in_circles_end_with_the_text_once(books, tmp_path, pattern):
  digest = text_files.scan_pattern(f'{books}{pattern}').digest
  for i in range(10):
    (books / f'link{i}').symlink_to('.')
    (books / 'sub' / f'up{i}').symlink_to('..')
    (books / 'sub' / f'side{i}').symlink_to('../sub')
  (tmp_path / 'via').symlink_to(books)
  for folder in (books, tmp_path / 'via'):
    assert text_files.scan_pattern(f'{folder}{pattern}').digest == digest
  assert names(f'{books}{pattern}') == PLAIN


@pytest.mark.parametrize('pattern', ['', '/**/*.txt'])
def test_linked_folders_are_followed(books, tmp_path, pattern):
  far = tmp_path / 'far' / 'deep'
  far.mkdir(parents=True)
  (far / '4.txt').write_text('somewhere else ' * 50)
  (far.parent / '5.txt').write_text('and here ' * 50)
  os.link(books / '0.txt', far / 'hard.txt')
  (books / 'b').symlink_to(far)
  assert names(f'{books}{pattern}') == PLAIN | {'b/4.txt'}
  (books / 'a').symlink_to(far.parent)  # holds what b links to, which goes by one name
  assert names(f'{books}{pattern}') == PLAIN | {'a/5.txt', 'a/deep/4.txt'}
  (books / 'sub' / 'top').symlink_to(tmp_path)  # holds the corpus itself, and perhaps data_dir
  with pytest.raises(
    ConfigError, match=r'cannot read .*sub/top \(a link to .*\): it holds the folder that is'
  ):
    names(f'{books}{pattern}')


def test_globs_match_what_those_of_python_match(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(80):
    parts = [
      *rng.choice(['a', 'b', '.h', 'c.d'], rng.integers(0, 4)),
      rng.choice(['x.txt', 'y.md', '.z', 'w']),
    ]
    path = tmp_path.joinpath(*parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(i))
  patterns = '** * **/*.txt */* .h/* **/a/** **/a/**/*.md */b/**/x* a/* **/.h/* **/.* [ab]/** a**/* *.d/**/w'
  for pattern in patterns.split():
    matches = glob.glob(str(tmp_path / pattern), recursive=True)
    expected = {os.path.relpath(match, tmp_path) for match in matches if os.path.isfile(match)}
    assert set(find(str(tmp_path), pattern.split('/'), hidden).values()) == expected, pattern


def dangling(path: Path) -> None:
  path.symlink_to('/nowhere')


def circle(path: Path) -> None:
  path.symlink_to(path.name)


def unix_socket(path: Path) -> None:
  with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(os.path.relpath(path))  # an absolute one may be too long


@pytest.mark.parametrize('make', [dangling, circle, os.mkfifo, unix_socket])
@pytest.mark.parametrize('pattern', ['', '/*', '/**/*', '/sub/odd', '/sub'])
def test_what_cannot_be_read_is_refused(books, monkeypatch, make, pattern):
  monkeypatch.chdir(books)
  make(books / 'sub' / 'odd')
  if pattern == '/*':  # does not name it
    assert names(f'{books}{pattern}') == {'0.txt', '2.txt'}
    return
  with pytest.raises(ConfigError, match=r'cannot read .*/sub/odd') as error:
    names(f'{books}{pattern}')
  assert '\n' not in str(error.value)


def test_a_link_to_nothing_may_have_been_a_folder_of_the_glob(books):
  (books / 'picture.png').symlink_to('/nowhere')
  assert names(f'{books}/**/*.txt') == PLAIN
  (books / 'part-1.0').symlink_to('/nowhere')
  for pattern in ('**/*.txt', 'part*/*.txt'):
    with pytest.raises(ConfigError, match=r'cannot read .*/part-1\.0 \(a link to /nowhere\): No such file'):
      names(f'{books}/{pattern}')


@pytest.mark.parametrize('pattern', ['', '/**/0.txt', '/*/1.txt'])
def test_a_folder_without_permission_is_refused(books, monkeypatch, pattern):
  """Told by the operating system's answer: for root, permissions do not bind."""
  scandir = os.scandir

  def refusing(path):
    if os.path.basename(path) == 'sub':
      raise PermissionError(errno.EACCES, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(os, 'scandir', refusing)
  with pytest.raises(ConfigError, match=r'cannot read .*/sub: Permission denied'):
    names(f'{books}{pattern}')
  with pytest.raises(ConfigError, match=r"'python_stdlib': cannot read .*/sub: Permission denied"):
    text_files.scan_stdlib(books)


def test_files_that_change_or_go_during_the_scan_are_noticed(books, tmp_path, monkeypatch):
  files = text_files.scan_pattern(str(books))
  (books / '2.txt').unlink()
  with pytest.raises(ConfigError, match=r'2\.txt cannot be read now \(No such file'):
    found = source.of_pieces('text_files', files.digest, files.documents)
    corpus.load_source('text_files:', found, tmp_path / 'data', BYTES)
  monkeypatch.setattr(text_files.os, 'fstat', lambda _: os.stat(tmp_path))
  with pytest.raises(ConfigError, match=r'0\.txt changed while it was read'):
    names(books)


def test_odd_names_are_read_and_said_in_one_line(books):
  odd = os.fsdecode(b'\xff\n.txt')
  (books / odd).write_text('odd ' * 50)
  assert names(books) == PLAIN | {odd}
  (books / odd).write_bytes(b'\0')
  with pytest.raises(ConfigError, match='is no text') as error:
    names(books)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  ('pattern', 'message'),
  [
    ('~nosuchuser/x', 'no such user'),
    ('~/no such folder', 'no such file'),
    ('a\0b', 'no file can have such a name'),
    ('\ud800', 'no file can have such a name'),
    ('x' * 300, 'no such file'),
    ('x/' * 3000, 'File name too long'),
    ('/dev/null', 'neither a file nor a folder'),
    ('{books}/0.txt/x', 'Not a directory'),
    ('{books}/0.txt/*', 'Not a directory'),
  ],
)
def test_names_that_cannot_be_are_one_line(books, pattern, message):
  with pytest.raises(ConfigError, match=message):
    names(pattern.format(books=books))


@pytest.mark.parametrize(
  ('data_dir', 'message'),
  [
    ('~nosuchuser/x', 'no such user'),
    ('a\0b', 'no file can have such a name'),
    ('{books}/0.txt', 'cannot write to .*Not a directory'),
    ('/dev/null', 'cannot write to .*Not a directory'),
    ('{books}/loop', 'cannot write to .*Too many levels'),
    ('{books}/' + 'x' * 300, 'cannot write to .*name too long'),
  ],
)
def test_folders_that_cannot_be_written_are_one_line(books, data_dir, message):
  (books / 'loop').symlink_to('loop')
  for name in (f'text_files:{books}/*.txt', 'tiny_shakespeare'):
    with pytest.raises(ConfigError, match=message) as error:
      load_corpus(name, data_dir.format(books=books))
    assert '\n' not in str(error.value)


def test_home_folders_expand(books, monkeypatch):
  monkeypatch.setenv('HOME', str(books.parent))
  found = load_corpus('text_files:~/books', '~/data')
  assert (books.parent / 'data').is_dir() and len(found.train)


@pytest.fixture
def prepared(books, tmp_path):
  """The books prepared once: (what loads them, their corpus, its folder)."""

  def load():
    return load_corpus(f'text_files:{books}', str(tmp_path / 'data'))

  first = load()
  [folder] = (tmp_path / 'data' / 'mhc_jax').glob('text_files-*/')
  return load, first, folder


def flipped(path: Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  status = path.stat()
  path.write_bytes(data)
  os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def out_of_vocabulary(path: Path) -> None:
  path.write_bytes(b'\xff' * path.stat().st_size)


def a_pipe(path: Path) -> None:
  path.unlink()
  os.mkfifo(path)


def a_folder(path: Path) -> None:
  path.unlink()
  path.mkdir()


def empty(path: Path) -> None:
  path.write_bytes(b'')


@pytest.mark.parametrize('damage', [flipped, out_of_vocabulary, empty, a_pipe, a_folder, Path.unlink])
def test_damaged_tokens_are_prepared_again_with_a_word(prepared, capsys, damage):
  load, first, folder = prepared
  for split in ('train', 'validation'):
    expected = (folder / f'{split}.tokens').read_bytes()
    damage(folder / f'{split}.tokens')
    assert load().digest == first.digest
    assert (folder / f'{split}.tokens').read_bytes() == expected
    said = capsys.readouterr().err
    assert said.count('warning: ') == said.count('\n') == 1 and str(folder) in said
  load()
  assert not capsys.readouterr().err


def test_hostile_corpus_json_is_no_traceback(prepared, capsys):
  load, first, folder = prepared
  good = (folder / 'corpus.json').read_text()
  facts = json.loads(good)
  wrong = ['', good[:-5], '[]', 'null', '1', '{}', '[' * 10**5, '1' * 10**4, '\xff']
  wrong += [json.dumps({**facts, 'train': value}) for value in (-1, 1e9, True, None, '9', [], 10**30)]
  wrong += [json.dumps({**facts, 'digest': value}) for value in (None, 'x', 1)]
  wrong += [json.dumps({key: facts[key] for key in facts if key != left_out}) for left_out in facts]
  for text in wrong:
    (folder / 'corpus.json').write_text(text, encoding='latin-1')
    assert token_files.read(folder, BYTES) is None, text[:40]
  assert load().digest == first.digest
  assert (folder / 'corpus.json').read_text() == good
  assert 'damaged' in capsys.readouterr().err


@pytest.mark.parametrize('wrong', ['file', 'link', 'dangling'])
def test_something_else_in_the_place_of_prepared_text(prepared, tmp_path, wrong):
  load, first, folder = prepared
  shutil.rmtree(folder)
  if wrong == 'file':
    folder.write_text('')
  else:
    folder.symlink_to(tmp_path / 'elsewhere')
    if wrong == 'link':
      (tmp_path / 'elsewhere').mkdir()
  assert load().digest == first.digest


def test_tokens_are_hashed_once_per_process_and_version(prepared, monkeypatch):
  load, _, folder = prepared
  hashed = []
  file_digest = token_files.hashlib.file_digest
  monkeypatch.setattr(
    token_files.hashlib, 'file_digest', lambda file, how: hashed.append(file.name) or file_digest(file, how)
  )
  load()
  assert not hashed
  os.utime(folder / 'train.tokens')
  load()
  assert hashed == [str(folder / 'train.tokens')]


def test_what_is_written_but_does_not_read_back_is_refused(prepared, monkeypatch):
  load, _, folder = prepared
  shutil.rmtree(folder)
  monkeypatch.setattr(token_files, '_map', lambda path, dtype: (np.zeros(1, dtype), 'other'))
  with pytest.raises(ConfigError, match='does not read back as written'):
    load()


def test_leftovers_of_killed_preparations_go(prepared):
  """But not what another process is at work on."""
  load, _, folder = prepared
  left, busy, other = (folder.with_name(f'text_files-bytes-{i}') for i in range(3))
  for path in (left, busy, other):
    path.mkdir()
    (path / 'corpus.json.unfinished').write_text('{')
    path.with_name(f'{path.name}.lock').write_text('')
  (other / 'corpus.json').write_text('{}')  # another corpus
  load()
  assert left.exists()
  (folder / 'corpus.json').unlink()
  with filelock.FileLock(f'{busy}.lock'):
    load()
  assert not left.exists() and busy.exists() and other.exists()


def test_a_held_lock_is_waited_for_with_a_word(tmp_path, monkeypatch, capsys):
  waited = []

  def acquire(self, timeout):
    waited.append(timeout)
    if len(waited) < 4:
      raise filelock.Timeout(self.lock_file)

  monkeypatch.setattr(filelock.FileLock, 'acquire', acquire)
  with lock.locked(tmp_path / 'x.lock'):
    assert waited == [10, 30, 30, 30]
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 3 and all(f'it holds {tmp_path}/x.lock' in line for line in said)


def test_a_full_disk_that_array_record_meets_is_an_os_error(books, tmp_path, monkeypatch):
  def no_space(*_):
    raise RuntimeError('Failed to finalize: write() failed: No space left on device; writing x')

  monkeypatch.setattr(token_files, 'write', no_space)
  with pytest.raises(OSError, match='No space') as error:
    load_corpus(f'text_files:{books}', str(tmp_path / 'data'))
  assert error.value.errno == errno.ENOSPC
  assert not list((tmp_path / 'data' / 'mhc_jax').glob('*/'))


def test_progress_is_said_where_there_is_no_terminal(books, monkeypatch, capsys):
  monkeypatch.setattr('mhc_jax.data.progress._SECONDS', -1)
  names(books)
  assert f'reading text_files:{books}: 3 of 4' in capsys.readouterr().err
