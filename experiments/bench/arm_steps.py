"""The functions that `mhc bench step` times, and a process that times them for `--against`.

Run as a file, it serves the package that PYTHONPATH names: it may use only what an older commit has too.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.diagnostics import diagnose
from mhc_jax.model_config import build_model
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

ARMS = ('residual', 'hc', 'mhc', 'identity')
STEPS = 100  # of the learning rate's schedule, and of the losses that are compared


def arm_functions(arm: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
  """functions_of one arm at the sizes of the arguments."""
  c = base_config()
  c.model.connection.name, c.model.connection.streams = arm, args.streams
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, max(1, args.width // 16)
  c.model.dtype, c.optimizer.warmup_fraction = args.dtype, 0.05
  c.transfer.base_width, c.transfer.base_depth = 32, 2
  c.data.batch_size, c.data.seq_len = args.batch, args.seq_len
  return functions_of(c)


def functions_of(c: ConfigDict) -> dict[str, Callable[[], object]]:
  """Closures of a model on a batch of random tokens: its train_step, its diagnostics of one sequence."""
  model, optimizer = build_model(c), build_optimizer(c)
  of_arm = programs(model, optimizer, make_mesh({}))
  shape = c.data.batch_size, c.data.seq_len
  tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocab_size - 1)
  weights, segments = jnp.ones(tokens.shape), jnp.zeros(tokens.shape, jnp.int32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': weights, 'segments': segments}
  warmup = optim.warmup_steps(optimizer, STEPS)
  hparams = {'lr': 1e-3, 'weight_decay': 0.1, 'num_steps': STEPS, 'warmup': warmup}
  hparams = {name: jnp.float32(value) for name, value in hparams.items()}
  state = of_arm.init(jax.random.key(0))

  def run() -> object:
    nonlocal state
    state, metrics = of_arm.step(state, batch, hparams)
    return metrics

  def diagnostics() -> object:
    records = of_arm.record(state.params, {name: value[:1] for name, value in batch.items()})[1]
    return diagnose(jax.device_get(records), model)  # as the training loop does

  return {'step': run, 'diagnostics': diagnostics}


def answers(requests: Iterator[str], settings: dict[str, object]) -> Iterator[dict[str, object]]:
  """For each request {arm, calls}: the seconds and CPU-seconds of so many updates, and their losses."""
  step_of = functools.cache(lambda arm: arm_functions(arm, argparse.Namespace(**settings))['step'])
  with contextlib.suppress(ImportError):  # an older commit
    from mhc_jax import runtime

    runtime.keep_memory()
  for line in requests:
    request = json.loads(line)
    step = step_of(request['arm'])
    began, began_cpu = time.perf_counter(), time.process_time()
    losses = jax.block_until_ready([step()['loss'] for _ in range(request['calls'])])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    yield {'seconds': seconds, 'cpu_seconds': cpu_seconds, 'losses': [float(loss) for loss in losses]}


if __name__ == '__main__':
  for answer in answers(sys.stdin, json.loads(sys.argv[1])):
    print(json.dumps(answer), flush=True)
