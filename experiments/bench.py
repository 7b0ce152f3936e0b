"""Speed as ratios measured in one run, printed as JSON.

  python -m experiments.bench step                 # train_step of each arm over residual
  python -m experiments.bench step --width 128 --repeats 9
  python -m experiments.bench constraints          # each constraint over 20 Sinkhorn iterations

Repeats are interleaved: A B C A B C ..., so that a machine whose speed drifts does not favour an arm.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from mhc_jax import config as config_lib
from mhc_jax import optimizer as optim
from mhc_jax.config import ConfigError, base_config
from mhc_jax.data import VOCAB_SIZE
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

ARMS = ('residual', 'hc', 'mhc', 'identity')


def interleaved(
  functions: dict[str, Callable[[], object]], repeats: int, calls: int
) -> dict[str, list[float]]:
  """Seconds per call of each function: `repeats` rounds of `calls` calls each, after one round unmeasured."""
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for round_ in range(repeats + 1):
    for name, function in functions.items():
      began = time.perf_counter()
      for _ in range(calls):
        result = function()
      jax.block_until_ready(result)
      if round_:
        seconds[name].append((time.perf_counter() - began) / calls)
  return seconds


def summary(values: list[float]) -> dict[str, float]:
  """Median and spread of the repeats."""
  return {'median': float(np.median(values)), 'min': min(values), 'max': max(values)}


def step_function(arm: str, args: argparse.Namespace) -> Callable[[], object]:
  """A closure that runs one train_step of the arm on one fixed batch of random tokens."""
  c = base_config()
  c.model.connection.name, c.model.connection.streams = arm, args.streams
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, max(1, args.width // 16)
  c.model.dtype, c.optimizer.warmup_fraction = args.dtype, 0.05
  c.transfer.base_width, c.transfer.base_depth = 32, 2
  model, optimizer = config_lib.build_model(c, VOCAB_SIZE), config_lib.build_optimizer(c)
  mesh = make_mesh(1, 1)
  found = programs(model, optimizer, mesh)
  tokens = jax.random.randint(jax.random.key(0), (args.batch, args.seq_len), 0, VOCAB_SIZE - 1)
  batch = {
    'inputs': tokens,
    'targets': tokens,
    'weights': np.ones(tokens.shape, np.float32),
    'segments': np.zeros(tokens.shape, np.int32),
  }
  batch = {name: jax.device_put(value) for name, value in batch.items()}
  warmup = optim.warmup_steps(optimizer, 100)
  hparams = {'lr': 1e-3, 'weight_decay': 0.1, 'num_steps': 100, 'warmup': warmup}
  hparams = {name: jax.device_put(np.asarray(value, np.float32)) for name, value in hparams.items()}
  state = found.init(jax.random.key(0))

  def run() -> object:
    nonlocal state
    state, metrics = found.step(state, batch, hparams)
    return metrics

  return run


def bench_step(args: argparse.Namespace) -> dict[str, object]:
  """Seconds of the train_step of every arm, and its ratio to residual's in the same round."""
  seconds = interleaved({arm: step_function(arm, args) for arm in ARMS}, args.repeats, args.calls)
  base = np.asarray(seconds['residual'])
  arms = {
    arm: {
      'seconds': summary(values),
      'ratio_to_residual': summary(list(np.asarray(values) / base)),
    }
    for arm, values in seconds.items()
  }
  names = ('width', 'depth', 'batch', 'seq_len', 'streams', 'dtype', 'repeats', 'calls')
  return {
    'settings': {name: getattr(args, name) for name in names},
    'device': jax.devices()[0].device_kind,
    'arms': arms,
  }


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('what', choices=('step', 'constraints'))
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--depth', type=int, default=4)
  parser.add_argument('--batch', type=int, default=16, help='sequences')
  parser.add_argument('--seq-len', type=int, default=128)
  parser.add_argument('--streams', type=int, default=4)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--tokens', type=int, default=16384, help='of the constraints bench')
  parser.add_argument('--repeats', type=int, default=7, help='rounds (default 7)')
  parser.add_argument('--calls', type=int, default=4, help='steps in a round (default 4)')
  args = parser.parse_args(argv)
  if args.repeats < 1 or args.calls < 1:
    raise ConfigError('--repeats and --calls must be at least 1')
  if args.what == 'constraints':
    from experiments.bench_constraints import bench_constraints  # which imports this file

    result = bench_constraints(args)
  else:
    result = bench_step(args)
  print(json.dumps(result, indent=1))
  return 0


if __name__ == '__main__':
  from mhc_jax.train import end_with_message

  sys.exit(end_with_message(main))
