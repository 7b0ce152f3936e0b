"""Leases and the versioned files below them, in a folder: one owner at a time, whatever dies or sleeps."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mhc_jax import lease, versioned
from mhc_jax.errors import BusyError, ConfigError


@pytest.fixture
def path(tmp_path, monkeypatch):
  monkeypatch.setenv('MHC_JAX_STALE_SECONDS', '0.4')
  return str(tmp_path / 'lease')


OWNER = """
import sys, time
from mhc_jax import lease
held = lease.take(sys.argv[1], {})
print('held' if held else 'busy', flush=True)
time.sleep(float(sys.argv[2]))
try:
  held.check()
  print('kept', flush=True)
except lease.LeaseLostError:
  print('lost', flush=True)
"""


@pytest.fixture
def owner():
  """Starts other processes that take a lease and keep it; `before`: a command that starts one."""
  started = []

  def start(path, seconds, *before):
    command = [*before, sys.executable, '-c', OWNER, path, f'{seconds}']
    started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    assert started[-1].stdout.readline() == 'held\n'
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()


def taken(path, within):
  """Seconds until this process gets the lease."""
  began, seen = time.monotonic(), {}
  while time.monotonic() < began + within:
    held = lease.take(path, seen)
    if held is not None:
      held.release()
      return time.monotonic() - began
    time.sleep(0.02)
  return None


def holder(path, seen=None):
  return lease.holders([path], {} if seen is None else seen)[0]


def test_a_version_is_written_once(tmp_path):
  """Many threads count in one file: no two get the same version, and no count is lost."""
  path, won = str(tmp_path / 'file'), []

  def count():
    for _ in range(50):
      content, version = versioned.read(path)
      if content or version is None:  # else it was read while it was written
        won.append(versioned.write(path, f'{int(content or b"0") + 1}'.encode(), version))

  threads = [threading.Thread(target=count) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  versions = [version for version in won if version is not None]
  assert len(set(versions)) == len(versions) > 5 and int(versioned.read(path)[0]) >= len(versions)
  assert len(os.listdir(path)) == 1


def test_a_number_that_was_there_before_is_no_new_version(tmp_path):
  """A process that slept between its look and its write loses, whatever happened to that number meanwhile."""
  path = str(tmp_path / 'file')
  first = versioned.write(path, b'1', None)
  second = versioned.write(path, b'2', first)
  third = versioned.write(path, b'3', second)
  assert versioned.write(path, b'late', first) is None and versioned.write(path, b'late', None) is None
  assert versioned.read(path) == (b'3', third) and len(os.listdir(path)) == 1


def test_one_owner_at_a_time_and_the_next_at_once(path):
  held = lease.take(path, {})
  assert holder(path).processes[0] == os.getpid() and lease.take(path, {}) is None
  time.sleep(1)
  assert lease.take(path, {}) is None, 'its thread renews it'
  held.release()
  assert holder(path) is None and taken(path, 0.1) is not None
  held.release()
  assert taken(path, 0.1) is not None, 'what was given back cannot be given back again'


def test_a_dead_process_of_this_machine_loses_it_at_once(path, owner, monkeypatch):
  monkeypatch.setenv('MHC_JAX_STALE_SECONDS', '100')
  process = owner(path, 100)
  assert taken(path, 0.2) is None
  process.kill()  # a zombie, until it is waited for
  assert taken(path, 1) is not None


def test_a_worker_that_died_is_its_sweeps_to_judge(path, monkeypatch):
  """Others take what it held only when the sweep above it is dead too, or has given it back."""
  monkeypatch.setenv('MHC_JAX_STALE_SECONDS', '100')
  worker = multiprocessing.get_context('spawn').Process(target=_take_and_die, args=(path,))
  worker.start()
  worker.join()
  assert worker.exitcode == -signal.SIGKILL
  assert holder(path).processes == (worker.pid, os.getpid()) and taken(path, 0.2) is None
  lease.bury(path, worker.pid).release()
  assert taken(path, 0.1) is not None


def _take_and_die(path):
  lease.take(path, {})
  os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(subprocess.run(['unshare', '-Ur', '-u', 'true']).returncode, reason='needs unshare')
def test_another_machines_silence_makes_it_stale(path, owner):
  """By this process's own clock; an owner that slept notices, and the number of deaths is handed on."""
  process = owner(path, 1.5, 'unshare', '-Ur', '-u', 'sh', '-c', 'hostname other && exec "$@"', 'sh')
  seen = {}
  assert holder(path, seen).name.startswith('other (') and not holder(path, seen).processes
  assert taken(path, 0.8) is None
  process.send_signal(signal.SIGSTOP)
  assert 0.3 < taken(path, 5)
  held = lease.take(path, {})
  assert held.deaths == 0, 'given back in between'
  process.send_signal(signal.SIGCONT)
  assert process.stdout.readline() == 'lost\n'
  held.check()
  held.release()


def test_deaths_are_counted_until_somebody_gets_on(path, owner, monkeypatch):
  for _ in range(2):
    process = owner(path, 100)
    process.kill()
    process.wait()
    held = lease.take(path, {})
    assert held.deaths == 1
    held.release()
  monkeypatch.setattr(lease, '_dead', lambda owner: True)
  for deaths in range(3):
    held = lease.take(path, {})
    assert held.deaths == deaths
  held.renew(progress=True)
  assert lease.take(path, {}).deaths == 1


def test_two_takers_of_a_stale_lease_do_not_both_win(path, owner, monkeypatch):
  """All see the same stale version before any of them writes."""
  process = owner(path, 100)
  process.kill()
  process.wait()
  barrier, write, won = threading.Barrier(4), versioned.write, []

  def together(*arguments):
    if threading.current_thread().name.startswith('taker'):
      barrier.wait(10)
    return write(*arguments)

  monkeypatch.setattr(versioned, 'write', together)
  takers = [
    threading.Thread(target=lambda: won.append(lease.take(path, {})), name=f'taker {i}') for i in range(4)
  ]
  for taker in takers:
    taker.start()
  for taker in takers:
    taker.join()
  monkeypatch.undo()
  assert sum(held is not None for held in won) == 1
  next(held for held in won if held).release()


@pytest.mark.parametrize('content', (b'', b'{"host": ', b'[]', b'{"free": 0}', b'\xff', b'[' * 100_000))
def test_damaged_leases_are_somebodys_until_they_are_stale(path, content):
  versioned.write(path, content, None)
  assert lease.take(path, {}) is None and 0.3 < taken(path, 5) < 3


def test_waiting_for_a_lease_ends_either_way(path, monkeypatch, capsys):
  """Busy as soon as its owner shows life; taken when it does not."""
  held = lease.take(path, {})
  with pytest.raises(BusyError, match=f'the run is in use by .*process {os.getpid()}'):
    lease.wait_for(path, 'the run')
  monkeypatch.setattr(lease, '_host', lambda: 'elsewhere')
  with pytest.raises(BusyError, match='the run is in use by'):
    lease.wait_for(path, 'the run')
  held._over.set()  # its thread ends, as if the machine had died
  time.sleep(0.2)
  lease.wait_for(path, 'the run').release()
  assert 'waiting 0 s at most' in capsys.readouterr().err
  with pytest.raises(lease.LeaseLostError, match='silent for too long'):
    held.check()


def test_the_time_must_be_one(monkeypatch):
  for text in ('x', '0', '-1', 'inf', 'nan'):
    monkeypatch.setenv('MHC_JAX_STALE_SECONDS', text)
    with pytest.raises(ConfigError, match='MHC_JAX_STALE_SECONDS='):
      lease.stale_seconds()
