"""Multi-token prediction: the module written out, its documents, and that it changes nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.data.windows import as_batch
from mhc_jax.errors import ConfigError
from mhc_jax.layers.attention import Attention, visible
from mhc_jax.layers.feed_forward import FeedForward
from mhc_jax.model import MultiToken, Transformer, two_ahead
from mhc_jax.model_config import build_model
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import gradients, hparams_of, init_state, programs, sums_and_beside, train_step

VOCAB, BOS, B, T, WEIGHT = 11, 0, 4, 10, 0.7


def config(connection='identity', **fields):
  c = base_config()
  c.model.update({'width': 16, 'depth': 1, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1})
  c.model.connection.update({'name': connection, 'streams': 2})
  c.model.mtp.update({'depth': 1, 'weight': WEIGHT})
  c.model.update(fields)
  c.optimizer.warmup_steps = 0
  return c


def model(connection='identity', **fields):
  return dataclasses.replace(build_model(config(connection, **fields)), vocab_size=VOCAB)


def batch():
  """Documents of some tokens each: BOS is 0."""
  token_BS = np.random.default_rng(0).integers(1, VOCAB, (B, T + 1))
  token_BS[np.random.default_rng(1).random((B, T + 1)) < 0.2] = BOS
  return as_batch(token_BS, BOS, False, np)


@functools.cache
def start(connection='identity'):
  tokens = jnp.zeros((1, 2), jnp.int32)
  init = Transformer(model(connection)).init
  params = jax.device_get(jax.jit(lambda key: init(key, tokens, tokens)['params'])(jax.random.key(0)))
  noise = np.random.default_rng(5)  # norms and collapses that are not those of the start
  return jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape), params)


def normed(x, weight, eps):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps) * weight


def module_by_hand(p, x_NBTD, e_BTD, seen, c):
  """DeepSeek-V3's eq. 21 and 22 with one map of both vectors, the embedding first, for every stream."""
  both_DD = jnp.concatenate([p['e_proj'], p['h_proj']])
  e_BTD = normed(e_BTD, p['embedding_norm'], c.norm_eps)
  x_NBTD = jnp.stack(
    [jnp.concatenate([e_BTD, normed(x_BTD, p['state_norm'], c.norm_eps)], -1) @ both_DD for x_BTD in x_NBTD]
  )
  for index, (name, kind) in enumerate({'attention': Attention, 'feed_forward': FeedForward}.items()):
    of_connection = p['block'].get(f'{name}_connection', {})
    own = hc.generate(of_connection, x_NBTD, c.connection, 2 * c.depth + index)
    y_BTD, _ = kind(c).apply({'params': p['block'][name]}, hc.read(own.pre_NBT, x_NBTD), seen)
    x_NBTD = hc.write(own.res_NMBT, own.post_NBT, x_NBTD, y_BTD)
  x_BTD = hc.collapse(x_NBTD, c.connection.collapse, p.get('collapse', {}), c.connection, None)
  return normed(x_BTD, p['final_norm'], c.norm_eps)


def test_the_module_is_that_of_the_equations(x64, rng):
  """Float64 rounding of some hundred additions."""
  c, now, p = model('mhc'), batch(), start('mhc')['mtp']
  x = rng.normal(size=(c.connection.streams, B, T, 16))
  e, seen = rng.normal(size=(B, T, 16)), visible(now['segments'], c, None)
  with jax.numpy_rank_promotion('allow'):  # by hand
    wanted = jax.jit(lambda p, x, e: module_by_hand(p, x, e, seen, c))(p, x, e)
  found, losses = jax.jit(lambda p, x, e: MultiToken(c).apply({'params': p}, hc.Pending(x), e, seen))(p, x, e)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())
  assert not losses and 'collapse' not in p


def test_targets_stay_in_their_document():
  """Token i says i + 2 where i, i + 1 and i + 2 are of one document; by a loop over tokens."""
  now = batch()
  token_BS = np.concatenate([now['inputs'], now['targets'][:, -1:]], 1)
  document_BS = np.cumsum(token_BS == BOS, 1)
  targets, weights = two_ahead(jnp.asarray(now['targets']), jnp.asarray(now['weights']))
  for b in range(B):
    for i in range(T):
      counts = i + 2 <= T and document_BS[b, i] == document_BS[b, i + 1] == document_BS[b, i + 2]
      assert weights[b, i] == counts
      assert not counts or targets[b, i] == token_BS[b, i + 2]
  assert 0 < weights.sum() < now['weights'].sum() - B


@functools.cache
def outcome(parts=None, mesh=None, **fields):
  program = functools.partial(
    gradients, model=model(**fields), parts=parts, mesh=mesh and make_mesh(dict(mesh))
  )
  return jax.device_get(jax.jit(program)(start(), batch()))


@pytest.mark.slow
def test_the_reported_loss_is_as_without_and_gradients_are_of_both(x64):
  """Mean cross-entropies of logits, over the targets of the next token."""
  (loss, beside), grads = outcome()
  now, params, plain = batch(), start(), dataclasses.replace(model(), mtp=None)
  _, weights = two_ahead(now['targets'], now['weights'])

  def parts_of(params):
    (total, count), _ = sums_and_beside(params, now, plain)
    further = sums_and_beside(params, now, model())[1].losses['mtp']
    return jnp.stack([total, further]) / count

  losses, both = jax.jit(lambda p: (parts_of(p), jax.jacrev(parts_of)(p)))(params)
  assert float(loss) == pytest.approx(float(losses[0]), rel=1e-13)
  assert float(beside.losses['mtp']) == pytest.approx(float(losses[1] * now['weights'].sum()), rel=1e-13)
  assert 0.5 < beside.losses['mtp'] / WEIGHT / weights.sum() / np.log(VOCAB) < 2
  rounding = 1e-16 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(both))  # of sums that cancel
  for path, leaf in jax.tree_util.tree_leaves_with_path(both):
    found = functools.reduce(lambda node, key: node[key.key], path, grads)
    atol = max(1e-12 * np.abs(leaf).max(), rounding)
    np.testing.assert_allclose(found, leaf[0] + leaf[1], rtol=0, atol=atol, err_msg=str(path))
    own = path[0].key == 'mtp'
    assert (np.abs(leaf[0]).max() == 0) == own, path  # of the module alone by its loss alone
  assert np.abs(both['embedding'][1]).max() > 0 and np.abs(both['unembedding'][1]).max() > 0


WAYS = {
  'blocks, microbatches': {'remat': 'block', 'parts': 2},
  'products, on a mesh': {'remat': 'products', 'mesh': (('data', 2), ('tensor', 2))},
}


@pytest.mark.slow
@pytest.mark.parametrize('way', WAYS)
def test_numbers_do_not_depend_on_how_they_are_computed(x64, way):
  (loss, beside), grads = outcome(**WAYS[way])
  (wanted, wanted_beside), alone = outcome()
  assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
  assert float(beside.losses['mtp']) == pytest.approx(float(wanted_beside.losses['mtp']), rel=1e-12)
  for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
    found = functools.reduce(lambda node, key: node[key.key], path, grads)
    atol = 1e-9 * np.abs(leaf).max() + 1e-16
    np.testing.assert_allclose(found, leaf, rtol=0, atol=atol, err_msg=str(path))


def test_all_other_parameters_start_as_without():
  tokens = jnp.zeros((1, 2), jnp.int32)

  def init(c):
    return jax.jit(lambda key: Transformer(c).init(key, tokens, tokens)['params'])(jax.random.key(3))

  c = model(dtype='float32')
  found, plain = init(c), init(dataclasses.replace(c, mtp=None))
  assert found.keys() - plain.keys() == {'mtp'} and 'mtp' not in plain
  jax.tree.map(np.testing.assert_array_equal, {name: found[name] for name in plain}, plain)


def test_an_update_says_the_loss_per_token_and_evaluation_is_of_the_next_token():
  c, optimizer = model(dtype='float32'), build_optimizer(config())
  state = jax.jit(functools.partial(init_state, model=c, optimizer=optimizer))(jax.random.key(0))
  step = jax.jit(functools.partial(train_step, model=c, optimizer=optimizer))
  _, metrics = step(state, batch(), hparams_of(optimizer, 10))
  count = two_ahead(batch()['targets'], batch()['weights'])[1].sum()
  expected = metrics['loss_mtp'] * batch()['weights'].sum() / WEIGHT / count
  assert float(metrics['mtp_loss']) == pytest.approx(float(expected), rel=1e-6)
  shapes = jax.eval_shape(programs(c, optimizer, make_mesh({})).evaluate, state.params, batch())
  assert all('losses' not in record for record in shapes[1])


REFUSED = {
  'one module': ({'depth': 2}, 'mhc'),
  'must be positive': ({'weight': 0.0}, 'mhc'),
  'needs model.mtp.depth': ({'depth': None}, 'mhc'),
  'does not go with the connection depth_matrix': ({}, 'depth_matrix'),
}


@pytest.mark.parametrize('why', REFUSED)
def test_what_cannot_be_is_refused(why):
  fields, connection = REFUSED[why]
  c = config(connection)
  c.model.mtp.update(fields)
  with pytest.raises(ConfigError, match=why):
    build_model(c)
