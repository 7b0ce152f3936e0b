"""How commands end: mistakes, full disks and failing systems in one line, with an exit code."""

import atexit
import signal
from collections.abc import Callable

from mhc_jax.errors import FULL_DISK, CheckpointError, ConfigError, OutOfMemoryError, StorageError
from mhc_jax.log import say, tolerant_streams


def end_with_message(main: Callable[[], int]) -> int:
  """Runs a command. One line for mistakes (2), full disks or memory, lost files, stores (1), Ctrl-C (130)."""
  with tolerant_streams():
    try:
      return main()
    except KeyboardInterrupt:
      say('interrupted; the same command goes on')
      return 130
    except ConfigError as error:
      say(f'error: {error}')
      return 2
    except (CheckpointError, OutOfMemoryError, StorageError) as error:
      say(f'error: {error}')
    except OSError as error:
      reason = error.strerror or str(error)
      where = f'{error.filename}: ' if error.filename else ''
      again = ': free some space and run the same command again, it goes on from the last checkpoint'
      say(f'error: {where}{reason}{again if error.errno in FULL_DISK else ""}')
    except (MemoryError, RuntimeError) as error:  # XLA's is a RuntimeError, and JAX may not be imported here
      if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      what = ' '.join(f'{error}'.split())[:200]
      say(f'error: out of memory ({what}): lower data.batch_size, or set optimizer.microbatches')
    finally:  # registered last, done first: one more Ctrl-C while Python takes itself down is no traceback
      atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return 1
