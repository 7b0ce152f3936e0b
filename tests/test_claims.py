"""Several processes, and several machines, at one sweep: every run trained once, whoever dies or sleeps."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import claims
from experiments.claims import Claims, Job
from mhc_jax import lease, storage
from mhc_jax.run_folder import write_status
from mhc_jax.workdir import lease_of, read_status
from tests import buckets
from tests.campaign.tiny import STEPS, Session, Tiny, logged, unfit

RUNS = 3
STALE = 3.0
SWEEP = f"""
import os, sys, time
from pathlib import Path
from experiments import planning, sweep
from mhc_jax import train
from mhc_jax.command import end_with_message
from tests.campaign.tiny import Tiny
tiny, loop = Tiny(Path(sys.argv[1])), train.loop

def noted(members, updates, *rest):
  with open(os.environ['JOURNAL'], 'a') as file:
    file.writelines(f'{{member.plan.run_id}} {{member.step}}\\n' for member in members)
  advance = updates.advance
  updates.advance = lambda count: time.sleep(float(os.environ['PACE'])) or advance(count)
  return loop(members, updates, *rest)

train.loop = noted
planning.EXPERIMENTS['claims'] = lambda _: [tiny.config(f'seed={{i}}') for i in range({RUNS})]
if __name__ == '__main__':
  sys.exit(end_with_message(lambda: sweep.main(['claims', '--out', *sys.argv[2:]])))
"""
UNSHARE = ('unshare', '-Ur', '-u')
needs_hosts = pytest.mark.skipif(
  subprocess.run([*UNSHARE, 'true'], check=False).returncode != 0, reason='needs unshare'
)


class Hosts:
  """Machines, as far as leases can tell: names and scratch folders of their own, and the same command."""

  def __init__(self, folder: Path, out: str, environment: dict[str, str]):
    self.tiny, self._folder, self._out, self._more = Tiny(folder / 'tiny'), folder, out, environment
    self._sessions: list[Session] = []
    (folder / 'sweep.py').write_text(SWEEP)

  def start(self, name: str, *more: str, pace: float = 0.0, out: str | None = None) -> Session:
    scratch = self._folder / name
    scratch.mkdir(exist_ok=True)
    environment = self.tiny.environment | self._more | {'TMPDIR': str(scratch), 'PACE': f'{pace}'}
    environment |= {'JOURNAL': str(scratch / 'journal'), 'MHC_JAX_STALE_SECONDS': f'{STALE}'}
    environment['PYTHONPATH'] = os.pathsep.join(('.', *filter(None, [os.environ.get('PYTHONPATH')])))
    named = ('sh', '-c', f'hostname {name} && exec "$@"', 'sh')
    command = [sys.executable, str(self._folder / 'sweep.py'), str(self.tiny.folder), out or self._out, *more]
    self._sessions.append(Session([*UNSHARE, *named, *command], environment, scratch))
    return self._sessions[-1]

  def end(self) -> None:
    for session in self._sessions:
      session.kill_all()
      session.process.communicate()

  def began(self, name: str) -> list[tuple[str, int]]:
    """(run, step) of every training that a machine began."""
    journal = self._folder / name / 'journal'
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]

  @functools.cached_property
  def alone(self) -> Path:
    """The folder of the same sweep, undisturbed."""
    said = self.start('alone', out=str(self._folder / 'undisturbed')).end()
    assert not unfit(said) and len(self.began('alone')) == RUNS
    return self._folder / 'undisturbed' / 'claims'


@pytest.fixture
def hosts_of(tmp_path):
  """Makes Hosts, and ends what is left of them."""
  made = []

  def make(out: str, environment: dict[str, str]) -> Hosts:
    made.append(Hosts(tmp_path, out, environment))
    return made[-1]

  yield make
  for hosts in made:
    hosts.end()


def check(hosts: Hosts, folder: Path) -> None:
  """All runs have ended as the undisturbed ones."""
  for run in hosts.alone.glob('*/'):
    assert read_status(str(folder / run.name))['state'] == 'finished'
    assert logged(folder / run.name) == logged(run) and len(logged(run)) > 2


@pytest.mark.slow
@needs_hosts
def test_what_a_dead_machine_held_is_taken_after_a_while(tmp_path, hosts_of):
  """Two on one folder; one is killed, the other goes on from its checkpoint when the lease is stale."""
  hosts = hosts_of(str(tmp_path / 'out'), {})
  folder = tmp_path / 'out' / 'claims'
  victim = hosts.start('victim', pace=1.5)  # seconds of an update: it will not end by itself
  assert victim.wait_until(lambda: list(folder.glob('*/checkpoints/4')))
  other = hosts.start('other')
  assert other.wait_until(lambda: len(hosts.began('other')) == RUNS - 1), other.end()
  [(run, _)] = hosts.began('victim')
  victim.kill_all()
  killed = time.monotonic()
  assert other.wait_until(lambda: len(hosts.began('other')) == RUNS), other.end()
  assert time.monotonic() - killed > STALE / 2
  said = other.end()
  assert not unfit(said) and f'waits for 1 runs that others train, {run} by victim (process' in said.err
  runs, steps = zip(*hosts.began('other'), strict=True)
  assert len(set(runs)) == RUNS and runs[-1] == run
  assert steps[-1] in range(4, STEPS) and set(steps[:-1]) == {0}
  check(hosts, folder)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """(address, environment, function that brings its files here) of an S3 bucket."""
  pytest.importorskip('moto')
  fsspec = pytest.importorskip('fsspec')
  pytest.importorskip('s3fs')
  address, stop = buckets.serve(buckets.s3())
  environment = {'AWS_ACCESS_KEY_ID': 'x', 'AWS_SECRET_ACCESS_KEY': 'y', 'AWS_REGION': 'us-east-1'}
  environment['AWS_ENDPOINT_URL'] = address
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  storage.to_path('s3://bucket')
  client = fsspec.filesystem('s3', skip_instance_cache=True)
  client.makedirs('bucket', exist_ok=True)  # moto has one memory for all servers of a process

  def bring() -> Path:
    client.get('bucket/out/claims', str(tmp_path / 'brought'), recursive=True)
    return tmp_path / 'brought'

  yield 's3://bucket/out', environment, bring
  stop()


@pytest.mark.slow
@needs_hosts
def test_two_machines_on_a_bucket_and_one_of_them_sleeps(bucket, hosts_of):
  """Each run is trained once, but what the sleeper held: it finds that taken when it wakes, and leaves it."""
  out, environment, bring = bucket
  hosts = hosts_of(out, environment)
  sleeper = hosts.start('sleeper', pace=1.5)
  assert sleeper.wait_until(lambda: hosts.began('sleeper')), sleeper.end()
  other = hosts.start('other', pace=0.05)
  assert other.wait_until(lambda: hosts.began('other')), other.end()
  [(run, _)] = hosts.began('sleeper')
  sleeper.process.send_signal(signal.SIGSTOP)
  assert other.wait_until(lambda: run in dict(hosts.began('other'))), other.end()
  sleeper.process.send_signal(signal.SIGCONT)
  ends = sleeper.end(), other.end()
  assert [said.code for said in ends] == [0, 0], '\n'.join(said.err for said in ends)
  assert f'{run} lost: LeaseLostError' in ends[0].err
  began = [begun for name in ('sleeper', 'other') for begun, _ in hosts.began(name)]
  assert sorted(began) == sorted([*set(began), run]) and len(set(began)) == RUNS
  check(hosts, bring())


@pytest.mark.slow
@needs_hosts
def test_a_sweep_into_google_cloud_storage(tmp_path, hosts_of, monkeypatch):
  pytest.importorskip('gcsfs')
  pytest.importorskip('werkzeug')
  import fsspec

  address, stop = buckets.serve(buckets.gcs())
  environment = {'STORAGE_EMULATOR_HOST': address, 'TENSORSTORE_GCS_HTTP_URL': address}
  environment |= {'GCE_METADATA_HOST': '127.0.0.1:1', 'GOOGLE_AUTH_TOKEN': 'x'}  # no search for credentials
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  hosts = hosts_of('gs://bucket/out', environment)
  said = hosts.start('one').end()
  assert said.code == 0, said.err
  client = fsspec.filesystem('gs', skip_instance_cache=True)
  client.get('bucket/out/claims', str(tmp_path / 'brought'), recursive=True)
  check(hosts, tmp_path / 'brought')
  stop()


def jobs(folder: Path, *groups: int) -> list[list[Job]]:
  """Groups of so many runs without configurations."""
  return [[Job(f'run{g}{i}', None, 10.0 - g, None) for i in range(count)] for g, count in enumerate(groups)]


def test_processes_go_through_groups_of_their_own_and_then_help(tmp_path):
  """The longest group first; one that another is at only when there is no other, and from its end."""
  first, second = (Claims(jobs(tmp_path, 3, 2), str(tmp_path)) for _ in range(2))

  def take(of: Claims) -> tuple[str, Job, lease.Lease] | None:
    taken = of.take()
    return (taken[0][0].run_id, *taken[0]) if taken else None

  def done(of: Claims, taken: tuple[str, Job, lease.Lease], state: str = 'finished') -> None:
    write_status(str(tmp_path / taken[0]), {'state': state})
    taken[2].release()
    of.done(taken[1])

  a, b = take(first), take(second)
  assert (a[0], b[0]) == ('run00', 'run10')
  done(first, a)
  a = take(first)
  assert a[0] == 'run01'
  done(second, b)
  b = take(second)
  assert b[0] == 'run11'
  done(second, b, 'failed')
  b = take(second)
  assert b[0] == 'run02', 'it helps from the other end'
  me = f'{os.uname().nodename} (process {os.getpid()})'
  assert take(first) is None and first.others() == {'run01': me, 'run02': me}
  done(second, b)
  assert take(second) is None and len(second.left()) == 1, 'what the other holds is left'
  done(first, a)
  assert take(first) is None and take(second) is None and not first.left() and not second.left()


def test_several_runs_of_a_group_are_taken_at_once(tmp_path):
  claimed = Claims(jobs(tmp_path, 1, 3), str(tmp_path))
  assert [[job.run_id for job, _ in claimed.take(lambda job: 2)] for _ in range(3)] == [
    ['run00'],
    ['run10', 'run11'],
    ['run12'],
  ]


def test_a_failed_run_is_retried_once_by_whoever_is_first(tmp_path):
  """Others that were asked to try it again see that it has been."""
  (tmp_path / 'run00').mkdir()
  write_status(str(tmp_path / 'run00'), {'state': 'failed', 'error': 'first'})
  before = claims._ended(read_status(str(tmp_path / 'run00')))
  group = [[Job('run00', None, 1.0, before)]]
  first, second = Claims(group, str(tmp_path)), Claims(group, str(tmp_path))
  [(job, held)] = first.take()
  write_status(str(tmp_path / 'run00'), {'state': 'failed', 'error': 'second'})
  held.release()
  first.done(job)
  assert not second.take() and not second.left()


def test_a_run_that_kills_its_processes_is_left_alone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lease, '_dead', lambda owner: True)
  for _ in range(claims.MOST_DEATHS):
    assert Claims(jobs(tmp_path, 1), str(tmp_path)).take()
  claimed = Claims(jobs(tmp_path, 1), str(tmp_path))
  assert not claimed.take() and not claimed.left()
  status = read_status(str(tmp_path / 'run00'))
  assert status['state'] == 'failed' and '3 processes died in it' in status['error']
  assert 'run00 failed: 3 processes' in capsys.readouterr().err
  assert lease.holders([lease_of(str(tmp_path / 'run00'))], {}) == [None]
