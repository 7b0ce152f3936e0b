"""What the compiler says of a train_step that never runs: communication, memory. Called by experiments.bench.

python -m experiments.bench scaling      # 1, 2, 4 and 8 fake CPU devices along fsdp, and along tensor
python -m experiments.bench memory       # each recomputation (model.remat), on one device
"""

import argparse
import math
import os
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled
from ml_collections import ConfigDict

from mhc_jax.config import REMAT, base_config, build_model, build_optimizer
from mhc_jax.data import VOCAB_SIZE
from mhc_jax.hlo import collectives
from mhc_jax.recompute import block_layers
from mhc_jax.sharding import BATCH, check_mesh, make_mesh, strategy
from mhc_jax.train_step import TrainState, programs

DEVICES = (1, 2, 4, 8)


def fake_devices(count: int) -> None:
  """Makes that many CPU devices; must come before the first computation."""
  flags = os.environ.get('XLA_FLAGS', '')
  os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={count}'.strip()
  jax.config.update('jax_platforms', 'cpu')


def small_config(args: argparse.Namespace, remat: str = 'none') -> ConfigDict:
  """The model of these benches: 8 heads, so that a tensor axis of 8 divides them; one layer at a time."""
  c = base_config()
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, 8
  c.model.connection.streams, c.model.dtype = args.streams, args.dtype
  c.model.scan_unroll, c.model.remat = 1, remat
  c.optimizer.warmup_fraction = 0.05
  return c


def compile_step(c: ConfigDict, mesh: Mesh, batch: int, seq_len: int) -> tuple[Compiled, TrainState]:
  """(the compiled train_step of a configuration on a mesh, its state's shapes and shardings)."""
  found = programs(build_model(c, VOCAB_SIZE), build_optimizer(c), mesh)
  rows = NamedSharding(mesh, P(BATCH))
  kinds = {'inputs': jnp.int32, 'targets': jnp.int32, 'segments': jnp.int32, 'weights': jnp.float32}
  inputs = {name: jax.ShapeDtypeStruct((batch, seq_len), kind, sharding=rows) for name, kind in kinds.items()}
  hparams = dict.fromkeys(
    ('lr', 'weight_decay', 'num_steps', 'warmup'), jax.ShapeDtypeStruct((), jnp.float32)
  )
  return found.step.lower(found.abstract, inputs, hparams).compile(), found.abstract


def bytes_per_device(tree: Any) -> int:
  """Bytes of a tree of ShapeDtypeStructs on one device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  )


def volume(hlo_text: str) -> dict[str, dict[str, int]]:
  """Executions and bytes on one device of the collectives in one step, by kind."""
  found: dict[str, dict[str, int]] = defaultdict(lambda: {'count': 0, 'bytes': 0})
  for each in collectives(hlo_text):
    found[each['kind']]['count'] += each['count']
    found[each['kind']]['bytes'] += each['count'] * each['bytes']
  return dict(found)


def bench_scaling(args: argparse.Namespace) -> dict[str, object]:
  """One row per mesh: memory per device by kind, and communication by kind of collective.

  state_over_even_share: parameters and optimizer state on one device over 1 / devices of the whole.
  """
  rows, whole = [], 0
  for axis, devices in (('fsdp', 1), *((axis, d) for axis in ('fsdp', 'tensor') for d in DEVICES[1:])):
    c = small_config(args)
    c.mesh[axis] = devices
    check_mesh(c.mesh.to_dict(), build_model(c, VOCAB_SIZE), args.seq_len)
    mesh = make_mesh(c.mesh.to_dict())
    compiled, state = compile_step(c, mesh, args.batch, args.seq_len)
    params, optimizer = bytes_per_device(state.params), bytes_per_device(state.opt_state)
    whole = whole or params + optimizer
    rows.append(
      {
        'axis': axis,
        'devices': devices,
        'strategy': strategy(mesh),
        'params_bytes': params,
        'optimizer_bytes': optimizer,
        'state_over_even_share': (params + optimizer) * devices / whole,
        'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
        'collectives': volume(compiled.as_text()),
      }
    )
  return {'settings': settings(args), 'per_device': rows}


def bench_memory(args: argparse.Namespace) -> dict[str, object]:
  """Temporary bytes and FLOPs of the step, as compiled, for each recomputation."""
  rows = {}
  for remat in REMAT:
    compiled, _ = compile_step(small_config(args, remat), make_mesh({}), args.batch, args.seq_len)
    memory = compiled.memory_analysis()
    rows[remat] = {
      'temporary_bytes': memory.temp_size_in_bytes,
      'argument_bytes': memory.argument_size_in_bytes,
    }
  layers = block_layers(args.streams, args.depth)
  return {'settings': settings(args), 'layers_per_block': layers, 'remat': rows}


def settings(args: argparse.Namespace) -> dict[str, object]:
  """What was compiled."""
  return {name: getattr(args, name) for name in ('width', 'depth', 'batch', 'seq_len', 'streams', 'dtype')}
