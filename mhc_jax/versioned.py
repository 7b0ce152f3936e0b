"""Small files that are written only where nobody else has written since: the ground on which leases stand.

On a local or network file system such a file is a folder that holds its newest version as a file named by a
number, and a write creates the next number exclusively (O_EXCL), which one process alone can do. In a store
it is an object, and a write is conditional: S3 compares the ETag (If-None-Match, If-Match), Google Cloud
Storage the generation (ifGenerationMatch).
"""

import contextlib
import os
import secrets
from typing import Any

import fsspec
from fsspec.asyn import sync

from mhc_jax import storage
from mhc_jax.errors import ConfigError

_REFUSED = (409, 412)  # HTTP: another write at the same time, or before


def read(path: str) -> tuple[bytes, str | None]:
  """(content, version) of the newest version; (b'', None) where there is none.

  Content that is still being written may be cut. Raises StorageError for a store out of reach.
  """
  with storage.errors_of(path):
    if storage.is_remote(path):
      return _read_object(*_opened(path))
    versions = _versions(path)
    if versions:
      with contextlib.suppress(FileNotFoundError):  # replaced since: as if it could not be read yet
        with open(os.path.join(path, _name(versions[-1])), 'rb') as file:
          return file.read(), f'{versions[-1]}'
      return b'', f'{versions[-1]}'
    return b'', None


def read_many(paths: list[str]) -> list[bytes | None]:
  """The contents alone, of files of one store all at once; None where there is no file."""
  if any(map(storage.is_remote, paths)):
    return storage.read_many(paths)
  found = [read(path) for path in paths]
  return [None if version is None else content for content, version in found]


def write(path: str, content: bytes, version: str | None) -> str | None:
  """Writes where `version`, None for no file, is still the newest; the new version while it is the newest.

  None where another was faster, or has written since. Of several that write at once, one at most succeeds; no
  two may write equal content. Raises OSError, or StorageError, where the write itself fails.
  """
  with storage.errors_of(path):
    if not storage.is_remote(path):
      return _write_file(path, content, version)
    written = _write_object(*_opened(path), content, version)
    if written is None:  # a repeated request meets its own first attempt
      found, version = read(path)
      return version if found == content else None
    return written


# Files


def _name(number: int) -> str:
  return f'{number:08d}'


def _versions(path: str) -> list[int]:
  try:
    return sorted(int(name) for name in os.listdir(path) if name.isdecimal())
  except (FileNotFoundError, NotADirectoryError):
    return []


def _write_file(path: str, content: bytes, version: str | None) -> str | None:
  number = int(version or 0) + 1
  mine = os.path.join(path, _name(number))
  os.makedirs(path, exist_ok=True)
  try:
    with open(mine, 'xb') as file:
      file.write(content)  # not forced to disk: what a machine's crash leaves of it is stale in any case
  except FileExistsError:
    return None
  # The number may have been there before, and gone again, since `version` was read: the highest counts.
  versions = _versions(path)
  won = versions[-1:] == [number]
  for other in versions[:-1] if won else [number]:
    with contextlib.suppress(FileNotFoundError):
      os.remove(os.path.join(path, _name(other)))
  return f'{number}' if won else None


# Objects


_trusted: set[tuple[str, str]] = set()  # buckets that have shown that they keep conditions


def _opened(path: str) -> tuple[Any, str, str]:
  """(client, bucket, key) of an object; ConfigError for a store that ignores the conditions of writes."""
  storage.to_path(path)  # refuses what is not supported
  scheme, _, rest = path.partition('://')
  bucket, _, key = rest.strip('/').partition('/')
  client = fsspec.filesystem(scheme)
  if (scheme, bucket) not in _trusted:
    _require_conditions(client, bucket, os.path.dirname(key))
    _trusted.add((scheme, bucket))
  return client, bucket, key


def _require_conditions(client: Any, bucket: str, folder: str) -> None:
  key = os.path.join(folder, f'.condition-{secrets.token_hex(8)}')
  first = _write_object(client, bucket, key, b'1', None)
  try:
    kept = _write_object(client, bucket, key, b'2', None) is None
    second = _write_object(client, bucket, key, b'2', first)
    kept = kept and None not in (first, second) and _write_object(client, bucket, key, b'3', first) is None
  finally:
    client.rm_file(f'{bucket}/{key}')
  if not kept:
    raise ConfigError(
      f'{bucket} ignores the conditions of conditional writes, which keep processes apart: '
      'take another store, or a local folder'
    )


def _read_object(client: Any, bucket: str, key: str) -> tuple[bytes, str | None]:
  async def of_s3() -> tuple[bytes, str]:
    answer = await client._call_s3('get_object', Bucket=bucket, Key=key)
    async with answer['Body'] as body:
      return await body.read(), answer['ETag']

  async def of_gcs() -> tuple[bytes, str]:
    headers, content = await client._call('GET', 'b/{}/o/{}', bucket, key, alt='media')
    return content, headers['x-goog-generation']

  try:
    return sync(client.loop, of_s3 if 's3' in client.protocol else of_gcs)
  except FileNotFoundError:
    return b'', None


def _write_object(client: Any, bucket: str, key: str, content: bytes, version: str | None) -> str | None:
  async def to_s3() -> str:
    condition = {'IfNoneMatch': '*'} if version is None else {'IfMatch': version}
    answer = await client._call_s3('put_object', Bucket=bucket, Key=key, Body=content, **condition)
    return answer['ETag']

  async def to_gcs() -> str:
    path, how = f'{client._location}/upload/storage/v1/b/{bucket}/o', {'uploadType': 'media', 'name': key}
    how['ifGenerationMatch'] = version or '0'
    return (await client._call('POST', path, data=content, json_out=True, **how))['generation']

  try:
    return sync(client.loop, to_s3 if 's3' in client.protocol else to_gcs)
  except (FileExistsError, FileNotFoundError):  # there is one; or there is none any more
    return None
  except Exception as error:  # each client has classes of its own
    response = getattr(error.__cause__, 'response', None) or {}
    code = response.get('ResponseMetadata', {}).get('HTTPStatusCode', getattr(error, 'code', None))
    if code in _REFUSED:
      return None
    raise
