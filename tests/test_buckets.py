"""Stores through their real clients, s3fs and gcsfs, against servers on this machine (buckets.py)."""

import functools
import os
import threading

import fsspec
import pytest
from etils.epath.backend import fsspec_backend

from mhc_jax import lease, storage, versioned
from mhc_jax.errors import ConfigError, StorageError
from tests import buckets

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


def test_conditions_are_tried_once_per_bucket(store, monkeypatch):
  monkeypatch.setattr(versioned, '_trusted', set())
  lease.take(f'{store}/.lease', {}).release()
  client = fsspec.filesystem(store.partition('://')[0])
  assert [os.path.basename(name) for name in client.find(store)] == ['.lease'], 'it leaves nothing'
