"""Energy by the machine's own counters, where it has any: the column device/joules of a run's rows.

config.log.energy -> **energy** -> loop -> recorder. Three sources, each named in status.json:
nvml: NVIDIA's counter of each GPU, in mJ (nvmlDeviceGetTotalEnergyConsumption; extra `energy`).
rapl: Intel's and AMD's counters of the CPU packages and their memory, in uJ, whatever process works on them;
they wrap around, which is seen where they are read at least once a round (some minutes), and since 2020 Linux
shows them to root alone.
cpu:WATTS: no counter. Seconds of this process on CPU cores times the watts of a core that you name.
"""

import glob
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mhc_jax.errors import require
from mhc_jax.log import say

POWERCAP = '/sys/class/powercap'
KINDS = r'nvml|rapl|cpu:[0-9]+(\.[0-9]+)?'
MISSING = 'no nvidia-ml-py: pip install mhc_jax[energy]'


@dataclass(frozen=True)
class Counter:
  """Joules since some moment; wraps_at: the value after which it begins at 0 again, None for never."""

  read: Callable[[], float]
  wraps_at: float | None = None


class Meter:
  """Joules of all counters together since it was made; None from the moment at which one cannot be read."""

  def __init__(self, source: str, counters: list[Counter]):
    """Reads every counter once; raises what reading raises."""
    self.source, self._counters, self._sum = source, counters, 0.0
    self._last = [counter.read() for counter in counters]

  def joules(self) -> float | None:
    """Reads the counters: the sum of their increases, with what a round that ended in between has left."""
    if self._sum is None:
      return None
    try:
      now = [counter.read() for counter in self._counters]
    except Exception as error:
      return self._lose(str(error))
    for counter, before, after in zip(self._counters, self._last, now, strict=True):
      if after < before and counter.wraps_at is None:
        return self._lose('a counter went back')
      self._sum += after - before + (counter.wraps_at if after < before else 0.0)
    self._last = now
    return self._sum

  def _lose(self, why: str) -> None:
    say(f'warning: energy is not measured any more ({self.source}: {why})')
    self._sum = None


class Laps:
  """Seconds and joules since the last lap, or since `begin`."""

  def __init__(self, meter: Meter | None):
    self._meter = meter
    self.begin()

  def begin(self) -> None:
    """What lies before is in no lap."""
    self._seconds, self._joules = time.monotonic(), self._meter and self._meter.joules()

  def lap(self) -> tuple[float, float | None]:
    """(seconds, joules); None without a meter, or where it failed."""
    seconds, joules = self._seconds, self._joules
    self.begin()
    known = joules is not None and self._joules is not None
    return self._seconds - seconds, self._joules - joules if known else None


def check_kind(kind: str | None) -> None:
  """Raises ConfigError unless log.energy is None, nvml, rapl or cpu:WATTS."""
  known = kind is None or re.fullmatch(KINDS, kind) is not None
  nothing = known and kind is not None and kind.startswith('cpu:') and float(kind[4:]) == 0
  require(
    known and not nothing,
    f'log.energy must be nvml, rapl, or cpu:WATTS with the watts of a core, got {kind!r}',
  )


def meter(kind: str | None, devices: list[Any], processes: int = 1) -> Meter | None:
  """The meter of a run on these devices of this process; None, with a warning that says why, for none.

  A run of several processes has none: each sees its own machine.
  """
  if kind is None:
    return None
  try:
    require(processes == 1, f'a run of {processes} processes is on several machines')
    if kind == 'nvml':
      return Meter('nvml', _nvml([device.local_hardware_id for device in devices]))
    if kind == 'rapl':
      return Meter('rapl', _rapl(POWERCAP))
    watts = float(kind.removeprefix('cpu:'))
    return Meter(f'CPU seconds x {watts:g} W, no counter', [Counter(lambda: watts * time.process_time())])
  except Exception as error:  # counters are no reason to end a run
    say(f'warning: energy is not measured (log.energy={kind}: {error})')
    return None


def _rapl(folder: str) -> list[Counter]:
  """Packages, and the memory that is a zone inside of one; not psys, whose packages count already."""
  zones = [path for path in sorted(glob.glob(os.path.join(folder, 'intel-rapl:*'))) if _counts(path)]
  require(bool(zones), f'{folder} has no counter of a CPU package')
  return [
    Counter(lambda path=path: _micro(path, 'energy_uj'), _micro(path, 'max_energy_range_uj'))
    for path in zones
  ]


def _counts(zone: str) -> bool:
  name = _text(zone, 'name')
  return name.startswith('package') or name == 'dram'


def _text(zone: str, name: str) -> str:
  with open(os.path.join(zone, name)) as file:
    return file.read().strip()


def _micro(zone: str, name: str) -> float:
  return int(_text(zone, name)) / 1e6


def _nvml(numbers: list[int]) -> list[Counter]:
  """The GPUs with these numbers among those that CUDA_VISIBLE_DEVICES leaves, by number or by UUID."""
  try:
    import pynvml
  except ModuleNotFoundError:
    raise ValueError(MISSING) from None
  pynvml.nvmlInit()
  visible = [name.strip() for name in os.environ.get('CUDA_VISIBLE_DEVICES', '').split(',') if name.strip()]
  handles = []
  for number in numbers:
    name = visible[number] if visible else str(number)
    by_number = name.isdigit()
    handles.append(
      pynvml.nvmlDeviceGetHandleByIndex(int(name)) if by_number else pynvml.nvmlDeviceGetHandleByUUID(name)
    )
  return [
    Counter(lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
    for handle in handles
  ]
