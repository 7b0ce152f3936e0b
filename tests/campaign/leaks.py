"""What one process holds after many runs, and after many updates of one run: memory, open files, threads."""

import gc
import random
import time
from pathlib import Path

import psutil

from experiments import workers
from mhc_jax import train
from tests.campaign.tiny import Tiny

GROWTH = 0.05  # of resident memory, files and threads that is allowed
RUNS, FIRST_RUNS = 200, 10
UPDATES, FIRST_UPDATES = 20_000, 1000


def held() -> dict[str, int]:
  """Resident bytes, open files and threads of this process."""
  gc.collect()
  process = psutil.Process()
  return {'bytes': process.memory_info().rss, 'files': process.num_fds(), 'threads': process.num_threads()}


def grown(before: dict[str, int], after: dict[str, int]) -> list[str]:
  """What grew by more than GROWTH."""
  return [
    f'unfit end: {name} grew from {before[name]:,} to {after[name]:,}'
    for name in before
    if after[name] > before[name] * (1 + GROWTH)
  ]


def runs(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """RUNS runs of equal shapes in one worker."""
  fields = ('duration.steps=4', 'evaluation.every_steps=4')
  configs = [tiny.config(*fields, f'seed={seed}') for seed in range(RUNS)]
  workers.run_group(configs[:FIRST_RUNS], str(folder), quiet=True)
  before = held()
  ended = workers.run_group(configs[FIRST_RUNS:], str(folder), quiet=True)
  after = held()
  bad = [state for _, state in ended if state != 'finished']
  print(before, after, flush=True)
  return RUNS, grown(before, after) + [f'unfit end: {bad}'] * bool(bad)


def updates(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """UPDATES updates of one run, with checkpoints, evaluations and rows all along."""
  fields = (
    f'duration.steps={UPDATES}',
    'data.repeat=True',
    'checkpoint.every_steps=500',
    'log.every_steps=10',
  )
  seen = {}

  def look(step: int) -> bool:
    if step in (FIRST_UPDATES, UPDATES - 1):
      seen[step] = held()
    return False

  began = time.monotonic()
  config = tiny.config(*fields, 'evaluation.every_steps=250')
  status = train.run(config, str(folder / 'run'), quiet=True, stops_at=look)
  print(seen, time.monotonic() - began, flush=True)
  bad = [] if status['state'] == 'finished' else [f'unfit end: {status["state"]}']
  return UPDATES, grown(*seen.values()) + bad
