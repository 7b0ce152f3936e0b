"""Paths as users give them."""

import argparse
import os
from pathlib import Path

from mhc_jax.errors import ConfigError, require


def expand(path: str | os.PathLike[str]) -> str:
  """A path as its user meant it: ~ and ~user are home folders; ConfigError where there is no such user.

  The shell leaves them alone after an equals sign and in quotes; a folder called ~ is the next accident.
  Also refused is a name that is not UTF-8, which the files of checkpoints cannot have.
  """
  path = os.fspath(path)
  strange = '\0' in path or any('\ud800' <= letter <= '\udfff' for letter in path)
  require(not strange, f'{path!a}: the name of a path must be UTF-8')
  if not path.startswith('~'):
    return path
  expanded = os.path.expanduser(path)
  require(not expanded.startswith('~'), f'{path}: no home folder is known for {path.split("/")[0]}')
  return expanded


def cache_folder() -> str:
  """The user's folder for what can be made again; ConfigError without a home folder."""
  return os.path.join(os.environ.get('XDG_CACHE_HOME') or expand('~/.cache'), 'mhc_jax')


def user_path(text: str) -> Path:
  """The type of a command's path argument."""
  try:
    return Path(expand(text))
  except ConfigError as error:  # argparse has words of its own for a ValueError
    raise argparse.ArgumentTypeError(str(error)) from None


def check_folder(folder: Path, option: str) -> None:
  """Raises ConfigError where the folder that `option` names cannot be made or written to; makes nothing."""
  nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
    raise ConfigError(f'{option}: {nearest} is not a folder that can be written to')
