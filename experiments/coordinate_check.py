"""Coordinate check of the transfer rules: what training changes keeps its size over width and depth.

  python -m experiments.coordinate_check           # a few minutes; runs/coordinate_check/coordinates.csv
  python -m experiments.coordinate_check --arms residual mhc --lr 0.05 --out runs/check
  mhc plots coordinates runs/coordinate_check

Every arm makes a few updates at a large learning rate on one batch of random tokens, at four widths and
four depths, with the rules of CompleteP (arXiv 2505.01618) and without. The coordinates: the mean absolute
change of the logits since initialisation, and the root mean square of the streams after the last layer's two
sublayers. For low_rank, a residual model with maps W = U V of rank width / 4, also the change of W: its
largest singular value times sqrt(fan-in / fan-out), the mean over maps.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from mhc_jax import optimizer as optim
from mhc_jax.command import end_with_message
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.layers.unembedding import loss_sums
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.paths import user_path
from mhc_jax.train_step import init_state

VOCAB, B, T = 32, 4, 8
UPDATES = 4
BASE = (16, 2)  # width, depth
SIZES = {'width': (BASE, (32, 2), (64, 2), (128, 2)), 'depth': (BASE, (16, 4), (16, 8), (16, 16))}
ARMS = ('residual', 'hc', 'mhc', 'identity', 'low_rank')
NAMES = ('change of the logits', 'streams after attention', 'streams after feed-forward')
CHANGE = 'change of the maps'  # of low_rank alone
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, T + 1)).astype(np.int32)


def _loss_and_sizes(params: Any, model: Any) -> tuple[jax.Array, tuple[jax.Array, list[jax.Array]]]:
  inputs = (TOKENS[:, :-1], np.zeros((B, T), np.int32))
  logits_BTV, records = Transformer(model).apply({'params': params}, *inputs, record=B)
  total, count = loss_sums(logits_BTV, TOKENS[:, 1:], jnp.ones((B, T)))
  squares = [jnp.einsum('nnbt->nbt', record['gram_NMBT'][-1]) / model.width for record in records]
  return total / count, (logits_BTV, [jnp.sqrt(square).mean() for square in squares])


@functools.cache
def coordinates(
  arm: str, size: tuple[int, int], base: tuple[int, int], lr: float, optimizer_name: str = 'adamw'
) -> dict[str, np.ndarray]:
  """Each coordinate after 0 .. UPDATES updates at (width, depth) `size`, with rules relative to `base`.

  Two streams, to compile sooner. base = size turns the rules off.
  """
  c = base_config()
  c.model.update({'width': size[0], 'depth': size[1], 'heads': size[0] // 8})
  c.model.connection.update({'name': 'residual' if arm == 'low_rank' else arm, 'streams': 2})
  c.model.weights.rank = size[0] // 4 if arm == 'low_rank' else None
  c.transfer.base_width, c.transfer.base_depth = base
  c.optimizer.warmup_steps, c.optimizer.name = 0, optimizer_name
  model, optimizer = dataclasses.replace(build_model(c), vocab_size=VOCAB), build_optimizer(c)

  def update(carry, _):
    params, opt_state = carry
    (_, sizes), grads = jax.value_and_grad(_loss_and_sizes, has_aux=True)(params, model)
    transform = optim.transform(optimizer, model, jnp.float32(lr), jnp.float32(0))
    updates, opt_state = transform.update(grads, opt_state, params)
    return (jax.tree.map(jnp.add, params, updates), opt_state), (*sizes, _factors(params))

  @jax.jit
  def run(key):
    state = init_state(key, model, optimizer)
    return jax.lax.scan(update, (state.params, state.opt_state), length=UPDATES + 1)[1]

  logits, streams, factors = run(jax.random.key(0))
  change = jnp.abs(logits - logits[:1]).mean(axis=(1, 2, 3))
  found = dict(zip(NAMES, map(np.asarray, (change, *streams)), strict=True))
  return found | ({CHANGE: _natural_change(factors)} if factors else {})


def _factors(params: Any) -> list[tuple[jax.Array, jax.Array]]:
  """U (L, in, R) and V (L, R, *out) of every map of the scanned layers that has factors."""
  maps = [p for sublayer in params['layers'].values() for p in sublayer.values() if isinstance(p, dict)]
  return [(p['u'], p['v']) for p in maps if 'u' in p]


def _natural_change(factors: list[tuple[jax.Array, jax.Array]]) -> np.ndarray:
  """How far W = U V has moved, from rms to rms: the mean over maps, of factors (updates, L, ...)."""
  norms = []
  for u, v in factors:
    w = np.einsum('klir,klro->klio', u, v.reshape(*v.shape[:3], -1))
    largest = np.linalg.norm(w - w[:1], 2, axis=(2, 3)).mean(1)
    norms.append(largest * (w.shape[2] / w.shape[3]) ** 0.5)
  return np.mean(norms, 0)


def table(arms: list[str], lr: float, progress: bool = False, optimizer_name: str = 'adamw') -> pd.DataFrame:
  """One row per arm, axis, size, rules on or off, update and coordinate."""
  cells = [
    (arm, axis, size, transfer)
    for arm, (axis, sizes), transfer in itertools.product(arms, SIZES.items(), (True, False))
    for size in sizes
  ]
  rows = []
  for arm, axis, size, transfer in tqdm(cells, desc='coordinate check', disable=not progress):
    measured = coordinates(arm, size, BASE if transfer else size, lr, optimizer_name)
    where = {'arm': arm, 'axis': axis, 'width': size[0], 'depth': size[1], 'transfer': transfer, 'lr': lr}
    rows += [
      where | {'update': k, 'coordinate': name, 'value': float(value)}
      for name, values in measured.items()
      for k, value in enumerate(values)
    ]
  return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
  """Command line: writes coordinates.csv and says where."""
  parser = argparse.ArgumentParser(
    'python -m experiments.coordinate_check',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--arms', nargs='+', choices=ARMS, default=ARMS)
  parser.add_argument('--lr', type=float, default=1.6e-2, help='of the base size (default 0.016)')
  parser.add_argument('--optimizer', choices=('adamw', 'muon'), default='adamw')
  parser.add_argument('--out', type=user_path, default=Path('runs/coordinate_check'))
  a = parser.parse_args(argv)
  rows = table(list(a.arms), a.lr, progress=True, optimizer_name=a.optimizer)
  a.out.mkdir(parents=True, exist_ok=True)
  rows.to_csv(a.out / 'coordinates.csv', index=False)
  print(f'wrote {a.out / "coordinates.csv"}: {len(rows)} rows')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
