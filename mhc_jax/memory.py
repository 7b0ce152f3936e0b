"""What a run takes of a device's memory: a lower bound that is held against it, about what by terms, what is
in use; and what to change where it is not enough.

plan -> **memory** -> train. `mhc compile` says what a step really takes.
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import psutil
from jax.sharding import Mesh

from mhc_jax import cost
from mhc_jax.errors import OutOfMemoryError, require
from mhc_jax.layers.attention import why_formula
from mhc_jax.layers.unembedding import LARGEST
from mhc_jax.optimizer import least_moments
from mhc_jax.plan import Run
from mhc_jax.recompute import block_layers
from mhc_jax.sharding import BATCH, find_devices
from mhc_jax.train_step import init_state


def check_memory(run: Run) -> None:
  """Raises ConfigError where cost.least_bytes exceeds the memory of the devices that the run's mesh takes.

  An accelerator's is what it allows; CPU devices share this machine's memory and swap. What is in use by
  others is not counted, so that a run which is refused can never run here.
  """
  c = run.resolved
  tokens = c['data']['batch_size'] * c['data']['seq_len']
  size = c['mesh']['data'] * c['mesh']['fsdp'] * c['mesh']['tensor'] * c['mesh']['expert']
  copies = run.loose.workers if run.loose else 1
  parts = c['optimizer']['microbatches'] or 1
  needed = cost.least_bytes(run.model, tokens, parts, size, least_moments(run.optimizer), copies)
  here = [device for device in find_devices()[:size] if device.process_index == jax.process_index()]
  have = memory_of(here[0]) if here else None
  if have is None:
    return
  if here[0].platform == 'cpu':
    needed, where = needed * len(here) / size, 'this machine has'
  else:
    needed, where = needed / size, f'a {here[0].device_kind} has'
  require(
    needed <= have,
    f'the run needs {needed / 2**30:,.1f} GiB at the least ({run.derived["params"]["total"]:,} parameters), '
    f'{where} {have / 2**30:,.1f}: lower model.width, model.depth or data.batch_size, or use more devices',
  )


def memory_of(device: jax.Device) -> int | None:
  """Bytes of an accelerator or, for a CPU device, of this machine with its swap; None where nobody says."""
  if device.platform == 'cpu':
    return psutil.virtual_memory().total + psutil.swap_memory().total
  return (device.memory_stats() or {}).get('bytes_limit')


def memory_in_use(mesh: Mesh) -> dict[str, int | None]:
  """Bytes in use now, and at the most so far, on the fullest of this process's devices; None where nobody
  says."""
  here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  stats = [{} if device.platform == 'cpu' else device.memory_stats() or {} for device in here]
  most = {name: [one[name] for one in stats if name in one] for name in ('bytes_in_use', 'peak_bytes_in_use')}
  return {f'device/{name}': max(values, default=None) for name, values in most.items()}


def terms(run: Run) -> dict[str, float]:
  """About what training holds on one device, in bytes, by what holds it: sums of sizes, nothing is compiled.

  State and gradients are divided as if every matrix were split by fsdp and tensor. Activations are what a
  backward pass needs of one microbatch: what its recomputation keeps (recompute.py), and of one layer all,
  with gradients. What the compiler adds or saves is left out; docs/tools.md sets the two beside each other.
  """
  c, mesh, model = run.resolved, run.resolved['mesh'], run.model
  split = mesh['fsdp'] * mesh['tensor']
  init = functools.partial(init_state, model=model, optimizer=run.optimizer)
  state = jax.eval_shape(init, jax.eval_shape(lambda: jax.random.key(0)))
  params, moments = (
    sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    for tree in (state.params, state.opt_state)
  )
  routed = 4 * run.derived['params']['routed_experts'] if model.moe else 0
  held = ((params - routed) + routed / mesh['expert']) / params / split  # of the whole, by one device
  parts, length = c['optimizer']['microbatches'] or 1, c['data']['seq_len']
  rows = rows_at_a_time(c)
  tokens = rows * length / mesh['tensor']
  here, outer, loose = 1, 0, run.loose  # workers on one device, and copies that are all workers'
  if loose:
    here, outer = loose.workers // min(loose.workers, mesh['data']), 2 + (loose.overlap > 0)
  return {
    'parameters': params * held * (here + (outer > 0)),
    'optimizer state': moments * held * here + params * held * max(outer - 1, 0),
    'gradients': params * held * here * (2 if parts > 1 else 1),
    'streams': tokens * _stream_bytes(run),
    'activations of layers': tokens * _layer_bytes(run),
    'attention scores': rows * length**2 * _score_bytes(run) / mesh['tensor'],
    'logits': 2 * min(4 * tokens * model.vocab_size, LARGEST),
  }


def rows_at_a_time(c: Mapping[str, Mapping]) -> int:
  """Sequences of one microbatch on each group of devices that shares them, of a resolved configuration."""
  parts = c['optimizer']['microbatches'] or 1
  return c['data']['batch_size'] // (parts * math.prod(c['mesh'][axis] for axis in BATCH))


def _stream_bytes(run: Run) -> float:
  """Of a token, over all layers: starts of layers or blocks, and outputs of sublayers, (n + 3) C a layer."""
  c, n = run.model, run.model.connection.streams
  kept = c.depth * (n + 3)
  if c.remat == 'none':
    kept = 2 * c.depth * (n + 2)  # starts of sublayers
  elif c.remat == 'block':
    size = block_layers(n, c.depth)
    kept = n * math.ceil(c.depth / size) + (n + 3) * size
  return kept * c.width * jnp.dtype(c.dtype).itemsize


def _layer_bytes(run: Run) -> float:
  """Of a token, what layers keep of products with weights; and all inputs and outputs of one, with gradients.

  A layer that computes everything else again ('products', 'block') keeps the outputs alone.
  """
  c = run.model
  maps = cost.products(c)
  attention = [*maps['attention'], *maps['index']]
  dense = [*attention, *maps['feed_forward']]
  experts = list(attention)
  if c.moe:
    each = [(c.width, c.moe.ffn_width)] * 2 + [(c.moe.ffn_width, c.width)]
    experts += each * (c.moe.active + c.moe.shared)
  dense_layers = c.depth if c.moe is None else c.dense_layers
  layers = [dense] * (dense_layers + (c.mtp is not None)) + [experts] * (c.depth - dense_layers)
  one = max(sum(a + b for a, b in layer) for layer in layers)
  size = jnp.dtype(c.dtype).itemsize
  # Of FP8 products a float32 sum is kept by name of its operation, and a byte of each input, with scales.
  output = size if c.precision is None or c.remat == 'none' else max(size, 4)
  into = size if c.precision is None else 1 + 4 / 128
  kept = sum(output * b + into * a * (c.remat == 'none') for layer in layers for a, b in layer)
  return kept * (c.remat != 'layer') + 2 * one * size


def _score_bytes(run: Run) -> float:
  """Of a sequence and pair of tokens: float32 powers of every head, kept in all layers or in one, and two
  more; 0 by a kernel, which accelerators that are not here (config.topology) are taken to have."""
  c, away = run.model, run.resolved['topology'] is not None
  formula = c.kernels == 'xla' if away else why_formula(c, None, run.resolved['data']['seq_len']) is not None
  heads = c.heads + (c.sparse.index_heads if c.indexed else 0)  # an index keeps its heads' products
  return 4 * heads * ((c.depth if c.remat == 'none' else 1) + 2) * formula


def advice(
  remat: str, dtype: str, mesh: Mapping[str, int], rows: int, state: float, capacity: float
) -> list[str]:
  """What to change where a step does not fit, by what takes the memory.

  rows: of the batch, or of a microbatch, on each group of devices that shares them. state: bytes of
  parameters and optimizer on one device.
  """
  lines = []
  if remat != 'layer':  # blocks keep the products of attention and feed-forward
    lines.append('recompute activations: --config.model.remat=layer')
  if state > capacity / 4:
    lines.append(
      f'parameters and optimizer take {100 * state / capacity:.0f} % of the memory: a larger '
      f'--config.mesh.fsdp (now {mesh["fsdp"]}) splits them further'
    )
  if rows > 1:
    lines.append(
      f'{rows} sequences are at a time on each group of devices: accumulate gradients over '
      '--config.optimizer.microbatches, or split them with a larger mesh.data or mesh.fsdp (more chips)'
    )
  else:
    lines.append(f'split the width of activations: a larger --config.mesh.tensor (now {mesh["tensor"]})')
  if dtype != 'bfloat16':
    lines.append(f'halve activations: --config.model.dtype=bfloat16 (now {dtype})')
  return lines


def explained(error: BaseException, run: Run) -> BaseException:
  """The error; where it says that memory is full, an OutOfMemoryError with the largest terms and advice."""
  full = isinstance(error, RuntimeError) and 'RESOURCE_EXHAUSTED' in str(error)  # XLA's are RuntimeErrors
  if not full and (not isinstance(error, MemoryError) or isinstance(error, OutOfMemoryError)):
    return error
  c, found = run.resolved, terms(run)
  here = jax.local_devices()[0]
  have = memory_of(here)
  largest = sorted(found.items(), key=lambda term: -term[1])[:4]
  words = ', '.join(f'{name} {gib(size)}' for name, size in largest)
  where = 'this machine' if here.platform == 'cpu' else here.device_kind
  limit = f'; {where} has {gib(have)}' if have else ''
  state = found['parameters'] + found['optimizer state']
  lines = advice(
    c['model']['remat'], c['model']['dtype'], c['mesh'], rows_at_a_time(c), state, have or sum(found.values())
  )
  said = ' '.join(str(error).split())[:120]
  message = f'out of memory: about {gib(sum(found.values()))} a device ({words}){limit}. What helps: '
  return OutOfMemoryError(message + '; '.join(lines) + (f' ({said})' if said else ''))


def gib(size: float) -> str:
  """Bytes for a reader."""
  return f'{size / 2**30:,.1f} GiB' if size >= 2**30 / 10 else f'{size / 2**20:,.1f} MiB'
