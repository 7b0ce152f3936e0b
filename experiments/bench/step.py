"""`mhc bench step`: seconds of the train_step of every arm over residual's, and the share of diagnostics."""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.diagnostics import with_spectra
from mhc_jax.model_config import build_model
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

from .timing import interleaved, summary

ARMS = ('residual', 'hc', 'mhc', 'identity')


def arm_functions(arm: str, args: argparse.Namespace) -> dict[str, Callable[[], object]]:
  """Closures of one arm on a batch of random tokens: its train_step, its diagnostics of one sequence."""
  c = base_config()
  c.model.connection.name, c.model.connection.streams = arm, args.streams
  c.model.width, c.model.depth, c.model.heads = args.width, args.depth, max(1, args.width // 16)
  c.model.dtype, c.optimizer.warmup_fraction = args.dtype, 0.05
  c.transfer.base_width, c.transfer.base_depth = 32, 2
  model, optimizer = build_model(c), build_optimizer(c)
  of_arm = programs(model, optimizer, make_mesh({}))
  tokens = jax.random.randint(jax.random.key(0), (args.batch, args.seq_len), 0, model.vocab_size - 1)
  weights, segments = jnp.ones(tokens.shape), jnp.zeros(tokens.shape, jnp.int32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': weights, 'segments': segments}
  warmup = optim.warmup_steps(optimizer, 100)
  hparams = {'lr': 1e-3, 'weight_decay': 0.1, 'num_steps': 100, 'warmup': warmup}
  hparams = {name: jnp.float32(value) for name, value in hparams.items()}
  state = of_arm.init(jax.random.key(0))

  def run() -> object:
    nonlocal state
    state, metrics = of_arm.step(state, batch, hparams)
    return metrics

  sequence = {name: value[:1] for name, value in batch.items()}

  def diagnostics() -> object:
    return with_spectra(jax.device_get(of_arm.diagnose(state.params, sequence)))  # as the training loop does

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
