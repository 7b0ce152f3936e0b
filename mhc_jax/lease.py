"""Leases: who is at work on a run, where no lock of an operating system reaches every process that may ask.

A lease is a small file (versioned.py) in which its owner counts up while it lives. Others take it when it has
not changed for as long as the owner promised, measured by their own clock alone: clocks of two machines are
never compared. A process of this machine that is dead loses it at once. An owner that was silent too long,
suspended for an hour, say, finds its lease taken before it writes again, and stops that run.
"""

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import secrets
import socket
import threading
import time
from typing import Any

from mhc_jax import versioned
from mhc_jax.errors import BusyError, require
from mhc_jax.log import say

STALE_SECONDS = 60.0  # of silence, after which a lease is free to take; MHC_JAX_STALE_SECONDS has another


class LeaseLostError(BusyError):
  """Another process has taken what this one held."""


Seen = dict[str, tuple[bytes, float]]  # path -> (content, since when by this process's clock)


def stale_seconds() -> float:
  """How often the leases of this process promise to change at least; ConfigError where it is no number."""
  text = os.environ.get('MHC_JAX_STALE_SECONDS', f'{STALE_SECONDS}')
  try:
    seconds = float(text)
  except ValueError:
    seconds = 0.0
  require(0 < seconds < 1e6, f'MHC_JAX_STALE_SECONDS={text!r} is not a number of seconds')
  return seconds


def _clock() -> float:
  """An owner's clock, which goes on while the machine sleeps, where the system has one that does.

  Those who wait for it measure by one that stands: when they wake together it has not been silent.
  """
  return time.clock_gettime(getattr(time, 'CLOCK_BOOTTIME', time.CLOCK_MONOTONIC))


@functools.cache
def _host() -> str:
  """The machine, and on Linux what must be equal for process ids to mean the same."""
  try:
    with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
      boot = file.read().strip()
    return f'{socket.gethostname()} {boot} {os.stat("/proc/self/ns/pid").st_ino}'
  except OSError:
    return socket.gethostname()


def _started(pid: int) -> str | None:
  """When a living process of this machine started, in the kernel's ticks; None for a dead one."""
  try:
    with open(f'/proc/{pid}/stat', encoding='utf-8', errors='replace') as file:
      fields = file.read().rpartition(')')[2].split()
  except OSError:
    return None
  return None if fields[0] in 'ZX' else fields[19]


def _dead(owner: dict[str, Any]) -> bool:
  """Whether all processes of an owner are known to be dead: only those of this machine are, and on Linux."""
  if owner.get('host') != _host() or ' ' not in _host():
    return False
  return all(_started(pid) != started for pid, started in owner['processes'])


@dataclasses.dataclass(frozen=True)
class Holder:
  """Who holds a lease, as others see it."""

  name: str  # host and process, for people
  processes: tuple[int, ...]  # its id and that of the sweep above it, where they are of this machine


def holders(paths: list[str], seen: Seen) -> list[Holder | None]:
  """Who holds each lease, None where it is free to take: never taken, given back, or stale.

  seen: what this process has seen of leases so far, which this adds to: staleness takes two looks.
  """
  contents = versioned.read_many(paths)
  return [_holder(path, content, seen) for path, content in zip(paths, contents, strict=True)]


def _holder(path: str, content: bytes | None, seen: Seen) -> Holder | None:
  """content: None where there is no lease yet."""
  owner = {'free': True} if content is None else _parsed(content)
  if owner.get('free'):
    seen.pop(path, None)
    return None
  if path not in seen or seen[path][0] != content:
    seen[path] = content, time.monotonic()
  since = seen[path][1]
  if _dead(owner) or time.monotonic() - since > owner['stale_seconds']:
    return None
  pids = [pid for pid, _ in owner['processes']]
  name = f'{owner["host"].split()[0]} (process {pids[0]})' if owner['host'] else 'another process'
  return Holder(name, tuple(pids) if owner['host'] == _host() else ())


def _parsed(content: bytes) -> dict[str, Any]:
  """The owner; one of whom nothing is known but the usual promise, where the content is cut or damaged."""
  unknown = {'host': '', 'processes': [[0, '']], 'stale_seconds': stale_seconds(), 'deaths': 0}
  try:
    owner = json.loads(content)
    sound = owner.get('free') or (
      isinstance(owner['host'], str)
      and all(isinstance(pid, int) and isinstance(start, str) for pid, start in owner['processes'])
      and 0 < owner['stale_seconds'] < 1e6
      and isinstance(owner['deaths'], int)
    )
  except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
    return unknown
  return owner if sound else unknown


class Lease:
  """A lease that this process holds; a thread renews it until it is given back or lost."""

  def __init__(self, path: str, version: str | None, deaths: int):
    self.path, self.deaths = path, deaths  # deaths: of its owners, since one of them got on
    self._version, self._content, self._count = version, b'', 0
    parent, pids = multiprocessing.parent_process(), [os.getpid()]
    if parent is not None:  # the sweep, which says what became of its worker's run before others get it
      pids.append(parent.pid)
    self._owner = {'host': _host(), 'processes': [[pid, _started(pid) or ''] for pid in pids]}
    self._owner |= {'token': secrets.token_hex(8), 'stale_seconds': stale_seconds()}
    self._stale = self._owner['stale_seconds']
    self._guard, self._over, self._lost = threading.Lock(), threading.Event(), False
    self._renewed = _clock()

  def begin(self) -> bool:
    """Takes it, unless another has since its version was read, and starts the thread."""
    with self._guard:
      if not self._write():
        return False
    threading.Thread(target=self._keep, daemon=True).start()
    return True

  def renew(self, progress: bool = False) -> None:
    """Counts up, now; progress: what is done so far is safe. Raises LeaseLostError where another has it."""
    with self._guard:
      if progress:
        self.deaths = 0
      for _ in range(3):  # of two writes at the same time a store may refuse both
        if self._lost or self._write():
          break
        found, self._version = versioned.read(self.path)
        self._lost = found != self._content
      else:
        self._lost = True
    if self._lost:
      raise LeaseLostError(
        f'{self.path} was taken by another process after this one had been silent for too long: it leaves '
        'the run to that one'
      )

  def check(self) -> None:
    """Raises LeaseLostError where another may have it; asks only where it was not renewed for a while."""
    if self._lost or _clock() - self._renewed > self._stale / 2:
      self.renew()

  def release(self) -> None:
    """Gives it back, so that others can take it at once; nothing where it is lost, or out of reach."""
    self._over.set()
    with self._guard, contextlib.suppress(OSError):
      if not self._lost:
        versioned.write(self.path, b'{"free": true}\n', self._version)
        self._lost = True

  def _write(self) -> bool:
    """Under the guard: one more count; False where it is not the next after what this process wrote."""
    owner = self._owner | {'deaths': self.deaths, 'count': self._count + 1}
    content, began = json.dumps(owner).encode() + b'\n', _clock()
    version = versioned.write(self.path, content, self._version)
    if version is None:
      return False
    self._version, self._content, self._renewed = version, content, began
    self._count += 1
    return True

  def _keep(self) -> None:
    while not self._over.wait(self._stale / 4):
      try:
        self.renew()
      except LeaseLostError:
        return
      except Exception:  # out of reach: again; whoever asks meanwhile is told
        continue


def take(path: str, seen: Seen) -> Lease | None:
  """The lease, where it is free to take and no other process is faster; see `holder`."""
  content, version = versioned.read(path)
  if _holder(path, None if version is None else content, seen) is not None:
    return None
  owner = _parsed(content)
  lease = Lease(path, version, 0 if version is None or owner.get('free') else owner['deaths'] + 1)
  return lease if lease.begin() else None


def wait_for(path: str, what: str) -> Lease:
  """The lease; waits until its owner has shown that it lives (a BusyError) or is known to be dead."""
  seen: Seen = {}
  first = None
  while True:
    lease = take(path, seen)
    if lease is not None:
      return lease
    [owner] = holders([path], seen)
    content = seen.get(path, (None,))[0]
    if owner and (owner.processes or content != (first or content)):
      raise BusyError(f'{what} is in use by {owner.name}')
    if owner and first is None:
      say(f'{what} is held by {owner.name}: waiting {stale_seconds():.0f} s at most, to see whether it lives')
    first = first or content
    time.sleep(min(1.0, stale_seconds() / 10))


def bury(path: str, pid: int) -> Lease | None:
  """The lease of a worker of this process that is dead, where it held this one: for its sweep to judge."""
  content, version = versioned.read(path)
  owner = _parsed(content)
  if owner.get('host') != _host() or [pid, os.getpid()] != [one for one, _ in owner['processes']]:
    return None
  lease = Lease(path, version, owner['deaths'] + 1)
  return lease if lease.begin() else None
