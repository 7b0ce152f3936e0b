"""Speed as ratios measured in one run, printed as JSON.

  python -m experiments.bench step                 # train_step of each arm over residual
  python -m experiments.bench step --width 128 --repeats 9
  python -m experiments.bench constraints          # each constraint over 20 Sinkhorn iterations
  python -m experiments.bench scaling              # communication and memory on 1 to 8 fake devices
  python -m experiments.bench memory               # memory of each recomputation, from the compiler

Repeats are interleaved: A B C A B C ..., so that a machine whose speed drifts does not favour an arm.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import bench_scaling
from experiments.workers import ONE_THREAD
from mhc_jax import config as config_lib
from mhc_jax import optimizer as optim
from mhc_jax.config import ConfigError, base_config
from mhc_jax.data import VOCAB_SIZE
from mhc_jax.diagnostics import with_spectra
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

ARMS = ('residual', 'hc', 'mhc', 'identity')


def interleaved(
  functions: dict[Any, Callable[[], object]], repeats: int, calls: int
) -> dict[Any, list[float]]:
  """Seconds per call of each function: `repeats` rounds of `calls` calls each, after one round unmeasured."""
  seconds: dict[Any, list[float]] = {name: [] for name in functions}
  for round_ in range(repeats + 1):
    for name, function in functions.items():
      began = time.perf_counter()
      for _ in range(calls):
        result = function()
      jax.block_until_ready(result)
      if round_:
        seconds[name].append((time.perf_counter() - began) / calls)
  return seconds


def summary(values: list[float] | np.ndarray) -> dict[str, float]:
  """Median and spread of the repeats."""
  return {'median': float(np.median(values)), 'min': float(min(values)), 'max': float(max(values))}


def arm_functions(arm: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
  """Closures of one arm on a batch of random tokens: its train_step, its diagnostics of one sequence."""
  c = base_config()
  c.model.connection.name, c.model.connection.streams = arm, args.streams
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, max(1, args.width // 16)
  c.model.dtype, c.optimizer.warmup_fraction = args.dtype, 0.05
  c.transfer.base_width, c.transfer.base_depth = 32, 2
  model, optimizer = config_lib.build_model(c, VOCAB_SIZE), config_lib.build_optimizer(c)
  mesh = make_mesh({})
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

  sequence = {name: value[:1] for name, value in batch.items()}

  def diagnostics() -> object:
    return with_spectra(jax.device_get(found.diagnose(state.params, sequence)))  # as the training loop does

  return {'step': run, 'diagnostics': diagnostics}


def bench_step(args: argparse.Namespace) -> dict[str, object]:
  """Seconds of the train_step of every arm, its ratio to residual's, and the share of diagnostics."""
  functions = {(arm, what): f for arm in ARMS for what, f in arm_functions(arm, args).items()}
  seconds = {key: np.asarray(v) for key, v in interleaved(functions, args.repeats, args.calls).items()}
  base, every = seconds['residual', 'step'], args.diagnostics_every
  arms = {
    arm: {
      'seconds': summary(seconds[arm, 'step']),
      'ratio_to_residual': summary(seconds[arm, 'step'] / base),
      'diagnostics_percent': summary(100 * seconds[arm, 'diagnostics'] / (every * seconds[arm, 'step'])),
    }
    for arm in ARMS
  }
  names = ('width', 'depth', 'batch', 'seq_len', 'streams', 'dtype', 'diagnostics_every', 'repeats', 'calls')
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
  parser.add_argument('what', choices=('step', 'constraints', 'scaling', 'memory'))
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--depth', type=int, help='layers (default 4; of the memory bench, 24)')
  parser.add_argument('--batch', type=int, default=16, help='sequences')
  parser.add_argument('--seq-len', type=int, default=128)
  parser.add_argument('--streams', type=int, default=4)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--diagnostics-every', type=int, default=10, help='steps (default 10)')
  parser.add_argument('--tokens', type=int, default=16384, help='of the constraints bench')
  parser.add_argument('--repeats', type=int, default=7, help='rounds (default 7)')
  parser.add_argument('--calls', type=int, default=4, help='steps in a round (default 4)')
  args = parser.parse_args(argv)
  if args.repeats < 1 or args.calls < 1:
    raise ConfigError('--repeats and --calls must be at least 1')
  args.depth = args.depth or (24 if args.what == 'memory' else 4)
  # As in a sweep's workers; XLA reads it when the first computation starts.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  if args.what == 'constraints':
    from experiments.bench_constraints import bench_constraints  # which imports this file

    result = bench_constraints(args)
  elif args.what == 'scaling':
    bench_scaling.fake_devices(max(bench_scaling.DEVICES))
    result = bench_scaling.bench_scaling(args)
  elif args.what == 'memory':
    result = bench_scaling.bench_memory(args)
  else:
    result = bench_step(args)
  print(json.dumps(result, indent=1))
  return 0


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
