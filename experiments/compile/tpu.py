"""The train_step compiled for TPUs that are not there: its memory and predicted speed.

The TPU's own compiler (libtpu, extra `tpu`) compiles shapes and shardings over a described topology; CPU is
the running backend. Memory is the compiler's; FLOPs, bytes and times are counted in its optimised program
(hlo_cost.py, step_time.py).
"""

import importlib.util
import math
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

from mhc_jax import cost
from mhc_jax.errors import ConfigError, require
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import BATCH, make_mesh
from mhc_jax.workdir import revision

from .abstract_step import describe, device_bytes, mesh_axes, trace_step
from .chips import CHIPS, TPUS, Chip
from .hlo_cost import Count, Operation, count, in_scope
from .hlo_text import parse_module
from .step_time import GIB, advice, check_products, predict, speed

# libtpu looks for the machine it runs on, and two compilations at once collide on its lock file.
LIBTPU = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TF_CPP_MIN_LOG_LEVEL': '3',
}


def described_devices(topology: str) -> list[jax.Device]:
  """The devices of a TPU slice that need not be there; raises ConfigError for an impossible one."""
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
  report = describe(config, model, topology, len(devices))
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
  counted = count(parse_module(compiled.as_text()))
  predicted = predict(counted, chip, group_sides(mesh, chip))
  tokens = config.data.batch_size * config.data.seq_len
  optimal = compiled.cost_analysis().get('optimal_seconds', -1.0)  # negative: no estimate
  predicted['seconds']['compiler_loops_once'] = optimal if optimal > 0 else None
  predicted['routed_experts'] = routed_experts(counted, config, model, len(devices))
  predicted |= against_model(counted, predicted['seconds']['step'], tokens, model, config, len(devices), chip)
  return {**report, 'fits': True, 'memory_bytes': memory(compiled, chip), 'predicted': predicted}


def against_model(
  counted: Count,
  seconds: float,
  tokens: int,
  model: ModelConfig,
  config: ConfigDict,
  devices: int,
  chip: Chip,
) -> dict[str, Any]:
  """The model's own FLOPs of a device and step, and speed; raises ConfigError where they contradict the count."""
  length = config.data.seq_len
  check_products(counted, cost.train_product_flops_per_token(model, length) * tokens / devices)
  flops = {
    name: cost.train_flops_per_token(model, length, causal=name == 'causal') for name in ('causal', 'full')
  }
  share = {name: value * tokens / devices for name, value in flops.items()}
  known = not counted.custom_calls
  return {
    'model_flops': share['full'],
    'model_flops_causal': share['causal'],
    **speed(seconds, tokens, flops, devices // chip.devices, chip, known),
  }


def routed_experts(
  counted: Count, config: ConfigDict, model: ModelConfig, devices: int
) -> dict[str, float] | None:
  """FLOPs of the routed experts' products on a device, all rows of their buffers, and over the ideal's.

  Ideal: each token times its chosen experts, forward and backward; a recomputation adds a third.
  """
  if model.moe is None:
    return None
  ours = [row for row in counted.operations if in_scope(row.op_name, 'routed_experts')]
  flops = sum(row.times * row.matmul_flops for row in ours)
  tokens = config.data.batch_size * config.data.seq_len
  per_token = cost.forward_flops_per_token(model, config.data.seq_len)['routed_experts']
  return {'flops': flops, 'over_ideal': flops / (3 * per_token * tokens / devices)}


def memory(compiled: Any, chip: Chip) -> dict[str, float]:
  """Bytes of one device by kind, from the compiler, their total, and what a device has."""
  stats = compiled.memory_analysis()
  kinds = {
    'arguments': stats.argument_size_in_bytes,
    'outputs': stats.output_size_in_bytes,
    'aliased': stats.alias_size_in_bytes,
    'temporaries': stats.temp_size_in_bytes,
    'generated_code': stats.generated_code_size_in_bytes,
  }
  total = sum(kinds.values()) - 2 * kinds['aliased']
  return {**kinds, 'total': total, 'capacity': chip.memory / chip.devices}


def too_large(error: str, config: ConfigDict, arguments: dict[str, int], capacity: float) -> dict[str, Any]:
  """The part of the report that says by how much a step misses the memory, and what to change."""
  used = re.search(r'[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)\w* hbm', error)
  scale = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}
  size: dict[str, Any] = {'capacity': capacity}
  if used:
    size = {'total': float(used[1]) * scale[used[2]], 'capacity': float(used[3]) * scale[used[4]]}
  mesh, parts = config.mesh.to_dict(), config.optimizer.microbatches or 1
  rows = config.data.batch_size // (parts * math.prod(mesh[axis] for axis in BATCH))
  lines = advice(config.model.remat, mesh, rows, arguments, capacity)
  return {'fits': False, 'memory_bytes': size, 'change': lines}


def group_sides(mesh: Mesh, chip: Chip) -> Any:
  """operation -> how many chips its group has along each axis of the torus, and whether they are a ring."""
  coords = [tuple(device.coords) for device in mesh.devices.flat]
  slice_sides = [len(set(axis)) for axis in zip(*coords, strict=True)]

  def sides(operation: Operation) -> list[tuple[int, bool]]:
    group = [coords[member] for member in operation.group]
    extent = [len(set(axis)) for axis in zip(*group, strict=True)] or [1] * len(slice_sides)
    return [(side, side == whole >= chip.wraps_at) for side, whole in zip(extent, slice_sides, strict=True)]

  return sides


def text(report: dict[str, Any]) -> str:
  """The report for people."""
  chips = report['devices'] // CHIPS[report['topology'].partition(':')[0]].devices
  mesh = ', '.join(f'{axis} {size}' for axis, size in report['mesh'].items())
  held = report['argument_bytes']
  gib = {name: f'{size / GIB:.2f} GiB' for name, size in {**report['memory_bytes'], **held}.items()}
  fits = 'fits' if report['fits'] else 'DOES NOT FIT'
  lines = [
    f'{report["connection"]} (n = {report["streams"]}), {report["params"]["total"] / 1e9:.3g} B parameters, '
    f'recompute {report["remat"]}, on {report["topology"]} ({chips} chips; mesh {mesh})',
    f'{fits}: {gib.get("total", "over")} of {gib["capacity"]} a device',
  ]
  if not report['fits']:
    return '\n'.join([*lines, *(f'- {line}' for line in report['change'])])
  kinds = ('arguments', 'outputs', 'aliased', 'temporaries', 'generated_code')
  lines.append('  ' + ', '.join(f'{kind.replace("_", " ")} {gib[kind]}' for kind in kinds))
  lines.append('  of the arguments: ' + ', '.join(f'{kind} {gib[kind]}' for kind in held))
  return '\n'.join([*lines, '', *predicted_lines(report['predicted'], report['compile_seconds'])])


def predicted_lines(predicted: dict[str, Any], compile_seconds: float) -> list[str]:
  """The predictions for people."""
  device, seconds = predicted['per_device'], predicted['seconds']
  ratio, once = device['matmul_flops'] / predicted['model_flops'], seconds['compiler_loops_once']
  lines = [
    f'Predictions, not measurements (compiled in {compile_seconds:.0f} s):',
    f"  a device and step: {device['flops']:.3g} FLOPs (matrix products {ratio:.2f} x the model's own "
    f'{predicted["model_flops"]:.3g}), {device["hbm_bytes"]:.3g} bytes of memory traffic',
  ]
  if predicted['routed_experts']:
    flops, over = predicted['routed_experts'].values()
    lines.append(f'  of these the routed experts {flops:.3g}, {over:.2f} x what they need without recompute')
  lines += [
    f'  step {seconds["step"]:.4g} s, collectives overlapped as scheduled; nothing overlapped '
    f'{seconds["serial"]:.4g} s: operations {seconds["without_collectives"]:.4g} s, collectives '
    f'{seconds["collectives"]:.3g} s',
    f'  all FLOPs at their peak {seconds["all_flops"]:.4g} s, all bytes {seconds["all_bytes"]:.4g} s',
    f"  the compiler's own estimate: {device['compiler_cycles']:.4g} cycles without collectives"
    + (f', {once:.3g} s with every loop run once' if once else ''),
    f'  {predicted["tokens_per_second"]:.4g} tokens/s, '
    + (
      'no MFU: the FLOPs of some kernels are unknown'
      if predicted['mfu'] is None
      else f'MFU {100 * predicted["mfu"]:.1f} % of what a causal model needs '
      f'({100 * predicted["mfu_full"]:.1f} % with all of attention counted)'
    ),
    '',
    f'{"collective":20} {"times":>7} {"group":>6} {"GiB":>9} {"seconds":>9}',
  ]
  lines += [
    f'{kind:20} {row["times"]:7} {row["group"]:6} {row["bytes"] / GIB:9.3f} {row["seconds"]:9.4f}'
    for kind, row in predicted['collectives'].items()
  ]
  lines += ['', f'{"seconds":>8} {"share":>6} {"limit":8} {"times":>6} {"FLOPs":>9} {"bytes":>9}  operation']
  for row in predicted['costliest']:
    scope = '/'.join(row['op_name'].split('/')[-2:])
    lines.append(
      f'{row["seconds"]:8.4f} {100 * row["share"]:5.1f}% {row["limit"]:8} {row["times"]:6} '
      f'{row["flops"]:9.3g} {row["hbm_bytes"]:9.3g}  {row["source"]} {scope} {row["name"]}'
    )
  left = predicted['uncounted']
  if left['loops']:
    lines.append(f'counted once, trip count unknown: loops {", ".join(left["loops"])}')
  if left['custom_calls']:
    lines.append(
      f'ERROR: FLOPs not counted in: {", ".join(left["custom_calls"])} (kernels without a cost estimate)'
    )
  return lines
