"""Recomputation and microbatches change memory, not the model: same start, loss and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from mhc_jax.config import base_config
from mhc_jax.model import Transformer
from mhc_jax.model_config import REMAT, build_model
from mhc_jax.recompute import block_layers, scan_blocks
from mhc_jax.train_step import gradients

VOCAB, B, T, DEPTH = 11, 4, 32, 7  # 7 layers of 4 streams: blocks of 2, 2, 2 and 1


def batch():
  rng = np.random.default_rng(0)
  token_BS = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  weights_BT = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
  segments_BT = np.cumsum(rng.random((B, T)) < 0.2, 1).astype(np.int32)
  inputs_BT, targets_BT = token_BS[:, :-1].copy(), token_BS[:, 1:].copy()
  return {'inputs': inputs_BT, 'targets': targets_BT, 'weights': weights_BT, 'segments': segments_BT}


def model(remat='none'):
  c = base_config()
  c.model.update({'width': 16, 'depth': DEPTH, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1})
  c.model.remat = remat
  c.model.connection.write_gate = 'one_hot'  # by the number of the layer
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


@functools.cache
def start(remat):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(lambda key: Transformer(model(remat)).init(key, tokens, tokens)['params'])(jax.random.key(0))


@functools.cache
def compiled(remat='none', parts=None):
  program = jax.jit(functools.partial(gradients, model=model(remat), parts=parts))
  return program.lower(start('none'), batch()).compile()


def assert_equal(found, expected):
  """Loss and gradients, up to the order of float64 sums of some thousand terms."""
  assert float(found[0][0]) == pytest.approx(float(expected[0][0]), rel=1e-13)
  for path, one in jax.tree_util.tree_leaves_with_path(expected[1]):
    other = functools.reduce(lambda node, key: node[key.key], path, found[1])
    assert np.abs(one).max() > 0, path
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-11 * np.abs(one).max(), err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize('remat', REMAT[1:])
def test_recomputation_changes_neither_loss_nor_gradients(x64, remat):
  assert_equal(compiled(remat)(start('none'), batch()), compiled()(start('none'), batch()))


def test_blocks_start_as_layers_do(x64):
  assert jax.tree.structure(start('block')) == jax.tree.structure(start('none'))
  jax.tree.map(np.testing.assert_array_equal, start('block'), start('none'))


def test_blocks_return_what_a_scan_returns():
  """Outputs in order, the shorter last block included."""
  inputs = jnp.arange(7.0)

  def layer(carry, x):
    return 0.5 * carry + jnp.sin(x), {'carry': carry * x}

  for size in (1, 2, 3, 7, 9):
    found = scan_blocks(layer, jnp.float32(1), inputs, size)
    jax.tree.map(np.testing.assert_array_equal, found, jax.lax.scan(layer, jnp.float32(1), inputs))


@pytest.mark.slow
def test_recomputation_saves_memory(x64):
  """Blocks keep the products of attention and feed-forward; layers keep nothing but the streams."""
  memory = {remat: compiled(remat).memory_analysis().temp_size_in_bytes for remat in REMAT}
  assert memory['none'] > 1.1 * memory['block'] > 1.1 * 1.1 * memory['layer'], memory


def products(jaxpr):
  """How many grouped products the program has, a part as often as it is called."""
  inside = (part for equation in jaxpr.eqns for part in jaxprs_in_params(equation.params))
  own = sum(equation.primitive.name == 'ragged_dot_general' for equation in jaxpr.eqns)
  return own + sum(map(products, inside))


@pytest.mark.slow
def test_blocks_keep_the_products_of_experts(x64):
  """As often in the program as without recomputation; recomputation by layer has the forward ones twice."""
  c = base_config()
  c.model.update({'width': 16, 'depth': 3, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1})
  c.model.moe.update({'experts': 4, 'active': 2, 'ffn_width': 8})
  params, count = None, {}
  for remat in REMAT:
    c.model.remat = remat
    config = dataclasses.replace(build_model(c), vocab_size=VOCAB)
    if params is None:
      tokens = jnp.zeros((1, 2), jnp.int32)
      params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)['params']
    found = jax.make_jaxpr(functools.partial(gradients, model=config))(params, batch())
    count[remat] = products(found.jaxpr)
  assert count['block'] == count['none'] == count['layer'] - 3, count


def test_blocks_are_those_of_equation_20():
  """Facts of the paper's sizes: 4.0, 4.9 and 6.3 sublayers of 24, 36 and 60, in whole layers of two."""
  assert [block_layers(4, layers) for layers in (12, 18, 30)] == [2, 2, 3]
  assert [block_layers(4, layers) for layers in (11, 17, 29)] == [2, 2, 3]  # less the dense layer
  assert block_layers(1, 1) == block_layers(4, 2) == 1


@pytest.mark.slow
def test_microbatches_add_up_to_the_batch(x64):
  """Rows have different numbers of weighted tokens: a mean of means would differ."""
  rows = batch()['weights'].sum(1)
  assert len(set(rows)) == B
  assert_equal(compiled(parts=2)(start('none'), batch()), compiled()(start('none'), batch()))
