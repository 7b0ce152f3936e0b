"""The device mesh, and where arrays live on it. One device is the same code with axes of size 1.

Mesh axes: `data` splits the batch; `fsdp` the batch, every parameter and every moment (fully sharded data
parallelism, ZeRO-3, arXiv 1910.02054); `tensor` heads, feed-forward width and vocabulary, and the time axis
wherever tokens do not see each other, the streams included (Megatron with sequence parallelism, arXiv
2205.05198); `expert` the batch, and the experts of a mixture. JAX's runtime is the only distributed engine.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.errors import ConfigError
from mhc_jax.model_config import ModelConfig
from mhc_jax.parameters import line_of

AXES = ('data', 'fsdp', 'tensor', 'expert')
BATCH = ('data', 'fsdp', 'expert')

# The one strategy: the letter of a shape suffix -> the mesh axes that split this dimension. Others are whole,
# as is S, the time of keys. A mesh axis splits one dimension of an array, that of the first letter here:
# heads before time. With tensor = 1 this is plain fully sharded data parallelism.
LAYOUT: dict[str, tuple[str, ...]] = {
  'E': ('expert',),
  'B': BATCH,
  **dict.fromkeys('VFHG', ('tensor',)),
  'T': ('tensor',),  # of queries, streams and norms
}


WHOLE_BELOW = 1024  # elements: a parameter so small lies on every device


def find_devices() -> list[jax.Device]:
  """jax.devices(); raises ConfigError where JAX finds none of the platform that is asked for."""
  try:
    return jax.devices()
  except (AssertionError, RuntimeError, ValueError) as error:
    asked = jax.config.jax_platforms or 'any platform'
    what = ' '.join(str(error).split())[:200]
    raise ConfigError(
      f'no devices of {asked} are here (environment variable JAX_PLATFORMS)' + (what and f': {what}')
    ) from None


def make_mesh(axes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the first devices with these sizes of AXES; those not given are 1.

  devices: described ones of a topology, say; None takes those that are here, all of them if there are several
  processes. Raises ConfigError for an unknown axis, too few devices, and processes that share rows.
  """
  unknown = sorted(axes.keys() - set(AXES))
  if unknown:
    raise ConfigError(f'mesh.{unknown[0]} is not an axis of the mesh; the axes are {", ".join(AXES)}')
  shape = tuple(axes.get(axis, 1) for axis in AXES)
  here = find_devices() if devices is None else devices
  size, several = math.prod(shape), devices is None and jax.process_count() > 1
  if size > len(here):
    raise ConfigError(
      f'{" * ".join(f"mesh.{axis}" for axis in AXES)} = {size} devices, but {len(here)} '
      f'{here[0].platform} device(s) are here; lower one of them'
    )
  if several and size != len(here):
    raise ConfigError(f'with several processes the mesh must use all {len(here)} devices')
  # Split physical axes: a mesh need not have the form of the TPU slice that it lies on.
  grid = mesh_utils.create_device_mesh(shape, here[:size], allow_split_physical_axes=True)
  if several:
    _check_rows(grid)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def left_out(resolved: dict[str, Any], mesh: Mesh) -> str | None:
  """What to set to use more of this process's devices, in a line; None where the mesh has all that it can.

  The mesh does not grow by itself: sums over more devices round otherwise, and a run's numbers would be those
  of the machine that it met.
  """
  here, rows = jax.device_count(), resolved['data']['batch_size']
  parts, evaluated = resolved['optimizer']['microbatches'] or 1, resolved['evaluation']['batch_size']
  others = mesh.size // mesh.shape['data']
  workers = resolved['cluster']['workers'] or 1
  numbers = range(here // others, mesh.shape['data'], -1)
  fits = (n for n in numbers if max(n, workers) % min(n, workers) == 0)
  shards = mesh.shape['fsdp'] * mesh.shape['expert']
  most = next((n for n in fits if rows % (n * shards * parts) == evaluated % (n * shards) == 0), None)
  if most is None:
    return None
  more = f'--config.mesh.data={most} uses {most * others}, with numbers equal up to rounding'
  return f'uses {mesh.size} of {here} devices; {more}'


def _check_rows(grid: np.ndarray) -> None:
  """Raises ConfigError unless each row of the batch is one process's: processes read rows of their own."""
  data, fsdp, _, expert = grid.shape
  rows = np.broadcast_to(np.arange(data * fsdp * expert).reshape(data, fsdp, 1, expert), grid.shape)
  owners = {(row, device.process_index) for row, device in zip(rows.flat, grid.flat, strict=True)}
  if len(owners) > data * fsdp * expert:
    raise ConfigError('mesh.tensor crosses processes, which read different rows: lower it, raise mesh.fsdp')


def check_mesh(axes: dict[str, int], model: ModelConfig, seq_len: int) -> None:
  """Raises ConfigError where the tensor or expert axis does not divide what it splits.

  config.check_counts looks after the batch. A vocabulary that tensor does not divide stays whole, and the
  logits are split over time.
  """
  tensor = axes['tensor']
  sizes = {f'model.{name}': getattr(model, name) for name in ('heads', 'kv_heads', 'ffn_width')}
  if model.moe is not None:
    sizes['model.moe.ffn_width'] = model.moe.ffn_width
    if model.moe.experts % axes['expert']:
      raise ConfigError(f'mesh.expert={axes["expert"]} does not divide model.moe.experts={model.moe.experts}')
    if model.precision and tensor > 1 and model.moe.ffn_width % (128 * tensor):  # it would change the numbers
      raise ConfigError(
        f'mesh.tensor={tensor} cuts tiles of 128 of model.moe.ffn_width={model.moe.ffn_width}, which '
        'model.precision multiplies by one scale: use mesh.expert'
      )
  for name, size in {**sizes, 'data.seq_len': seq_len}.items():
    if size % tensor:
      raise ConfigError(f'mesh.tensor={tensor} does not divide {name}={size}')


def splits_time(mesh: Mesh | None) -> bool:
  """Whether the time axis of streams lies on several devices."""
  return mesh is not None and mesh.shape['tensor'] > 1


def partition(letters: str, sizes: dict[str, int], mesh: Mesh) -> list[tuple[str, ...]]:
  """The mesh axes of each dimension, () where it is whole: because its size does not divide, for one.

  Training never meets that (check_mesh); initialisation and diagnostics, with a batch of 1, do.
  """
  used: set[str] = set()
  split_by: dict[str, tuple[str, ...]] = {}
  for letter, axes in LAYOUT.items():
    axes = tuple(axis for axis in axes if axis not in used)
    if letter in letters and axes and sizes[letter] % math.prod(mesh.shape[axis] for axis in axes) == 0:
      split_by[letter] = axes
      used |= set(axes)
  return [split_by.get(letter, ()) for letter in letters]


def local_parts(letters: str, sizes: dict[str, int], mesh: Mesh | None) -> int:
  """Into how many parts the mesh cuts an array of these dimensions."""
  if mesh is None:
    return 1
  return math.prod(mesh.shape[axis] for axes in partition(letters, sizes, mesh) for axis in axes)


def constrain(x: jax.Array, letters: str, mesh: Mesh | None) -> jax.Array:
  """x, laid out by the letters of its shape suffix; x itself without a mesh or on one device."""
  if mesh is None or mesh.size == 1:
    return x
  axes = partition(letters, dict(zip(letters, x.shape, strict=True)), mesh)
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes)))


def token_local(
  function: Callable, mesh: Mesh | None, inputs: Sequence[str | None], outputs: Any
) -> Callable:
  """function, run by every device on its own tokens, for one that computes each token by itself.

  inputs: the letters of each argument, of its first dimensions at least; None for one that every device needs
  whole (parameters). outputs: a tree of letters, or those of all outputs. XLA's partitioner could not cut it:
  the code flattens batch and time, and some constraints call solvers, so the streams would be gathered.
  """
  if mesh is None or mesh.size == 1:
    return function

  def run(*arguments: Any) -> Any:
    sizes: dict[str, int] = {}
    for letters, argument in zip(inputs, arguments, strict=True):
      if letters is not None and argument is not None:
        sizes |= dict(zip(letters, argument.shape, strict=False))

    def spec(letters: str | None) -> P:
      return P() if letters is None else P(*partition(letters, sizes, mesh))

    where = {'in_specs': tuple(map(spec, inputs)), 'out_specs': jax.tree.map(spec, outputs)}
    # check_vma=False: the generator's custom gradient sums over its own tokens, shard_map over the devices.
    return jax.shard_map(function, mesh=mesh, **where, check_vma=False)(*arguments)

  return run


def state_sharding(abstract: Any, mesh: Mesh) -> Any:
  """A NamedSharding for every leaf of a state or of parameters, by its path.

  Dimensions that parameters.py names by LAYOUT; then fsdp splits D, or else the largest dimension that it
  divides. The stack of scanned layers is split only where nothing else divides: each layer would be gathered
  from one device.
  """

  def leaf(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    return NamedSharding(mesh, _parameter_spec(name, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(leaf, abstract)


def _parameter_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
  if math.prod(shape) < WHOLE_BELOW:
    return P(*[None] * len(shape))
  letters = (line_of(name) or ('', ''))[0].rjust(len(shape), '.')[-len(shape) :]
  axes = partition(letters, dict(zip(letters, shape, strict=True)), mesh)
  left = [
    size // math.prod(mesh.shape[axis] for axis in used) for size, used in zip(shape, axes, strict=True)
  ]
  stacked = 'layers' in name.split('/')

  def preference(i: int) -> tuple[bool, bool, int]:
    # D first: a lookup in an embedding that is split by rows would gather the batch.
    return not (stacked and i == 0), letters[i] == 'D', left[i]

  fsdp = mesh.shape['fsdp']
  divisible = [i for i in range(len(shape)) if left[i] % fsdp == 0]
  if fsdp > 1 and divisible:
    best = max(divisible, key=preference)
    axes[best] = (*axes[best], 'fsdp')
  return P(*(used or None for used in axes))


def constrain_state(tree: Any, mesh: Mesh | None) -> Any:
  """Parameters or their gradients, laid out by state_sharding; as they are without a mesh."""
  if mesh is None or mesh.size == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of a global batch -> global arrays split over BATCH."""
  sharding = NamedSharding(mesh, P(BATCH))
  return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(batch_size: int, mesh: Mesh) -> list[int]:
  """Rows of a global batch that lie on this process's devices, ascending.

  Processes along an axis that does not split the batch hold, and so read, the same rows.
  """
  axes = tuple(axis for axis in BATCH if axis in mesh.shape)
  places = NamedSharding(mesh, P(axes)).addressable_devices_indices_map((batch_size,))
  return sorted({row for (rows,) in places.values() for row in range(*rows.indices(batch_size))})
