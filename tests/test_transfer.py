"""CompleteP (arXiv 2505.01618): activations and what training changes in them keep their size.

The coordinate check: after a few updates at a large learning rate, root mean squares of the streams and
of the change of the logits, against width and depth, at one set of hyper-parameters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import train_step as ts
from mhc_jax.config import base_config, build_model, build_optimizer
from mhc_jax.model import Transformer

VOCAB, UPDATES = 17, 4
WIDTHS, DEPTHS = (16, 32, 64), (2, 4, 8)
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 17)).astype(np.int32)
BATCH = {
  'inputs': TOKENS[:, :-1],
  'targets': TOKENS[:, 1:],
  'weights': np.ones((4, 16), np.float32),
  'segments': np.zeros((4, 16), np.int32),
}


@functools.cache
def coordinates(arm: str, width: int, depth: int, transfer: bool) -> dict[str, float]:
  """Root mean squares after UPDATES updates: streams after the last sublayer, change of the logits."""
  c = base_config()
  c.model.connection.name = arm
  c.model.update({'width': width, 'depth': depth, 'heads': width // 8})
  c.optimizer.update({'warmup_steps': 0, 'schedule': 'constant', 'weight_decay': 0.0})
  if transfer:
    c.transfer.base_width, c.transfer.base_depth = WIDTHS[0], DEPTHS[0]
  model, optimizer = build_model(c, VOCAB), build_optimizer(c)
  hparams = {'lr': 2e-2, 'weight_decay': 0.0, 'num_steps': 100, 'warmup': 0}

  def forward(params):
    logits, records = Transformer(model).apply(
      {'params': params}, BATCH['inputs'], BATCH['segments'], record=True
    )
    return logits, jnp.einsum('lnnbt->', records[1]['gram_NMBT'][-1:]) / width

  @jax.jit
  def measure(key):
    def look_and_step(state, _):
      return ts.train_step(state, BATCH, hparams, model, optimizer)[0], forward(state.params)

    state = ts.init_state(key, model, optimizer)
    _, (logits, squares) = jax.lax.scan(look_and_step, state, length=UPDATES + 1)
    streams = jnp.sqrt(squares[-1] / (model.connection.streams * TOKENS[:, 1:].size))
    return {'streams': streams, 'logits': jnp.sqrt(jnp.mean((logits[-1] - logits[0]) ** 2))}

  found = [measure(jax.random.key(seed)) for seed in range(3)]
  return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
  """d log value / d log size."""
  return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


@pytest.mark.parametrize('arm', ['residual', 'mhc'])
def test_coordinate_check_over_width_and_depth(arm):
  """|slopes| < 0.2: the sizes at hand are small, where sqrt(1 / width) terms have not died out."""
  for name in ('streams', 'logits'):
    over_width = [coordinates(arm, width, DEPTHS[0], True)[name] for width in WIDTHS]
    over_depth = [coordinates(arm, WIDTHS[0], depth, True)[name] for depth in DEPTHS]
    assert abs(slope(WIDTHS, over_width)) < 0.2, (name, 'width', over_width)
    assert abs(slope(DEPTHS, over_depth)) < 0.2, (name, 'depth', over_depth)


def test_without_transfer_the_check_fails():
  """Standard parametrisation: the logits' change grows with width, the streams with depth."""
  over_width = [coordinates('residual', width, DEPTHS[0], False)['logits'] for width in WIDTHS]
  over_depth = [coordinates('residual', WIDTHS[0], depth, False)['streams'] for depth in DEPTHS]
  assert slope(WIDTHS, over_width) > 0.3, over_width
  assert slope(DEPTHS, over_depth) > 0.3, over_depth
