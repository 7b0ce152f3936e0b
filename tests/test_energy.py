"""Counters of energy: rounds that end, what cannot be read, and the column that a run's rows have."""

import sys
import types

import pytest

from mhc_jax import energy, train
from mhc_jax.chips import CHIPS
from mhc_jax.energy import Counter, Laps, Meter, check_kind, meter
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from tests.test_train import config, corpus, rows, run


class Fake:
  """A counter that shows these values one after another; an exception among them is raised."""

  def __init__(self, *values):
    self._values = iter(values)

  def __call__(self):
    value = next(self._values)
    if isinstance(value, Exception):
      raise value
    return value


def zone(folder, name, kind, micro, most=65_532_610_987):
  """A zone of powercap as the kernel shows it."""
  path = folder / name
  path.mkdir(parents=True)
  for file, text in (('name', kind), ('energy_uj', micro), ('max_energy_range_uj', most)):
    (path / file).write_text(f'{text}\n')
  return path


def test_joules_are_the_increases_of_all_counters_over_ends_of_rounds():
  counted = Meter('fake', [Counter(Fake(90, 95, 3, 3), 100.0), Counter(Fake(0, 1, 2, 2))])
  assert [counted.joules() for _ in range(3)] == [6.0, 15.0, 15.0]


@pytest.mark.parametrize('values', [(5, PermissionError('denied')), (5, 4)])
def test_a_counter_that_fails_or_goes_back_ends_the_counting_for_good(values, capsys):
  counted = Meter('fake', [Counter(Fake(*values, 9, 9))])
  assert [counted.joules() for _ in range(3)] == [None] * 3
  assert capsys.readouterr().err.count('energy is not measured any more') == 1


def test_laps_leave_out_what_lies_between_them(monkeypatch):
  monkeypatch.setattr(energy.time, 'monotonic', Fake(0.0, 10.0, 12.0, 12.0))
  laps = Laps(Meter('fake', [Counter(Fake(0, 0, 100, 107, 107))]))
  laps.begin()
  assert laps.lap() == (2.0, 7.0)
  assert laps.lap() == (0.0, 0.0), 'an interval of no length'
  monkeypatch.undo()
  assert Laps(None).lap()[1] is None


def test_packages_and_their_memory_count_once(tmp_path, monkeypatch):
  """Not psys, which has the packages in it, and not the cores, which are in theirs."""
  monkeypatch.setattr(energy, 'POWERCAP', str(tmp_path))
  package = zone(tmp_path, 'intel-rapl:0', 'package-0', 9_000_000, 10_000_000)
  memory = zone(tmp_path, 'intel-rapl:0:1', 'dram', 0)
  others = [zone(tmp_path, *one, 0) for one in (('intel-rapl:0:0', 'core'), ('intel-rapl:1', 'psys'))]
  counted = meter('rapl', [])
  for path in others:
    (path / 'energy_uj').write_text('700000\n')
  (package / 'energy_uj').write_text('500000\n')
  (memory / 'energy_uj').write_text('250000\n')
  assert counted.source == 'rapl' and counted.joules() == pytest.approx(1.5 + 0.25, abs=1e-12)


@pytest.mark.parametrize('kind', ['rapl', 'nvml'])
def test_a_machine_without_counters_is_told_and_measured_without(kind, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(energy, 'POWERCAP', str(tmp_path))
  monkeypatch.setitem(sys.modules, 'pynvml', None)
  assert meter(kind, []) is None
  said = capsys.readouterr().err
  assert {'rapl': 'no counter of a CPU package', 'nvml': 'pip install'}[kind] in said


def test_counters_of_root_alone_are_none(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(energy, 'POWERCAP', str(tmp_path))
  zone(tmp_path, 'intel-rapl:0', 'package-0', 0)

  def denied(*_):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(energy, '_micro', denied)
  assert meter('rapl', []) is None and 'Permission denied' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('visible', 'asked'), [('', [0, 1]), ('3,5', [3, 5]), ('GPU-a,GPU-b', ['GPU-a', 'GPU-b'])]
)
def test_gpus_are_those_that_the_process_sees(visible, asked, monkeypatch):
  """By number or by UUID, in mJ."""
  values = {name: 1000 * k for k, name in enumerate(asked)}
  fake = types.SimpleNamespace(
    nvmlInit=lambda: None,
    nvmlDeviceGetHandleByIndex=lambda number: number,
    nvmlDeviceGetHandleByUUID=lambda name: name,
    nvmlDeviceGetTotalEnergyConsumption=lambda handle: values[handle],
  )
  monkeypatch.setitem(sys.modules, 'pynvml', fake)
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  counted = meter('nvml', [types.SimpleNamespace(local_hardware_id=k) for k in (0, 1)])
  values[asked[0]] += 1500
  values[asked[1]] += 500
  assert counted.joules() == pytest.approx(2.0)


def test_several_processes_have_none(capsys):
  assert meter('cpu:5', [], processes=2) is None and 'several machines' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['', 'NVML', 'cpu', 'cpu:', 'cpu:0', 'cpu:-3', 'cpu:1e3', 'watt'])
def test_other_kinds_are_refused(kind):
  with pytest.raises(ConfigError, match=r'log\.energy must be nvml, rapl, or cpu:WATTS'):
    check_kind(kind)


def test_rows_have_joules_of_the_timed_updates_and_nothing_else_changes(tmp_path):
  """The same id, and the same losses to the bit."""
  assert resolve(config(), 'd').run_id == resolve(config(log__energy='cpu:2'), 'd').run_id
  fields = {'log__energy': 'cpu:2', 'log__every_steps': 1}
  status, logged = run(tmp_path / 'a', **fields)
  assert status['energy'] == 'CPU seconds x 2 W, no counter'
  joules = [row['device/joules'] for row in logged[2:]]
  assert joules == sorted(joules) and joules[0] > 0
  plain, without = run(tmp_path / 'b', log__every_steps=1)
  assert plain['energy'] is None and not any('device/joules' in row for row in without)
  assert [row.get('train/loss') for row in logged] == [row.get('train/loss') for row in without]


def test_a_checkpoint_carries_the_joules_so_far(tmp_path):
  """The second process counts a millionth of the first's."""
  fields = {'log__energy': 'cpu:1000000', 'log__every_steps': 1}
  train.run(config(**fields), str(tmp_path), corpus(), quiet=True, stops_at=lambda step: step >= 4)
  before = rows(tmp_path)[-1]['device/joules']
  status, logged = run(tmp_path, log__energy='cpu:1', log__every_steps=1)
  assert status['state'] == 'finished' and before > 1
  assert before < logged[-1]['device/joules'] < 1.5 * before


def test_watts_are_those_of_data_sheets():
  """NVIDIA's of the SXM modules; of Google's chips only v4's measured maximum is public."""
  known = {'v4': 192, 'A100': 400, 'H100': 700, 'H200': 700, 'B200': 1000}
  assert {name: chip.watts for name, chip in CHIPS.items() if chip.watts} == known
