"""The dry run: 100 columns, nothing downloaded, seconds by what was measured, and it says by what."""

import json
import os
import socket

import pytest

from experiments import forecast, planning, sweep
from mhc_jax import speed
from mhc_jax.config_file import parse
from mhc_jax.plan import resolve

FLOPS = 1e7  # so slow that the runs take minutes: less is not remembered


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """A cache folder of this test's own, and a calibration that would be seen."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(forecast, 'calibrated', lambda planned: forecast.Speed(1e9, None, 'timed now'))
  return tmp_path / 'cache'


@pytest.fixture
def planned():
  """Two shapes, the first at two seeds."""
  arms = (('residual', 0), ('residual', 1), ('identity', 0))
  overrides = [[f'--config.model.connection.name={arm}', f'--config.seed={seed}'] for arm, seed in arms]
  return [resolve(parse('laptop:smoke', given), 'd') for given in overrides]


def finish(folder, run, besides, began=1e9):
  """A finished run, with so many seconds besides training."""
  path, seconds = folder / run.run_id, run.derived['flops'] / FLOPS
  path.mkdir(parents=True)
  (path / 'config.json').write_text('{}')
  status = {'state': 'finished', 'seconds': seconds, 'device_kind': 'cpu'}
  (path / 'status.json').write_text(json.dumps(status))
  os.utime(path / 'config.json', (began, began))
  os.utime(path / 'status.json', (began + seconds + besides,) * 2)


def test_finished_runs_of_the_folder_come_first_then_the_last_sweep_then_a_calibration(planned, tmp_path):
  here, other = tmp_path / 'a', tmp_path / 'b'
  assert forecast.speed_of(planned, str(here)).source == 'timed now'
  finish(here, planned[0], besides=12.0)
  finish(here, planned[1], besides=3.0, began=2e9)  # the second of its shape: compiled already
  found = forecast.speed_of(planned, str(here))
  assert found.flops == pytest.approx(FLOPS) and found.shape_seconds == pytest.approx(12, abs=1e-3)
  assert found.source == 'measured on 2 finished runs of this folder'
  forecast.remember(planned[:1], str(other))
  assert forecast.speed_of(planned, str(other)).source == 'timed now', 'nothing has run there'
  forecast.remember(planned[:2], str(here))
  found = forecast.speed_of(planned, str(other))
  assert found.flops == pytest.approx(FLOPS) and 'last sweep on this machine' in found.source
  for broken in ('{', '[]', '{"cpu": 3}', '{"cpu": {"flops_per_second": 0}}', '{"tpu": {}}'):
    with open(forecast.cache_file(), 'w', encoding='utf-8') as file:
      file.write(broken)
    assert forecast.speed_of(planned, str(other)).source == 'timed now', broken


def test_a_copied_folder_knows_no_compilation(planned, tmp_path):
  finish(tmp_path, planned[0], besides=-0.01 - planned[0].derived['flops'] / FLOPS)
  assert forecast.speed_of(planned, str(tmp_path)).shape_seconds is None


def test_time_is_updates_and_compilations_over_the_workers(planned):
  flops = sum(run.derived['flops'] for run in planned)
  speed = forecast.Speed(flops / 600, 300.0, 'measured')
  words = forecast.time_of(planned, 2, speed)
  assert '3 runs to do, of 2 shapes' in words and 'about 10 min with 2 workers' in words
  assert '5 min of updates' in words and '5 min of compilation (2 shapes at 5 min each)' in words
  assert 'about 20 min with 1 worker:' in forecast.time_of(planned, 1, speed)
  assert 'about 10 min with 8 workers' in forecast.time_of(planned, 8, speed), 'two shapes feed two'
  unknown = forecast.time_of(planned, 1, forecast.Speed(flops / 600, None, 'timed now'))
  assert 'about 10 min' in unknown and 'compilation, which has not been measured here' in unknown


@pytest.mark.parametrize('name', ('quick', 'rank:small', 'isoflop:small'))
def test_the_table_has_every_run_in_100_columns(name):
  _, planned = planning.plan(name, ['--config.data.name=python_stdlib'])
  states = ['interrupted'] * len(planned)
  states[0] = 'finished'
  text = forecast.report(planned, states, [1], 1, forecast.Speed(1e9, 20.0, 'measured'))
  assert max(map(len, text.splitlines())) <= 100
  rows = [line for line in text.splitlines() if line.endswith(('interrupted', 'finished'))]
  assert [row.split()[0] for row in rows] == [run.run_id for run in planned]


def test_a_dry_run_of_a_corpus_that_is_elsewhere_touches_no_network(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(socket, 'socket', None)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'data'))
  assert sweep.main(['ablation:large', '--dry-run', '--out', str(tmp_path)]) == 0
  text = capsys.readouterr().out
  said = ' '.join(text.split())
  assert 'sample/10BT is not on this machine: sizes are checked when the sweep starts' in said
  assert max(map(len, text.splitlines())) <= 100 and '27 runs to do' in text
  assert not (tmp_path / 'data').exists()


def test_the_calibration_times_a_layer_of_the_plan(planned, monkeypatch):
  monkeypatch.undo()
  monkeypatch.setattr(speed, 'CALIBRATION', 1e6)
  found = forecast.calibrated(planned)
  assert 1e5 < found.flops < 1e15 and found.shape_seconds is None
  assert f'one {planned[0].model.width} wide layer of' in found.source


def test_counts_have_three_digits():
  assert [forecast.short(n) for n in (7, 999, 1234, 12_345_678, 1e13)] == [
    '7',
    '999',
    '1.23k',
    '12.3M',
    '10T',
  ]
