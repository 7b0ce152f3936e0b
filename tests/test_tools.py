"""Besides training: --print-config, --estimate, what is said of memory that is full; meshes that fill up."""

import json

import jax
import pytest
from ml_collections import ConfigDict

from experiments.planning import plan as plan_sweep
from mhc_jax import __main__ as mhc
from mhc_jax import memory, print_config, train
from mhc_jax.config import base_config, fill_mesh
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError, OutOfMemoryError
from mhc_jax.plan import resolve
from mhc_jax.train_step import programs
from tests.test_train import config, corpus, run


def fields(section, path=''):
  """Names of all fields, 'section.field', and of sections that have none."""
  for key, value in section.items():
    whole = isinstance(value, ConfigDict) and len(value)
    yield from fields(value, f'{path}{key}.') if whole else [f'{path}{key}']


def test_print_config_has_every_field_with_its_default_and_a_meaning(capsys):
  names = list(fields(base_config()))
  assert len(names) > 80 and all(print_config.meanings()[name] for name in names)
  assert set(print_config.meanings()) >= set(names)
  assert mhc.main(['--print-config']) == mhc.main(['train', '--print-config']) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[: len(said) // 2] == said[len(said) // 2 :]
  heads = [line.split('=')[0] for line in said[: len(said) // 2] if '=' in line.split(' ')[0]]
  assert sorted(heads) == sorted(names)
  (line,) = (line for line in said[: len(said) // 2] if line.startswith('data.seq_len='))
  assert line.split() == ['data.seq_len=128', 'tokens'] and max(map(len, said)) <= 110


def test_print_config_tells_what_was_chosen_from_the_default(capsys):
  chosen = ['--config.model.width=96', '--config.model.connection.constraint_params.iterations=5']
  assert mhc.main(['train', '--config', 'laptop:smoke', '--print-config', *chosen]) == 0
  lines = {line.split('=')[0]: line for line in capsys.readouterr().out.splitlines()}
  assert '=96 ' in lines['model.width'] and lines['model.width'].endswith('(default 64)')
  assert lines['model.connection.constraint_params.iterations'].endswith('=5  (default None)')
  assert lines['data.batch_size'].endswith('(default 16)') and 'default' not in lines['seed']
  assert mhc.main(['train', '--print-config', '--config.model.widht=3']) == 2
  assert 'did you mean model.width' in capsys.readouterr().err


def test_train_needs_a_config_and_a_folder(capsys):
  assert mhc.main(['train']) == mhc.main(['train', '--config', 'laptop:smoke']) == 2
  said = capsys.readouterr().err.splitlines()
  assert 'name a config' in said[0] and '--workdir' in said[1] and len(said) == 2


def mesh(**axes):
  c = config(data__batch_size=8, evaluation__batch_size=8)
  c.mesh.update(axes)
  return c


@pytest.mark.parametrize(('axis', 'other'), (('data', 'fsdp'), ('fsdp', 'data'), ('expert', 'data')))
def test_one_axis_of_the_mesh_takes_what_the_others_leave(axis, other):
  """Eight devices are here (conftest.py)."""
  found = resolve(mesh(**{axis: -1, other: 2}), 'd')
  assert found.resolved['mesh'] == {'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1, axis: 4, other: 2}
  assert found.run_id == resolve(mesh(), 'd').run_id


def test_meshes_that_cannot_be_filled_say_why():
  with pytest.raises(ConfigError, match=r'one axis of mesh can be -1.*not data and fsdp'):
    resolve(mesh(data=-1, fsdp=-1), 'd')
  with pytest.raises(ConfigError, match=r'left of 8 devices.*tensor 3.*= 3, do not divide them'):
    resolve(mesh(fsdp=-1, tensor=3), 'd')
  with pytest.raises(ConfigError, match=r'mesh\.data must be at least 1, got -2'):
    resolve(mesh(data=-2), 'd')
  with pytest.raises(ConfigError, match='must be a multiple of'):
    resolve(config(data__batch_size=4, mesh__fsdp=-1), 'd')
  locked = mesh(tensor=-1).lock()
  fill_mesh(locked, 16)
  assert locked.mesh.tensor == 16 and locked.is_locked


def test_a_run_trains_on_all_devices_that_are_left(tmp_path):
  status, _ = run(tmp_path, duration__steps=2, mesh__fsdp=-1, data__batch_size=8, evaluation__batch_size=8)
  assert (status['state'], status['device_count']) == ('finished', 8)
  assert json.loads((tmp_path / 'config.json').read_text())['mesh']['fsdp'] == 8


def test_a_sweep_fills_meshes_by_the_devices_of_its_workers():
  overrides = ['--config.mesh.data=-1', '--config.data.batch_size=16', '--config.evaluation.batch_size=64']
  configs, planned = plan_sweep('quick', overrides, download=False, elsewhere=True, devices=4)
  assert {c.mesh.data for c in configs} == {4} == {run.resolved['mesh']['data'] for run in planned}
  with pytest.raises(ConfigError, match='needs a number'):
    plan_sweep('quick', overrides, download=False, elsewhere=True)


def test_estimate_says_what_a_run_is_and_takes(capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  assert mhc.main(['train', '--config', 'laptop:smoke', '--estimate']) == 0
  said = capsys.readouterr().out
  found = resolve(parse('laptop:smoke', []), '')
  assert f'{found.derived["params"]["total"]:,}: embedding' in said
  assert f'20 updates of 512 tokens: 10,240 tokens, {found.derived["flops"]:.3g} FLOPs' in said
  assert '(this machine): fits' in said and 'logits' in said and 'timed now' in said
  assert not any(path.name != 'cache' for path in tmp_path.iterdir()), 'nothing is written'
  big = ['--config.topology=v5e:2x4', '--config.mesh.data=8', '--config.model.width=2048']
  assert mhc.main(['train', '--config', 'laptop', '--estimate', *big]) == 0
  said = capsys.readouterr().out
  assert 'of 16.0 GiB (v5e)' in said and 'an assumed 25% of the peak of 8 x v5e' in said


@pytest.mark.parametrize(
  'fields',
  (
    {'model__connection__name': 'mhc', 'model__remat': 'layer', 'model__scan_unroll': 1},
    {'data__seq_len': 256, 'optimizer__microbatches': 2},
  ),
  ids=('recomputed', 'microbatches'),
)
def test_terms_of_memory_add_up_to_about_what_the_compiled_step_takes(fields):
  """XLA's own count for CPU. Of four kinds of steps the sums were 0.79 to 0.88 of it (docs/tools.md)."""
  c = config(model__width=64, model__depth=2, model__heads=4)
  c.data.seq_len, c.data.batch_size = 128, 16
  for name, value in fields.items():
    *path, last = name.split('__')
    section = c
    for key in path:
      section = section[key]
    section[last] = value
  plan = resolve(c, 'd')
  of_model = programs(plan.model, plan.optimizer, train.make_mesh({}))
  shape = (c.data.batch_size, c.data.seq_len)
  types = {'inputs': 'int32', 'targets': 'int32', 'weights': 'float32', 'segments': 'int32'}
  batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in types.items()}
  hparams = dict.fromkeys(('lr', 'weight_decay', 'num_steps', 'warmup'), jax.ShapeDtypeStruct((), 'float32'))
  stats = of_model.step.lower(of_model.abstract, batch, hparams).compile().memory_analysis()
  needed = stats.argument_size_in_bytes + stats.temp_size_in_bytes
  assert 0.7 < sum(memory.terms(plan).values()) / needed < 1.3


def test_memory_that_is_full_names_the_largest_terms_and_what_to_change(tmp_path, monkeypatch):
  def full(self, count):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9999 bytes.\nat x')

  monkeypatch.setattr(train.Single, 'advance', full)
  with pytest.raises(OutOfMemoryError) as raised:
    run(tmp_path)
  status = json.loads((tmp_path / 'status.json').read_text())
  assert status['state'] == 'failed' and status['error'] == f'OutOfMemoryError: {raised.value}'
  said = str(raised.value)
  assert 'logits' in said and 'model.remat=layer' in said and 'optimizer.microbatches' in said
  assert 'allocating 9999 bytes' in said and '\n' not in said
  assert memory.explained(raised.value, resolve(config(), 'd')) is raised.value
  other = RuntimeError('INTERNAL: something else')
  assert memory.explained(other, resolve(config(), 'd')) is other


def test_members_of_a_population_that_is_too_large_are_explained_too(tmp_path, monkeypatch):
  def full(self, count):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 1 byte')

  monkeypatch.setattr(train.Population, 'advance', full)
  folders = [str(tmp_path / str(seed)) for seed in (0, 1)]
  found = train.run_population([config(seed=seed) for seed in (0, 1)], folders, corpus(), quiet=True)
  assert all(status['error'].startswith('OutOfMemoryError: out of memory: about') for status in found)
