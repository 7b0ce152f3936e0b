"""Two processes of one run: one is killed, stopped or told to stop, or never comes; the other ends."""

import random
import signal
import socket
import time
from pathlib import Path

import psutil

from tests.campaign.tiny import STEPS, Said, Session, Tiny, logged, pick, status, unfit

HEARTBEAT = 10  # seconds, the least that JAX bears beside other work on two cores
FIELDS = ('mesh.data=4', 'mesh.fsdp=2', 'log.tensorboard=False')
LOST = 4  # disturbances of one trial
WITHIN = HEARTBEAT + 60  # seconds until the other has ended


class Pair:
  """The training command as two processes of four devices each."""

  def __init__(self, tiny: Tiny, workdir: Path, *more: str):
    with socket.create_server(('localhost', 0)) as free:
      port = free.getsockname()[1]
    fields = [f'--config.{field}' for field in FIELDS]
    flags = [
      '--local-devices=4',
      f'--coordinator=localhost:{port}',
      '--processes=2',
      f'--heartbeat={HEARTBEAT}',
      '--join-timeout=40',
    ]
    self.workdir = workdir
    self.sessions = [tiny.start(workdir, *fields, *flags, f'--process={index}', *more) for index in range(2)]

  def wait_for_rows(self, count: int) -> bool:
    """Whether there were so many rows before one of the two ended."""
    return self.sessions[0].wait_until(
      lambda: self.sessions[0].rows() >= count or self.sessions[1].process.poll() is not None
    )

  def end(self, timeout: float = 240) -> list[Said]:
    """How both end."""
    return [session.end(timeout=timeout) for session in self.sessions]


def training(session: Session) -> list[psutil.Process]:
  """The supervising process and its child, which trains."""
  parent = psutil.Process(session.process.pid)
  return [parent, *parent.children()]


def trial(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """A pair that loses a process LOST times, goes on each time, and ends as one that nothing disturbed."""
  workdir, tried, failure = folder / 'run', 0, ''
  while tried < LOST and not failure:
    victim = rng.randrange(2)
    how = pick(rng, {'kill': 5, 'kill its child': 2, 'stop': 2, 'signal': 2})
    pair = Pair(tiny, workdir)
    rows = len(logged(workdir)) + rng.randrange(4)
    met = rng.random() < 0.3 or pair.wait_for_rows(min(rows, STEPS - 2))
    time.sleep(rng.random() * (0.1 if rows else 6))
    if not met or any(session.process.poll() is not None for session in pair.sessions):
      failure = next(filter(None, map(unfit, pair.end())), '')
      break
    tried += 1
    failure = disturb(pair, victim, how)
  failure = failure or finish(tiny, workdir)
  return tried, [failure] if failure else []


def disturb(pair: Pair, victim: int, how: str) -> str:
  """Does it to one process; '' where the other one ends as it may, in time."""
  session, other = pair.sessions[victim], pair.sessions[1 - victim]
  if how == 'signal':
    session.process.send_signal(signal.SIGTERM)
  elif how == 'kill its child':
    training(session)[-1].kill()
  elif how == 'kill':
    session.process.kill()
  else:
    for process in training(session):
      process.suspend()
  began = time.monotonic()
  said = other.end(timeout=WITHIN)
  session.kill_all() if how == 'stop' else None
  first = session.end(timeout=WITHIN)
  if said.code == 124 or first.code == 124:
    return f'hang: {how} of process {victim}: {time.monotonic() - began:.0f} s: {said.err[-300:]}'
  if how == 'signal':
    codes = said.code, first.code
    early = -signal.SIGTERM in codes or 1 in codes  # before they had joined
    return (
      ''
      if early or set(codes) in ({130}, {0})
      else f'unfit end: codes {codes} after SIGTERM: {said.err[-300:]}'
    )
  if said.code == 0:  # it had done its last update
    return ''
  return unfit(said)


def finish(tiny: Tiny, workdir: Path) -> str:
  """'' where the pair ends as a pair that nothing disturbed."""
  for said in Pair(tiny, workdir).end():
    if failure := unfit(said) or (said.code and f'unfit end: {said.err[-300:]}'):
      return failure
  whole = tiny.folder / 'undisturbed-pair'
  if not whole.exists():
    Pair(tiny, whole).end()
  if [row['step'] for row in logged(workdir)] != list(range(STEPS + 1)):
    return f'silent loss: rows of steps {[row["step"] for row in logged(workdir)]}'
  if logged(workdir) != logged(whole) or status(workdir)['final'] != status(whole)['final']:
    return 'wrong number: the pair that went on and the undisturbed one differ'
  return ''


def missing(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Process 0 or 1 waits for one that never comes, or that dies before it joins."""
  here, timeout = rng.randrange(2), rng.choice((4, 8))
  began = time.monotonic()
  pair = Pair(tiny, folder / 'run', f'--join-timeout={timeout}')
  there = pair.sessions[1 - here]
  time.sleep(0 if rng.random() < 0.5 else rng.random() * 2)
  there.kill_all()
  said = pair.sessions[here].end(timeout=timeout + 60)
  there.end()
  failure = unfit(said)
  if not failure and said.code == 0:
    failure = 'unfit end: a process trains without its peer'
  if time.monotonic() - began > timeout + 60:
    failure = f'hang: {time.monotonic() - began:.0f} s for a peer that is missing'
  return 1, [f'{failure} (process {here})'] if failure else []
