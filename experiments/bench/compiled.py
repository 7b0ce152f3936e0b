"""What the compiler says of a train_step that never runs: communication and memory.

mhc bench scaling      # 1, 2, 4 and 8 fake CPU devices along fsdp, and along tensor
mhc bench memory       # each recomputation (model.remat), on one device
"""

import argparse
import os
from collections import defaultdict

import jax
from ml_collections import ConfigDict

from mhc_jax.config import base_config
from mhc_jax.model_config import REMAT
from mhc_jax.recompute import block_layers
from mhc_jax.sharding import make_mesh

from ..compile.abstract_step import device_bytes, trace_step
from ..compile.hlo_cost import count
from ..compile.hlo_text import parse_module

DEVICES = (1, 2, 4, 8)


def fake_devices(number: int) -> None:
  """Makes that many CPU devices; must come before the first computation."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={number}'.strip()
  jax.config.update('jax_platforms', 'cpu')


def small_config(args: argparse.Namespace, remat: str = 'none') -> ConfigDict:
  """The model of these benches: 8 heads, so that a tensor axis of 8 divides them; one layer at a time."""
  c = base_config()
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, 8
  c.model.connection.streams, c.model.dtype = args.streams, args.dtype
  c.data.batch_size, c.data.seq_len = args.batch, args.seq_len
  c.model.scan_unroll, c.model.remat = 1, remat
  c.optimizer.warmup_fraction, c.duration.steps = 0.05, 100
  return c


def volume(hlo_text: str) -> dict[str, dict[str, float]]:
  """Collectives of one step by kind: executions, and bytes that a group gathers, reduces or exchanges."""
  kinds: dict[str, dict[str, float]] = defaultdict(lambda: {'count': 0, 'bytes': 0})
  for operation in count(parse_module(hlo_text)).operations:
    if operation.collective:
      kinds[operation.collective]['count'] += operation.times
      kinds[operation.collective]['bytes'] += operation.times * operation.payload
  return dict(kinds)


def bench_scaling(args: argparse.Namespace) -> dict[str, object]:
  """One row per mesh: memory per device by kind, and communication by kind of collective.

  state_over_even_share: parameters and optimizer state on one device over 1 / devices of the whole.
  """
  rows, whole = [], 0
  for axis, devices in (('fsdp', 1), *((axis, d) for axis in ('fsdp', 'tensor') for d in DEVICES[1:])):
    c = small_config(args)
    c.mesh[axis] = devices
    traced, state, *_ = trace_step(c, make_mesh(c.mesh.to_dict()))
    compiled = traced.lower().compile()
    params, optimizer = device_bytes(state.params), device_bytes(state.opt_state)
    whole = whole or params + optimizer
    rows.append(
      {
        'axis': axis,
        'devices': devices,
        'params_bytes': params,
        'optimizer_bytes': optimizer,
        'state_over_even_share': (params + optimizer) * devices / whole,
        'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
        'collectives': volume(compiled.as_text()),
      }
    )
  return {'settings': settings(args), 'per_device': rows}


def bench_memory(args: argparse.Namespace) -> dict[str, object]:
  """Temporary and argument bytes of the step, as compiled, for each recomputation."""
  rows = {}
  for remat in REMAT:
    traced, *_ = trace_step(small_config(args, remat), make_mesh({}))
    memory = traced.lower().compile().memory_analysis()
    rows[remat] = {
      'temporary_bytes': memory.temp_size_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes,
    }
  layers = block_layers(args.streams, args.depth)
  return {'settings': settings(args), 'layers_per_block': layers, 'remat': rows}


def settings(args: argparse.Namespace) -> dict[str, object]:
  """What was compiled."""
  return {name: getattr(args, name) for name in ('width', 'depth', 'batch', 'seq_len', 'streams', 'dtype')}
