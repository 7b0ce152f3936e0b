"""train_step for NVIDIA GPUs that are not there: lowered for CUDA, with sizes and bounds by arithmetic.

`mhc compile --config ... --gpu H100:64`. XLA's GPU compiler needs a GPU, so nothing comes
from it: lowering shows that every operation exists for CUDA and that no kernel of CPUs or TPUs is
called; memory is that of the shards, and times are lower bounds.
"""

import math
import re
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType
from ml_collections import ConfigDict

from mhc_jax import cost
from mhc_jax.errors import ConfigError, require
from mhc_jax.model_config import ModelConfig
from mhc_jax.recompute import block_layers
from mhc_jax.sharding import BATCH

from .abstract_step import describe, device_bytes, mesh_axes, trace_step
from .chips import CHIPS, GPUS, Chip
from .step_time import speed

# Custom calls of one kind of machine: LAPACK and Eigen of CPUs, Mosaic and others of TPUs.
ELSEWHERE = re.compile(r'lapack|eigen|onednn|cpu|tpu', re.IGNORECASE)


def lower_step(config: ConfigDict, gpus: str) -> dict[str, Any]:
  """The report on one config and a number of GPUs; raises ConfigError for impossible ones."""
  name, _, number = gpus.partition(':')
  require(
    name in GPUS and number.isdigit() and int(number) > 0,
    f'--gpu is a chip of {", ".join(GPUS)} and their number, like H100:64; got {gpus!r}',
  )
  chip, axes = CHIPS[name], mesh_axes(config, int(number), f'--gpu {gpus}')
  mesh = AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
  traced, state, batch, model = trace_step(config, mesh)
  try:
    lowered = traced.lower(lowering_platforms=('cuda',)).as_text()
  except NotImplementedError as error:
    what = ' '.join(str(error).split())
    raise ConfigError(f'train_step has an operation that does not exist for CUDA: {what}') from None
  targets = sorted(set(re.findall(r'custom_call @([\w.$]+)', lowered)))
  held = {
    'params': device_bytes(state.params),
    'optimizer': device_bytes((state.opt_state, state.step)),
    'gradients': device_bytes(state.params),
    'batch': device_bytes(batch),
  }
  held |= activation_bytes(config, model)
  report = {
    **describe(config, model, gpus, mesh.size),
    'custom_calls': targets,
    'not_for_cuda': [target for target in targets if ELSEWHERE.search(target)],
    'memory_bytes': {**held, 'total': sum(held.values()), 'capacity': chip.memory},
    'fits': sum(held.values()) < chip.memory,
  }
  tokens = config.data.batch_size * config.data.seq_len
  length = config.data.seq_len
  flops = {
    name: cost.train_flops_per_token(model, length, causal=name == 'causal') for name in ('causal', 'full')
  }
  gathered = held['params'] * np.dtype(model.dtype).itemsize // 4  # cast before
  seconds = bounds(chip, mesh.shape['fsdp'], held, gathered, flops['causal'] * tokens / mesh.size)
  slowest = max(seconds.values())
  return {
    **report,
    'bounds': {'seconds': seconds, **speed(slowest, tokens, flops, mesh.size, chip)},
  }


def activation_bytes(config: ConfigDict, model: ModelConfig) -> dict[str, int]:
  """The two that recomputation leaves, of one GPU: the streams between blocks and the logits."""
  axes, parts = config.mesh.to_dict(), config.optimizer.microbatches or 1
  shards = math.prod(axes[axis] for axis in BATCH)
  tokens = config.data.batch_size // parts * config.data.seq_len // shards
  size = block_layers(model.connection.streams, model.depth) if model.remat == 'block' else 1
  item = np.dtype(model.dtype).itemsize
  streams = math.ceil(model.depth / size) * model.connection.streams * tokens * model.width * item
  return {'streams': streams // axes['tensor'], 'logits': tokens * model.vocab_size * 4 // axes['tensor']}


def bounds(chip: Chip, fsdp: int, held: dict[str, int], gathered: int, flops: float) -> dict[str, float]:
  """Lower bounds of a step's seconds on one GPU: its FLOPs, its optimizer's traffic, fsdp's collectives.

  Every parameter is gathered twice and its gradient reduced once, over NVLink within a domain and over the
  network beyond it; gathered: bytes of this GPU's shards as they travel. The optimizer reads parameters,
  gradients and moments and writes all but the gradients.
  """
  inside = fsdp <= chip.domain
  rate = chip.interconnect / 2 if inside else chip.network
  traffic = 3 * held['params'] + 2 * held['optimizer']
  return {
    'flops': flops / chip.flops,
    'optimizer_bytes': traffic / chip.bandwidth,
    # A gather or reduction of all shards moves (fsdp - 1) shards through each GPU.
    'fsdp_collectives': 3 * gathered * (fsdp - 1) / rate,
  }


def text(report: dict[str, Any]) -> str:
  """The report for people."""
  gib = {name: f'{size / 2**30:.2f} GiB' for name, size in report['memory_bytes'].items()}
  kinds = ', '.join(f'{name} {size}' for name, size in gib.items() if name not in ('total', 'capacity'))
  foreign, calls = (', '.join(report[name]) for name in ('not_for_cuda', 'custom_calls'))
  bounds_of, buffers = report['bounds'], report['routed_buffer_over_used']
  least = (f'{value:.4g} s for its {name.replace("_", " ")}' for name, value in bounds_of['seconds'].items())
  lines = [
    f'{report["connection"]} (n = {report["streams"]}), {report["params"]["total"] / 1e9:.3g} B parameters '
    f'on {report["topology"]}, mesh {report["mesh"]}',
    'lowered for CUDA; ' + (f'NOT FOR CUDA: {foreign}' if foreign else f'custom calls: {calls or "none"}'),
    f'at least {gib["total"]} of {gib["capacity"]} a GPU: {kinds}' + ' - DOES NOT FIT' * (not report['fits']),
    f'Predictions, not measurements: a step takes at least {", ".join(least)}',
    f'at most {bounds_of["tokens_per_second"]:.4g} tokens/s, MFU {100 * bounds_of["mfu"]:.1f} %',
  ]
  if buffers is not None:
    lines.append(
      "the experts' products are ragged_dot: where XLA has no kernel for it, every expert meets every row; "
      f'rows of their buffers over those in use: {buffers:.3g}'
    )
  return '\n'.join(lines)
