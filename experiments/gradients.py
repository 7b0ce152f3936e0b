"""Where do the gradients of rotations grow? Gradients and streams by sublayer over a run's first updates.

  python -m experiments.gradients --out docs/results/rotations/gradients.csv     # minutes of one core
  python -m experiments.gradients --updates 20 --lr 0.064

The arms of rotations.py at their largest depth, updated as `mhc train` does, on the same batches. Before each
update, its loss, and for each sublayer:

gradient: norm of the gradient of the sublayer's own maps. rms: root mean square of the streams after it.
mean: norm of the streams' mean over the root mean square of their norms, averaged over tokens: 1 for copies
of one stream, 1 / sqrt(n) for orthogonal ones, 0 where they cancel. mean_least: of the token with the
smallest.
"""

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from mhc_jax.command import end_with_message
from mhc_jax.data import corpus_of, windows
from mhc_jax.data.batches import train_batches
from mhc_jax.diagnostics import interleave
from mhc_jax.errors import require
from mhc_jax.log import say
from mhc_jax.model_config import ModelConfig
from mhc_jax.paths import user_path
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import Batch, hparams_of, programs, sums_and_records

from . import rotations

SUBLAYERS = ('attention', 'feed_forward')


@functools.partial(jax.jit, static_argnames='model')
def gradients_and_grams(params: Any, batch: Batch, model: ModelConfig) -> tuple[jax.Array, Any, list[Any]]:
  """Loss, squares of the gradient's norm by sublayer and layer, (L,) each, Gram matrices of the streams."""

  def loss(params: Any) -> tuple[jax.Array, list[Any]]:
    (total, count), records = sums_and_records(params, batch, model, record=len(batch['inputs']))
    return total / count, [{'gram_NMBT': record['gram_NMBT']} for record in records]

  (value, records), grads = jax.value_and_grad(loss, has_aux=True)(params)
  squares = [
    sum(jnp.square(leaf).reshape(model.depth, -1).sum(1) for leaf in jax.tree.leaves(grads['layers'][name]))
    for name in SUBLAYERS
  ]
  return value, squares, records


def by_sublayer(params: Any, batch: Batch, model: ModelConfig) -> pd.DataFrame:
  """A row for each sublayer, from the first: what the columns say at the top."""
  loss, squares, records = gradients_and_grams(params, batch, model)
  gram_SNMBT = interleave(records, 'gram_NMBT').astype(float)
  n = gram_SNMBT.shape[1]
  square_SBT = np.einsum('snnbt->sbt', gram_SNMBT) / n
  mean_SBT = np.sqrt(np.maximum(gram_SNMBT.sum((1, 2)), 0) / n**2 / square_SBT)
  return pd.DataFrame(
    {
      'loss': float(loss),
      'sublayer': np.arange(len(gram_SNMBT)),
      'gradient': np.sqrt(np.stack([np.asarray(of_layers, float) for of_layers in squares], 1).reshape(-1)),
      'rms': np.sqrt(square_SBT.mean((1, 2)) / model.width),
      'mean': mean_SBT.mean((1, 2)),
      'mean_least': mean_SBT.min((1, 2)),
    }
  )


def follow(config: ConfigDict, updates: int) -> pd.DataFrame:
  """by_sublayer before each of a run's first updates, and after the last of them."""
  corpus = corpus_of(config.data)
  plan, mesh = resolve(config, corpus.digest), make_mesh({})
  data, compiled = plan.resolved['data'], programs(plan.model, plan.optimizer, mesh)
  source = windows(corpus.train, corpus.tokenizer.bos, data['seq_len'], data['cross_documents'])
  batches = train_batches(
    source, batch_size=data['batch_size'], seed=config.seed, repeat=False, num_steps=updates + 1
  )
  state, found = compiled.init(jax.random.key(config.seed)), []
  hparams = hparams_of(plan.optimizer, plan.num_steps)
  for update, batch in enumerate(batches):
    found.append(by_sublayer(state.params, batch, plan.model).assign(update=update))
    state, _ = compiled.step(state, batch, hparams)
  return pd.concat(found)


def main(argv: list[str] | None = None) -> int:
  """Writes the CSV; prints the largest gradient of each arm by update."""
  parser = argparse.ArgumentParser(
    'python -m experiments.gradients',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--updates', type=int, default=10, help='to follow (default 10; a run has 40)')
  parser.add_argument('--lr', type=float, default=rotations.RATES[-1], choices=rotations.RATES)
  parser.add_argument('--out', type=user_path, default=Path('runs/gradients.csv'))
  a = parser.parse_args(argv)
  require(a.updates >= 0, f'--updates {a.updates}: must be 0 or more')
  found = []
  for config in rotations.runs():
    if (config.model.depth, config.optimizer.lr) == (max(rotations.DEPTHS), a.lr):
      say(f'{config.arm}, seed {config.seed}')
      same = {'arm': config.arm, 'depth': config.model.depth, 'lr': a.lr, 'seed': config.seed}
      found.append(follow(config, a.updates).assign(**same))
  table = pd.concat(found)
  a.out.parent.mkdir(parents=True, exist_ok=True)
  columns = [
    'arm',
    'depth',
    'lr',
    'seed',
    'update',
    'loss',
    'sublayer',
    'gradient',
    'rms',
    'mean',
    'mean_least',
  ]
  table[columns].to_csv(a.out, index=False, float_format='%.4g')
  print(
    table.groupby(['arm', 'update'], sort=False)['gradient'].max().unstack().to_string(float_format='%.3g')
  )
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
