"""The device mesh and where arrays live on it. One device is the same code with axes of size 1.

Axes: `data` splits the batch; `fsdp` splits the batch and every parameter and optimizer moment along its
largest divisible dimension (fully sharded data parallelism, ZeRO-3). JAX's runtime is the only
distributed engine.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.config import ConfigError

BATCH = P(('data', 'fsdp'))


def make_mesh(data: int, fsdp: int) -> Mesh:
  """A (data, fsdp) mesh of the first devices; raises ConfigError where there are too few."""
  devices = jax.devices()
  if data * fsdp > len(devices):
    raise ConfigError(
      f'mesh.data * mesh.fsdp = {data * fsdp} devices, but {len(devices)} '
      f'{devices[0].platform} device(s) are here; lower --config.mesh.data or --config.mesh.fsdp'
    )
  if jax.process_count() > 1 and data * fsdp != len(devices):
    raise ConfigError(f'with several processes the mesh must use all {len(devices)} devices')
  return jax.make_mesh(
    (data, fsdp),
    ('data', 'fsdp'),
    axis_types=(AxisType.Auto, AxisType.Auto),
    devices=devices[: data * fsdp],
  )


def state_sharding(abstract: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of a state: its largest dimension that fsdp divides is split."""

  def leaf(x: jax.ShapeDtypeStruct) -> NamedSharding:
    size = mesh.shape['fsdp']
    axes = [axis for axis in np.argsort(x.shape)[::-1] if size > 1 and x.shape[axis] % size == 0]
    spec = [None] * len(x.shape)
    if axes:
      spec[axes[0]] = 'fsdp'
    return NamedSharding(mesh, P(*spec))

  return jax.tree.map(leaf, abstract)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a global batch -> global arrays split over data and fsdp."""
  sharding = NamedSharding(mesh, BATCH)
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
