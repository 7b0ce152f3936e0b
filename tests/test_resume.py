"""The training command killed, interrupted and out of disk: the same command goes on, bit for bit."""

import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config_file import parse
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = f'{ROOT / "configs" / "laptop.py"}:smoke'
STEPS, TIMEOUT = 40, 300
# Sets the largest size of a file in bytes, then becomes the command.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
os.execv(sys.argv[2], sys.argv[2:])
"""
OVERRIDES = (
  'model.width=16',
  'data.seq_len=16',
  'data.batch_size=4',
  f'duration.steps={STEPS}',
  'evaluation.every_steps=20',
  'log.diagnostics_every_steps=15',
  'checkpoint.every_steps=7',
)


class Session:
  """The training command in a process of its own, on a corpus of its own."""

  def __init__(self, folder, workdir, limit=None):
    overrides = (*OVERRIDES, f'data.name=text_files:{folder / "text"}', f'data.dir={folder / "data"}')
    command = [sys.executable, '-m', 'mhc_jax.train', '--config', SMOKE, '--workdir', str(workdir)]
    command += [f'--config.{override}' for override in overrides]
    if limit is not None:
      command = [sys.executable, '-c', LIMITED, str(limit), *command]
    environment = os.environ | {
      # One compilation for all sessions of this file.
      'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
    }
    self.workdir, self.began = workdir, time.time()
    self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)

  def wait_until(self, condition):
    """Looks every half millisecond; the run must not end before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
      assert self.process.poll() is None, f'ended before: {self.process.communicate()[1]}'
      assert time.monotonic() < deadline
      time.sleep(0.0005)

  def end(self, send=None):
    """Sends a signal, if any, and waits: (exit code, stderr)."""
    if send is not None:
      self.process.send_signal(send)
    said = self.process.communicate(timeout=TIMEOUT)[1]
    return self.process.returncode, said

  def rows(self):
    path = self.workdir / 'metrics.jsonl'
    return path.read_text().count('\n') if path.exists() else 0

  def is_writing_a_checkpoint(self):
    """Whether orbax's temporary folder of a step is there, and not one that a killed session left."""
    for path in (self.workdir / 'checkpoints').glob('*tmp*'):
      with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ctime > self.began:
          return True
    return False


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('resume')
  words = random.Random(0)
  (folder / 'text').mkdir()
  for index in range(20):
    (folder / 'text' / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(500)))
  return folder


@pytest.fixture(scope='module')
def uninterrupted(folder):
  workdir = folder / 'uninterrupted'
  code, said = Session(folder, workdir).end()
  assert code == 0, said
  return workdir


def logged(workdir):
  """Rows without their times; a row that is not whole fails."""
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [{key: value for key, value in row.items() if not key.startswith('time/')} for row in rows]


def newest(workdir):
  """(step, all arrays of the newest checkpoint)."""
  plan = resolve(parse(SMOKE, [f'--config.{override}' for override in OVERRIDES]), '')
  abstract = programs(plan.model, plan.optimizer, make_mesh({})).abstract
  step, state, _ = Checkpoints(workdir / 'checkpoints').restore_latest(abstract)
  return step, jax.device_get(state)


def status(workdir):
  return json.loads((workdir / 'status.json').read_text())


def assert_equal_runs(workdir, other):
  steps = [row['step'] for row in logged(workdir)]
  assert steps == list(range(STEPS + 1)), 'a step is missing or logged twice'
  assert logged(workdir) == logged(other)
  (step, state), (other_step, other_state) = newest(workdir), newest(other)
  assert step == other_step == STEPS
  jax.tree.map(np.testing.assert_array_equal, state, other_state)
  assert status(workdir)['final'] == status(other)['final'] is not None
  assert [path.name for path in (workdir / 'checkpoints').iterdir()] == [str(STEPS)]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(folder, uninterrupted, tmp_path):
  moment, workdir = random.Random(), tmp_path / 'run'
  rows = moment.randrange(8, 20)
  for kill in ('at a random moment', 'while a checkpoint is written'):
    session = Session(folder, workdir)
    if kill == 'at a random moment':
      session.wait_until(lambda session=session: session.rows() >= rows)
      time.sleep(moment.random() * 0.02)
    else:
      session.wait_until(session.is_writing_a_checkpoint)
    code, said = session.end(signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert status(workdir)['state'] == 'running'
  code, said = Session(folder, workdir).end()
  assert code == 0, said
  assert 'damaged' not in said and 'Traceback' not in said
  assert_equal_runs(workdir, uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_a_full_disk_ends_in_one_line(folder, uninterrupted, tmp_path):
  workdir = tmp_path / 'run'
  session = Session(folder, workdir)
  session.wait_until(lambda: session.rows() > 15)
  code, said = session.end(signal.SIGTERM)
  assert code == 130, said
  interrupted = status(workdir)
  assert interrupted['state'] == 'interrupted' and interrupted['final'] is None
  assert said.splitlines()[-1] == f'interrupted after step {interrupted["step"]}; the same command goes on'
  step, before = newest(workdir)
  assert step == interrupted['step'] == logged(workdir)[-1]['step'] < STEPS

  # Rows, status and metadata still fit (38 kB), the arrays do not: 257 kB in three files, more or less.
  code, said = Session(folder, workdir, limit=45_000).end()
  assert code == 1 and 'Traceback' not in said
  errors = [line for line in said.splitlines() if not line.startswith('mhc: step')]  # progress
  assert len(errors) == 1 and errors[0].startswith('error: ') and 'run the same command again' in errors[0]
  assert status(workdir)['state'] == 'interrupted', 'a sweep goes on with it too'
  after_step, after = newest(workdir)
  assert after_step == step
  jax.tree.map(np.testing.assert_array_equal, after, before)

  code, said = Session(folder, workdir).end()
  assert code == 0, said
  assert_equal_runs(workdir, uninterrupted)
