"""Which programs compute the parts of the model that have kernels of their own: XLA's, or Pallas's.

`hyper_connection.py` and `layers/attention.py` are the definitions; kernels are tested against them.
"""

import jax
from jax.sharding import Mesh

KERNELS = ('auto', 'xla', 'pallas')


def kernels_for(setting: str, mesh: Mesh | None) -> str:
  """'xla', or whose Pallas kernels are used: 'tpu', 'gpu', or 'interpret', the TPU's run by the interpreter.

  setting: model.kernels. 'auto' takes XLA's programs on CPU and Pallas's elsewhere; 'pallas' on CPU is the
  interpreter, slow and for tests. Known when the program is traced, from the devices of the mesh (those of
  this machine without one), so that only one of the two is traced and compiled, and status.json can name it.
  """
  platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
  if setting == 'xla' or (setting == 'auto' and platform == 'cpu'):
    return 'xla'
  return {'cpu': 'interpret', 'tpu': 'tpu', 'cuda': 'gpu', 'gpu': 'gpu'}.get(platform, 'xla')
