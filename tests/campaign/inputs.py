"""Overrides and command lines that nobody should write: each is taken, or refused in one line, and soon."""

import contextlib
import functools
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from analysis import fit, plots, report
from experiments import sweep
from mhc_jax import environment, evaluate, train
from mhc_jax.config import SCHEDULES, base_config
from mhc_jax.config_file import parse
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.manifold_updates import MANIFOLDS
from mhc_jax.plan import rebuild_model, resolve, run_id
from mhc_jax.presets import PRESETS
from tests.campaign import reports
from tests.campaign.tiny import SMOKE, Tiny, command, unfit

OVERRIDES = 100  # of one trial
SOON = 20  # seconds that a refusal may take
NUMBERS = '0 1 -1 2 3 7 8 0.5 1.5 -0.0 1e-30 1e308 -1e308 1e309 nan -inf 1j 0x10 3000000000 1000000000000'
TEXTS = '[] [1,2] {} () "a" True False None x ~ * [ ü (a+)+$ $\\frac{1$ __import__("os")'
ODD = (
  *NUMBERS.split(),
  *TEXTS.split(),
  '',
  ' ',
  '\udcff',
  '\x00',
  'a\nb',
  '{"a": 1}',
  '-9223372036854775809',
)
ODD = (*ODD, '9' * 30, '9' * 5000, '-9223372036854775809', '[' * 3000, '(' * 300 + ')' * 300)
NAMES = {
  'name': tuple(PRESETS),
  'preset': tuple(name for presets in PRESETS.values() for name in presets),
  'constraint': tuple(CONSTRAINTS),
  'schedule': SCHEDULES,
  'manifold': tuple(MANIFOLDS),
  'dtype': ('float32', 'bfloat16', 'float64'),
  'remat': ('none', 'layer', 'block'),
  'scope': ('joint', 'per_stream'),
  'norm_scope': ('joint', 'per_stream'),
  'generator': ('matrix', 'cp'),
  'activation': ('none', 'tanh'),
  'read_gate': ('sigmoid', 'softmax', 'tanh', 'linear', 'fixed', 'elementwise'),
  'write_gate': ('sigmoid', 'softmax', 'tanh', 'linear', 'fixed', 'one_hot'),
  'expansion': ('replicate', 'one_hot', 'learned'),
  'collapse': ('mean', 'sum', 'learned', 'weights', 'read'),
  'router': ('sigmoid', 'sinkhorn'),
  'manifold_pattern': ('layers/(attention|feed_forward)/.*/w', '.*', 'layers/.*'),
}
PARAMS = ('iterations', 'count', 'eps', 'factors', 'tau', 'steps', 'nobody')  # of constraints, and of none


@functools.cache
def fields() -> tuple[tuple[str, type | None], ...]:
  """(dotted name, type) of every field of the configuration."""

  def below(node: ConfigDict, path: str) -> Iterator[tuple[str, type | None]]:
    for key in node:
      if isinstance(node.get(key), ConfigDict):
        yield from below(node[key], f'{path}{key}.')
      else:
        yield f'{path}{key}', node.get_type(key)

  params = ((f'model.connection.constraint_params.{name}', None) for name in PARAMS)
  return (*below(base_config(), ''), *params)


def plausible(rng: random.Random, name: str, kind: type | None) -> str:
  """A value that may fit the field."""
  choices: tuple[Any, ...] = NAMES.get(name.rpartition('.')[2], ())
  if kind is int or kind is None:
    choices = choices or (1, 2, 3, 4, 6, 8, 16)
  elif kind is float:
    choices = (0, 1e-6, 1e-3, 0.1, 0.5, 1, 2, 8)
  elif kind is bool:
    choices = (True, False)
  return str(rng.choice(choices or ('None',)))


def override(rng: random.Random) -> str:
  """One `section.field=value`; the value is odd or plausible."""
  name, kind = rng.choice(fields())
  value = rng.choice(ODD) if rng.random() < 0.8 else plausible(rng, name, kind)
  if rng.random() < 0.02:
    name = rng.choice((f'{name}.x', name[:-1], name.upper(), f'.{name}', '', 'model', 'a.b.c'))
  return f'{name}={value}'


def overrides(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """OVERRIDES of them, mostly one at a time, parsed and resolved."""
  failures, tried = [], 0
  while tried < OVERRIDES:
    some = [override(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    tried += len(some)
    began = time.monotonic()
    failure = unfit(command(resolved, *some))
    if time.monotonic() - began > SOON:
      failure = failure or f'hang: {time.monotonic() - began:.0f} s'
    if failure:
      failures.append(f'{failure} {shown(some)}')
  return tried, failures


def resolved(some: list[str]) -> int:
  """Resolves the smoke configuration with overrides; what is written and read again is the same run."""
  run = resolve(parse(SMOKE, [f'--config.{one}' for one in some]), 'digest')
  again = json.loads(json.dumps(run.resolved, allow_nan=False))
  if run_id(again) != run.run_id or rebuild_model(again) != run.model:
    raise RuntimeError('config.json is another run')
  return 0


def shown(some: list[str]) -> str:
  """The overrides as a text of bounded length."""
  return repr([one[:80] for one in some])


def runs(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """A configuration of several plausible fields that is not refused at once trains two updates."""
  names = [(name, kind) for name, kind in fields() if name.startswith(('model.', 'optimizer.', 'transfer.'))]
  for _ in range(200):
    some = [f'{name}={plausible(rng, name, kind)}' for name, kind in rng.sample(names, rng.choice((2, 3, 5)))]
    said = command(lambda given: train.resolve(tiny.config(*given), '') and 0, *some)
    if said.code == 0 and 'Traceback' not in said.err:
      break
  fixed = 'duration.steps=2', 'log.diagnostics_every_steps=2', 'evaluation.every_steps=2'
  said = tiny.train(folder / 'run', *some, *fixed)
  jax.clear_caches()
  failure = unfit(said)
  if not failure and said.code:
    failure = '' if 'float64' in said.err else f'unfit end: refused late: {said.err.strip()[-200:]}'
  return 1, [f'{failure} {shown(some)}'] if failure else []


def lines(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]]:
  """Ten command lines in this process."""
  failures = []
  for index in range(10):
    place = folder / str(index)
    place.mkdir()
    name, main, arguments = line(tiny, place, rng)
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
      patch.setenv('HOME', str(place))
      began = time.monotonic()
      failure = unfit(command(main, *arguments))
    if time.monotonic() - began > 3 * SOON:
      failure = failure or f'hang: {time.monotonic() - began:.0f} s'
    if failure:
      failures.append(f'{failure} {name} {[argument[-90:] for argument in arguments]}')
  return 10, failures


def line(tiny: Tiny, place: Path, rng: random.Random) -> tuple[str, Callable[[list[str]], int], list[str]]:
  """(command, its main, arguments): a line that would work, with odd things in it."""
  (place / 'file').write_text('x')
  (place / 'loop').symlink_to('loop')
  (place / 'gone').symlink_to('nowhere')
  (place / 'points.csv').write_text(rng.choice((*POINTS[:1] * 9, *POINTS[1:])))
  synthetic, _ = reports.sweep(tiny.folder / 'synthetic')
  sweep.EXPERIMENTS['campaign'] = lambda argument: [tiny.config('duration.steps=1')]
  workdir, plan = str(tiny.undisturbed), ['campaign', '--out', str(place), '--dry-run']
  name, main, arguments, flags = rng.choice(
    (
      ('train', train.main, tiny.arguments(place / 'run', 'duration.steps=2'), TRAIN),
      ('evaluate', evaluate.main, [workdir, '--bytes', '1'], EVALUATE),
      ('sweep', sweep.main, plan, SWEEP),
      ('report', report.main, [str(synthetic), '--resamples', '2'], REPORT),
      ('plots', plots.main, ['paper', str(synthetic), '--out', str(place / 'plots')], PLOTS),
      ('fit', fit.main, [str(place / 'points.csv'), '--resamples', '2'], FIT),
      ('fit', fit.main, [str(place / 'points.csv'), '--isoflop', '--resamples', '2'], FIT),
      ('env', environment.main, [], {'--help': ()}),
    )
  )
  for _ in range(rng.choice((1, 1, 2))):
    change, flag = rng.random(), rng.choice(list(flags))
    if change < 0.8:
      values = flags[flag] if rng.random() < 0.85 else (*PLACES, *ODD)[:60]
      value = [rng.choice(values)] if values else []
      arguments += [f'{flag}={value[0]}'] if value and flag.startswith('--config.') else [flag, *value]
    elif change < 0.9 and arguments:
      arguments[rng.randrange(len(arguments))] = rng.choice(PLACES)
    elif arguments:
      del arguments[rng.randrange(len(arguments))]
  return name, main, [argument.replace('\x00', '?') for argument in arguments]


# None names a device or a file of the system: a command that writes there would replace it.
PLACES = (
  'file',
  'file/x',
  'loop',
  'gone',
  'gone/x',
  'x' * 300,
  '/proc/x',
  '~nobody/x',
  '~/x',
  'ftp://x',
  '.',
  '',
)
PLACES = (*PLACES, 's3:/', 'a/b/c', 'ü', '\udcff', 'a\nb', '-x')
GLOBS = (*PLACES, '**', '/proc/self/fd/*', 'file*')
SOURCES = (*(f'text_files:{place}' for place in GLOBS), '', 'nobody/x:1')
SOME = ('0', '1', '-1', '2', '7', '0.5', 'nan', 'x', '')  # of what costs as much as is asked for
REFERENCES = ('mhc', 'residual', 'nobody', '', 'ü')
TRAIN = {
  '--config': (*PLACES, 'laptop:x', 'paper:', 'base_config'),
  '--workdir': PLACES,
  '--continue-diverged': (),
}
TRAIN |= {'--config.data.name': SOURCES, '--config.data.dir': PLACES, '--config.arm': tuple(TEXTS.split())}
TRAIN |= {'--coordinator': PLACES, '--processes': SOME, '--join-timeout': tuple(NUMBERS.split())}
TRAIN |= {
  '--config.topology': (*PLACES, 'v5p:4x4x4', 'v5p:0x1'),
  '--config.model.dtype': ('float64', 'int8', ''),
}
EVALUATE = {
  '--prompt': ODD,
  '--bytes': SOME,
  '--temperature': tuple(NUMBERS.split()),
  '--seed': tuple(NUMBERS.split()),
}
SWEEP = {
  '--only': REFERENCES,
  '--out': PLACES,
}
SWEEP |= {'--workers': SOME, '--retry-failed': (), '--continue-diverged': (), '--no-wait': ()}
REPORT = {'--resamples': SOME, '--params': ('total', 'matmul', 'x'), '--reference': REFERENCES}
PLOTS = {'--out': PLACES, '--reference': REFERENCES, '--params': ('total', 'non_embedding', 'x')}
FIT = {'--resamples': SOME, '--out': (*PLACES, '-'), '--figure': (*PLACES, 'a.png', 'a.pdf', 'a.xyz')}
FIT |= dict.fromkeys(('--delta', '--level', '--drop-highest', '--seed'), tuple(NUMBERS.split()))
FIT |= {
  '--law': ('chinchilla', 'additive', 'x', ''),
  '--pin': ('E=1.69', 'E=nan', 'E=-1', 'x=1', 'E', 'alpha=0'),
}
FIT |= {
  '--tie': ('alpha=beta', 'alpha=alpha', 'x=y', 'E=alpha'),
  '--columns': ('N=D', 'N=N,D=D,loss=loss', 'x'),
}
GRID = [(n, d, 1.5 + 400 / n**0.34 + 410 / d**0.28) for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9)]
POINTS = (
  '\n'.join(['N,D,loss', *(f'{n},{d},{loss}' for n, d, loss in GRID)]),
  'N,D,loss\n1,2,3\n',
  'N,D,loss\n' + 'x,y,z\n' * 9,
  'N,D,loss\n' + '1e308,1e308,1e308\n-1,0,nan\n' * 5,
  '',
  '\x00\xff',
  'N,D,loss\n"1,2\n',
)
