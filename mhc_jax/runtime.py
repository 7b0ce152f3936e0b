"""What a process sets up before it computes: memory that it keeps, and programs that later processes find.

Both are for speed alone and change no number. What the environment says of either wins.
"""

import argparse
import contextlib
import ctypes
import functools
import glob
import hashlib
import importlib.util
import mmap
import os
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence

import jax

from mhc_jax.errors import ConfigError
from mhc_jax.log import say, say_once
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


# What overlaps collectives with computation, for --xla-flags preset: (variable, flags). GPUs: of NVIDIA's and
# JAX's guides to performance. TPUs: of MaxText's guide; without them its schedule has no collectives beside
# fusions that compute.
PRESETS = {
  'gpu': (
    'XLA_FLAGS',
    (
      '--xla_gpu_enable_latency_hiding_scheduler=true',
      '--xla_gpu_enable_pipelined_all_gather=true',
      '--xla_gpu_enable_pipelined_reduce_scatter=true',
      '--xla_gpu_enable_pipelined_all_reduce=true',
      '--xla_gpu_enable_while_loop_double_buffering=true',
      '--xla_gpu_triton_gemm_any=true',
    ),
  ),
  'tpu': (
    'LIBTPU_INIT_ARGS',
    (
      '--xla_tpu_enable_async_collective_fusion=true',
      '--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true',
      '--xla_tpu_enable_async_collective_fusion_multiple_steps=true',
      '--xla_tpu_overlap_compute_collective_tc=true',
      '--xla_enable_async_all_gather=true',
    ),
  ),
}
# Platform -> (files that its driver makes, packages by which JAX sees it, packages that read the flags).
_PLATFORMS = {
  'gpu': (
    ('/dev/nvidia[0-9]*',),
    ('jax_cuda12_plugin', 'jax_cuda13_plugin'),
    ('jaxlib', 'jax_plugins.xla_cuda12', 'jax_plugins.xla_cuda13'),
  ),
  'tpu': (('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'), ('libtpu',), ('libtpu',)),
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
  parser.add_argument(
    '--xla-flags',
    choices=('none', 'preset'),
    default='none',
    help='preset: flags for GPUs or TPUs that overlap communication with computation, where XLA knows them; '
    'what XLA_FLAGS says wins (numbers may differ by rounding)',
  )


def platform_of(environ: Mapping[str, str]) -> str | None:
  """'gpu', 'tpu' or None: what JAX will take, by its settings, packages and files, without starting it."""
  asked = set(filter(None, environ.get('JAX_PLATFORMS', '').split(',')))
  for name, (files, packages, _) in _PLATFORMS.items():
    if asked and not asked & {name, *(('cuda',) if name == 'gpu' else ())}:
      continue
    if any(map(importlib.util.find_spec, packages)) and (asked or any(map(glob.glob, files))):
      return name
  return None


def use_preset(name: str | None) -> None:
  """Adds a platform's preset to the environment, less flags that are set there and that XLA does not know.

  An unknown flag would end the process. What was added, or left out, is said.
  """
  if name is None:
    say('--xla-flags preset: there is none for CPU')
    return
  variable, flags = PRESETS[name]
  given = os.environ.get(variable, '')
  names = {flag: flag.partition('=')[0].lstrip('-') for flag in flags}
  missing = [flag for flag in flags if re.search(rf'--{names[flag]}(=|\s|$)', given) is None]
  known = _known([names[flag] for flag in missing], _PLATFORMS[name][2])
  added = [flag for flag in missing if names[flag] in known]
  os.environ[variable] = ' '.join([given, *added]).strip()
  unknown = [names[flag] for flag in missing if flag not in added]
  say(f'{variable} gets {" ".join(added) or "nothing"}' + (f'; not known here: {unknown}' if unknown else ''))


def _known(names: Sequence[str], packages: Sequence[str]) -> set[str]:
  """Of flags, those whose names are in the library of every package that is here."""
  known = set(names)
  for package in packages:
    with contextlib.suppress(ModuleNotFoundError):
      found = importlib.util.find_spec(package)
      folders = list(found.submodule_search_locations or []) if found else []
      files = [file for folder in folders for file in glob.glob(f'{folder}/*.so')]
      if files:
        known &= set().union(*(_named(file, known) for file in files))
  return known


def _named(file: str, names: set[str]) -> set[str]:
  if os.path.getsize(file) < 2**24:  # XLA is larger
    return set()
  with open(file, 'rb') as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
    return {name for name in names if content.find(name.encode() + bytes(1)) >= 0}


def prepare(args: argparse.Namespace) -> None:
  """For a command that trains, before anything is computed."""
  if args.xla_flags == 'preset':
    use_preset(platform_of(os.environ))
  keep_memory()
  keep_programs(not args.no_compilation_cache)


def _processor() -> str:
  """A name for what the processor can do."""
  features = platform.machine() + platform.processor()
  if sys.platform == 'linux':
    with contextlib.suppress(OSError), open('/proc/cpuinfo', encoding='utf-8') as file:
      features += next((line for line in file if line.startswith(('flags', 'Features'))), '')
  return hashlib.sha256(features.encode()).hexdigest()[:12]
