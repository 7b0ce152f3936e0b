"""Readers beside a training that saves after every update and keeps one checkpoint: no false alarm."""

import json
import random
from pathlib import Path

from analysis.runs import read_sweep
from experiments import sweep
from mhc_jax import evaluate, train
from tests.campaign.tiny import Said, Tiny, command, unfit

UPDATES = 120


def trial(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Reads by evaluate, by the report, by a sweep's plan and by a second training, until the writer ends."""
  writer = ('checkpoint.every_steps=1', f'checkpoint.keep={rng.choice((1, 2))}', f'duration.steps={UPDATES}')
  writer = (*writer, 'data.repeat=True')
  config = tiny.config(*writer)
  sweep.EXPERIMENTS['campaign'] = lambda _: [config]
  _, [run] = sweep.plan('campaign')
  workdir = folder / 'campaign' / run.run_id
  plan = {'sweep': 'campaign', 'runs': [{'run_id': run.run_id, 'arm': 'residual'}]}
  (folder / 'campaign').mkdir()
  (folder / 'campaign' / 'plan.json').write_text(json.dumps(plan))
  session = tiny.start(workdir, *(f'--config.{field}' for field in writer))
  if not session.wait_until(lambda: session.rows() > 1):
    return 1, [f'unfit end: {session.end().err[-300:]}']
  reads, failures = 0, []
  while session.process.poll() is None and not failures:
    name = rng.choice(('evaluate', 'evaluate', 'evaluate', 'report', 'sweep', 'train'))
    said = read(name, tiny, folder, workdir, writer)
    failure = unfit(said)
    lines = [line for line in said.err.splitlines() if 'warning' in line or 'damaged' in line]
    refusal = {'train': 'in use by another process', 'evaluate': 'no checkpoint yet'}.get(name, '\0')
    if lines or (said.code and refusal not in said.err):
      failure = failure or f'false alarm: {said.err[-300:]}'
    reads += 1
    failures += [f'{failure} ({name})'] * bool(failure)
  said = session.end()
  failures += [failure for failure in (unfit(said),) if failure]
  return reads, failures


def read(name: str, tiny: Tiny, folder: Path, workdir: Path, fields: tuple[str, ...]) -> Said:
  """One read of that kind, as a command."""
  if name == 'evaluate':
    return command(lambda _: evaluate.load(str(workdir)) and 0)
  if name == 'report':
    return command(lambda _: trouble(folder / 'campaign'))
  if name == 'sweep':
    return command(sweep.main, 'campaign', '--dry-run', '--out', folder)
  return command(train.main, *tiny.arguments(workdir, *fields))


def trouble(folder: Path) -> int:
  """Raises where the report would find a fault."""
  sweep = read_sweep(folder)
  if sweep.warnings:
    raise RuntimeError(f'false alarm: {sweep.warnings}')
  return 0
