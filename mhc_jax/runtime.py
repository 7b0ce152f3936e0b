"""What a process sets up before it computes: memory that it keeps, and programs that later processes find.

Both are for speed alone and change no number. What the environment says of either wins.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import sys
import warnings
from collections.abc import Callable

import jax

from mhc_jax.errors import ConfigError
from mhc_jax.log import say_once
from mhc_jax.paths import cache_folder

# Settings of glibc: variables for processes that are started from here, mallopt's numbers for this one.
# XLA:CPU allocates the temporaries of every step anew; beyond 32 MB glibc would return them to the system,
# which fills them with zeros again, page by page, and so do arenas but the first. With one arena compilation,
# which allocates in several threads, takes a third longer.
_MALLOC = {
  'MALLOC_ARENA_MAX': (-8, 2),
  'MALLOC_MMAP_THRESHOLD_': (-3, 2**30),
  'MALLOC_TRIM_THRESHOLD_': (-1, 2**31 - 1),
}
_CACHE = {
  'JAX_COMPILATION_CACHE_MAX_SIZE': 2**31,  # bytes; what was used longest ago goes first
  'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': 0.1,
}


def keep_memory() -> None:
  """This process, and those that it starts, keep what they free. Does nothing but on Linux with glibc."""
  if platform.libc_ver()[0] != 'glibc':
    return
  libc = ctypes.CDLL(None)
  for variable, (name, value) in _MALLOC.items():
    if variable not in os.environ:
      os.environ[variable] = str(value)
      libc.mallopt(name, value)


def keep_programs(wanted: bool = True) -> None:
  """Compiled programs go to the user's cache folder, for this process and those that it starts.

  One folder for each kind of processor: a program for one may not run on another. wanted: False is off, as
  JAX_ENABLE_COMPILATION_CACHE=false is. Entries that cannot be read or written are said once.
  """
  values = {'JAX_ENABLE_COMPILATION_CACHE': False}
  if wanted:
    try:
      folder = os.path.join(cache_folder(), 'compiled', _processor())
      os.makedirs(folder, exist_ok=True)
    except (ConfigError, OSError):  # no home folder, or one that is read only: as if it were off
      return
    values = {'JAX_COMPILATION_CACHE_DIR': folder, **_CACHE}
  for variable, value in values.items():
    if variable not in os.environ or not wanted:
      os.environ[variable] = str(value)
      jax.config.update(variable.lower(), value)
  warnings.showwarning = functools.partial(_show, warnings.showwarning)


def _show(show: Callable[..., None], message: Warning | str, *rest: object, **more: object) -> None:
  """warnings.showwarning, but for what JAX says of every entry: that once."""
  if 'persistent compilation cache' not in str(message):
    show(message, *rest, **more)
    return
  say_once(
    f'warning: programs kept in {jax.config.jax_compilation_cache_dir} cannot be read or written, and are '
    'compiled anew: remove the folder, or give --no-compilation-cache'
  )


def add_flag(parser: argparse.ArgumentParser) -> None:
  """The option of a command that trains."""
  parser.add_argument(
    '--no-compilation-cache',
    action='store_true',
    help="compile everything anew; else programs are kept in the user's cache folder (2 GiB at the most)",
  )


def prepare(args: argparse.Namespace) -> None:
  """For a command that trains, before anything is computed."""
  keep_memory()
  keep_programs(not args.no_compilation_cache)


def _processor() -> str:
  """A name for what the processor can do."""
  features = platform.machine() + platform.processor()
  if sys.platform == 'linux':
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
      features += next((line for line in file if line.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(features.encode()).hexdigest()[:12]
