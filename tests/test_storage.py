"""Workdirs and text in an object store, faked by a folder: no network, no gcsfs, and no rename or append.

The clients themselves are in test_buckets.py. Not covered: credentials, and real latencies.
"""

import os
import shutil
import threading
from pathlib import Path

import fsspec
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from experiments import sweep
from mhc_jax import evaluate, loop, orbax_patches, storage, train, versioned
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.data import load_corpus
from mhc_jax.errors import BusyError, ConfigError, StorageError
from mhc_jax.lease import LeaseLostError
from mhc_jax.plan import resolve
from mhc_jax.workdir import check_workdir, claim, read_status
from tests.test_train import TIMES, config, corpus, rows

CONDITIONS = threading.Lock()


class Store(LocalFileSystem):
  """gs:// and s3:// as a local folder, in which files are only ever written whole."""

  protocol = ('gs', 'gcs', 's3')
  root = ''

  def __init__(self, **_):
    super().__init__(auto_mkdir=True)

  @classmethod
  def _strip_protocol(cls, path):
    path = (os.fspath(path).partition('://')[2] or os.fspath(path)).lstrip('/')
    inside = f'{path}/'.startswith(f'{cls.root}/'[1:])  # as the paths of its own listings are
    return super()._strip_protocol(f'/{path}' if inside else os.path.join(cls.root, path))

  def _open(self, path, mode='rb', **kwargs):
    assert 'a' not in mode and '+' not in mode, 'an object cannot be appended to'
    return super()._open(path, mode, **kwargs)

  def get_file(self, path, local, **_):
    shutil.copyfile(self._strip_protocol(path), local)

  def mv(self, *_, **__):
    raise AssertionError('an object cannot be renamed')


def read_object(_, bucket, key):
  """A conditional store of one process: the version is the content."""
  path = Path(Store._strip_protocol(f'{bucket}/{key}'))
  content = path.read_bytes() if path.is_file() else None
  return content or b'', content and content.decode()


def write_object(_, bucket, key, content, version):
  with CONDITIONS:
    if read_object(_, bucket, key)[1] != version:
      return None
    path = Path(Store._strip_protocol(f'{bucket}/{key}'))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content.decode()


@pytest.fixture
def store(tmp_path, monkeypatch):
  """The folder that stands for all buckets; tensorstore writes there as well."""
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  folder = tmp_path / 'store'
  monkeypatch.setattr(Store, 'root', str(folder))
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  for protocol in Store.protocol:
    monkeypatch.setitem(_registry, protocol, Store)
  monkeypatch.setattr(versioned, '_read_object', read_object)
  monkeypatch.setattr(versioned, '_write_object', write_object)
  orbax_patches.teach_orbax_s3()
  monkeypatch.setattr(gcs_utils, 'is_hierarchical_namespace_enabled', lambda path: False)
  monkeypatch.setattr(tensorstore_utils, '_use_gcs_driver', lambda path: False)
  monkeypatch.setattr(tensorstore_utils, '_normalize_path', Store._strip_protocol)
  yield folder
  fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ('gs', 's3'))
def test_a_run_in_a_store_equals_a_local_one(store, tmp_path, monkeypatch, scheme):
  """Also after it failed between two checkpoints and went on on another machine, with nothing local."""
  train.run(config(), str(tmp_path / 'local'), corpus(), quiet=True)
  workdir, validate, calls = f'{scheme}://bucket/runs/a', loop.mean_loss, []

  def broken(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
      raise RuntimeError('no luck')
    return validate(*arguments)

  monkeypatch.setattr(loop, 'mean_loss', broken)
  with pytest.raises(RuntimeError, match='no luck'):  # at step 8, before it is saved
    train.run(config(), workdir, corpus(), quiet=True)
  folder = store / 'bucket' / 'runs' / 'a'
  assert read_status(workdir)['state'] == 'failed' and rows(folder)[-1]['step'] > 4
  unfinished = folder / 'checkpoints' / '6' / 'state'  # a process was killed while it wrote
  unfinished.mkdir(parents=True)
  assert Checkpoints(f'{workdir}/checkpoints').steps() == [4]
  shutil.rmtree(storage.scratch(workdir))
  status = train.run(config(), workdir, corpus(), quiet=True)
  assert status['state'] == 'finished' and status == read_status(workdir)

  def timeless(found):
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows(found)]

  assert timeless(folder) == timeless(tmp_path / 'local')
  assert [path.name for path in (folder / 'checkpoints').iterdir()] == ['10']
  assert not (folder / '.lock').exists()
  resolved, _, step, params = evaluate.load(workdir)
  assert (resolved['arm'], step) == ('residual', 10) and 'embedding' in params


def test_a_remote_workdir_is_held_by_one_process_and_belongs_to_one_configuration(store, monkeypatch):
  workdir = 'gs://bucket/run'
  plan = resolve(config(), 'digest')
  with claim(workdir, plan) as (status, held):
    assert status == {'state': 'missing'} and held is not None
    with pytest.raises(BusyError, match='in use'), claim(f'{workdir}/', plan):
      pass
    monkeypatch.setattr('tempfile.tempdir', str(store / 'elsewhere'))  # another machine's folder of scratch
    with pytest.raises(BusyError, match=r'gs://bucket/run/? is in use by .* \(process'), claim(workdir, plan):
      pass
  with pytest.raises(ConfigError, match=r'holds a run with seed=0, this one has 1'):
    check_workdir(workdir, resolve(config(seed=1), 'digest'))


def test_a_step_that_an_earlier_owner_ended_late_is_saved_again(store):
  """It slept while it saved, and its last file came after this process had looked what there is."""
  with Checkpoints('gs://bucket/c') as checkpoints, Checkpoints('gs://bucket/c') as late:
    for step in (1, 2):
      assert checkpoints.steps() == [1] * (step - 1)
      late.save(step, {'w': jnp.zeros(3)}, {})
      late.wait()
      checkpoints.save(step, {'w': jnp.ones(3)}, {})
      checkpoints.wait()
  step, state, _ = Checkpoints('gs://bucket/c').restore_latest({'w': jnp.ones(3)})
  assert step == 2 and state['w'].tolist() == [1, 1, 1]


@pytest.mark.parametrize('trouble', ('UNAVAILABLE: timed out', 'DATA_LOSS: bad magic'))
def test_a_store_out_of_reach_is_no_damage(store, monkeypatch, capsys, trouble):
  """Damage falls back to the step before, and the next save removes what is damaged."""
  with Checkpoints('gs://bucket/c') as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, {'w': jnp.ones(3)}, {})
  read = Checkpoints._read

  def fail(self, step, *arguments):
    if step == 2:
      raise ValueError(trouble)
    return read(self, step, *arguments)

  monkeypatch.setattr(Checkpoints, '_read', fail)
  target = {'w': jnp.ones(3)}
  if trouble.startswith('UNAVAILABLE'):
    with pytest.raises(StorageError, match='gs://bucket/c: ValueError: UNAVAILABLE'):
      Checkpoints('gs://bucket/c').restore_latest(target)
  else:
    assert Checkpoints('gs://bucket/c').restore_latest(target)[0] == 1
    assert 'step 2 in gs://bucket/c is damaged' in capsys.readouterr().err


def test_text_in_a_store_is_copied_once_per_version(store, tmp_path, monkeypatch):
  """The copy is the same corpus as the folder it came from."""
  words = np.random.default_rng(0)
  texts = store / 'bucket' / 'text'
  (texts / 'sub').mkdir(parents=True)
  for index in range(30):
    name = f'sub/{index}.txt' if index % 2 else f'{index}.md'
    (texts / name).write_text(' '.join(words.choice(['ab', 'cde', 'f'], 400)))
  copied, get_file = [], Store.get_file

  def counted(self, path, local):
    copied.append(path)
    get_file(self, path, local)

  monkeypatch.setattr(Store, 'get_file', counted)
  data = str(tmp_path / 'data')
  for pattern, count in (('', 30), ('/**/*.txt', 15)):
    for _ in range(2):
      found = load_corpus(f'text_files:gs://bucket/text{pattern}', data)
    assert found.digest == load_corpus(f'text_files:{texts}{pattern}', data).digest and len(copied) == count
    copied.clear()
  (texts / '0.md').write_text('something new')
  assert load_corpus('text_files:gs://bucket/text', data).digest != found.digest and len(copied) == 30
  with pytest.raises(ConfigError, match='no such object'):
    load_corpus('text_files:gs://bucket/none', data)


def test_a_copy_that_is_no_longer_what_was_copied_is_replaced(store, tmp_path, capsys):
  texts, data = store / 'bucket' / 'text', tmp_path / 'data'
  texts.mkdir(parents=True)
  for index in range(4):
    (texts / f'{index}.txt').write_text(f'chapter {index} ' * 50)
  digest = load_corpus('text_files:gs://bucket/text', str(data)).digest
  [copy] = (data / 'mhc_jax' / 'copies').glob('*/')
  for damage in (Path.unlink, lambda path: path.write_bytes(b'\0'), lambda path: path.write_text('other')):
    damage(copy / '2.txt')
    left = copy.with_name('0123.partial')  # of a killed copy
    left.mkdir()
    left.with_name('0123.lock').write_text('')
    assert load_corpus('text_files:gs://bucket/text', str(data)).digest == digest
    assert capsys.readouterr().err.startswith(f'warning: {copy} is damaged')
    assert (copy / '2.txt').read_text() == 'chapter 2 ' * 50 and not left.exists()
  load_corpus('text_files:gs://bucket/text', str(data))
  assert not capsys.readouterr().err


@pytest.mark.parametrize(
  'trouble', ['a link to nothing', 'a name with ..', 'it grows', 'a file where a folder is']
)
def test_a_store_that_cannot_be_copied_whole_is_refused(store, tmp_path, monkeypatch, trouble):
  texts, find, get_file = store / 'bucket' / 'text', Store.find, Store.get_file
  texts.mkdir(parents=True)
  (texts / '0.txt').write_text('chapter ' * 50)

  def with_more(self, path, **kwargs):
    listed = find(self, path, **kwargs)
    [(name, facts)] = listed.items()
    more = {'a name with ..': f'{path}/../../x', 'a file where a folder is': f'{name}/x'}
    return listed | {more[trouble]: facts}

  def growing(self, path, local, **kwargs):
    get_file(self, path, local, **kwargs)
    with open(local, 'a') as file:
      file.write('more')

  if trouble == 'a link to nothing':
    (texts / 'gone').symlink_to('/nowhere')
  elif trouble == 'it grows':
    monkeypatch.setattr(Store, 'get_file', growing)
  else:
    monkeypatch.setattr(Store, 'find', with_more)
  with pytest.raises(ConfigError) as error:
    load_corpus('text_files:gs://bucket/text', str(tmp_path / 'data'))
  assert '\n' not in str(error.value)
  assert not list((tmp_path / 'data').rglob('*.txt')) and not (tmp_path / 'x').exists()


def test_mistakes_are_one_line(monkeypatch):
  def missing(protocol):
    raise ImportError(protocol)

  monkeypatch.setattr(fsspec, 'get_filesystem_class', missing)
  for scheme, package in (('gs', 'gcsfs'), ('s3', 's3fs')):
    with pytest.raises(ConfigError, match=rf'needs the package {package}: pip install "mhc_jax\[cloud\]"'):
      train.run(config(), f'{scheme}://bucket/run', corpus())
  with pytest.raises(ConfigError, match='ftp://host/run: takes a local folder, gs://BUCKET/FOLDER or s3:'):
    train.run(config(), 'ftp://host/run', corpus())
  with pytest.raises(ConfigError, match='gs://bucket/quick needs the package gcsfs'):
    sweep.main(['quick', '--out', 'gs://bucket'])
  with pytest.raises(ConfigError, match='ftp://host/quick: takes a local folder'):
    sweep.main(['quick', '--out', 'ftp://host'])


def test_orbax_writes_s3_by_tensorstore(monkeypatch):
  from orbax.checkpoint._src.serialization import tensorstore_utils

  orbax_patches.teach_orbax_s3()
  for name in ('AWS_REGION', 'AWS_DEFAULT_REGION', 'AWS_ENDPOINT_URL', 'AWS_ACCESS_KEY_ID'):
    monkeypatch.delenv(name, raising=False)
  spec = tensorstore_utils.build_kvstore_tspec('s3://bucket/run/checkpoints/4/state', 'w', use_ocdbt=True)
  assert spec['base'] == {'driver': 's3', 'bucket': 'bucket', 'path': 'run/checkpoints/4/state'}
  monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://localhost:9000')
  spec = tensorstore_utils.build_kvstore_tspec('s3://bucket/state', use_ocdbt=False)
  address = {'endpoint': 'http://localhost:9000', 'aws_region': 'us-east-1'}
  assert spec == {'driver': 's3', 'bucket': 'bucket', 'path': 'state', **address}
  spec = tensorstore_utils.build_kvstore_tspec('gs://bucket/state', use_ocdbt=False)
  assert spec == {'driver': 'gcs', 'bucket': 'bucket', 'path': 'state'}


def test_a_run_that_another_process_has_taken_writes_nothing_more(store, monkeypatch):
  """It slept too long: another has its lease, and its folder is left as that one has it."""
  workdir, validate, calls = 'gs://bucket/run', loop.mean_loss, []
  folder = store / 'bucket' / 'run'

  def slow(*arguments):
    calls.append(arguments)
    if len(calls) == 2:
      (folder / '.lease').write_text('{"host": "other"}')
      calls.append({path: path.read_bytes() for path in folder.rglob('*') if path.is_file()})
    return validate(*arguments)

  monkeypatch.setattr(loop, 'mean_loss', slow)
  with pytest.raises(LeaseLostError, match=r'run/\.lease was taken by another process'):
    train.run(config(), workdir, corpus(), quiet=True)
  left = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
  assert left == calls[2] and len(left) > 2
