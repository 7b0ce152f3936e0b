"""One file of a run folder or of a prepared corpus is damaged; then every reader is asked again.

It must end with the right numbers, or in one line that begins with error:, or warn and name the file.
"""

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from experiments import sweep
from mhc_jax import evaluate, train
from mhc_jax.data import load_corpus
from tests.campaign import damage
from tests.campaign.tiny import Said, Tiny, command, files_below, logged, status, unfit

TRIED = 10  # damages of one trial


def trials_of(one: Callable[[Tiny, Path, random.Random], tuple[str, str]]):
  """A trial of TRIED damages from a function that does one and returns (what was damaged, failure)."""

  def trial(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
    failures = []
    for index in range(TRIED):
      what, failure = one(tiny, folder / str(index), rng)
      if failure:
        failures.append(f'{failure} [{what}]')
    return TRIED, failures

  return trial


def hurt(folder: Path, rng: random.Random, files: list[Path] | None = None) -> tuple[Path, str]:
  """Damages a random file below folder: (the file, what was done to it)."""
  path = rng.choice(files or list(files_below(folder)))
  kinds = damage.kinds(path)
  kind = rng.choice(list(kinds))
  kinds[kind](path, rng)
  return path, f'{path.relative_to(folder)} {kind}'


def names(said: Said, path: Path) -> bool:
  """Whether a line that warns or refuses names the file, or the checkpoint that it belongs to."""
  words = {path.name, *re.findall(r'checkpoints/(\d+)', str(path))}
  lines = [line for line in said.err.splitlines() if re.match(r'(warning|error): ', line)]
  return any(word in line for line in lines for word in words)


def train_again(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """A run folder, interrupted or finished: the same command again."""
  source = rng.choice((tiny.interrupted, tiny.interrupted, tiny.undisturbed))
  workdir = damage.copy(source, folder)
  # Half of the files belong to checkpoints, whose own trial is below.
  files = [path for path in files_below(workdir) if path.name != '.lock']
  chosen = [path for path in files if 'checkpoints' not in path.parts and 'tensorboard' not in path.parts]
  path, what = hurt(workdir, rng, files if rng.random() < 0.3 else chosen)
  said = tiny.train(workdir)
  failure = unfit(said)
  if not (failure or said.code):
    final = status(tiny.undisturbed)['final']
    if ', '.join(f'{name} {value:.4f}' for name, value in final.items()) not in said.out:
      failure = f'wrong number: {said.out.strip()}'
    # Of an ended run it only says how it ended. Rows that are lost stay so, with a word.
    elif source == tiny.interrupted and not names(said, path):
      failure = tiny.difference(workdir)
  return f'train, {source.name}: {what}', failure


def checkpoints(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """The newest of two checkpoints, or both, read as evaluate and training do."""
  workdir = damage.copy(tiny.interrupted, folder)
  steps = ('14',) if rng.random() < 0.8 else ('12', '14')
  done = [hurt(workdir / 'checkpoints' / step, rng)[1] for step in steps]
  said, found = _restored(tiny, workdir)
  failure = unfit(said)
  if not failure and found is not None:
    step, state = found
    whole = damage.copy(tiny.interrupted, folder.with_name(f'{folder.name}-whole'))
    if step == 12:
      os.rename(whole / 'checkpoints' / '14', whole / '14')
    _, expected = tiny.newest(whole)
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), state, expected)
    if not jax.tree.all(same):
      failure = f'wrong number: arrays of step {step}'
    elif step == 12 and 'checkpoint of step 14' not in said.err:
      failure = 'silent loss: step 14 is passed over without a word'
  return f'checkpoints: {", ".join(done)}', failure


def _restored(tiny: Tiny, workdir: Path):
  found = []
  said = command(lambda _: found.append(tiny.newest(workdir)) or 0)
  return said, found[0] if found else None


def corpus(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """A prepared corpus; half of the time its tokens are to be made again from TFDS's files."""
  name = f'text_files:{tiny.text}'
  expected = load_corpus(name, str(tiny.data))
  data = damage.copy(tiny.data, folder)
  _, what = hurt(data, rng, [path for path in files_below(data) if path.suffix != '.lock'])
  if rng.random() < 0.3:
    for facts in data.rglob('corpus.json'):
      os.remove(facts) if facts.is_file() or facts.is_symlink() else None
    what += ', corpus.json removed'
  loaded = []
  said = command(lambda _: loaded.append(load_corpus(name, str(data))) or 0)
  failure = unfit(said)
  if not failure and loaded:
    one = loaded[0]
    same = np.array_equal(one.train, expected.train) and np.array_equal(one.validation, expected.validation)
    if not same:
      failure = f'wrong number: tokens, digest {one.digest == expected.digest}'
    elif one.digest != expected.digest:
      failure = 'wrong number: digest'
  return f'corpus: {what}', failure


def evaluated(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """A finished run, evaluated."""
  workdir = damage.copy(tiny.undisturbed, folder)
  files = [path for path in files_below(workdir) if path.name != '.lock' and 'tensorboard' not in path.parts]
  _, what = hurt(workdir, rng, files)
  said = command(evaluate.main, workdir, '--bytes', '1')
  loss = status(tiny.undisturbed)['final']['validation/loss']
  failure = unfit(said)
  if not failure and said.code == 0 and f'validation/loss {loss:.4f}' not in said.out:
    failure = f'wrong number: {said.out.splitlines()[0]}, not {loss:.4f}'
  return f'evaluate: {what}', failure


def swept(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """A sweep of two runs, one finished and one interrupted: the plan, then the sweep itself."""
  configs = [tiny.config(), tiny.config('seed=1')]
  sweep.EXPERIMENTS['campaign'] = lambda argument: configs
  whole, half = tiny.folder / 'sweep', tiny.folder / 'half-sweep'
  run_ids = [run.run_id for run in sweep.plan('campaign')[1]]
  if not half.exists():
    command(sweep.main, 'campaign', '--out', whole)
    damage.copy(whole, half)
    shutil.rmtree(half / 'campaign' / run_ids[1])
    workdir = half / 'campaign' / run_ids[1]
    train.run(configs[1], str(workdir), quiet=True, stops_at=lambda step: step == 14)
  out = damage.copy(half, folder)
  files = [path for path in files_below(out) if path.suffix in ('.json', '.jsonl')]
  path, what = hurt(out, rng, files)
  failure = unfit(command(sweep.main, 'campaign', '--out', out, '--dry-run'))
  if not failure:
    said = command(sweep.main, 'campaign', '--out', out)
    failure = unfit(said)
    for run_id in run_ids if said.code == 0 else ():
      place, other = (folder / 'campaign' / run_id for folder in (out, whole))
      of_ended = run_id == run_ids[0] and path.suffix == '.jsonl'  # a sweep does not read these
      if not (failure or of_ended or names(said, path)) and logged(place) != logged(other):
        failure = f'silent loss: {len(logged(place))} rows of {run_id}, or others'
      if not failure and status(place).get('final') != status(other)['final']:
        failure = f'wrong number: final losses of {run_id}'
  return f'sweep: {what}', failure
