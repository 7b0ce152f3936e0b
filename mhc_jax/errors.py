"""Mistakes of the user's, which end a program with one line and exit code 2."""

import errno


class ConfigError(ValueError):
  """A mistake of the user's: one line that says what to do; programs end with exit code 2."""

  def __init__(self, message: str):
    super().__init__(' '.join(message.splitlines()))  # names of files and others' errors may have more


class BusyError(ConfigError):
  """Another process is at work on the same run."""


class OutOfMemoryError(MemoryError):
  """The memory of a device is full; the message is one line that says by what, and what to change."""


def require(condition: bool, message: str) -> None:
  """Raises ConfigError with this message unless the condition holds."""
  if not condition:
    raise ConfigError(message)


class CheckpointError(OSError):
  """Checkpoints exist but none can be trusted; the message is one line that says what to do."""


class StorageError(OSError):
  """An object store failed; the message is one line that names the path."""


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
