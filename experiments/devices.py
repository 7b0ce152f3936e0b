"""Which accelerators each local worker of a sweep sees: decided without starting one, told by environment.

A process that starts JAX takes most of a GPU's memory, or the whole TPU: the sweep itself never does where
workers train, and each worker is shown its own devices before it starts JAX. Nothing here imports JAX.
"""

import dataclasses
import glob
import importlib.util
from collections.abc import Mapping

from mhc_jax.errors import require

SHARED = 0.9  # of a device's memory, over the workers that share it
TPU_BOUNDS = {1: '1,1,1', 2: '1,2,1', 4: '2,2,1', 8: '2,4,1'}  # chips of one process, as libtpu wants them
_FRACTION = 'XLA_PYTHON_CLIENT_MEM_FRACTION'
# Kind -> variables that show a process some of the devices, the first one that is set decides; the packages
# without one of which JAX does not see them; the files of devices that are there.
_KINDS = {
  'cuda': (
    ('CUDA_VISIBLE_DEVICES',),
    ('jax_cuda12_plugin', 'jax_cuda13_plugin'),
    ('/dev/nvidia[0-9]*',),
  ),
  'rocm': (
    ('HIP_VISIBLE_DEVICES', 'ROCR_VISIBLE_DEVICES'),
    ('jax_rocm7_plugin', 'jax_rocm60_plugin'),
    ('/dev/dri/renderD*',),
  ),
  'tpu': (('TPU_VISIBLE_CHIPS',), ('libtpu',), ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')),
}
_PLATFORMS = {'cuda': ('cuda', 'gpu'), 'rocm': ('rocm', 'gpu'), 'tpu': ('tpu',)}  # in JAX_PLATFORMS


@dataclasses.dataclass(frozen=True)
class Accelerators:
  """What this process could use: names as `variable` takes them."""

  kind: str
  variable: str
  names: tuple[str, ...]


def find(environ: Mapping[str, str]) -> Accelerators | None:
  """The accelerators that a process with this environment would see, by files and packages; None without.

  A variable that is set already is respected: its devices are all that are shared out.
  """
  asked = [name for name in environ.get('JAX_PLATFORMS', '').split(',') if name]
  for kind, (variables, packages, files) in _KINDS.items():
    if asked and not set(asked) & set(_PLATFORMS[kind]):
      continue
    if not any(importlib.util.find_spec(package) for package in packages):
      continue
    there = next((found for pattern in files if (found := glob.glob(pattern))), [])
    variable = next((name for name in variables if name in environ), variables[0])
    names = environ.get(variable, ','.join(map(str, range(len(there)))))
    shown = tuple(name.strip() for name in names.split(',') if name.strip() not in ('', '-1', 'NoDevFiles'))
    if there and shown:
      return Accelerators(kind, variable, shown)
  return None


def most_workers(found: Accelerators, each: int, per_device: int) -> int:
  """How many workers of `each` devices fit; raises ConfigError where none does, or they cannot be shared."""
  count = len(found.names)
  require(each <= count, f'a run wants {each} devices (config.mesh), and {count} are here')
  require(per_device == 1 or found.kind != 'tpu', '--per-device: a TPU chip belongs to one process')
  require(
    found.kind != 'tpu' or each in TPU_BOUNDS, f'{each} TPU chips are no part of a host: 1, 2, 4 or 8 are'
  )
  return count // each * per_device


def environment(
  worker: int, found: Accelerators, each: int, per_device: int, environ: Mapping[str, str]
) -> dict[str, str]:
  """What to set for a worker, from 0: `each` devices of its own, or shared with per_device - 1 others.

  The first workers get devices of their own, the next ones share them.
  """
  first = worker % (len(found.names) // each) * each
  told = {found.variable: ','.join(found.names[first : first + each])}
  if per_device > 1:
    told[_FRACTION] = f'{float(environ.get(_FRACTION, SHARED)) / per_device:.3f}'
  if found.kind == 'tpu':  # a process by itself, whatever the slice is
    told |= {'TPU_PROCESS_BOUNDS': '1,1,1', 'TPU_CHIPS_PER_PROCESS_BOUNDS': TPU_BOUNDS[each]}
    told['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  return told
