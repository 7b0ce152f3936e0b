"""MUDD: layers that read all earlier ones by weights from the last, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import SEGMENTS, TOKENS, initial, model

from mhc_jax.config import base_config
from mhc_jax.cost import forward_flops_per_token
from mhc_jax.errors import ConfigError
from mhc_jax.layers.attention import Attention, visible
from mhc_jax.layers.feed_forward import FeedForward
from mhc_jax.layers.parts import rms_norm
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model

COMPILER = {'xla_backend_optimization_level': 0}  # compiles in half the time, same arithmetic


def disturbed(params, rng):
  ours = ('read_up', 'b_read', 'post_norm', 'norm', 'key_norm', 'value_norm', 'final_norm')
  add = lambda path, x: x + 0.3 * rng.normal(size=x.shape) if path[-1].key in ours else x  # noqa: E731
  return jax.tree_util.tree_map_with_path(add, params)


def by_definition(config, params):
  """Equations 5 to 8 of 2502.12170 with a list of layers that grows; weights of later ones are not used."""
  seen, n = visible(SEGMENTS, config, None), config.depth + 1

  def norm(x):
    return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + config.connection.norm_eps)

  def reads(p, layers, ways):
    inner = norm(layers[-1]) @ p['read_down']
    hidden = 0.5 * inner * (1 + jax.scipy.special.erf(inner / np.sqrt(2)))
    a = hidden @ p['read_up'] + p['b_read'][None, None]
    sources = list(map(norm, layers)) if 'post_norm' in p else layers
    sums = [sum(a[..., w * n + j, None] * x for j, x in enumerate(sources)) for w in range(ways)]
    if 'post_norm' not in p:
      return sums
    return [layers[-1] + norm(x) * p['post_norm'][w][None, None] for w, x in enumerate(sums)]

  layers, ways = [params['embedding'][TOKENS]], config.connection.read_ways
  for i in range(config.depth):
    p = jax.tree.map(lambda leaf, i=i: leaf[i], params['layers'])
    assert 'feed_forward_connection' not in p
    *inputs, residual = [jnp.asarray(x) for x in reads(p['attention_connection'], layers, ways)]
    inputs = tuple(inputs) if inputs else residual
    x = Attention(config).apply({'params': p['attention']}, inputs, seen)[0] + residual
    layers.append(x + FeedForward(config).apply({'params': p['feed_forward']}, x, seen)[0])
  (x,) = reads(params['collapse'], layers, 1)
  return rms_norm(x, params['final_norm'], config.norm_eps) @ params['unembedding']


@pytest.mark.parametrize('preset', ('multiway', 'normed', 'single'))
def test_values_and_all_gradients(x64, rng, preset):
  config = model({'name': 'mudd', 'preset': preset}, depth=3)
  params, weights = disturbed(initial(config), rng), rng.normal(size=(*TOKENS.shape, 11))

  def both(function):
    run = jax.value_and_grad(lambda params: (function(params) * weights).sum())
    return jax.jit(run).lower(params).compile(COMPILER)(params)

  ours = both(lambda params: Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0])
  wanted = both(lambda params: by_definition(config, params))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted))
  for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11 * np.abs(other).max())


@pytest.mark.parametrize('preset', ('normed', 'single'))
def test_it_starts_as_the_residual_model(x64, preset):
  found, wanted = (
    jax.jit(Transformer(c).apply)({'params': initial(c)}, TOKENS, SEGMENTS)[0]
    for c in (model({'name': 'mudd', 'preset': preset}), model('residual'))
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize('preset,norms', (('multiway', 3 * 4), ('normed', 3 * 4 * (1 + 4) + 5 * 13)))
def test_flops_of_reads_and_norms_by_hand(preset, norms):
  """Three layers, four streams: 4 + 1 reads a layer, one at the end; 4 norms of last streams, or all."""
  c = model({'name': 'mudd', 'preset': preset}, depth=3)
  terms = forward_flops_per_token(c, 4)
  assert terms['hc_read'] == (3 * 5 + 1) * 2 * 4 * c.width and terms['hc_generator'] == norms * c.width


def test_what_does_not_go_with_dense_reads_is_refused():
  def config_of(changes=(), **fields):
    c = base_config()
    c.model.update({'width': 16, 'depth': 5, 'heads': 2})
    c.model.connection.update({'name': 'mudd', **fields})
    for section, values in changes:
      c.model[section].update(values)
    return build_model(c)

  spec = config_of().connection
  assert (spec.streams, spec.write_period, spec.read_ways) == (6, 2, 4)
  latent = [('mla', {'kv_rank': 4})]
  assert config_of(latent, preset='single').connection.read_ways == 1
  for changes, fields, message in (
    (latent, {}, 'read_ways=1 goes with both'),
    ((), {'write_period': 1}, 'write_period=2'),
    ((), {'collapse': 'mean'}, 'need each other'),
    ((), {'read_ways': 3}, 'must be 1, or 4'),
    ((), {'fractions': 2}, 'read_gate=dense does not go'),
    ((), {'name': 'mhc', 'read_ways': 4}, 'must be 1, or 4'),
    ((), {'name': 'mhc', 'depth_norm': True}, 'depth_norm needs'),
  ):
    with pytest.raises(ConfigError, match=message):
      config_of(changes, **fields)
