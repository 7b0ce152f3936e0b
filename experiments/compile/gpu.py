"""The train_step compiled for NVIDIA GPUs that are not there: its memory, collectives and predicted speed.

`mhc compile --config ... --gpu H100:2x8`, hosts x GPUs; H100:64 is hosts of 8. XLA's own GPU compiler, of
the wheels of the extra `gpu-compiler`, compiles for a described target without a driver. It cannot try its
kernels there, so that it takes the default tiles of its matrix products. Memory is the compiler's; FLOPs,
bytes and times are counted in its program as for TPUs (hlo_cost.py, step_time.py).
"""

import dataclasses
import importlib.util
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import jax
from jax.experimental.topologies import get_topology_desc
from ml_collections import ConfigDict

from mhc_jax.chips import CHIPS, GPUS
from mhc_jax.errors import ConfigError, require
from mhc_jax.sharding import make_mesh
from mhc_jax.workdir import revision

from .abstract_step import describe, device_bytes, mesh_axes, trace_step
from .hlo_cost import Operation
from .report import changes, finished
from .step_time import Sides


@dataclasses.dataclass(frozen=True)
class Target:
  """What XLA wants to know of a GPU; memory and its bandwidth are those of chips.py.

  Sources: NVIDIA's white papers and tuning guides of Ampere, Hopper and Blackwell (compute capabilities).
  """

  capability: tuple[int, int]
  cores: int  # streaming multiprocessors
  shared: int  # bytes of shared memory on each
  l2: int  # bytes
  clock: float  # GHz, boost
  lanes: int = 128  # float32 units on each


TARGETS = {
  'A100': Target((8, 0), 108, 164 * 1024, 40 * 2**20, 1.41, lanes=64),
  'H100': Target((9, 0), 132, 228 * 1024, 50 * 2**20, 1.98),
  'H200': Target((9, 0), 132, 228 * 1024, 50 * 2**20, 1.98),
  'B200': Target((10, 0), 148, 228 * 1024, 126 * 2**20, 1.965),
}
WHEELS = ('jax_plugins.xla_cuda12', 'nvidia.cuda_nvcc')
MISSING = "XLA's compiler for NVIDIA GPUs is missing (it needs no GPU): pip install 'mhc_jax[gpu-compiler]'"


def target_text(name: str) -> str:
  """XLA's GpuTargetConfigProto of a GPU."""
  target, chip = TARGETS[name], CHIPS[name]
  major, minor = target.capability
  return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_core: {target.shared}
  shared_memory_per_block_optin: {target.shared - 1024}
  threads_per_core_limit: 2048
  core_count: {target.cores}
  fpus_per_core: {target.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {target.l2}
  clock_rate_ghz: {target.clock}
  device_memory_size: {int(chip.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


def cluster(gpus: str) -> tuple[str, int, int]:
  """(chip, hosts, GPUs on each) of H100:2x8, or of H100:64, hosts of 8; raises ConfigError for others."""
  name, _, size = gpus.partition(':')
  require(
    name in GPUS and re.fullmatch(r'[1-9]\d*(x[1-9]\d*)?', size) is not None,
    f'--gpu is a chip of {", ".join(GPUS)}, and hosts x GPUs or their number, like H100:2x8; got {gpus!r}',
  )
  if 'x' in size:
    hosts, each = map(int, size.split('x'))
    return name, hosts, each
  number, domain = int(size), CHIPS[name].domain
  require(
    number < domain or number % domain == 0,
    f'--gpu {gpus}: {number} is no multiple of the {domain} GPUs of a host; name the hosts, like {name}:3x4',
  )
  return name, max(1, number // domain), min(number, domain)


def described_devices(name: str, hosts: int, each: int) -> list[jax.Device]:
  """The GPUs of a cluster that need not be there; raises ConfigError where the wheels are not installed."""
  try:
    folder = [importlib.util.find_spec(wheel) for wheel in WHEELS][1].submodule_search_locations[0]
  except (AttributeError, ModuleNotFoundError):  # no such wheel, or no package above it
    raise ConfigError(MISSING) from None
  flags = f'--xla_gpu_cuda_data_dir={folder} --xla_gpu_autotune_level=0'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'.strip()  # read when backends start
  os.environ['PATH'] += f'{os.pathsep}{folder}/bin'  # ptxas
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  with _quiet():
    jax.devices()
    topology = f'1x{hosts}x{each}'
    try:
      found = get_topology_desc('', platform='cuda', target_config=target_text(name), topology=topology)
    except RuntimeError as error:
      raise ConfigError(f"XLA's GPU compiler: {' '.join(str(error).split())}") from None
  return list(found.devices)


@contextmanager
def _quiet() -> Iterator[None]:
  """The plugin logs that there is no driver; nothing here needs one."""
  logging.disable(logging.CRITICAL)
  try:
    yield
  finally:
    logging.disable(logging.NOTSET)


def compile_step(config: ConfigDict, gpus: str) -> dict[str, Any]:
  """The report on one config and a cluster, as plain values; raises ConfigError for impossible ones."""
  name, hosts, each = cluster(gpus)
  chip, axes = CHIPS[name], mesh_axes(config, hosts * each, f'--gpu {gpus}')
  devices = described_devices(name, hosts, each)
  mesh = make_mesh(axes, devices)
  traced, state, batch, model = trace_step(config, mesh)
  arguments = {
    'params': device_bytes(state.params),
    'optimizer': device_bytes((state.opt_state, state.step)),
    'batch': device_bytes(batch),
  }
  versions = {package: metadata.version(package) for package in ('jax', 'jaxlib', 'jax-cuda12-plugin')}
  report = describe(config, model, gpus, len(devices), mesh)
  report |= {'git_revision': revision(), 'versions': versions, 'argument_bytes': arguments}
  print(f'compiling for {gpus}, some minutes for a large model', file=sys.stderr)
  began = time.perf_counter()
  try:
    compiled = traced.lower().compile()
  except NotImplementedError as error:
    what = ' '.join(str(error).split())
    raise ConfigError(f'train_step has an operation that does not exist for CUDA: {what}') from None
  report['compile_seconds'] = time.perf_counter() - began
  text = compiled.as_text()
  report['program'] = {
    'fusions': len(re.findall(r' fusion\(', text)),
    'custom_calls': sorted(set(re.findall(r'custom_call_target="([^"]*)"', text))),
  }
  report |= finished(compiled, config, model, group_sides(mesh), len(devices), chip)
  sizes = report['memory_bytes']
  if sizes['total'] < sizes['capacity']:
    return {**report, 'fits': True}
  return {**report, 'fits': False, 'change': changes(config, arguments, sizes['capacity'])}


def group_sides(mesh: jax.sharding.Mesh) -> Sides:
  """operation -> ((members of its group on a host, no ring), (hosts, no ring))."""
  hosts = [device.process_index for device in mesh.devices.flat]

  def sides(operation: Operation) -> list[tuple[int, bool]]:
    members = Counter(hosts[member] for member in operation.group) or {0: 1}
    return [(max(members.values()), False), (len(members), False)]

  return sides
