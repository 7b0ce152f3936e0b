"""The train_step compiled for TPUs that are not there: its memory and predicted speed.

The TPU's own compiler (libtpu, extra `tpu`) compiles shapes and shardings over a described topology; CPU is
the running backend. Memory is the compiler's; FLOPs, bytes and times are counted in its optimised program
(hlo_cost.py, step_time.py).
"""

import importlib.util
import os
import re
import sys
import time
from importlib import metadata
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mhc_jax.chips import CHIPS, TPUS, Chip
from mhc_jax.errors import ConfigError, require
from mhc_jax.runtime import PRESETS
from mhc_jax.sharding import make_mesh
from mhc_jax.workdir import revision

from .abstract_step import describe, device_bytes, mesh_axes, trace_step
from .hlo_cost import Operation
from .report import changes, finished

# libtpu looks for the machine it runs on, and two compilations at once collide on its lock file.
LIBTPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'LIBTPU_INIT_ARGS': ' '.join(PRESETS['tpu'][1]),  # as a run has it with --xla-flags preset
}


def check_topology(topology: str) -> None:
  """Raises ConfigError unless it names a chip and its sides, and libtpu is installed."""
  name, _, sides = topology.partition(':')
  known = name in TPUS and re.fullmatch(r'\d+(x\d+)*', sides)
  require(
    bool(known) and sides.count('x') + 1 == CHIPS[name].axes,
    f'a topology is a chip and its sides, like v5p:8x8x8, v6e:16x16 or one of {", ".join(TPUS)}; '
    f'got {topology!r}',
  )
  require(
    importlib.util.find_spec('libtpu') is not None,
    "libtpu, the TPU compiler, is missing (it needs no TPU): pip install 'jax[tpu]'",
  )


def described_devices(topology: str) -> list[jax.Device]:
  """The devices of a TPU slice that need not be there; raises ConfigError for an impossible one."""
  check_topology(topology)
  for variable, value in LIBTPU.items():
    os.environ.setdefault(variable, value)
  try:
    return list(get_topology_desc(topology, 'tpu').devices)
  except (RuntimeError, ValueError) as error:  # what XLA raises is a RuntimeError
    what = ' '.join(str(error).split())
    raise ConfigError(f'libtpu knows no slice {topology}: {what}') from None


def compile_step(config: ConfigDict, topology: str) -> dict[str, Any]:
  """The report on one config and one slice, as plain values; raises ConfigError for impossible ones."""
  devices = described_devices(topology)
  chip = CHIPS[topology.partition(':')[0]]
  mesh = make_mesh(mesh_axes(config, len(devices), topology), devices)
  traced, state, batch, model = trace_step(config, mesh)
  arguments = {
    'params': device_bytes(state.params),
    'optimizer': device_bytes((state.opt_state, state.step)),
    'batch': device_bytes(batch),
  }
  report = describe(config, model, topology, len(devices), mesh)
  report |= {'git_revision': revision()}
  report |= {'versions': {name: metadata.version(name) for name in ('jax', 'jaxlib', 'libtpu')}}
  report |= {'argument_bytes': arguments}
  print(f'compiling for {topology}, some minutes for a large model', file=sys.stderr)
  began = time.perf_counter()
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    return {**report, **too_large(str(error), config, arguments, chip.memory / chip.devices)}
  report['compile_seconds'] = time.perf_counter() - began
  return {
    **report,
    'fits': True,
    **finished(compiled, config, model, group_sides(mesh, chip), len(devices), chip),
  }


def too_large(error: str, config: ConfigDict, arguments: dict[str, int], capacity: float) -> dict[str, Any]:
  """The part of the report that says by how much a step misses the memory, and what to change."""
  used = re.search(r'[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)\w* hbm', error)
  scale = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  size: dict[str, Any] = {'capacity': capacity}
  if used:
    size = {'total': float(used[1]) * scale[used[2]], 'capacity': float(used[3]) * scale[used[4]]}
  return {'fits': False, 'memory_bytes': size, 'change': changes(config, arguments, capacity)}


def group_sides(mesh: Mesh, chip: Chip) -> Any:
  """operation -> how many chips its group has along each axis of the torus, and whether they are a ring."""
  coords = [tuple(device.coords) for device in mesh.devices.flat]
  slice_sides = [len(set(axis)) for axis in zip(*coords, strict=True)]

  def sides(operation: Operation) -> list[tuple[int, bool]]:
    group = [coords[member] for member in operation.group]
    extent = [len(set(axis)) for axis in zip(*group, strict=True)] or [1] * len(slice_sides)
    return [(side, side == whole >= chip.wraps_at) for side, whole in zip(extent, slice_sides, strict=True)]

  return sides
