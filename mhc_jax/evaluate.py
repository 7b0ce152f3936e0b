"""Validation loss of a run's last checkpoint and a sample of its text; reads the workdir, writes nothing.

mhc evaluate runs/laptop
mhc evaluate runs/laptop --prompt 'def main' --bytes 400 --temperature 0.7
"""

import argparse
import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax import settings
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.command import end_with_message
from mhc_jax.constraints.base import Constraint
from mhc_jax.data import (
  Corpus,
  Tokenizer,
  Windows,
  bytes_per_token,
  corpus_of,
  validation_batches,
  windows,
)
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.model import Transformer
from mhc_jax.model_config import ModelConfig
from mhc_jax.paths import expand
from mhc_jax.plan import rebuild_model
from mhc_jax.sharding import local_rows, make_mesh, put_batch
from mhc_jax.train_step import Batch, evaluate_sums
from mhc_jax.workdir import read_config


def validation_loss(
  evaluate: Callable, params: Any, batches: list[Batch], bytes_per_token: float
) -> dict[str, float]:
  """Nats per predicted token and bits per byte over the batches, each token weighing the same."""
  return mean_loss(jax.device_get([evaluate(params, batch) for batch in batches]), bytes_per_token)


def mean_loss(sums: list[tuple[Any, Any]], bytes_per_token: float) -> dict[str, float]:
  """The same, of evaluate_sums of each batch."""
  total, count = (math.fsum(float(pair[i]) for pair in sums) for i in (0, 1))
  return {
    'validation/loss': total / count,
    'validation/bits_per_byte': total / count / math.log(2) / bytes_per_token,
  }


def validation_arrays(resolved: dict[str, Any], validation: Windows, mesh: Mesh) -> list[Batch]:
  """The validation batches of a resolved configuration, on the devices: the same for every run."""
  c = resolved['evaluation']
  count = c['sequences'] // c['batch_size']
  rows = local_rows(c['batch_size'], mesh)
  batches = validation_batches(validation, c['batch_size'], count, rows)
  return [put_batch(batch, mesh) for batch in batches]


def validation_bytes_per_token(resolved: dict[str, Any], validation: Windows, corpus: Corpus) -> float:
  """Bytes of text that a scored target of the validation batches stands for, on average."""
  c = resolved['evaluation']
  return bytes_per_token(validation, corpus.byte_lengths, c['batch_size'], c['sequences'] // c['batch_size'])


def load(workdir: str, constraint: Constraint | None = None) -> tuple[dict[str, Any], ModelConfig, int, Any]:
  """(config.json, model, step, parameters) of the newest undamaged checkpoint.

  constraint: the caller's own that the run was trained with. Raises ConfigError where workdir holds no run or
  no checkpoint, or was trained with another constraint.
  """
  return restore(workdir, constraint)[:4]


def restore(
  workdir: str, constraint: Constraint | None = None, device: jax.Device | None = None
) -> tuple[dict[str, Any], ModelConfig, int, Any, dict[str, Any]]:
  """What `load` returns, and the loop's small numbers (recorder.Position) at that step.

  device: where the parameters go, by default the first one.
  """
  resolved = read_config(workdir)
  if resolved is None:
    raise ConfigError(f'{workdir} holds no run (no config.json)')
  settings.check_precision(resolved['model']['dtype'])
  try:
    model = rebuild_model(resolved, constraint)
  except ConfigError:
    raise
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise ConfigError(f'{workdir}/config.json is not the configuration of a run: {error!r}') from None
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = functools.partial(Transformer(model).init, jax.random.key(0), tokens, tokens)
  wanted = {'params': jax.eval_shape(init)['params']}
  if device is not None:
    here = jax.sharding.SingleDeviceSharding(device)
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), wanted)
  with Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    newest = checkpoints.restore_latest(wanted, only_part=True)
  if newest is None:
    raise ConfigError(f'{workdir} has no checkpoint yet')
  step, state, extra = newest
  return resolved, model, step, state['params'], extra


def validation(resolved: dict[str, Any], model: ModelConfig, params: Any, corpus: Corpus) -> dict[str, float]:
  """The loss over the validation batches that training used, in nats per token and bits per byte."""
  data = resolved['data']
  split = windows(corpus.validation, corpus.tokenizer.bos, data['seq_len'], data['cross_documents'])
  batches = validation_arrays(resolved, split, make_mesh({}))
  evaluate = jax.jit(functools.partial(evaluate_sums, model=model))
  return validation_loss(evaluate, params, batches, validation_bytes_per_token(resolved, split, corpus))


def sample(
  model: ModelConfig,
  params: Any,
  tokenizer: Tokenizer,
  prompt: str,
  length: int,
  window: int,
  temperature: float,
  seed: int,
) -> str:
  """prompt continued by `length` tokens; the model sees the last `window` tokens. Temperature 0 is greedy.

  Says after 10 seconds, and then every 30, how long the rest will take.
  """

  @jax.jit
  def next_token(params: Any, tokens_1T: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
    logits_1TV, _ = Transformer(model).apply({'params': params}, tokens_1T, jnp.zeros_like(tokens_1T))
    logits_V = logits_1TV[0, last, : tokenizer.vocab_size].at[tokenizer.bos].set(-jnp.inf)
    greedy = jnp.argmax(logits_V)
    drawn = jax.random.categorical(key, logits_V / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, greedy)

  tokens = [tokenizer.bos, *(int(token) for token in tokenizer.encode(prompt))]
  began = time.monotonic()
  said = began - 20
  for index in range(length):
    if index and (now := time.monotonic()) > said + 30:
      said = now
      left_s = (now - began) / index * (length - index)
      say(f'sample: {index:,} of {length:,} tokens, about {left_s:,.0f} s left')
    seen = tokens[-window:]
    padded = jnp.asarray([seen + [0] * (window - len(seen))], jnp.int32)
    key = jax.random.fold_in(jax.random.key(seed), index)
    tokens.append(int(next_token(params, padded, jnp.int32(len(seen) - 1), key)))
  return tokenizer.decode(tokens[1:])


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='mhc evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('workdir', help='folder of a run')
  parser.add_argument('--prompt', default='import ', help='start of the sample')
  parser.add_argument('--bytes', type=int, default=200, help='length of the sample (default 200)')
  parser.add_argument('--temperature', type=float, default=0.8, help='0 is greedy (default 0.8)')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args(argv)
  bounds = {'bytes': (0, 2**31 - 1), 'temperature': (0, 1e6), 'seed': (0, 2**31 - 1)}
  for name, (low, high) in bounds.items():
    value = getattr(args, name)
    require(low <= value <= high, f'--{name} {value}: must lie between {low} and {high:.10g}')
  args.workdir = expand(args.workdir)
  resolved, model, step, params = load(args.workdir)
  data = resolved['data']
  corpus = corpus_of(data)
  if data['digest'] and corpus.digest != data['digest']:  # weights from elsewhere saw nothing here
    raise ConfigError(f'{args.workdir} was trained on another version of {corpus.name} than is here')
  losses = validation(resolved, model, params, corpus)
  print(f'step {step}: ' + ', '.join(f'{name} {value:.4f}' for name, value in losses.items()))
  tokenizer = corpus.tokenizer
  split = windows(corpus.validation, tokenizer.bos, data['seq_len'], data['cross_documents'])
  length = round(args.bytes / validation_bytes_per_token(resolved, split, corpus))
  print(sample(model, params, tokenizer, args.prompt, length, data['seq_len'], args.temperature, args.seed))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
