"""mhc bench as a command, at tiny sizes: what is timed, what is read from the compiler, what is printed."""

import contextlib
import itertools
import json
import os
import shutil

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import compiled, device, device_parts, step, timing
from mhc_jax.errors import ConfigError

SMALL = ['--width', '64', '--batch', '2', '--seq-len', '64', '--streams', '2']


@pytest.fixture
def run(monkeypatch, capsys):
  """Runs the command and returns what it prints; XLA has read its flags long before."""
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])

  def run(*arguments):
    assert bench.main([*arguments, *SMALL]) == 0
    return json.loads(capsys.readouterr().out)

  return run


def test_repeats_are_interleaved_and_the_first_round_is_not_measured(monkeypatch):
  """a takes 1 s a call at first and 0.5 s more every call; b takes 3 s."""
  now, calls = 0.0, []

  def function(name, seconds):
    def call():
      nonlocal now
      calls.append(name)
      now += next(seconds)

    return call

  monkeypatch.setattr(timing.time, 'perf_counter', lambda: now)
  functions = {'a': function('a', itertools.count(1, 0.5)), 'b': function('b', itertools.repeat(3))}
  assert timing.interleaved(functions, repeats=2, calls=2) == {'a': [2.25, 3.25], 'b': [3, 3]}
  assert ''.join(calls) == 'aabb' * 3
  assert timing.summary([3.0, 1.0, 2.5]) == {'median': 2.5, 'min': 1, 'max': 3}


@pytest.mark.slow
def test_step_compares_arms_within_a_round(run, monkeypatch):
  """Ratios by hand from given seconds; both arms train and diagnose for real."""

  def timed(functions, repeats, calls):
    assert (repeats, calls) == (3, 1)
    metrics = [functions[arm, 'step']() for arm in ('residual', 'identity') for _ in range(2)]
    losses = [float(update['loss']) for update in metrics]
    assert losses[0] > losses[1] and losses[2] > losses[3], 'the state is carried on'
    assert functions['identity', 'diagnostics']()
    seconds = {'residual': [1.0, 2.0, 4.0], 'identity': [3.0, 3.0, 6.0]}
    return {key: seconds[key[0]] if key[1] == 'step' else [0.3, 0.3, 0.6] for key in functions}

  monkeypatch.setattr(step, 'ARMS', ('residual', 'identity'))
  monkeypatch.setattr(step, 'interleaved', timed)
  report = run('step', '--depth', '1', '--repeats', '3', '--calls', '1', '--diagnostics-every', '10')
  identity = report['arms']['identity']
  assert identity['ratio_to_residual'] == {'median': 1.5, 'min': 1.5, 'max': 3}
  assert identity['diagnostics_percent'] == pytest.approx({'median': 1, 'min': 1, 'max': 1})
  assert report['settings']['width'] == 64 and report['settings']['depth'] == 1


@pytest.mark.slow
def test_step_against_a_commit_takes_each_side_from_its_own_files(run, monkeypatch, tmp_path):
  """The other side is a repository whose train_step is this one's; here a copy that says so."""
  monkeypatch.setattr(step, 'ARMS', ('residual',))
  monkeypatch.setattr(step, 'STEPS', 3)
  asked = []
  monkeypatch.setattr(step, 'ask', lambda *of, ask=step.ask: asked.append(of[0].args[-2:]) or ask(*of))

  @contextlib.contextmanager
  def worktree(commit):
    assert commit == 'before'
    shutil.copytree('mhc_jax', tmp_path / 'mhc_jax')
    with open(tmp_path / 'mhc_jax' / 'train_step.py', 'a', encoding='utf-8') as file:
      file.write(
        '\n_step = train_step\ndef train_step(*args, **more):\n  state, metrics = _step(*args, **more)'
      )
      file.write("\n  return state, metrics | {'loss': metrics['loss'] + 0.5}\n")
    yield str(tmp_path)

  monkeypatch.setattr(step, 'worktree', worktree)
  report = run('step', '--against', 'before', '--depth', '1', '--repeats', '1', '--calls', '2')
  residual = report['arms']['residual']
  assert residual['largest_difference_of_losses'] == pytest.approx(0.5, abs=1e-5)
  assert residual['cpu_seconds_now_over_then']['median'] > 0 and len(asked) == 4


def test_an_unknown_commit_is_one_line(run):
  with pytest.raises(ConfigError, match='--against nothing: '):
    bench.main(['step', '--against', 'nothing', *SMALL])


@pytest.fixture
def unmixed(monkeypatch):
  """Identity in place of mhc, which compiles longer; what these benches read is of any model."""

  def small(*args, of=compiled.small_config):
    c = of(*args)
    c.model.connection.name = 'identity'
    return c

  monkeypatch.setattr(compiled, 'small_config', small)


@pytest.mark.slow
def test_memory_falls_with_recomputation(run, unmixed, monkeypatch):
  monkeypatch.setattr(compiled, 'REMAT', ('none', 'layer'))
  report = run('memory', '--depth', '6')
  none, layer = report['remat']['none'], report['remat']['layer']
  assert 3 * layer['temporary_bytes'] < none['temporary_bytes']
  assert layer['argument_bytes'] == none['argument_bytes']


@pytest.mark.slow
def test_scaling_splits_the_state_and_counts_what_that_costs(run, unmixed, monkeypatch):
  """Two devices: fsdp halves the state and gathers it for use; tensor splits the sublayers' weights alone."""
  monkeypatch.setattr(compiled, 'DEVICES', (1, 2))
  one, fsdp, tensor = run('scaling', '--depth', '2')['per_device']
  assert one['collectives'] == {} and one['state_over_even_share'] == 1
  assert 1 <= fsdp['state_over_even_share'] < 1.01
  assert fsdp['state_over_even_share'] < tensor['state_over_even_share'] < 2
  assert fsdp['collectives']['all-gather']['bytes'] > fsdp['params_bytes']
  assert (tensor['axis'], tensor['devices']) == ('tensor', 2) and tensor['collectives']['all-gather']['count']


@pytest.mark.parametrize('mistake', ('--repeats 0', '--streams 0', '--depth 0', '--tokens 5', '--batch -2'))
def test_mistakes_are_refused(mistake):
  with pytest.raises(ConfigError, match=f'{mistake.split()[0]} must be at least 1'):
    bench.main(['step', *mistake.split()])


def test_settings_of_jax_are_those_of_training(run, monkeypatch):
  monkeypatch.setitem(bench.BENCHES, 'step', lambda args: {'sum': float(jnp.int32(1) + jnp.float32(0.5))})
  jax.config.update('jax_numpy_dtype_promotion', 'strict')
  try:
    assert run('step') == {'sum': 1.5}
  finally:
    jax.config.update('jax_numpy_dtype_promotion', 'standard')


@pytest.mark.slow
def test_device_measures_what_is_here_and_stops_in_time(run, monkeypatch, tmp_path):
  report = run('device', '--small', '--out', str(tmp_path))
  assert report['platform'] == 'cpu' and report['kernels'] is None
  assert not [row for row in report['rows'] if 'error' in row or 'skipped' in row]
  parts = [row['part'] for row in report['rows']]
  assert list(dict.fromkeys(parts)) == [
    'peak',
    'bandwidth',
    'attention',
    'boundary forward',
    'boundary forward_backward',
    'population',
    'step',
    'constraint',
  ]
  residual, mhc = (row for row in report['rows'] if row['part'] == 'step')
  assert residual['ratio_to_residual'] == 1
  assert mhc['ratio_to_residual'] == pytest.approx(mhc['ms'] / residual['ms'])
  alone, four = (row for row in report['rows'] if row['part'] == 'population')
  assert alone['gain'] == 1 and four['gain'] == pytest.approx(four['updates_per_s'] / alone['updates_per_s'])
  peak = report['rows'][0]
  assert peak['tflops'] == pytest.approx(2 * 256**3 / peak['ms'] / 1e9)
  assert mhc['mfu'] == pytest.approx(mhc['tflops'] / peak['tflops'])
  assert json.loads((tmp_path / 'device.json').read_text()) == report
  assert (tmp_path / 'device.png').stat().st_size > 1000


def test_device_skips_what_it_has_no_time_for_and_goes_on_after_an_error(run, monkeypatch, tmp_path):
  now = itertools.count(0, 50)

  def broken():
    raise RuntimeError('out of memory\nin line 2')

  names = [{'part': 'boundary forward', 'by': 'xla', 'dtype': str(i)} for i in range(3)]
  parts = [
    device_parts.Part(name, build) for name, build in zip(names, (broken, lambda: int, int), strict=True)
  ]
  monkeypatch.setattr(device, 'limits', lambda sizes: parts)
  for name in ('attentions', 'boundaries', 'steps', 'populations', 'constraints'):
    monkeypatch.setattr(device, name, lambda *_: ())
  monkeypatch.setattr(device.time, 'monotonic', lambda: next(now))
  failed, done, late = run('device', '--small', '--minutes', '2', '--out', str(tmp_path))['rows']
  assert failed['error'].startswith('RuntimeError: out of memory')
  assert done['ms'] > 0
  assert late['skipped'] == '2 minutes were up'
