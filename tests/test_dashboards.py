"""Sinks beside metrics.jsonl: they get every row once, and whatever they do the run is the same."""

import glob
import importlib.util
import json
import os
import threading
import time

import pytest

from mhc_jax import dashboards, train
from mhc_jax.plan import resolve
from tests.test_train import TIMES, config, corpus, rows


def finished(folder, sink=None, **fields):
  status = train.run(config(**fields), str(folder), corpus(), quiet=True, sink=sink)
  return status['state'], status['final'], timeless(folder)


def timeless(folder):
  return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows(folder)]


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """What the run without a sink has to show."""
  return finished(tmp_path_factory.mktemp('plain'))


@pytest.fixture
def short_waits(monkeypatch):
  monkeypatch.setattr(dashboards, '_LAST_SECONDS', 0.3)
  monkeypatch.setattr(dashboards, '_UPLOAD_SECONDS', 0.5)


def test_a_sink_gets_the_rows_of_the_file_with_the_run_id_in_another_thread(tmp_path, plain):
  got, threads = [], set()

  def sink(row):
    threads.add(threading.current_thread())
    got.append(dict(row))
    row.clear()

  assert finished(tmp_path, sink) == plain
  run_id = resolve(config(), 'digest').run_id
  assert got == [{'run_id': run_id, **row} for row in rows(tmp_path)] and len(got) == 7
  assert threading.main_thread() not in threads and len(threads) == 1


def test_a_run_that_goes_on_gives_no_row_twice(tmp_path, monkeypatch, plain):
  """It was killed three rows after its checkpoint, so the rows of updates 5 and 6 are computed twice."""
  got = []

  class KilledError(BaseException):
    """Nothing of the run is saved or said when it comes."""

  real = train.Recorder.update

  def dies(self, at, step, *rest):
    if step == 7:
      raise KilledError
    return real(self, at, step, *rest)

  with monkeypatch.context() as patch, pytest.raises(KilledError):
    patch.setattr(train.Recorder, 'update', dies)
    finished(tmp_path, got.append)
  assert [row['step'] for row in got] == [0, 3, 4, 6]
  assert finished(tmp_path, got.append) == plain
  assert [row['step'] for row in got] == [0, 3, 4, 6, 8, 9, 10]
  assert finished(tmp_path, got.append) == plain and len(got) == 7, 'it has ended'


def raises(row):
  raise SystemExit('of\nits own')


def hangs(row):
  time.sleep(3600)


@pytest.mark.parametrize(
  ('sink', 'why'), [(raises, 'SystemExit: of its own'), (hangs, 'it takes none, 6 were left')]
)
def test_a_sink_that_fails_is_said_once_and_the_run_is_the_same(
  tmp_path, capsys, sink, why, short_waits, plain
):
  assert finished(tmp_path, sink) == plain
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'warning: the sink gets no more rows ({why}') and line.endswith('has every row')


def test_a_slow_sink_is_given_up_when_too_much_waits(tmp_path, capsys, monkeypatch, short_waits, plain):
  monkeypatch.setattr(dashboards, '_MOST_WAITING', 2)
  assert finished(tmp_path, hangs) == plain
  assert capsys.readouterr().err.count('the sink gets no more rows (it is 2 rows behind)') == 1


@pytest.fixture
def wandb(tmp_path, monkeypatch):
  """Installs a package wandb whose text is given, for the process that asks for it."""

  def install(text):
    (tmp_path / 'packages').mkdir()
    (tmp_path / 'packages' / 'wandb.py').write_text(text)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'packages'))
    monkeypatch.syspath_prepend(tmp_path / 'packages')
    importlib.invalidate_caches()

  return install


RECORDS = """
import json, os
class Run:
  def __init__(self, **about):
    self.id, self.summary = about['id'], {}
    self.say('begin', {name: about[name] for name in ('id', 'resume', 'project', 'group')})
  def say(self, *what):
    with open(os.environ['RECORD'], 'a') as file:
      print(json.dumps([self.id, *what]), file=file)
  def log(self, values, step):
    self.say('log', step, values)
  def finish(self, exit_code):
    self.say('finish', exit_code, self.summary)
def init(**about):
  print('W&B has much to say')
  return Run(**about)
"""


def recorded(tmp_path):
  return [json.loads(line) for line in (tmp_path / 'record').read_text().splitlines()]


def test_wandb_is_told_every_row_under_the_run_id(tmp_path, monkeypatch, wandb, plain, capsys):
  monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
  wandb(RECORDS)
  assert finished(tmp_path / 'run', log__wandb='mhc') == plain
  run_id = resolve(config(), 'digest').run_id
  said = recorded(tmp_path)
  about = {'id': run_id, 'resume': 'allow', 'project': 'mhc', 'group': 'residual'}
  assert said[0] == [run_id, 'begin', about] and said[-1] == [run_id, 'finish', 0, {'state': 'finished'}]
  assert [line[2] for line in said[1:-1]] == [0, 3, 4, 6, 8, 9, 10]
  values, row = said[-2][3], rows(tmp_path / 'run')[-1]
  assert values == {name: row[name] for name in values} and {'tokens', 'train/loss', 'time/seconds'} <= set(
    values
  )
  assert not capsys.readouterr().err, 'nor is anything of its own seen'


def test_members_of_a_population_are_runs_of_their_own(tmp_path, monkeypatch, wandb):
  monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
  wandb(RECORDS)
  members = [config(seed=seed, log__wandb=project) for seed, project in ((0, 'mhc'), (1, 'mhc'), (2, None))]
  folders = [str(tmp_path / str(seed)) for seed in range(3)]
  train.run_population(members, folders, corpus(), quiet=True)
  said, ids = recorded(tmp_path), [resolve(c, 'digest').run_id for c in members]
  assert {line[0] for line in said} == set(ids[:2])
  for run_id in ids[:2]:
    assert [line[2] for line in said if line[:2] == [run_id, 'log']] == [0, 3, 4, 6, 8, 9, 10]


HANGS = 'import time; time.sleep(3600)'
FAILING = {
  'refuses': ("def init(**_): raise ValueError('no key\\nis set')", 'ValueError: no key is set'),
  'dies': ('import os; os._exit(3)', 'its process has ended'),
  'hangs': (HANGS, 'it has not sent all'),
  'does not finish': (RECORDS.replace("self.say('finish'", f"{HANGS}  # ('"), 'it has not sent all'),
}


@pytest.mark.parametrize('how', FAILING)
def test_a_failing_wandb_is_said_once_and_the_run_is_the_same(
  how, tmp_path, monkeypatch, wandb, capsys, short_waits, plain
):
  monkeypatch.setenv('RECORD', str(tmp_path / 'record'))
  text, why = FAILING[how]
  wandb(text)
  began = time.monotonic()
  assert finished(tmp_path / 'run', log__wandb='mhc') == plain
  assert time.monotonic() - began < 20
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'warning: W&B gets no more rows ({why}')


def test_a_missing_wandb_is_said_and_the_run_is_the_same(tmp_path, monkeypatch, capsys, plain):
  monkeypatch.setattr(dashboards.importlib.util, 'find_spec', lambda name: None)
  assert finished(tmp_path, log__wandb='mhc') == plain
  (line,) = capsys.readouterr().err.splitlines()
  assert "pip install 'mhc_jax[wandb]'" in line
  assert resolve(config(log__wandb='mhc'), 'd').run_id == resolve(config(), 'd').run_id


@pytest.mark.skipif(importlib.util.find_spec('wandb') is None, reason='the extra wandb is not installed')
def test_the_real_wandb_keeps_an_offline_run(tmp_path, monkeypatch, capsys, plain):
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.delenv('WANDB_DIR', raising=False)
  assert finished(tmp_path, log__wandb='mhc') == plain and not capsys.readouterr().err
  run_id = resolve(config(), 'digest').run_id
  (file,) = glob.glob(f'{tmp_path}/wandb/offline-run-*/run-{run_id}.wandb')
  content = open(file, 'rb').read()
  assert b'train/loss' in content and b'validation/loss' in content and os.path.getsize(file) > 1000
