"""How commands end: mistakes, full disks and failing systems in one line, with an exit code."""

from collections.abc import Callable

from mhc_jax.errors import FULL_DISK, CheckpointError, ConfigError, StorageError
from mhc_jax.log import say, tolerant_streams


def end_with_message(main: Callable[[], int]) -> int:
  """Runs a command. One line for mistakes (2), full disks, lost files or stores (1), Ctrl-C (130)."""
  with tolerant_streams():
    try:
      return main()
    except KeyboardInterrupt:
      say('interrupted; the same command goes on')
      return 130
    except ConfigError as error:
      say(f'error: {error}')
      return 2
    except (CheckpointError, StorageError) as error:
      say(f'error: {error}')
    except OSError as error:
      reason = error.strerror or str(error)
      where = f'{error.filename}: ' if error.filename else ''
      again = ': free some space and run the same command again, it goes on from the last checkpoint'
      say(f'error: {where}{reason}{again if error.errno in FULL_DISK else ""}')
    return 1
