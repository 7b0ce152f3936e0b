"""How commands end: mistakes and full disks in one line, with an exit code."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from mhc_jax.errors import FULL_DISK, CheckpointError, ConfigError, StorageError


def end_with_message(main: Callable[[], int]) -> int:
  """Runs a command. One line for mistakes (2), full disks, lost checkpoints or stores (1), Ctrl-C (130)."""
  try:
    return main()
  except KeyboardInterrupt:
    print('interrupted; the same command goes on', file=sys.stderr)
    return 130
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


def check_folder(folder: Path, option: str) -> None:
  """Raises ConfigError where the folder that `option` names cannot be made or written to; makes nothing."""
  nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
    raise ConfigError(f'{option}: {nearest} is not a folder that can be written to')
