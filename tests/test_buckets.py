"""Stores through their real clients, s3fs and gcsfs, against servers on this machine (buckets.py)."""

import functools
import os
import threading

import fsspec
import pandas as pd
import pytest
from etils.epath.backend import fsspec_backend

from analysis import report, stores
from analysis.runs import read_sweep
from mhc_jax import lease, storage, versioned
from mhc_jax.errors import ConfigError, StorageError
from mhc_jax.run_folder import ENDED, load_status
from tests import buckets
from tests.synthetic_runs import write_sweep

pytest.importorskip('s3fs')
pytest.importorskip('gcsfs')
pytest.importorskip('moto')

KEYS = {'AWS_ACCESS_KEY_ID': 'x', 'AWS_SECRET_ACCESS_KEY': 'y', 'AWS_REGION': 'us-east-1'}


@pytest.fixture(scope='module')
def servers():
  """{scheme: environment} of two running stores with a bucket of the name bucket."""
  s3, stop_s3 = buckets.serve(buckets.s3())
  gcs, stop_gcs = buckets.serve(buckets.gcs())
  yield {
    's3': KEYS | {'AWS_ENDPOINT_URL': s3},
    'gs': {'STORAGE_EMULATOR_HOST': gcs, 'TENSORSTORE_GCS_HTTP_URL': gcs},
  }
  stop_s3()
  stop_gcs()


@pytest.fixture(params=('s3', 'gs'))
def store(request, servers, monkeypatch, tmp_path):
  """The address of an empty folder of a bucket."""
  for name, value in servers[request.param].items():
    monkeypatch.setenv(name, value)
  fsspec.filesystem(request.param).clear_instance_cache()
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path / 'scratch'))
  (tmp_path / 'scratch').mkdir()
  address = f'{request.param}://bucket'
  storage.to_path(address)
  if request.param == 's3' and not fsspec.filesystem('s3').exists('bucket'):
    fsspec.filesystem('s3').mkdir('bucket')
  yield f'{address}/{request.node.name.partition("[")[0]}'
  fsspec_backend._get_filesystem.cache_clear()


def test_a_version_is_written_once(store):
  path = f'{store}/file'
  assert versioned.read(path) == (b'', None)
  first = versioned.write(path, b'1', None)
  assert first and versioned.read(path) == (b'1', first)
  assert versioned.write(path, b'2', None) is None, 'there is one'
  second = versioned.write(path, b'2', first)
  assert second and versioned.write(path, b'3', first) is None, 'it has changed since'
  assert versioned.write(f'{store}/none', b'3', first) is None, 'it is gone'
  assert versioned.read_many([path, f'{store}/none']) == [b'2', None]
  # A client repeats a request whose answer was lost, and is refused for its own success.
  assert versioned.write(path, b'2', first) == second


def test_writers_at_once_do_not_lose_a_count(store):
  path, won = f'{store}/file', []

  def count(me):
    for turn in range(4):
      content, version = versioned.read(path)
      number = int(content.split()[0]) + 1 if content else 1
      won.append(versioned.write(path, f'{number} {me} {turn}'.encode(), version))

  threads = [threading.Thread(target=count, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  written = [version for version in won if version]
  assert int(versioned.read(path)[0].split()[0]) == len(written) == len(set(written)) >= 4


def test_a_lease_is_one_owners_and_the_next_ones_when_it_is_stale(store, monkeypatch):
  monkeypatch.setenv('MHC_JAX_STALE_SECONDS', '1')
  path = f'{store}/.lease'
  held = lease.take(path, {})
  assert lease.take(path, {}) is None
  held.renew(progress=True)
  monkeypatch.setattr(lease, '_host', lambda: 'elsewhere')
  held._over.set()  # it is silent from here on
  taken = lease.wait_for(path, 'the run')
  with pytest.raises(lease.LeaseLostError):
    held.renew()
  taken.renew()
  held.release()
  assert lease.holders([path, f'{store}/none'], {})[0] is not None, 'what was lost cannot be given back'
  taken.release()
  assert lease.holders([path], {}) == [None]


def test_a_store_that_ignores_conditions_is_refused(store, monkeypatch):
  monkeypatch.setattr(versioned, '_trusted', set())
  real = versioned._write_object
  overwrites = functools.partial(_overwrite, real)
  monkeypatch.setattr(versioned, '_write_object', overwrites)
  with pytest.raises(ConfigError, match='bucket ignores the conditions'):
    lease.take(f'{store}/.lease', {})


def _overwrite(real, client, bucket, key, content, version):
  """As stores do that know no conditions."""
  found = versioned._read_object(client, bucket, key)[1]
  return real(client, bucket, key, content, found)


def test_a_store_out_of_reach_is_one_line(store, monkeypatch):
  with pytest.raises(StorageError, match='://nowhere'):
    lease.take(f'{store.partition("://")[0]}://nowhere/.lease', {})


def test_a_sweep_in_a_store_is_reported_from_a_copy(store, tmp_path, monkeypatch, capsys):
  """Many requests at once; what has ended is copied once, what has gone goes, and results stay here."""
  sweep = tmp_path / 'local'
  write_sweep(sweep, arms=('residual', 'mhc'), sizes=((32, 2), (32, 4)), ranks=False)
  client = fsspec.filesystem(store.partition('://')[0])
  for path in sorted(sweep.rglob('*.json*')):
    client.pipe_file(f'{store}/{path.relative_to(sweep)}', path.read_bytes())
  monkeypatch.chdir(tmp_path)
  assert report.main([store, '--resamples', '2']) == 0
  copy = tmp_path / 'runs' / store.replace('://', '/')
  assert (copy / 'report' / 'index.html').exists() and f'mhc report {store}' in (
    copy / 'report' / 'index.html'
  ).read_text()
  assert f'runs copied to {copy.relative_to(tmp_path)}' in capsys.readouterr().err
  pd.testing.assert_frame_equal(read_sweep(copy).table, read_sweep(sweep).table)
  # A second time: only what may have changed.
  asked, read_many = [], storage.read_many
  monkeypatch.setattr(storage, 'read_many', lambda paths: asked.extend(paths) or read_many(paths))
  first, *rest = (run.name for run in sorted(sweep.glob('*/')) if (run / 'metrics.jsonl').exists())
  client.rm(f'{store}/{first}', recursive=True)
  stores.here(store)
  assert not (copy / first).exists() and (copy / rest[0]).exists()
  ended = [run for run in rest if load_status(str(sweep / run))[0]['state'] in ENDED]
  assert ended and not any(f'{store}/{run}/metrics.jsonl' in asked for run in ended)
  with pytest.raises(ConfigError, match='json is missing'):
    stores.here(f'{store}/none')


def test_conditions_are_tried_once_per_bucket(store, monkeypatch):
  monkeypatch.setattr(versioned, '_trusted', set())
  lease.take(f'{store}/.lease', {}).release()
  client = fsspec.filesystem(store.partition('://')[0])
  assert [os.path.basename(name) for name in client.find(store)] == ['.lease'], 'it leaves nothing'
