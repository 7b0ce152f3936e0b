"""Devices of local workers: shared out without overlap, told before JAX starts, left alone by the sweep."""

import collections
import itertools
import os
import subprocess
import sys

import jax
import pytest

from experiments import devices, sweep, workers
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from mhc_jax.sharding import left_out, make_mesh


@pytest.fixture
def machine(monkeypatch):
  """A machine with every plugin and these files."""
  files = {}
  monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: True)
  monkeypatch.setattr(devices.glob, 'glob', lambda pattern: files.get(pattern, []))
  return files


def gpus(count):
  return devices.Accelerators('cuda', 'CUDA_VISIBLE_DEVICES', tuple(map(str, range(count))))


def test_a_cpu_machine_has_none():
  assert devices.find(os.environ) is None or jax.default_backend() != 'cpu'


@pytest.mark.parametrize(
  ('environ', 'found'),
  [
    ({}, ('cuda', 'CUDA_VISIBLE_DEVICES', ('0', '1'))),
    ({'JAX_PLATFORMS': 'cpu'}, None),
    ({'JAX_PLATFORMS': 'cuda,cpu'}, ('cuda', 'CUDA_VISIBLE_DEVICES', ('0', '1'))),
    ({'CUDA_VISIBLE_DEVICES': '3, 5,GPU-8a'}, ('cuda', 'CUDA_VISIBLE_DEVICES', ('3', '5', 'GPU-8a'))),
    ({'CUDA_VISIBLE_DEVICES': ''}, None),
    ({'CUDA_VISIBLE_DEVICES': '-1'}, None),
  ],
)
def test_visible_gpus_are_those_of_the_variable_else_all(machine, environ, found):
  """Files of a container keep the host's numbers, CUDA counts from 0."""
  machine['/dev/nvidia[0-9]*'] = ['/dev/nvidia4', '/dev/nvidia7']
  assert devices.find(environ) == (found and devices.Accelerators(*found))


def test_other_kinds(machine):
  machine['/dev/vfio/[0-9]*'] = [f'/dev/vfio/{i}' for i in range(8)]
  assert devices.find({}) == devices.Accelerators('tpu', 'TPU_VISIBLE_CHIPS', tuple('01234567'))
  machine.clear()
  machine['/dev/dri/renderD*'] = ['/dev/dri/renderD128']
  assert devices.find({'ROCR_VISIBLE_DEVICES': '6'}).variable == 'ROCR_VISIBLE_DEVICES'
  assert devices.find({}) == devices.Accelerators('rocm', 'HIP_VISIBLE_DEVICES', ('0',))


def test_without_the_plugin_jax_sees_no_gpu(machine, monkeypatch):
  machine['/dev/nvidia[0-9]*'] = ['/dev/nvidia0']
  monkeypatch.setattr(devices.importlib.util, 'find_spec', lambda name: None)
  assert devices.find({}) is None


@pytest.mark.parametrize(
  ('count', 'each', 'per_device'), list(itertools.product((1, 2, 3, 6, 8), (1, 2, 3), (1, 2, 3)))
)
def test_every_worker_has_its_devices_and_no_device_too_many_workers(count, each, per_device):
  found = gpus(count)
  if each > count:
    with pytest.raises(ConfigError, match=f'wants {each} devices'):
      devices.most_workers(found, each, per_device)
    return
  most = devices.most_workers(found, each, per_device)
  load, memory = collections.Counter(), collections.Counter()
  for worker in range(most):
    told = devices.environment(worker, found, each, per_device, {})
    names = told['CUDA_VISIBLE_DEVICES'].split(',')
    assert len(set(names)) == each and set(names) <= set(found.names)
    load.update(names)
    memory.update(dict.fromkeys(names, 1000 * float(told.get('XLA_PYTHON_CLIENT_MEM_FRACTION', 0))))
    if worker == count // each - 1:
      assert max(load.values()) == 1, 'own devices come first'
  assert max(load.values()) == per_device and len(load) == count // each * each
  assert all(value <= 1000 * devices.SHARED + per_device for value in memory.values())  # three digits each


def test_a_fraction_of_the_users_is_what_is_shared():
  told = devices.environment(0, gpus(1), 1, 2, {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.5'})
  assert told['XLA_PYTHON_CLIENT_MEM_FRACTION'] == '0.250'


def test_a_tpu_worker_is_a_process_by_itself():
  tpu = devices.Accelerators('tpu', 'TPU_VISIBLE_CHIPS', tuple('0123'))
  told = devices.environment(3, tpu, 1, 1, {})
  assert told['TPU_VISIBLE_CHIPS'] == '3' and told['TPU_CHIPS_PER_PROCESS_BOUNDS'] == '1,1,1'
  assert devices.environment(0, tpu, 4, 1, {})['TPU_CHIPS_PER_PROCESS_BOUNDS'] == '2,2,1'
  for each, per_device, message in ((1, 2, 'belongs to one process'), (3, 1, 'no part of a host')):
    with pytest.raises(ConfigError, match=message):
      devices.most_workers(tpu, each, per_device)


def _seen():
  return [(os.environ['CUDA_VISIBLE_DEVICES'], 'finished')]


@pytest.mark.slow
def test_workers_take_their_environments(tmp_path):
  crew = workers.Crew(_seen, [], str(tmp_path))
  for name in ('4', '7'):
    crew.start({'CUDA_VISIBLE_DEVICES': name})
  while crew.at_work(10):
    pass
  assert sorted(crew.ended) == [('4', 'finished'), ('7', 'finished')]
  assert 'CUDA_VISIBLE_DEVICES' not in os.environ


def arranged(monkeypatch, count, *arguments):
  """What the sweep would start on a machine with so many GPUs: (workers, environments)."""
  started = []
  monkeypatch.setattr(sweep.devices, 'find', lambda environ: gpus(count) if count else None)
  monkeypatch.setattr(sweep.jax.config, 'update', lambda name, value: started.append((name, value)))
  monkeypatch.setattr(sweep, 'execute', lambda *rest: started.append((rest[3], rest[6])) or [])
  monkeypatch.setitem(
    sweep.EXPERIMENTS, 'one', lambda arg: [parse('laptop:smoke', ['--config.data.name=python_stdlib'])]
  )
  sweep.main(['one', *arguments])
  return started


def test_a_sweep_has_a_worker_for_every_device_and_starts_none_itself(monkeypatch, tmp_path):
  out = ['--out', str(tmp_path)]
  platform, (count, told) = arranged(monkeypatch, 3, *out)
  assert platform == ('jax_platforms', 'cpu') and count == 3
  assert [one['CUDA_VISIBLE_DEVICES'] for one in told] == ['0', '1', '2']
  assert arranged(monkeypatch, 3, '--workers', '1', *out) == [(1, None)], 'it trains by itself'
  assert arranged(monkeypatch, 0, *out) == [(1, None)]
  _, (count, told) = arranged(monkeypatch, 1, '--per-device', '2', *out)
  assert count == 2 and {one['CUDA_VISIBLE_DEVICES'] for one in told} == {'0'}
  with pytest.raises(ConfigError, match='3 devices take 3; --per-device'):
    arranged(monkeypatch, 3, '--workers', '4', *out)
  with pytest.raises(ConfigError, match='no accelerator is here'):
    arranged(monkeypatch, 0, '--per-device', '2', *out)


def test_runs_of_several_devices_get_them_together(monkeypatch, tmp_path):
  out = ['--config.mesh.data=2', '--out', str(tmp_path)]
  _, (count, told) = arranged(monkeypatch, 5, *out)
  assert count == 2 and [one['CUDA_VISIBLE_DEVICES'] for one in told] == ['0,1', '2,3']


def test_finding_devices_imports_no_jax():
  code = (
    'import sys, os\nfrom experiments import devices\ndevices.find(os.environ)\nprint("jax" in sys.modules)'
  )
  answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert answer.stdout == 'False\n'


def test_a_run_says_which_devices_it_leaves():
  """Of 8: as many as divide the batch, by the option that takes them."""
  resolved = resolve(parse('laptop:smoke', ['--config.data.batch_size=12']), 'd').resolved
  mesh = make_mesh({})
  assert left_out(resolved, mesh).startswith('uses 1 of 8 devices; --config.mesh.data=4 uses 4')
  assert left_out(resolved, make_mesh({'data': 4})) is None, 'no more divide both batches'
  resolved['optimizer']['microbatches'] = 6
  assert '--config.mesh.data=2 uses 2' in left_out(resolved, mesh)
  resolved['data']['batch_size'] = 7
  assert left_out(resolved, mesh) is None
