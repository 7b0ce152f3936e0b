"""Which programs compute the parts of the model that have kernels of their own: XLA's, or Pallas's.

`hyper_connection.py` and `layers/attention.py` are the definitions; kernels are tested against them.
"""

import dataclasses

import jax
from jax.sharding import Mesh

KERNELS = ('auto', 'xla', 'pallas')


def _first(mesh: Mesh | None) -> jax.Device:
  return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def kernels_for(setting: str, mesh: Mesh | None) -> str:
  """'xla', or whose Pallas kernels are used: 'tpu', 'gpu', or 'interpret', the TPU's run by the interpreter.

  setting: model.kernels. 'auto' takes XLA's programs on CPU and Pallas's elsewhere; 'pallas' on CPU is the
  interpreter, slow and for tests; AMD's GPUs have XLA's. Known when the program is traced, from devices of
  the mesh (those of this machine without one), so that only one of the two is traced and compiled, and
  status.json can name it.
  """
  device = _first(mesh)
  # Nothing was tried on AMD's GPUs, which JAX calls gpu too.
  amd = 'rocm' in getattr(getattr(device, 'client', None), 'platform_version', '')
  if setting == 'xla' or amd or (setting == 'auto' and device.platform == 'cpu'):
    return 'xla'
  return {'cpu': 'interpret', 'tpu': 'tpu', 'cuda': 'gpu', 'gpu': 'gpu'}.get(device.platform, 'xla')


@dataclasses.dataclass(frozen=True)
class Chip:
  """What kernels must know of a device."""

  platform: str  # 'tpu' or 'gpu'
  cores: int = 1  # TensorCores that work on one device's program, which share a kernel's grid
  vmem: int = 110 * 2**20  # bytes of on-chip memory that one kernel may use; v5e and v6e have 128 MiB
  interpret: bool = False  # run the kernels of that platform by the interpreter

  @property
  def lanes(self) -> str:
    """The platform for lanes.py."""
    return 'interpret' if self.interpret else self.platform


# By how JAX names the device: half of the others' memory.
_SMALL = {'TPU v4': 28, 'TPU v5': 60, 'TPU v5p': 60, 'TPU7x': 60}


def chip_of(setting: str, mesh: Mesh | None) -> Chip | None:
  """The chip for which Pallas kernels are made; None where XLA's programs are used."""
  platform = kernels_for(setting, mesh)
  if platform == 'xla':
    return None
  if platform != 'tpu':
    return Chip('gpu') if platform == 'gpu' else Chip('tpu', interpret=True)
  device = _first(mesh)
  return Chip(platform, getattr(device, 'num_cores', 1), _SMALL.get(device.device_kind, 110) * 2**20)
