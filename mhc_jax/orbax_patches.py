"""What orbax 0.12 does not offer and is changed inside it: its words on stderr, its clock, arrays in s3://.

Each function says which private names of orbax it relies on; checkpoint.py calls them.
"""

import functools
import logging
import os
import re
import sys
import time
import traceback
import types
import warnings
from typing import Any

_ORBAX = re.compile('orbax|tensorstore|OCDBT')  # in the log lines and module paths of orbax alone


def quieten_orbax() -> None:
  """Keeps orbax's own words off stderr, once per process; its errors reach the caller as raised.

  Sources: absl's log (a full traceback for every failed write); and, after the first of several
  failed transfers, the others, which report to asyncio, or to an event loop already closed, or are never
  begun and warn of it.
  """
  if _not_from_orbax in logging.getLogger('absl').filters:
    return
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(_not_from_orbax)
  warnings.filterwarnings('ignore', r"coroutine '.*write_fragment' was never awaited", RuntimeWarning)
  earlier_hook = sys.unraisablehook

  def hook(unraisable) -> None:
    late_write = unraisable.object is None and str(unraisable.exc_value) == 'Event loop is closed'
    coroutine = getattr(unraisable.object, 'cr_code', None)
    late_read = coroutine is not None and bool(_ORBAX.search(coroutine.co_filename))
    if not (late_write or late_read):
      earlier_hook(unraisable)

  sys.unraisablehook = hook


def _not_from_orbax(record: logging.LogRecord) -> bool:
  frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
  text = ' '.join([record.pathname, record.getMessage(), *(frame.filename for frame in frames)])
  return not _ORBAX.search(text)


@functools.cache
def teach_orbax_s3() -> None:
  """Lets orbax write arrays to s3://, which the tensorstore below it can; orbax 0.12 sends only gs:// there.

  Two of its functions choose tensorstore's driver by the path; this puts s3:// beside gs:// in both. The
  usual variables (AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, ...) hold for it as they do for s3fs.
  """
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  uses_gcs, gcs_store = tensorstore_utils._use_gcs_driver, gcs_utils.get_kvstore_for_gcs

  def store(path: str) -> dict[str, Any]:
    if not path.startswith('s3:/'):
      return gcs_store(path)
    bucket, _, key = path.removeprefix('s3:').lstrip('/').partition('/')  # orbax made one slash of two
    spec = {'driver': 's3', 'bucket': bucket, 'path': key}
    region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')
    endpoint = os.environ.get('AWS_ENDPOINT_URL')
    if endpoint:
      spec['endpoint'] = endpoint
    if endpoint or region:
      spec['aws_region'] = region or 'us-east-1'
    if 'AWS_ACCESS_KEY_ID' in os.environ:  # else it looks for files first, and says that there are none
      spec['aws_credentials'] = {'type': 'environment'}
    return spec

  tensorstore_utils._use_gcs_driver = lambda path: uses_gcs(path) or path.startswith('s3:/')
  gcs_utils.get_kvstore_for_gcs = store


@functools.cache
def bear_clock_steps() -> None:
  """Lets orbax wait by the monotonic clock: by the wall clock, a step of it ends a save as timed out."""
  from orbax.checkpoint._src.futures import future, signaling_client

  for module in (future, signaling_client):
    module.time = types.SimpleNamespace(**vars(time) | {'time': time.monotonic})
