"""Object stores on this machine, for tests of leases and sweeps: moto's S3, and a small Google Cloud Storage.

  python -m tests.buckets s3     # prints its address, and serves until it is killed

Both keep all in memory and serve one request at a time, so that a condition and its write are one step, as in
the real ones (moto alone checks and writes without a lock). The small one speaks as much of the JSON API as
gcsfs, tensorstore and leases use: uploads (whole, or resumable in one piece), downloads and ranges of them,
metadata, lists by prefix and delimiter, deletion; ifGenerationMatch holds for uploads and deletion, and
generations grow by one. It knows no credentials, no errors but 404 and 412, no versions of the past.
"""

import json
import sys
import threading
from collections.abc import Callable
from email.parser import BytesParser
from urllib.parse import parse_qs, quote


def serve(app: Callable) -> tuple[str, Callable[[], None]]:
  """(address, function that stops it) of a WSGI application, one request at a time."""
  from werkzeug.serving import WSGIRequestHandler, make_server

  class Quiet(WSGIRequestHandler):
    def log(self, *_):
      pass

  one = threading.Lock()

  def alone(environ: dict, start: Callable) -> list[bytes]:
    with one:
      return list(app(environ, start))

  server = make_server('127.0.0.1', 0, alone, threaded=True, request_handler=Quiet)
  thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
  thread.start()

  def stop() -> None:
    server.shutdown()
    server.server_close()
    thread.join()

  return f'http://127.0.0.1:{server.port}', stop


def s3() -> Callable:
  """moto's S3; needs moto[server]."""
  from moto.server import DomainDispatcherApplication, create_backend_app

  return DomainDispatcherApplication(create_backend_app)


def gcs(buckets: tuple[str, ...] = ('bucket',)) -> Callable:
  """The small Google Cloud Storage, with these buckets."""
  objects: dict[str, dict[str, tuple[bytes, int]]] = {bucket: {} for bucket in buckets}
  count = [1_000]

  def described(bucket: str, name: str) -> dict:
    content, generation = objects[bucket][name]
    times = dict.fromkeys(('updated', 'timeCreated'), '2026-01-01T00:00:00.000Z')
    identity = {
      'kind': 'storage#object',
      'id': f'{bucket}/{name}/{generation}',
      'name': name,
      'bucket': bucket,
    }
    return (
      identity | times | {'generation': f'{generation}', 'size': f'{len(content)}', 'metageneration': '1'}
    )

  def listed(bucket: str, query: dict) -> dict:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    items, prefixes = [], set()
    for name in sorted(objects[bucket]):
      if name.startswith(prefix):
        head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else ('', '', '')
        if cut:
          prefixes.add(f'{prefix}{head}{cut}')
        else:
          items.append(described(bucket, name))
    return {'kind': 'storage#objects', 'items': items, 'prefixes': sorted(prefixes)}

  def respond(method: str, path: str, query: dict, body: bytes, kind: str) -> tuple[int, dict, bytes]:
    bucket, inside, name = path.partition('/b/')[2].partition('/o')
    name = name.removeprefix('/') or query.get('name', '')
    if bucket not in objects:
      return 404, {}, b'{}'
    if not inside:
      return 200, {}, json.dumps({'kind': 'storage#bucket', 'name': bucket, 'id': bucket}).encode()
    if method == 'POST' and kind.startswith('multipart'):
      parts = BytesParser().parsebytes(f'Content-Type: {kind}\r\n\r\n'.encode() + body).get_payload()
      name, body = json.loads(parts[0].get_payload())['name'], parts[1].get_payload(decode=True)
    if method == 'GET' and not name:
      return 200, {}, json.dumps(listed(bucket, query)).encode()
    if query.get('uploadType') == 'resumable' and method == 'POST':
      name = name or json.loads(body)['name']
      same = '&'.join(f'{key}={value}' for key, value in query.items() if key not in ('uploadType', 'name'))
      return 200, {'Location': f'{path}?name={quote(name, safe="")}&{same}'}, b''
    method = 'POST' if method == 'PUT' else method  # the one piece of a resumable upload
    generation = objects[bucket].get(name, (b'', 0))[1]
    if method in ('POST', 'DELETE') and query.get('ifGenerationMatch', f'{generation}') != f'{generation}':
      return 412, {}, b'{}'
    if method == 'POST':
      count[0] += 1
      objects[bucket][name] = body, count[0]
      return 200, {}, json.dumps(described(bucket, name)).encode()
    if not generation:
      return 404, {}, b'{}'
    if method == 'DELETE':
      del objects[bucket][name]
      return 204, {}, b''
    if query.get('alt') == 'media':
      return 200, {'x-goog-generation': f'{generation}'}, objects[bucket][name][0]
    return 200, {}, json.dumps(described(bucket, name)).encode()

  def app(environ: dict, start: Callable) -> list[bytes]:
    query = {key: values[0] for key, values in parse_qs(environ['QUERY_STRING']).items()}
    body = environ['wsgi.input'].read(int(environ.get('CONTENT_LENGTH') or 0))
    status, headers, content = respond(
      environ['REQUEST_METHOD'], environ['PATH_INFO'], query, body, environ.get('CONTENT_TYPE', '')
    )
    if 'HTTP_RANGE' in environ and status == 200:
      first, _, last = environ['HTTP_RANGE'].removeprefix('bytes=').partition('-')
      whole, begin = len(content), int(first)
      content = content[begin : int(last) + 1 if last else None]
      status, headers['Content-Range'] = 206, f'bytes {begin}-{begin + len(content) - 1}/{whole}'
    if 'Location' in headers:
      headers['Location'] = f'http://{environ["HTTP_HOST"]}{headers["Location"]}'
    sent = {'Content-Length': f'{len(content)}', 'Content-Type': 'application/json'} | headers
    start(f'{status} -', list(sent.items()))
    return [content]

  return app


if __name__ == '__main__':
  print(serve({'s3': s3, 'gcs': gcs}[sys.argv[1]]())[0], flush=True)
  threading.Event().wait()
