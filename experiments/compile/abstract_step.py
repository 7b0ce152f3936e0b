"""train_step with shapes and shardings in place of arrays, on any mesh: what the compile reports start from.

A mesh of described TPU devices, or one without devices (jax.sharding.AbstractMesh) for lowering alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mhc_jax import clusters, cost
from mhc_jax.config import build_optimizer, check_counts, fill_mesh
from mhc_jax.config_file import check_fields
from mhc_jax.errors import require
from mhc_jax.layers.attention import why_formula
from mhc_jax.model import why_no_kernels
from mhc_jax.model_config import ModelConfig, build_model
from mhc_jax.plan import check_size
from mhc_jax.sharding import BATCH, check_mesh
from mhc_jax.train_step import TrainState, programs


def mesh_axes(config: ConfigDict, devices: int, where: str) -> dict[str, int]:
  """config.mesh as axis -> size, -1 filled in there too; ConfigError unless it has that many devices."""
  fill_mesh(config, devices)
  axes = config.mesh.to_dict()
  needed = int(np.prod(list(axes.values())))
  require(
    needed == devices,
    f'{where} has {devices} devices, but {" * ".join(f"mesh.{axis}" for axis in axes)} = {needed}: '
    'set --config.mesh.fsdp and the other axes to match',
  )
  return axes


def abstract_inputs(config: ConfigDict, mesh: Mesh | AbstractMesh) -> tuple[dict[str, Any], dict[str, Any]]:
  """(batch, hparams) of train_step as shapes with shardings; no corpus is read."""
  shape = (config.data.batch_size, config.data.seq_len)
  rows, replicated = NamedSharding(mesh, P(BATCH)), NamedSharding(mesh, P())
  types = {'inputs': jnp.int32, 'targets': jnp.int32, 'weights': jnp.float32, 'segments': jnp.int32}
  batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in types.items()}
  names = ('lr', 'weight_decay', 'num_steps', 'warmup')
  return batch, {name: jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated) for name in names}


def trace_step(
  config: ConfigDict, mesh: Mesh | AbstractMesh
) -> tuple[Any, TrainState, dict[str, Any], ModelConfig]:
  """(traced train_step, abstract state, abstract batch, model) of a checked config on a mesh."""
  config = check_fields(config)
  check_counts(config)
  model = build_model(config)
  check_size(model, config)
  check_mesh(config.mesh.to_dict(), model, config.data.seq_len)
  cluster = clusters.build_cluster(config)
  loose = cluster if cluster and cluster.sync_every else None
  of_model = programs(model, build_optimizer(config), mesh, loose)
  batch, hparams = abstract_inputs(config, mesh)
  for name, value in (clusters.hparams_of(loose) if loose else {}).items():
    hparams[name] = jax.ShapeDtypeStruct((), value.dtype, sharding=NamedSharding(mesh, P()))
  return of_model.step.trace(of_model.abstract, batch, hparams), of_model.abstract, batch, model


def device_bytes(tree: Any) -> int:
  """Bytes of the shards that one device holds of a tree of shapes with shardings."""
  sizes = [
    np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
  ]
  return int(sum(sizes))


def describe(
  config: ConfigDict, model: ModelConfig, where: str, devices: int, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
  """What was compiled or lowered, for the report."""
  return {
    'topology': where,
    'devices': devices,
    'mesh': config.mesh.to_dict(),
    'connection': config.model.connection.name,
    'streams': model.connection.streams,
    'remat': model.remat,
    'kernels': kernels(config, model, mesh),
    'batch_size': config.data.batch_size,
    'seq_len': config.data.seq_len,
    'params': cost.parameters(model),
    'routed_buffer_over_used': cost.routed_flops_over_ideal(model, config.mesh.expert) if model.moe else None,
  }


def kernels(config: ConfigDict, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, str | None]:
  """Part of the model -> why XLA's program does it; None where a kernel does."""
  rows = config.data.batch_size // (config.optimizer.microbatches or 1)
  return {
    'boundaries': why_no_kernels(model, rows, config.data.seq_len, mesh),
    'attention': why_formula(model, mesh, config.data.seq_len),
  }
