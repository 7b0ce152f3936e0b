"""A run killed and stopped again and again, from its start to its last cleanup, and ended by its command."""

import random
import signal
import time
from pathlib import Path

from tests.campaign.tiny import STEPS, Said, Session, Tiny, pick, status, unfit

KILLS = 4  # of one trial
SIGNALS = {
  (signal.SIGKILL,): 18,
  (signal.SIGTERM,): 1,
  (signal.SIGINT,): 1,
  (signal.SIGHUP,): 1,
  (signal.SIGUSR1,): 1,
  (signal.SIGTERM, signal.SIGKILL): 1,
  (signal.SIGINT, signal.SIGINT): 1,
}
MOMENTS = {'time': 3, 'row': 3, 'save': 2, 'end': 2}
START = 2.0  # seconds of a process before its run begins, about


def trial(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """KILLS signals that met a running process, in one run or, where it ended before, in the next."""
  kills, runs, failure = 0, 0, ''
  while kills < KILLS and not failure:
    workdir, ended = folder / str(runs), False
    runs += 1
    while kills < KILLS and not failure and not ended:
      session = tiny.start(workdir)
      signals = pick(rng, SIGNALS)
      moment = pick(rng, MOMENTS) if kills else 'save'
      met = wait(session, moment, rng, signals != (signal.SIGKILL,))
      said = session.end(*signals) if met else session.end()
      failure = wrong_end(said, workdir, signals if met else ())
      kills, ended = kills + met, said.code == 0
    if not (failure or ended):
      said = tiny.start(workdir).end()
      failure = unfit(said) or alarm(said)
    failure = failure or tiny.difference(workdir)
  return kills, [failure] if failure else []


def wait(session: Session, moment: str, rng: random.Random, python: bool) -> bool:
  """Until that moment; False where the process ended before. python: not before it handles signals."""
  checkpoints = session.workdir / 'checkpoints'
  rows = rng.randrange(STEPS)
  met = not python or session.wait_until(lambda: is_ours(session))
  if moment == 'row':
    met = session.wait_until(lambda: session.rows() > rows)
  elif moment == 'save':
    met = session.wait_until(session.is_writing_a_checkpoint)
  elif moment == 'end':  # the last save, evaluation or cleanup
    met = session.wait_until(lambda: (checkpoints / str(STEPS)).exists() or session.rows() > STEPS)
  elif python:
    met = session.wait_until(lambda: (session.workdir / '.lock').exists())
  else:
    time.sleep(rng.random() * 2 * START)
  time.sleep(rng.random() * 0.05)
  return met and session.process.poll() is None


def is_ours(session: Session) -> bool:
  """Whether code of ours runs, which imports JAX: before, a signal meets Python alone."""
  try:
    return 'jaxlib' in Path(f'/proc/{session.process.pid}/maps').read_text()
  except OSError:
    return False


def wrong_end(said: Said, workdir: Path, signals: tuple[int, ...]) -> str:
  """'' where a process that got these signals ended as it may."""
  if 'Traceback' in said.err or said.code == 124:
    return unfit(said)
  if said.code < 0:  # killed; also by a signal before the run had begun, or by its second
    return '' if -said.code in signals else f'unfit end: killed by signal {-said.code}: {said.err[-300:]}'
  if said.code == 130:
    saved = status(workdir)
    kept = (workdir / 'checkpoints' / str(saved['step'])).is_dir() or saved['step'] == 0
    return '' if saved['state'] == 'interrupted' and kept else f'silent loss: {saved["state"]}, saved {kept}'
  return unfit(said) or alarm(said)


def alarm(said: Said) -> str:
  """'' where nothing is called damaged: a kill damages nothing."""
  lines = [line for line in said.err.splitlines() if 'warning' in line or 'damaged' in line]
  return f'false alarm: {lines[0]}' if lines else ''
