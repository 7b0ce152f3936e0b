"""The sweep: finished runs are skipped, failures recorded, dead workers survived, plans printed."""

import errno
import json
import multiprocessing
import os
import random
import signal
import threading
import time

import jax
import pytest

from experiments import progress, sweep, workers
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.workdir import read_status


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  """An experiment of three one-update runs of equal shapes on a corpus of its own."""
  folder = tmp_path_factory.mktemp('sweep')
  words = random.Random(0)
  (folder / 'text').mkdir()
  for index in range(40):
    (folder / 'text' / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(300)))

  def runs(arg):
    assert arg in (None, 'small')
    configs = []
    for seed, arm in enumerate(('residual', 'residual', 'other')):
      overrides = [f'--config.data.name=text_files:{folder}/text', f'--config.data.dir={folder}']
      overrides += ['--config.model.connection.name=residual', '--config.log.diagnostics_every_steps=None']
      overrides += ['--config.duration.steps=1', f'--config.seed={seed}', f'--config.arm={arm}']
      overrides += ['--config.evaluation.sequences=4', '--config.evaluation.batch_size=4']
      configs.append(parse('configs/laptop.py:smoke', overrides))
    return configs

  return runs


@pytest.fixture
def experiment(tiny, monkeypatch):
  monkeypatch.setitem(sweep.EXPERIMENTS, 'tiny', tiny)
  return 'tiny'


def states(folder):
  plan = json.loads((folder / 'plan.json').read_text())['runs']
  return [read_status(str(folder / run['run_id']))['state'] for run in plan]


@pytest.mark.slow
def test_runs_records_failures_skips_finished_and_retries(experiment, tmp_path, monkeypatch, capsys):
  """One arm first; then all, one of which breaks; then nothing is left to do; then the broken one again."""
  out = ['--out', str(tmp_path)]
  assert sweep.main([experiment, '--only', 'other', *out]) == 0
  assert states(tmp_path / 'tiny') == ['missing', 'missing', 'finished']
  assert not list((tmp_path / 'tiny').glob('*/checkpoints/0')), 'only the last checkpoint stays'

  from mhc_jax import train

  real = train.loop

  def broken(members, *rest):
    if members[0].plan.resolved['seed'] == 0:
      raise RuntimeError('broken on purpose')
    return real(members, *rest)

  monkeypatch.setattr(train, 'loop', broken)
  assert sweep.main([experiment, *out]) == 1
  assert states(tmp_path / 'tiny') == ['failed', 'finished', 'finished']
  failed = json.loads((tmp_path / 'tiny' / 'plan.json').read_text())['runs'][0]['run_id']
  assert 'broken on purpose' in read_status(str(tmp_path / 'tiny' / failed))['error']
  assert 'broken on purpose' in capsys.readouterr().err

  monkeypatch.setattr(train, 'loop', real)
  assert sweep.main([experiment, *out]) == 1, 'a failed run keeps the sweep from success'
  assert states(tmp_path / 'tiny')[0] == 'failed', 'failed runs stay until they are asked for'
  assert sweep.main([experiment, '--retry-failed', *out]) == 0
  assert states(tmp_path / 'tiny') == ['finished'] * 3


def test_a_run_in_use_is_left_to_its_process(experiment, tmp_path):
  """The lock is the operating system's: no status is touched, and the others run."""
  import filelock

  configs, planned = sweep.plan(experiment)
  workdir = tmp_path / planned[0].run_id
  workdir.mkdir()
  with filelock.FileLock(workdir / '.lock'):
    ended = workers.run_group(configs[:1], str(tmp_path), quiet=True)
  assert ended == [(planned[0].run_id, 'busy')] and not (workdir / 'status.json').exists()


def test_arms_are_selected_by_name(experiment, tmp_path):
  _, planned = sweep.plan(experiment)
  assert sweep.select(planned, str(tmp_path), 'residual', ()) == ([0, 1], [0, 1])
  with pytest.raises(ConfigError, match='residual'):
    sweep.select(planned, str(tmp_path), 'nobody', ())


def test_runs_of_equal_shapes_form_one_group():
  """quick: four arms at five sizes, whatever their seeds and rates, and nine ranks."""
  _, planned = sweep.plan('quick', download=False)
  assert len({run.shapes for run in planned}) == 4 * 5 + 9


def test_dry_run_prints_the_plan_and_writes_nothing(experiment, tmp_path, capsys):
  assert sweep.main([f'{experiment}:small', '--dry-run', '--out', str(tmp_path)]) == 0
  table = capsys.readouterr().out
  _, planned = sweep.plan(experiment)
  for run in planned:
    assert run.run_id in table
  assert '3 runs to do, of 1 shapes' in table and not list(tmp_path.iterdir())


def test_equal_runs_and_unknown_experiments_are_refused(tiny, monkeypatch):
  monkeypatch.setitem(sweep.EXPERIMENTS, 'twice', lambda arg: [*tiny(None), tiny(None)[0]])
  with pytest.raises(ConfigError, match='twice'):
    sweep.plan('twice')
  with pytest.raises(ConfigError, match='quick'):
    sweep.plan('nobody')


@pytest.mark.slow
def test_workers_share_the_runs(experiment, tmp_path, monkeypatch):
  """Two processes: every run is done once, and groups of equal shapes stay in one process."""
  configs, planned = sweep.plan(experiment)
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])  # execute adds to it: undone afterwards
  ended = workers.execute(configs, planned, str(tmp_path), workers=2)
  assert sorted(ended) == sorted((run.run_id, 'finished') for run in planned)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_run_alone(experiment, tmp_path, monkeypatch):
  """Killed as the system does when memory is short: recorded, the other runs end, a retry goes on."""
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
  _, planned = sweep.plan(experiment)
  out = ['--out', str(tmp_path), '--workers', '2']
  victim = tmp_path / 'tiny' / planned[0].run_id

  def kill():
    deadline = time.monotonic() + 120  # a sweep that dies before ends the wait
    while not (victim / 'status.json').exists():
      if time.monotonic() > deadline:
        return
      time.sleep(0.01)
    for child in multiprocessing.active_children():
      held = {os.path.realpath(f'/proc/{child.pid}/fd/{fd}') for fd in os.listdir(f'/proc/{child.pid}/fd')}
      if str(victim / 'metrics.jsonl') in held:
        os.kill(child.pid, signal.SIGKILL)

  killer = threading.Thread(target=kill, daemon=True)
  killer.start()
  assert sweep.main([experiment, *out]) == 1
  killer.join()
  assert sorted(states(tmp_path / 'tiny')) == ['failed', 'finished', 'finished']
  assert 'the process died' in json.loads((victim / 'status.json').read_text())['error']
  assert sweep.main([experiment, '--retry-failed', *out]) == 0
  assert states(tmp_path / 'tiny') == ['finished'] * 3


@pytest.mark.slow
def test_interrupted_workers_are_not_started_again(experiment, tmp_path, monkeypatch):
  """Ctrl-C, with a run that an earlier kill left as running: it is not taken for a worker's death."""
  configs, planned = sweep.plan(experiment)
  monkeypatch.setenv('XLA_FLAGS', os.environ['XLA_FLAGS'])
  (tmp_path / planned[2].run_id).mkdir()
  stale = {'state': 'running', 'step': 0}
  (tmp_path / planned[2].run_id / 'status.json').write_text(json.dumps(stale))
  started, watch, start = [], progress.watch, workers.Crew.start

  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(progress, 'watch', interrupted)
  monkeypatch.setattr(workers.Crew, 'start', lambda *arguments: started.append(start(*arguments)))
  ended = workers.execute(configs, planned, str(tmp_path), workers=2)
  assert len(started) == 2 and 'interrupted' in dict(ended).values()
  assert read_status(str(tmp_path / planned[2].run_id)) == stale
  monkeypatch.setattr(progress, 'watch', watch)
  ended = workers.execute(configs, planned, str(tmp_path), workers=2)
  assert {state for _, state in ended} == {'finished'} and len(ended) == 3


def test_a_full_disk_ends_the_sweep_and_the_same_command_goes_on(experiment, tmp_path, monkeypatch, capsys):
  from mhc_jax import train
  from mhc_jax.command import end_with_message

  real = train.loop

  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(train, 'loop', full)
  command = [experiment, '--out', str(tmp_path)]
  assert end_with_message(lambda: sweep.main(command)) == 1
  assert states(tmp_path / 'tiny') == ['interrupted', 'missing', 'missing']
  error = capsys.readouterr().err.splitlines()[-1]
  assert error.startswith('error: No space left') and 'the same command again' in error
  monkeypatch.setattr(train, 'loop', real)
  assert sweep.main(command) == 0
  assert states(tmp_path / 'tiny') == ['finished'] * 3


def test_folders_that_cannot_be_written_are_refused(experiment, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ConfigError, match='cannot hold runs'):
    sweep.main([experiment, '--out', str(tmp_path / 'file')])


def test_settings_that_no_run_can_have_end_the_sweep_before_it_begins(experiment, tmp_path):
  with jax.enable_x64(True), pytest.raises(ConfigError, match='JAX_ENABLE_X64=1 would change'):
    sweep.main(['tiny', '--out', str(tmp_path / 'out')])
  assert not (tmp_path / 'out').exists()


def test_mixed_code_is_warned_of(experiment, tmp_path, capsys):
  _, planned = sweep.plan(experiment)
  folder = tmp_path / planned[0].run_id
  folder.mkdir()
  status = {'state': 'finished', 'git_revision': 'other', 'versions': {}}
  (folder / 'status.json').write_text(json.dumps(status))
  sweep.warn_of_mixtures(planned, str(tmp_path))
  assert 'another git revision (other)' in capsys.readouterr().err


@pytest.mark.parametrize('number', (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP))
def test_a_stop_in_the_last_cleanup_of_a_run_ends_its_group(experiment, tmp_path, monkeypatch, number):
  real, sent = Checkpoints.remove_all_but_last, []

  def cleanup(checkpoints):
    if not sent:
      sent.append(os.kill(os.getpid(), number))
    real(checkpoints)

  monkeypatch.setattr(Checkpoints, 'remove_all_but_last', cleanup)
  configs, _ = sweep.plan(experiment)
  ours = signal.signal(number, signal.SIG_DFL)  # not ignored, as under nohup
  try:
    ended = workers.run_group(configs, str(tmp_path), quiet=True)
  finally:
    signal.signal(number, ours)
  assert [state for _, state in ended] == ['finished', 'interrupted'] and len(list(tmp_path.iterdir())) == 1
