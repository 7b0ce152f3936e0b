"""CompleteP (arXiv 2505.01618): activations and what training changes in them keep their size.

The coordinate check: a few updates at a large learning rate, at three widths and three depths. With transfer
the size of every module's output stays the same; without, the streams grow with width and with depth.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_model, build_optimizer
from mhc_jax.model import Transformer, loss_sums
from mhc_jax.train_step import init_state

VOCAB, B, T = 32, 4, 8
LR, UPDATES = 5e-2, 4
HC_LR = 1.6e-2  # hc's matrices are not bounded: at 5e-2 they leave the identity within four updates
BASE = (16, 2)  # width, depth
SIZES = {'width': (BASE, (32, 2), (64, 2)), 'depth': (BASE, (16, 4), (16, 8))}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (B, T + 1)).astype(np.int32)


def loss_and_coordinates(params, model):
  """Cross-entropy; the logits; sizes of the streams after the last attention and the last feed-forward."""
  inputs = (TOKENS[:, :-1], np.zeros((B, T), np.int32))
  logits_BTV, records = Transformer(model).apply({'params': params}, *inputs, record=True)
  total, count = loss_sums(logits_BTV, TOKENS[:, 1:], jnp.ones((B, T)))
  squares = [jnp.einsum('nnbt->nbt', record['gram_NMBT'][-1]) / model.width for record in records]
  return total / count, (logits_BTV, [jnp.sqrt(square).mean() for square in squares])


@functools.cache
def coordinates(arm, size, base, lr):
  """After UPDATES updates of one batch, transferred from `base`; two streams for mhc, to compile sooner."""
  c = base_config()
  c.model.update({'width': size[0], 'depth': size[1], 'heads': size[0] // 8})
  c.model.connection.update({'name': arm, 'streams': 2})
  c.transfer.base_width, c.transfer.base_depth = base
  c.optimizer.warmup_steps = 0
  model, optimizer = build_model(c, VOCAB), build_optimizer(c)

  def update(carry, _):
    params, opt_state = carry
    (_, found), grads = jax.value_and_grad(loss_and_coordinates, has_aux=True)(params, model)
    transform = optim.adamw(optimizer, model, jnp.float32(lr), jnp.float32(0))
    updates, opt_state = transform.update(grads, opt_state, params)
    return (jax.tree.map(jnp.add, params, updates), opt_state), found

  @jax.jit
  def run(key):
    state = init_state(key, model, optimizer)
    return jax.lax.scan(update, (state.params, state.opt_state), length=UPDATES + 1)[1]

  logits, (attention, feed_forward) = run(jax.random.key(0))
  return {
    'change of the logits': float(jnp.abs(logits[-1] - logits[0]).mean()),
    'streams after attention': float(attention[-1]),
    'streams after feed-forward': float(feed_forward[-1]),
  }


def slopes(arm, axis, sizes, bases, lr=LR):
  """d log(coordinate) / d log(width or depth) by least squares, for each coordinate."""
  found = [coordinates(arm, size, base, lr) for size, base in zip(sizes, bases, strict=True)]
  at = np.log([size[list(SIZES).index(axis)] for size in sizes])
  return {name: np.polyfit(at, np.log([f[name] for f in found]), 1)[0] for name in found[0]}


@pytest.mark.parametrize('axis', SIZES)
@pytest.mark.parametrize('arm', ('residual', 'mhc', 'identity'))
def test_coordinates_keep_their_size_with_transfer(arm, axis):
  """0 in the limit; at these sizes, where terms of 1 / sqrt(width) are left, within 0.2."""
  found = slopes(arm, axis, SIZES[axis], [BASE] * 3)
  assert max(map(abs, found.values())) < 0.2, found


@pytest.mark.parametrize('axis,limit', (('width', 0.2), ('depth', 0.4)))
def test_coordinates_of_hyper_connections_transfer_less_well_in_depth(axis, limit):
  """Updates of an unbounded H_res compound over depth.

  The slope is -0.62 if b_res and alpha_res keep lr, -0.34 at lr / m_L; the rest is phi's share of H_res.
  The logits do not see it: the final norm divides the streams' size out.
  """
  found = slopes('hc', axis, SIZES[axis], [BASE] * 3, HC_LR)
  assert max(map(abs, found.values())) < limit, found
  assert abs(found['change of the logits']) < 0.2, found


@pytest.mark.parametrize('arm,axis', (('residual', 'width'), ('residual', 'depth'), ('mhc', 'width')))
def test_streams_grow_in_proportion_without_transfer(arm, axis):
  """Every size its own base, which turns the rules off and leaves the smallest model as it is."""
  ends = (SIZES[axis][0], SIZES[axis][-1])
  found = slopes(arm, axis, ends, ends)
  assert min(found[name] for name in found if name.startswith('streams')) > 0.6, found
