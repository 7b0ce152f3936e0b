"""The study: what constrained hyper-connections buy over compute. Its plan: docs/study_plan.md.

  mhc sweep study:cpu --workers 2   # two cores, 3 to 5 hours; study:gpu: one GPU, 25 minutes
  mhc report runs/study-cpu

study:SCALE trains all arms at all sizes. Its parts are sweeps of their own: SCALE-rates (a grid of rates at
one size, on seeds that nothing else uses), SCALE-transfer (half and twice the chosen rate at a larger size),
SCALE-small (study:SCALE without its largest size, for the prediction of that), SCALE-muon-rates,
SCALE-muon-transfer, SCALE-muon and SCALE-ranks. After a sweep of rates

  python -m experiments.study runs/study-cpu-rates

chooses each arm's rate and writes it into study_rates.json, from which all the others take theirs.
"""

import argparse
import functools
import itertools
import json
import pathlib
import sys
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError, require
from mhc_jax.plan import resolve
from mhc_jax.run_folder import load_plan
from mhc_jax.workdir import read_config, read_status

from . import protocol

ARMS: dict[str, dict[str, Any]] = {
  'residual': {'name': 'residual'},
  'identity': {'name': 'identity'},
  'mhc': {'name': 'mhc'},
  'mhc exact': {'name': 'mhc', 'constraint': 'birkhoff_dual'},
  'hc': {'name': 'hc'},
  'attention_residual': {'name': 'attention_residual'},
  'gated_residual': {'name': 'gated_residual'},
}
# Sizes are (width, depth), smallest first; heads have 16 numbers (pod: 64). Tokens per parameter are of
# matmul parameters, which connections have no part in: arms of one size see equal tokens. tuned, checked:
# where rates are chosen, and tried again.
SCALES: dict[str, dict[str, Any]] = {
  'cpu': {
    'protocol': 'small',
    'sizes': ((16, 2), (32, 2), (48, 3), (64, 4), (80, 4)),
    'data': {'batch_size': 8, 'seq_len': 128},
    'evaluation': {'sequences': 1024},
    'tuned': (32, 2),
    'checked': (48, 3),
    'muon': ((32, 2), (48, 3)),
    'more_tokens': ((16, 2), (32, 2)),
  },
  'gpu': {
    'protocol': 'small',
    'sizes': ((32, 2), (32, 4), (48, 4), (64, 6), (112, 6)),
    'data': {'batch_size': 32, 'seq_len': 128},
    'evaluation': {'sequences': 2048, 'batch_size': 256},
    'tuned': (48, 4),
    'checked': (64, 6),
    'muon': ((48, 4), (64, 6)),
    'more_tokens': ((32, 2), (32, 4)),
  },
  'pod': {
    'protocol': 'large',
    'sizes': ((256, 4), (512, 8), (768, 12), (1024, 16), (1280, 20)),
    'data': {'batch_size': 256, 'seq_len': 1024},
    'evaluation': {'sequences': 2048},
    'tuned': (512, 8),
    'checked': (768, 12),
    'muon': ((512, 8), (768, 12)),
    'more_tokens': ((256, 4), (512, 8)),
  },
}
TOKENS_PER_PARAM, MORE_TOKENS_PER_PARAM = 20.0, 80.0
SEEDS, LARGEST_SEEDS, RATE_SEEDS = (0, 1, 2), (0, 1), (100, 101)
GRIDS = {'adamw': (4e-3, 8e-3, 1.6e-2, 3.2e-2), 'muon': (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)}
STREAMS, GENERATOR_RANKS = (1, 2, 8), (1, 4)  # of mhc, besides 4 and full
WEIGHT_RANKS = (8, 4, 2)  # parts of the width
EVALUATIONS, ROWS = 5, 100  # of a run
RATES = pathlib.Path(__file__).with_name('study_rates.json')


def runs(arg: str | None = None) -> list[ConfigDict]:
  """The runs of a part.

  Argument: a key of SCALES, or one with -rates, -transfer, -small, -muon-rates, -muon-transfer, -muon
  or -ranks; cpu-rates, with which all begins, where there is none.
  """
  scale, _, part = (arg or 'cpu-rates').partition('-')
  if scale not in SCALES:
    raise ValueError(f'the argument must begin with one of {", ".join(SCALES)}, got {arg!r}')
  sizes, optimizer = SCALES[scale], 'muon' if part.startswith('muon') else 'adamw'
  match part:
    case 'rates' | 'muon-rates':
      grid = itertools.product(ARMS, GRIDS[optimizer], RATE_SEEDS)
      return [config(scale, arm, sizes['tuned'], seed, lr, optimizer) for arm, lr, seed in grid]
    case 'transfer' | 'muon-transfer':
      factors = itertools.product(ARMS, (0.5, 1.0, 2.0))
      tried = [(arm, k * rate(scale, arm, optimizer)) for arm, k in factors]
      return [config(scale, arm, sizes['checked'], RATE_SEEDS[0], lr, optimizer) for arm, lr in tried]
    case 'muon':
      grid = itertools.product(sizes['muon'], ARMS, SEEDS)
      return [config(scale, arm, size, s, rate(scale, arm, optimizer), optimizer) for size, arm, s in grid]
    case 'ranks':
      return _ranks(scale)
    case '' | 'small':
      return _scaling(scale, sizes['sizes'][: -1 if part else None])
  raise ValueError(f'{scale} has no part {part!r}')


def _scaling(scale: str, sizes: tuple[tuple[int, int], ...]) -> list[ConfigDict]:
  planned = []
  for size in sizes:
    seeds = LARGEST_SEEDS if size == SCALES[scale]['sizes'][-1] else SEEDS
    ratios = (TOKENS_PER_PARAM, MORE_TOKENS_PER_PARAM)[: 1 + (size in SCALES[scale]['more_tokens'])]
    for ratio, arm, seed in itertools.product(ratios, ARMS, seeds):
      planned.append(config(scale, arm, size, seed, rate(scale, arm), ratio=ratio))
  return planned


def _ranks(scale: str) -> list[ConfigDict]:
  """mhc at one size: ranks of the generator and of the depth matrix (streams), and of the weights."""
  size, lr, planned = SCALES[scale]['tuned'], rate(scale, 'mhc'), []
  for seed in SEEDS:
    planned.append(config(scale, 'mhc', size, seed, lr))
    for field, values in (('streams', STREAMS), ('rank', GENERATOR_RANKS)):
      for value in values:
        c = config(scale, 'mhc', size, seed, lr)
        c.model.connection[field] = value
        planned.append(c)
    steps = steps_of(scale, size, TOKENS_PER_PARAM)  # those of full rank, which has more parameters
    for part, factor in itertools.product(WEIGHT_RANKS, (1.0, 2.0)):
      c = config(scale, 'mhc', size, seed, factor * lr)
      c.model.weights.rank = size[0] // part
      c.duration.update({'tokens_per_param': None, 'steps': steps})
      planned.append(c)
  return planned


def config(
  scale: str,
  arm: str,
  size: tuple[int, int],
  seed: int,
  lr: float,
  optimizer: str = 'adamw',
  ratio: float = TOKENS_PER_PARAM,
) -> ConfigDict:
  """One run of `arm` at a size (width, depth) for `ratio` tokens per parameter."""
  c = _sized(scale, size, ratio)
  c.arm, c.seed = arm, seed
  c.model.connection.update(ARMS[arm])
  c.optimizer.lr = lr
  if optimizer != 'adamw':
    c.optimizer.name = optimizer
  steps = steps_of(scale, size, ratio)
  c.evaluation.every_steps = -(-steps // EVALUATIONS)
  c.log.every_steps = -(-steps // ROWS)
  return c


def _sized(scale: str, size: tuple[int, int], ratio: float) -> ConfigDict:
  sizes = SCALES[scale]
  head = 64 if sizes['protocol'] == 'large' else 16
  c = protocol.config(sizes['protocol'], 'residual', {'name': 'residual'}, 0)
  c.data.update(sizes['data'])
  c.model.update({'width': size[0], 'depth': size[1], 'heads': size[0] // head})
  c.duration.update({'steps': None, 'tokens_per_param': ratio})
  c.evaluation.update(sizes['evaluation'])
  c.log.update({'diagnostics_every_steps': None, 'tensorboard': False})
  c.checkpoint.update({'every_steps': 1000, 'keep': 1})
  return c


@functools.cache
def steps_of(scale: str, size: tuple[int, int], ratio: float) -> int:
  """Updates of a run, the same for every arm."""
  return resolve(_sized(scale, size, ratio), '').num_steps


def rate(scale: str, arm: str, optimizer: str = 'adamw') -> float:
  """The arm's rate as its sweep of rates chose it; the pod's are the GPU's."""
  chosen = json.loads(RATES.read_text()) if RATES.is_file() else {}
  name = f'{"gpu" if scale == "pod" else scale}{"-muon" if optimizer == "muon" else ""}'
  if arm not in chosen.get(name, {}):
    raise ValueError(f'no rates are chosen: first mhc sweep study:{name}-rates, then {_choosing(name)}')
  return chosen[name][arm]


def _choosing(name: str) -> str:
  return f'python -m experiments.study runs/study-{name}-rates'


def choose(folder: str) -> dict[str, float]:
  """Each arm's rate of the lowest mean loss over its seeds, none of which diverged, in a sweep of rates."""
  losses: dict[str, dict[float, list[float]]] = {}
  for run_id, arm in load_plan(folder)[1].items():
    config, status = read_config(f'{folder}/{run_id}'), read_status(f'{folder}/{run_id}')
    state = status['state']
    require(state in ('finished', 'diverged'), f'{folder}/{run_id} is {state}: finish the sweep first')
    loss = status['final']['validation/loss'] if state == 'finished' else np.inf
    losses.setdefault(arm, {}).setdefault(config['optimizer']['lr'], []).append(loss)
  means = {arm: {lr: float(np.mean(v)) for lr, v in by_rate.items()} for arm, by_rate in losses.items()}
  for arm, by_rate in means.items():
    if not np.isfinite(min(by_rate.values())):
      raise ConfigError(f'{folder}: {arm} diverged at every rate')
  return {arm: min(by_rate, key=by_rate.get) for arm, by_rate in means.items()}


def largest(scale: str) -> str:
  """The arms at the scale's largest size as CSV, for analysis/prediction.py."""
  width, depth = SCALES[scale]['sizes'][-1]
  lines = ['arm,size,width,depth,params_matmul,tokens,flops']
  for arm in ARMS:
    derived = resolve(config(scale, arm, (width, depth), 0, 1.0), '').derived
    numbers = derived['params']['matmul'], derived['tokens'], derived['flops']
    lines.append(f'{arm},{width}x{depth},{width},{depth},' + ','.join(map(str, numbers)))
  return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
  """Writes the chosen rates of finished sweeps of rates into study_rates.json."""
  parser = argparse.ArgumentParser('python -m experiments.study', description=main.__doc__)
  parser.add_argument('folders', nargs='*', help='as runs/study-cpu-rates')
  parser.add_argument('--largest', choices=sorted(SCALES), help='print the largest size, for a prediction')
  a = parser.parse_args(argv)
  require(bool(a.folders) != bool(a.largest), 'name folders of sweeps of rates, or --largest SCALE')
  if a.largest:
    print(largest(a.largest))
  for folder in a.folders:
    name = (load_plan(folder)[0] or '').partition(':')[2] or 'cpu-rates'
    require(
      name.endswith('-rates'), f'{folder} is no sweep of rates: choose from study:cpu-rates or the like'
    )
    name = name.removesuffix('-rates')
    chosen = json.loads(RATES.read_text()) if RATES.is_file() else {}
    chosen[name] = choose(folder)
    RATES.write_text(json.dumps(chosen, indent=2) + '\n')
    print(name, chosen[name])
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
