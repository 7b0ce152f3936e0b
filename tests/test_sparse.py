"""Sparse attention against plain loops: the choice, both losses, what learns from which, any program."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import base_config, build_optimizer
from mhc_jax.layers import sparse
from mhc_jax.layers.latent_attention import LatentAttention
from mhc_jax.layers.parts import Visible
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import gradients, init_state, sums_and_beside, sums_and_records, train_step
from mhc_jax.weights import importing
from mhc_jax.weights.tensors import published

VOCAB, B, T, D, L, H, J, TOPK = 29, 4, 12, 16, 2, 2, 3, 4
INDEX = {'kind': 'topk', 'topk': TOPK, 'index_heads': J, 'index_dim': 6, 'index_rope_dim': 2}
LATENT = {'kv_rank': 6, 'head_dim': 4, 'rope_dim': 2, 'value_dim': 5, 'q_rank': 7}
SEGMENTS = np.cumsum(np.random.default_rng(2).random((B, T)) < 0.1, 1).astype(np.int32)
VISIBLE = np.tril(np.ones((T, T), bool))[None] & (SEGMENTS[:, :, None] == SEGMENTS[:, None])


def model(sparse=(), mla=(), experts=None, connection='residual', **fields):
  c = base_config()
  sizes = {'width': D, 'depth': L, 'heads': H, 'dtype': 'float64', 'scan_unroll': 1, 'norm_eps': 1e-3}
  c.model.update(sizes | fields)
  c.model.sparse.update(dict(sparse))
  c.model.mla.update(dict(mla))
  c.model.moe.update({'experts': experts, 'active': experts and 2})
  c.model.connection.update({'name': connection, 'streams': 2})
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


def batch():
  rng = np.random.default_rng(0)
  token_BS = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  weights_BT = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
  arrays = {'inputs': token_BS[:, :-1], 'targets': token_BS[:, 1:]}
  return arrays | {'weights': weights_BT, 'segments': SEGMENTS}


@functools.cache
def initial(config):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.jit(lambda key: Transformer(config).init(key, tokens, tokens)['params'])(jax.random.key(0))


def of_index(params):
  """(the index's leaves, the others), by path."""
  leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
  mine = {path for path in leaves if "['index']" in path}
  return {path: leaves[path] for path in mine}, {path: leaves[path] for path in leaves.keys() - mine}


def program(config, parts=None, mesh=None):
  mesh = mesh and make_mesh(mesh)
  return jax.jit(functools.partial(gradients, batch=batch(), model=config, parts=parts, mesh=mesh))


@functools.cache
def outcome(config):
  """((loss, Beside), gradients) at the start."""
  return jax.device_get(program(config)(initial(config)))


def by_loops(score_BTS, topk, window):
  """The definition, one query at a time: the window first, then by score, of equal ones the earliest."""
  chosen_BTS = np.zeros((B, T, T), bool)
  for b, t in np.ndindex(B, T):
    seen = [s for s in range(T) if VISIBLE[b, t, s]]
    first = sorted(seen, key=lambda s: (window is None or t - s >= window, -score_BTS[b, t, s], s))
    chosen_BTS[b, t, first[:topk]] = True
  return chosen_BTS


CHOICES = ((1, None), (TOPK, None), (TOPK, 1), (TOPK, TOPK), (T - 1, 2), (T, 3))


@pytest.mark.parametrize('topk,window', CHOICES)
def test_exactly_so_many_are_chosen_of_what_is_visible(rng, topk, window):
  """Scores of few values, so that ties decide; zeros of both signs are equal."""
  score_BTS = rng.integers(-1, 2, (B, T, T)) * rng.choice([-0.0, 0.0, 1.0], (B, T, T)).astype(np.float32)
  found = np.asarray(sparse.chosen(jnp.asarray(score_BTS, jnp.float32), jnp.asarray(VISIBLE), topk, window))
  np.testing.assert_array_equal(found.sum(-1), np.minimum(topk, VISIBLE.sum(-1)))
  np.testing.assert_array_equal(found, by_loops(score_BTS, topk, window))


def turned(x, rope_dim):
  """The first rope_dim numbers rotated by position, in pairs of halves."""
  half = rope_dim // 2
  angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(half) / half)
  angle = angle.reshape(1, T, *[1] * (x.ndim - 3), half)
  a, b, rest = x[..., :half], x[..., half:rope_dim], x[..., rope_dim:]
  parts = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle), rest
  return jnp.concatenate(parts, -1)


def normed(x, weight):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-3) * weight


def scores_by_definition(p, x, latent):
  """Equation 1, a sum over heads; LayerNorm on the keys."""
  q = turned(jnp.einsum('btr,rjk->btjk', latent, p['query_up']['w']), 2)
  k = x @ p['key']['w']
  k = (k - k.mean(-1, keepdims=True)) / jnp.sqrt(k.var(-1, keepdims=True) + 1e-3)
  k = turned(k * p['key_norm'] + p['key_norm_bias'], 2)
  w = x @ p['weights']['w']
  heads = (w[..., j, None] * jnp.maximum(q[:, :, j] @ k.swapaxes(1, 2), 0) for j in range(J))
  return sum(heads) / np.sqrt(J * 6)


def layer_by_definition(p, x):
  """(the sublayer's input and query latent, softmax over the given tokens, value heads of queries)."""
  x = normed(x, p['norm'])
  latent = normed(x @ p['q_down']['w'], p['query_norm'])
  q, down = jnp.einsum('btr,rhk->bthk', latent, p['q_up']['w']), x @ p['kv_down']['w']
  up = jnp.einsum('btr,rhk->bthk', normed(down[..., :6], p['latent_norm']), p['kv_up']['w'])
  logits = jnp.einsum('bthk,bshk->bhts', q[..., :4], up[..., :4])
  logits += jnp.einsum('bthk,bsk->bhts', turned(q[..., 4:], 2), turned(down[..., 6:], 2))

  def weights(mask):
    powers = jnp.where(mask[:, None], jnp.exp(logits / np.sqrt(6)), 0)
    return powers / powers.sum(-1, keepdims=True)

  return x, latent, weights, up[..., 4:]


@pytest.mark.parametrize('stage', (None, 'warmup'))
def test_values_losses_and_gradients_are_those_of_the_definition(x64, rng, stage):
  """The output's gradients reach all but the index, the loss's the index alone; rounding of float64 sums."""
  config = model(INDEX | {'stage': stage}, LATENT)
  x, cotangent = (jnp.asarray(rng.normal(size=(B, T, D))) for _ in range(2))
  seen = Visible(jnp.asarray(SEGMENTS), jnp.asarray(VISIBLE))
  layer = LatentAttention(config)
  params = jax.jit(lambda key: layer.init(key, x, seen)['params'])(jax.random.key(0))
  params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), params)

  def ours(params, x):
    out, records = layer.apply({'params': params}, x, seen)
    return jnp.sum(cotangent * out) + records['losses']['index'], records['losses']['index']

  with jax.numpy_rank_promotion('allow'):
    h, latent = map(np.asarray, layer_by_definition(params, x)[:2])
    scores = np.asarray(scores_by_definition(params['index'], h, latent))
    chosen = VISIBLE if stage else by_loops(scores, TOPK, None)
    target = np.asarray(layer_by_definition(params, x)[2](chosen).sum(1))
    target = target / target.sum(-1, keepdims=True)

    def reference(params, x):
      _, _, weights, values = layer_by_definition(params, x)
      out = jnp.einsum('bhts,bshv->bthv', weights(chosen), values).reshape(B, T, -1) @ params['output']['w']
      score = scores_by_definition(params['index'], h, latent)  # of constants: no gradient for the rest
      log = score - jnp.log(jnp.sum(jnp.where(chosen, jnp.exp(score), 0), -1, keepdims=True))
      divergence = jnp.sum(np.where(chosen, target, 0) * (np.log(np.where(chosen, target, 1)) - log))
      return jnp.sum(cotangent * out) + divergence, divergence

    wanted = jax.jit(jax.value_and_grad(reference, (0, 1), has_aux=True))(params, x)
  found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, x)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max(), err_msg=str(path))
    assert np.abs(b).max() > 1e-3, path


def test_no_loss_has_gradients_of_the_others_parameters(x64):
  """Exactly none, in a model of several layers."""
  config = model(INDEX)

  def both(params):
    (total, _), beside = sums_and_beside(params, batch(), config)
    return total, jnp.sum(beside.losses['index'])

  each = jax.jit(lambda params: [jax.grad(lambda p, i=i: both(p)[i])(params) for i in (0, 1)])
  language, index = each(initial(config))
  for grads, none, some in ((language, 0, 1), (index, 1, 0)):
    assert all((x == 0).all() for x in of_index(grads)[none].values())
    assert all(np.abs(x).max() > 0 for path, x in of_index(grads)[some].items())


@functools.cache
def step(config, clip=0.01):
  """(parameters, state after an update with decay and a norm that is clipped, its metrics)."""
  c = base_config()
  c.optimizer.update({'warmup_steps': 0, 'clip_norm': clip, 'weight_decay': 0.5})
  optimizer = build_optimizer(c)
  hparams = {'lr': 0.1, 'weight_decay': 0.5, 'num_steps': 10.0, 'warmup': 0.0}

  @jax.jit
  def update(key):
    start = init_state(key, config, optimizer)
    return start.params, *train_step(start, batch(), hparams, model=config, optimizer=optimizer)

  return jax.device_get(update(jax.random.key(0)))


WHOLE = {'topk': INDEX | {'topk': T}, 'window': {'kind': 'window', 'window': T}}


@pytest.mark.parametrize('name', WHOLE)
def test_all_tokens_are_dense_attention_to_the_bit(x64, name):
  """Loss and all gradients, where XLA fuses the rest alike; fewer tokens are another model."""
  found, dense = (outcome(model(fields)) for fields in (WHOLE[name], {}))
  assert found[0][0] == dense[0][0] != outcome(model(WHOLE[name] | {name: TOPK}))[0][0]
  language = of_index(found[1])[1]
  for path, leaf in of_index(dense[1])[1].items():
    np.testing.assert_array_equal(language[path], leaf, err_msg=path)


def test_the_index_changes_no_step_of_the_others(x64):
  """With decay and a clipped norm, up to rounding of that norm's sum; its own norm is clipped for itself."""
  dense, found = step(model())[1].params, step(model(WHOLE['topk']))[1].params
  language = of_index(found)[1]
  for path, leaf in of_index(dense)[1].items():
    np.testing.assert_allclose(language[path], leaf, rtol=0, atol=1e-11 * np.abs(leaf).max(), err_msg=path)


@pytest.mark.parametrize('experts', (None, pytest.param(3, marks=pytest.mark.slow)))
def test_in_the_warm_up_attention_is_dense_and_the_index_alone_moves(x64, experts):
  start, state, metrics = step(model(INDEX | {'stage': 'warmup'}, experts=experts))
  assert metrics['loss'] == pytest.approx(float(step(model(experts=experts))[2]['loss']), rel=1e-14)
  assert metrics['loss_index'].shape == (L,) and (metrics['loss_index'] > 0).all()
  for (path, before), after in zip(
    jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(state.params), strict=True
  ):
    assert (before != after).any() == ("['index']" in jax.tree_util.keystr(path)), path


CASES = {
  'a loop over layers': ({'scan': False}, None, None),
  'recomputed layers, microbatches': ({'remat': 'layer'}, 2, None),
  'recomputed but for products': ({'remat': 'products', 'scan_unroll': 4}, None, None),
  'recomputed blocks on a mesh, microbatches': ({'remat': 'block'}, 2, {'data': 2, 'tensor': 2}),
}


def stacked(params, config):
  """Parameters of a loop over layers, laid out as a scan's."""
  names = [f'layer_{i}' for i in range(config.depth)]
  layers = jax.tree.map(lambda *x: jnp.stack(x), *(params[name] for name in names))
  return {name: x for name, x in params.items() if name not in names} | {'layers': layers}


@pytest.mark.parametrize('fields,parts,mesh', CASES.values(), ids=CASES)
def test_any_program_has_the_same_losses_and_gradients(x64, fields, parts, mesh):
  """Float64 sums of some hundred terms in another order; a choice by rounding would be seen."""
  plain, config = (model(INDEX | {'window': 2}, **{'kv_heads': 1} | f) for f in ({}, fields))
  (loss, beside), grads = outcome(plain)
  params = initial(plain)
  if not config.scan:
    params = {name: x for name, x in params.items() if name != 'layers'}
    params |= {f'layer_{i}': jax.tree.map(lambda x, i=i: x[i], initial(plain)['layers']) for i in range(L)}
  (found_loss, found), found_grads = program(config, parts, mesh)(params)
  assert (beside.losses['index'] > 1e-3).all()
  np.testing.assert_allclose(found_loss, loss, rtol=1e-13)
  np.testing.assert_allclose(found.losses['index'], beside.losses['index'], rtol=1e-12)
  found_grads = found_grads if config.scan else stacked(found_grads, config)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found_grads), jax.tree.leaves(grads), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max(), err_msg=str(path))
    assert np.abs(b).max() > 0, path


@pytest.mark.parametrize('fields', (INDEX, {'kind': 'window', 'window': 3}), ids=('topk', 'window'))
def test_no_token_is_chosen_by_what_comes_later_or_by_other_documents(x64, fields):
  """Other tokens from a place on, and in a later document, leave every logit before as it is, to the bit."""
  config, tokens = model(fields, LATENT, connection='mhc'), batch()['inputs']
  apply = jax.jit(lambda tokens: Transformer(config).apply({'params': initial(config)}, tokens, SEGMENTS)[0])
  logits, (row, place) = apply(tokens), np.argwhere(np.diff(SEGMENTS, axis=1))[0]
  for start, same in ((7, np.arange(T) < 7), (0, np.arange(T) > place)):
    changed = tokens.copy()
    where = slice(7, None) if start else slice(0, place + 1)
    changed[row, where] = (changed[row, where] + 3) % VOCAB
    found = apply(changed)
    np.testing.assert_array_equal(found[row, same], logits[row, same])
    assert (found[row, ~same] != logits[row, ~same]).any(-1).all()


def test_what_is_recorded_of_the_first_sequence(x64):
  """Shares by definition; by chance the share of the visible tokens, at best that of the largest weights."""
  config, window = model(INDEX, kv_heads=1), model({'kind': 'window', 'window': TOPK}, kv_heads=1)
  records = {
    name: jax.jit(lambda p, c=c: sums_and_records(p, batch(), c, record=1)[1][0])(initial(c))
    for name, c in (('topk', config), ('window', window))
  }
  share_T = np.minimum(TOPK, VISIBLE[0].sum(-1)) / VISIBLE[0].sum(-1)
  for found in records.values():
    assert found['recall_BT'].shape == (L, 1, T)
    np.testing.assert_allclose(found['random_BT'], np.broadcast_to(share_T, (L, 1, T)))
    assert (found['recall_BT'] <= found['best_BT'] + 1e-12).all() and (found['best_BT'] <= 1 + 1e-12).all()
    np.testing.assert_allclose(found['recall_BT'][:, share_T[None] == 1], 1, rtol=1e-12)
    assert (found['recall_BT'] < 1).any()
  entropy, most = np.asarray(records['topk']['entropy_BT']), np.log(VISIBLE[0].sum(-1))
  assert 'entropy_BT' not in records['window']
  assert (-1e-12 <= entropy).all() and (entropy <= most + 1e-12).all()
  assert entropy.mean() > 0.8 * most.mean()  # close to uniform at the start


def test_attentions_weights_are_made_once():
  """The loss of the index takes them from the program's own product: XLA merges the two that are stated."""
  config = dataclasses.replace(model(INDEX, depth=1, scan=False, dtype='float32'), vocab_size=VOCAB)
  text = program(config).lower(initial(config)).compile().as_text()
  products = re.findall(rf'= f32\[{B},{H},1,{T},{T}\]\S* dot\(|= f32\[{B},{H},{T},{T}\]\S* dot\(', text)
  assert len(products) == 2, 'one forward, one of the gradients'


@pytest.mark.parametrize('mla', ({}, LATENT), ids=('grouped', 'latent'))
def test_an_index_starts_as_ever_beside_weights_that_have_none(mla):
  """How a dense run goes on to the warm-up, and that to sparse attention: by mhc export and mhc import."""
  c = base_config()
  c.model.update({'width': D, 'depth': L, 'heads': H})
  c.model.mla.update(mla)
  c.duration.steps, c.optimizer.warmup_steps, c.seed = 3, 1, 5
  dense = resolve(c, 'd')
  c.model.sparse.update({'kind': 'topk', 'topk': TOPK, 'stage': 'warmup'})
  run, starts = resolve(c, 'd'), {}
  for name, planned, seed in (('weights', dense, 0), ('fresh', run, 5)):
    starts[name] = init_state(jax.random.key(seed), planned.model, planned.optimizer).params
  begun = importing._state(run, published(starts['weights'], dense.model, folded=False)).params
  again = importing._state(run, published(begun, run.model, folded=False)).params
  jax.tree.map(np.testing.assert_array_equal, begun, again)
  wanted = of_index(starts['fresh'])[0] | of_index(starts['weights'])[1]
  found = {path: leaf for part in of_index(begun) for path, leaf in part.items()}
  assert found.keys() == wanted.keys() and len(of_index(begun)[0]) == 5
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
