"""Several processes at one thing: preparations of a corpus, trainings of one run, sweeps of one folder."""

import json
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np

from mhc_jax.data import load_corpus
from tests.campaign.tiny import Session, Tiny, logged, status, unfit, write_text

PREPARE = """
import sys
from mhc_jax.command import end_with_message
from mhc_jax.data import load_corpus
print('ready', flush=True)
input()
sys.exit(end_with_message(lambda: print(load_corpus(*sys.argv[1:]).digest)))
"""
SWEEP = """
import sys
from pathlib import Path
from experiments import sweep
from mhc_jax.command import end_with_message
from tests.campaign.tiny import Tiny
if __name__ == '__main__':
  tiny = Tiny(Path(sys.argv[1]))
  sweep.EXPERIMENTS['campaign'] = lambda _: [tiny.config('duration.steps=6', f'seed={i}') for i in range(3)]
  sys.exit(end_with_message(lambda: sweep.main(['campaign', '--out', *sys.argv[2:]])))
"""


def preparations(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Two processes prepare one corpus at once, and one of them may be killed; then a third asks for it."""
  write_text(folder / 'text')
  name, data = f'text_files:{folder}/text', folder / 'data'
  whole = load_corpus(name, str(folder / 'whole'))
  command = [sys.executable, '-c', PREPARE, name, str(data)]
  sessions = [Session(command, tiny.environment, folder) for _ in range(2)]
  for session in sessions:
    session.process.stdout.readline()
  for session in sessions:
    session.process.stdin.write('go\n')
    session.process.stdin.flush()
    time.sleep(rng.random() * 0.05)
  killed = rng.random() < 0.6
  if killed:
    time.sleep(rng.random() * 0.6)
    sessions[0].process.kill()
  ends = [session.end(timeout=120) for session in sessions]
  failures = [unfit(said) for said in ends[killed:]]
  corpus = load_corpus(name, str(data))
  for said in ends[killed:]:
    failures.append('' if said.out.strip() == whole.digest else f'wrong number: {said.out!r}')
  if not (np.array_equal(corpus.train, whole.train) and corpus.digest == whole.digest):
    failures.append('wrong number: the tokens prepared in a race')
  left = [path.name for path in data.rglob('*incomplete*')] + [
    path.name for path in data.rglob('*unfinished*')
  ]
  failures.append(f'unfit end: {left} are left' if left else '')
  return 1, [failure for failure in failures if failure]


def trainings(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Two processes train one run at once, and one may be killed: the other is told so, or does it."""
  workdir = folder / 'run'
  sessions = [tiny.start(workdir) for _ in range(2)]
  kill = rng.random() < 0.5
  if kill:
    sessions[0].wait_until(lambda: sessions[0].rows() > rng.randrange(20))
    sessions[0].process.kill()
  ends = [session.end() for session in sessions]
  failures = [unfit(said) for said in ends if said.code != -signal.SIGKILL]
  refused = [said for said in ends if said.code == 2]
  if any('in use by another process' not in said.err for said in refused):
    failures.append(f'unfit end: {refused[0].err[-200:]}')
  said = tiny.start(workdir).end()
  failures += [unfit(said), tiny.difference(workdir)]
  return 1, [failure for failure in failures if failure][:1]


def sweeps(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Two sweeps into one folder, and one may be killed, with its workers or not; then the command again."""
  script = folder / 'race.py'
  script.write_text(SWEEP)
  environment = tiny.environment | {'PYTHONPATH': '.'}

  def start(*more: str) -> Session:
    command = [sys.executable, str(script), str(tiny.folder), str(folder / 'out'), *more]
    return Session(command, environment, folder)

  sessions = [start('--workers', str(rng.choice((1, 2)))) for _ in range(2)]
  if rng.random() < 0.7:
    time.sleep(1 + rng.random() * 6)
    sessions[0].kill_all() if rng.random() < 0.5 else sessions[0].process.kill()
  ends = [session.end() for session in sessions]
  failures = [unfit(said) for said in ends if said.code >= 0 and 'busy' not in said.err]
  last = start('--retry-failed').end()
  failures.append(unfit(last))
  plan = json.loads((folder / 'out' / 'campaign' / 'plan.json').read_text())['runs']
  alone = start_alone(tiny, start)
  for run in plan:
    place = folder / 'out' / 'campaign' / run['run_id']
    if status(place)['state'] != 'finished':
      failures.append(f'silent loss: {run["run_id"]} is {status(place)["state"]}: {last.err[-300:]}')
    elif logged(place) != logged(alone / run['run_id']):
      failures.append(f'wrong number: rows of {run["run_id"]}')
  return 1, [failure for failure in failures if failure][:2]


def start_alone(tiny: Tiny, start) -> Path:
  """The folder of the same sweep, undisturbed."""
  folder = tiny.folder / 'race'
  if not folder.exists():
    start('--out', str(folder)).end()
  return folder / 'campaign'
