"""Attention residuals: sublayers read by attention over earlier outputs, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_connection_options import disturbed, logits, sublayers
from test_model import SEGMENTS, TOKENS, initial, model

from mhc_jax import cost
from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config
from mhc_jax.errors import ConfigError
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import connection_spec

L, B, T, D = 6, 2, 3, 8
EPS = 1e-6


def by_definition(x, maps, query, weight, period, heads, normed):
  """Kimi's equations (arXiv 2603.15031), a list of sources that grows; F_i(h) = tanh(h M_i)."""

  def read(q, g, sources):
    keys = [v / jnp.sqrt(jnp.mean(v**2, -1, keepdims=True) + EPS) for v in sources]
    parts = [((q * g)[None, None] * k).reshape(B, T, heads, -1).sum(-1) for k in keys]
    weights = jnp.exp(jnp.stack(parts))
    weights = jnp.repeat(weights / weights.sum(0, keepdims=True), D // heads, -1)
    return sum(w * v for w, v in zip(weights, keys if normed else sources, strict=True))

  done, partial = [x], []
  for i in range(L):
    partial.append(
      jnp.tanh(read(query[i], weight[i], [*done, *([sum(partial)] if partial else [])]) @ maps[i])
    )
    if len(partial) == period:
      done, partial = [*done, sum(partial)], []
  return read(query[L], weight[L], [*done, *([sum(partial)] if partial else [])])


def by_streams(x, maps, query, weight, period, heads, normed):
  spec = connection_spec(
    'attention_residual',
    streams=1 + -(-L // period),
    write_period=period,
    read_heads=heads,
    read_normed=normed,
    norm_eps=EPS,
  )
  x_NBTD = hc.expand(x, spec.streams, 'one_hot')
  for i in range(L):
    c = hc.generate({'read_query': query[i], 'norm_weight': weight[i][None]}, x_NBTD, spec, i)
    y_BTD = jnp.tanh(hc.read(c.pre_NBT, x_NBTD) @ maps[i])
    x_NBTD = hc.write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD)
  return hc.collapse(x_NBTD, 'sources', {'read_query': query[L], 'norm_weight': weight[L][None]}, spec)


@pytest.mark.parametrize('period,heads,normed', ((1, 1, False), (2, 1, False), (4, 2, True), (6, 4, False)))
def test_values_and_all_gradients(x64, rng, period, heads, normed):
  shapes = (B, T, D), (L, D, D), (L + 1, D), (L + 1, D)
  arguments, cotangent = [rng.normal(size=shape) for shape in shapes], rng.normal(size=(B, T, D))

  def both(function):
    run = lambda *a: (function(*a, period, heads, normed) * cotangent).sum()  # noqa: E731
    return jax.jit(jax.value_and_grad(run, argnums=range(4)))(*arguments)

  for found, wanted in zip(*map(jax.tree.leaves, (both(by_streams), both(by_definition))), strict=True):
    np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)


def test_the_model_reads_earlier_outputs(x64, rng):
  config = model('attention_residual')
  params = jax.tree.map(np.asarray, disturbed(initial(config), rng))

  def read(p, sources):
    keys = [v / np.sqrt(np.mean(v**2, -1, keepdims=True) + config.connection.norm_eps) for v in sources]
    scores = np.exp([(p['read_query'] * p['norm_weight'][0] * k).sum(-1) for k in keys])
    return np.einsum('nbt,nbtd->btd', scores / scores.sum(0), sources)

  outputs = [np.asarray(params['embedding'][TOKENS])]
  for p, function in sublayers(config, params):
    outputs.append(np.asarray(function(read(p, np.stack(outputs)))))
  assert len(outputs) == config.connection.streams == 2 * config.depth + 1
  wanted = logits(config, params, read(params['collapse'], np.stack(outputs)))
  found = Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0]
  np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def config_of(**fields):
  c = base_config()
  c.model.update({'width': 16, 'depth': 10, 'heads': 2})
  c.model.connection.update({'name': 'attention_residual', **fields})
  return build_model(c)


def test_blocks_by_depth_and_a_block_of_one_is_full():
  assert config_of().connection.streams == 21
  block = config_of(preset='block').connection
  assert (block.write_period, block.streams) == (3, 8)  # of 20 sublayers: six sums of 3 and one of 2
  assert config_of(preset='inkling2', write_period=2).connection.streams == 11
  assert config_of(preset='block', write_period=1) == config_of()
  assert config_of(preset='heads').connection.read_heads == 8
  for fields, message in (
    ({'write_period': 0}, 'must be at least 1'),
    ({'read_heads': 3}, 'does not divide the width 16'),
    ({'collapse': 'mean'}, 'need each other'),
    ({'write_gate': 'sigmoid'}, 'need each other'),
    ({'name': 'mhc', 'read_heads': 2}, 'need read_gate=sources'),
    ({'name': 'mhc', 'write_period': 2}, 'needs write_gate=one_hot'),
  ):
    with pytest.raises(ConfigError, match=message):
      config_of(**fields)


@pytest.mark.parametrize('preset', ('full', 'block', 'heads', 'inkling2'))
def test_parameters_are_counted_and_the_start_is_a_mean(preset):
  config = config_of(preset=preset)
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)['params']
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cost.parameters(config)['total']
  spec = config.connection
  x_NBTD = jax.random.normal(jax.random.key(0), (spec.streams, 1, 2, 16))
  pre = hc.generate(hc.init_params(jax.random.key(0), spec, 16, 4), x_NBTD, spec, 4).pre_NBT
  written, weights = 1 + -(-4 // spec.write_period), np.asarray(pre).reshape(spec.streams, -1)
  norms = 1 / np.sqrt(np.mean(np.square(x_NBTD), -1) + spec.norm_eps).reshape(spec.streams, -1)
  wanted = np.where(np.arange(spec.streams) < written, 1 / written, 0)[:, None]
  wanted = wanted * norms if spec.read_normed else np.broadcast_to(wanted, weights.shape)
  np.testing.assert_allclose(weights, wanted, rtol=1e-6)
