"""What rows say of speed and memory, beside the numbers that a run id stands for."""

import pytest

from mhc_jax import recorder, train
from mhc_jax.chips import CHIPS, chip_of
from mhc_jax.cost import train_flops_per_token
from mhc_jax.memory import memory_in_use
from mhc_jax.plan import resolve
from tests.test_train import config, corpus, rows, run

SPEED = ('time/tokens_per_second', 'time/tokens_per_second_per_device', 'time/mfu')
MEMORY = ('device/bytes_in_use', 'device/peak_bytes_in_use')


class Device:
  """One of `stats` bytes, on process 0."""

  def __init__(self, platform, **stats):
    self.platform, self.process_index, self._stats = platform, 0, stats

  def memory_stats(self):
    return self._stats or None


def test_devices_are_chips_of_the_table_by_name():
  names = {
    **{'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p'},
    **{'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e', 'TPU7x': '7x', 'NVIDIA A100-SXM4-80GB': 'A100'},
    **{'NVIDIA H100 80GB HBM3': 'H100', 'NVIDIA H200': 'H200', 'NVIDIA B200': 'B200'},
  }
  assert {kind: chip_of(kind).name for kind in names} == names and set(names.values()) == set(CHIPS)
  others = 'cpu', 'NVIDIA H100 PCIe', 'NVIDIA H20', 'NVIDIA A100-SXM4-80GB MIG 1g.10gb', 'NVIDIA L4', 'TPU v3'
  assert not any(map(chip_of, others))


def test_every_row_of_an_update_has_speed_per_device_memory_and_the_wait_for_data(tmp_path, monkeypatch):
  """On two devices that are told to be a TPU v7x's, each half a chip."""
  monkeypatch.setattr(recorder, 'chip_of', lambda kind: CHIPS['7x'])
  stats = {'bytes_in_use': 7, 'peak_bytes_in_use': 9}
  monkeypatch.setattr(recorder, 'memory_in_use', lambda mesh: {f'device/{k}': v for k, v in stats.items()})
  status, logged = run(tmp_path, mesh__data=2, log__every_steps=1)
  plan = resolve(config(), 'digest')
  assert status['state'] == 'finished' and logged[0].keys().isdisjoint(SPEED)
  per_token = train_flops_per_token(plan.model, 16, causal=True)
  for row in logged[2:]:  # the first update compiles and has no speed
    speed, each, mfu = (row[name] for name in SPEED)
    assert each == pytest.approx(speed / 2) and mfu == pytest.approx(each * per_token / (2307e12 / 2))
    assert 0 <= row['time/data_seconds'] <= row['time/seconds']
    assert tuple(row[name] for name in MEMORY) == (7, 9)
  waits = [row['time/data_seconds'] for row in logged[1:]]
  assert waits == sorted(waits) and waits[0] == 0 < waits[-1]


def test_a_cpu_has_no_peak_and_no_memory_of_its_own(tmp_path):
  logged = run(tmp_path, duration__steps=3, log__every_steps=1)[1]
  assert logged[-1]['time/tokens_per_second_per_device'] == logged[-1]['time/tokens_per_second'] > 0
  assert all(logged[-1][name] is None for name in ('time/mfu', *MEMORY))


def test_memory_is_that_of_the_fullest_device(monkeypatch):
  class Mesh:
    devices = type('', (), {'flat': [Device('gpu', bytes_in_use=3, peak_bytes_in_use=5), Device('gpu')]})

  assert memory_in_use(Mesh) == {'device/bytes_in_use': 3, 'device/peak_bytes_in_use': 5}
  Mesh.devices.flat[1] = Device('gpu', bytes_in_use=4)
  assert memory_in_use(Mesh) == {'device/bytes_in_use': 4, 'device/peak_bytes_in_use': 5}
  Mesh.devices.flat[:] = [Device('cpu', bytes_in_use=4)]
  assert memory_in_use(Mesh) == dict.fromkeys(MEMORY)


def test_a_run_that_goes_on_adds_up_its_waits(tmp_path, monkeypatch):
  """As it does its seconds: both are in the checkpoint."""
  stops = iter(range(100))
  status = train.run(config(), str(tmp_path), corpus(), quiet=True, stops_at=lambda step: next(stops) >= 6)
  assert status['state'] == 'interrupted'
  before = rows(tmp_path)[-1]
  after = run(tmp_path)[1][-1]
  for name in ('time/seconds', 'time/data_seconds'):
    assert after[name] > before[name] > 0
