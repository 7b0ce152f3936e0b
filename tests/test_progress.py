"""The progress of a sweep: what it says, on what evidence, at which cost; Ctrl-C is answered at once."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from experiments import progress, workers
from mhc_jax.config_file import parse
from mhc_jax.log import duration
from mhc_jax.plan import resolve

TRAINING, OTHER = 20.0, 10.0  # seconds of a run that has ended: its updates, and the rest


@pytest.fixture
def planned():
  """Two shapes, the first at two seeds."""
  arms = (('residual', 0), ('residual', 1), ('identity', 0))
  overrides = [[f'--config.model.connection.name={arm}', f'--config.seed={seed}'] for arm, seed in arms]
  return [resolve(parse('laptop:smoke', given), 'd') for given in overrides]


def write(folder, run, part, state, began, seconds=TRAINING, other=OTHER):
  """A run that was taken at `began` and has logged a part of its updates."""
  path = folder / run.run_id
  path.mkdir(exist_ok=True)
  row = {'step': round(part * run.num_steps), 'flops': part * run.derived['flops'], 'time/seconds': seconds}
  files = {'config.json': '{}', 'status.json': json.dumps({'state': state})}
  files |= {'metrics.jsonl': f'{json.dumps(row)}\n'} if part else {}
  for name, text in files.items():
    (path / name).write_text(text)
    when = began if name == 'config.json' else began + seconds + other
    os.utime(path / name, (when, when))


def test_time_left_is_that_of_measured_rates_and_compilations(planned, tmp_path):
  """None without evidence; then FLOPs at the measured rate and a compilation for the shape that is left."""
  folders, now = progress.Folders(planned, str(tmp_path)), time.time() + 1
  assert folders.look().seconds is None
  write(tmp_path, planned[0], 0, 'running', now)
  found = folders.look()
  assert found.seconds is None and [run.run_id for run in found.compiling] == [planned[0].run_id]
  write(tmp_path, planned[0], 1, 'finished', now)
  found = folders.look()
  assert (found.ended, found.shapes, found.shapes_left, found.compiling) == (1, 2, 1, [])
  rate = planned[0].derived['flops'] / TRAINING
  rest = sum(run.derived['flops'] for run in planned[1:]) / rate
  assert found.seconds == pytest.approx(rest + OTHER, rel=1e-4)  # of the files' times
  write(tmp_path, planned[1], 0.5, 'running', now + 30, seconds=TRAINING / 2, other=1.0)
  found = folders.look()
  half = planned[1].derived['flops'] / 2
  assert [seen.run.run_id for seen in found.training] == [planned[1].run_id]
  assert found.seconds == pytest.approx(rest - half / rate + OTHER, rel=1e-4), 'its shape had been compiled'


def test_updates_of_earlier_starts_are_no_evidence(planned, tmp_path):
  """A run that goes on: what it had done before the watching began counts as done, not as speed."""
  write(tmp_path, planned[0], 0.5, 'interrupted', time.time() - 1000)
  folders = progress.Folders(planned, str(tmp_path))
  found = folders.look()
  assert found.flops == planned[0].derived['flops'] / 2 and found.seconds is None
  write(tmp_path, planned[0], 1, 'finished', time.time() + 1, seconds=TRAINING + 5, other=OTHER - TRAINING)
  assert folders.look().seconds is not None
  work = folders.runs[planned[0].run_id].work
  assert work == pytest.approx((planned[0].derived['flops'] / 2, 5, OTHER), abs=1e-3)


def test_a_killed_run_goes_on_from_its_checkpoint(planned, tmp_path):
  """Its rows since then are gone: what it does again is evidence of speed, and is no compilation."""
  write(tmp_path, planned[0], 0.8, 'running', time.time() - 1000)
  folders, now = progress.Folders(planned, str(tmp_path)), time.time() + 1
  folders.look()
  for part, seconds in ((0.5, 10.0), (0.75, 15.0)):
    write(tmp_path, planned[0], part, 'running', now, seconds)
    found = folders.look()
  assert found.compiling == [] and len(found.training) == 1
  rate = planned[0].derived['flops'] / TRAINING
  [other] = [seen.work[2] for seen in found.training]
  left = sum(run.derived['flops'] for run in planned) - found.flops
  assert found.seconds == pytest.approx(left / rate + other, rel=1e-4)


def test_a_look_reads_what_has_changed_alone(planned, tmp_path, monkeypatch):
  reads, real = [], progress.read_status
  monkeypatch.setattr(progress, 'read_status', lambda workdir: reads.append(workdir) or real(workdir))
  folders, now = progress.Folders(planned, str(tmp_path)), time.time() + 1
  write(tmp_path, planned[0], 1, 'finished', now)
  write(tmp_path, planned[1], 0.5, 'running', now)
  folders.look()
  assert len(reads) == 2
  folders.look()
  assert len(reads) == 2, 'nothing had changed'
  write(tmp_path, planned[0], 1, 'finished', now + 5)
  write(tmp_path, planned[1], 0.75, 'running', now + 5)
  write(tmp_path, planned[2], 0, 'running', now + 5)
  folders.look()
  assert sorted(os.path.basename(path) for path in reads[2:]) == sorted(run.run_id for run in planned[1:])


def test_looks_take_half_a_percent_of_a_core_whatever_they_cost(planned, tmp_path, monkeypatch):
  bar = progress.Bar(planned, str(tmp_path), 1)
  assert bar.show() == pytest.approx(progress.LOOK_SECONDS)
  ticks = iter((0.0, 0.05))
  monkeypatch.setattr(progress.time, 'thread_time', lambda: next(ticks))
  assert bar.show() == pytest.approx(0.05 * 200)


def test_lines_say_what_compiles_and_never_guess(planned, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(progress, 'LINE_SECONDS', 0.0)
  bar, now = progress.Bar(planned, str(tmp_path), 1), time.time() + 1
  bar.show()
  write(tmp_path, planned[2], 0, 'running', now)
  bar.show()
  write(tmp_path, planned[2], 0.5, 'running', now)
  bar.show()
  write(tmp_path, planned[2], 1, 'finished', now + 1)
  bar.show(last=True)
  lines = capsys.readouterr().err.splitlines()
  size = f'{planned[0].model.width}x{planned[0].model.depth}'
  assert lines[0].endswith('compiling, 0 of 2 shapes done, estimating the time left')
  assert f'compiling identity {size}, 0 of 2 shapes done, estimating' in lines[1]
  assert f'identity {size} at step {planned[2].num_steps // 2}/{planned[2].num_steps}, about' in lines[2]
  assert lines[3].startswith('sweep: 1/3 runs, ') and lines[3].endswith('of the FLOPs')


def test_durations_are_no_more_exact_than_an_estimate():
  assert [duration(s) for s in (9.4, 200.0, 24559.0)] == ['9 s', '3 min', '6.8 h']


def test_ctrl_c_is_answered_while_the_main_thread_computes_and_twice_ends():
  """The main thread is in one call without the interpreter, as in a compilation."""
  program = (
    'import hashlib, sys\nfrom mhc_jax import distributed\n'
    'with distributed.stop_on_signal():\n'
    '  print("in", flush=True)\n'
    '  hashlib.pbkdf2_hmac("sha256", b"a", b"b", 400_000_000)\n'
  )
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  with subprocess.Popen([sys.executable, '-c', program], **pipes) as process:
    try:
      assert process.stdout.readline() == 'in\n'
      for word in ('stopping', 'ended at once'):
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.stderr.readline().startswith(word)
        assert time.monotonic() - began < 10  # of minutes
      assert process.wait(10) == 130
    finally:
      process.kill()


def test_workers_do_not_see_the_ctrl_c_of_a_terminal():
  code = 'import signal; print(signal.SIGINT in signal.pthread_sigmask(0, []))'
  with workers._no_interrupt():
    answer = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert answer.stdout == 'True\n' and signal.SIGINT not in signal.pthread_sigmask(0, [])
