"""Whether this machine can hold a run at all: a lower bound against what is here.

plan -> **memory** -> train. `mhc compile` says what a step really takes.
"""

import jax
import psutil

from mhc_jax import cost
from mhc_jax.errors import require
from mhc_jax.plan import Run
from mhc_jax.sharding import find_devices


def check_memory(run: Run) -> None:
  """Raises ConfigError where cost.least_bytes exceeds the memory of the devices that the run's mesh takes.

  An accelerator's is what it allows; CPU devices share this machine's memory and swap. What is in use by
  others is not counted, so that a run which is refused can never run here.
  """
  c = run.resolved
  tokens = c['data']['batch_size'] * c['data']['seq_len']
  size = c['mesh']['data'] * c['mesh']['fsdp'] * c['mesh']['tensor'] * c['mesh']['expert']
  needed = cost.least_bytes(run.model, tokens, c['optimizer']['microbatches'] or 1, size)
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
