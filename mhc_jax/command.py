"""How commands end: mistakes and full disks in one line, with an exit code."""

import errno
import sys
from collections.abc import Callable

from mhc_jax.checkpoint import CheckpointError
from mhc_jax.config import ConfigError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def end_with_message(main: Callable[[], int]) -> int:
  """Runs a command. One line for mistakes (2), a full disk or lost checkpoints (1), Ctrl-C (130)."""
  try:
    return main()
  except KeyboardInterrupt:
    print('interrupted; the same command goes on', file=sys.stderr)
    return 130
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except CheckpointError as error:
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
