"""How commands end: mistakes and full disks in one line, with an exit code."""

import errno
import sys
from collections.abc import Callable

from mhc_jax.checkpoint import CheckpointError
from mhc_jax.config import ConfigError
from mhc_jax.storage import StorageError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def end_with_message(main: Callable[[], int]) -> int:
  """Runs a command; mistakes end in one line and 2, a full disk, lost checkpoints or stores in one and 1."""
  try:
    return main()
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except (CheckpointError, StorageError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except OSError as error:
    if error.errno not in FULL_DISK:
      raise
    print(
      f'error: {error.strerror}: free some space and run the same command again, '
      'it goes on from the last checkpoint',
      file=sys.stderr,
    )
    return 1
