"""Mixture of experts against a dense reference: routing, balancing, gradients, any load, any mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from mhc_jax import manifold_updates
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.errors import ConfigError
from mhc_jax.layers import grouped_experts, moe
from mhc_jax.layers.unembedding import loss_sums
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.train_step import balance, init_state, train_step

VOCAB, B, T, D, E, A, F = 11, 4, 6, 8, 4, 2, 6
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (B, T)).astype(np.int32)
SEGMENTS = np.cumsum(np.random.default_rng(2).random((B, T)) < 0.2, 1).astype(np.int32)


def model(moe_fields=(), connection='residual', **fields):
  """Two layers with experts after a dense one, latent attention; float64."""
  c = base_config()
  c.model.update({'width': 16, 'depth': 3, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1})
  c.model.connection.update({'name': connection, 'streams': 2})
  c.model.mla.kv_rank = 6
  c.model.moe.update({'experts': E, 'active': A, 'shared': 1, 'ffn_width': F} | dict(moe_fields))
  c.model.update(fields)
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


def meshed(*shape):
  return jax.make_mesh(shape, ('data', 'fsdp', 'tensor', 'expert'), (AxisType.Auto,) * 4)


def arrays(rng):
  """x, router logits, gate, up and down maps."""
  shapes = ((B, T, D), (B, T, E), (E, D, F), (E, D, F), (E, F, D))
  return [jnp.asarray(rng.normal(size=shape)) for shape in shapes]


def layer(x, logits, gate, up, down, bias, config, mesh=None):
  return moe.experts(x, moe.route(logits, bias, config), gate, up, down, mesh)


def dense(x, logits, gate, up, down, bias, config):
  """Every expert on every token, and a mask in front of the scores."""
  if config.router == 'sigmoid':
    score, selection = jax.nn.sigmoid(logits), jax.nn.sigmoid(logits)
  else:
    score, selection = moe.sinkhorn_scores(logits, config.active), logits
  selection = selection + bias[None, None]
  chosen = selection >= jnp.sort(selection)[..., -config.active, None]
  weights = config.scale * score * chosen / (score * chosen).sum(-1, keepdims=True)
  hidden = jax.nn.silu(jnp.einsum('btd,edf->btef', x, gate)) * jnp.einsum('btd,edf->btef', x, up)
  return jnp.einsum('bte,btef,efd->btd', weights, hidden, down)


# Usual loads; all tokens at the last two experts, which are one device's if `expert` is 2.
LOADS = {'even': [0.0, 0, 0, 0], 'full': [0.0, 0, 99, 99]}


@pytest.mark.parametrize('router,mesh', (('sigmoid', None), ('sinkhorn', None), ('sigmoid', (1, 2, 2, 2))))
def test_values_and_gradients_are_those_of_all_experts_on_all_tokens(x64, rng, router, mesh):
  """At any load: no token is dropped. Float64 rounding of some ten additions."""
  config = dataclasses.replace(model().moe, router=router)
  weight, args = rng.normal(size=(B, T, D)), arrays(rng)

  def differentiated(function):
    def value(bias, *args):
      y = function(*args, bias, config)
      return jnp.sum(weight * y), y

    return jax.jit(jax.value_and_grad(value, (1, 2, 3, 4, 5), has_aux=True))

  ours = differentiated(functools.partial(layer, mesh=mesh and meshed(*mesh)))
  reference = differentiated(dense)
  for name, bias in LOADS.items():
    bias = jnp.asarray(bias)
    index = np.asarray(moe.route(args[1], bias, config).index_BTA)
    assert set(index.flat) == ({2, 3} if name == 'full' else {0, 1, 2, 3})
    found, wanted = ours(bias, *args), reference(bias, *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max(), err_msg=name)
      assert np.abs(b).max() > 1e-3


@pytest.mark.parametrize('sizes', ([40, 0, 7, 17], [0, 0, 0, 30]))
def test_the_tpu_kernel_makes_the_weight_gradient(rng, sizes):
  """In Pallas' interpreter; rows of no expert are not looked at. Float32 sums of 64 products."""
  x, g = (jnp.asarray(rng.normal(size=(64, width)), jnp.float32) for width in (128, 256))
  unused = jnp.arange(64)[:, None] >= sum(sizes)
  arguments = jnp.where(unused, jnp.nan, x), jnp.where(unused, jnp.nan, g), jnp.asarray(sizes)
  with pltpu.force_tpu_interpret_mode():
    found = grouped_experts._weight_gradient_on_tpu(*arguments)
  ends = np.cumsum(sizes)
  wanted = [x[end - size : end].T @ g[end - size : end] for end, size in zip(ends, sizes, strict=True)]
  np.testing.assert_allclose(found, np.stack(wanted), atol=1e-4)


def test_the_bias_chooses_and_does_not_weigh(x64, rng):
  logits, config = jnp.asarray(rng.normal(size=(B, T, E))), model().moe
  none, small, large = (moe.route(logits, jnp.asarray([b, 0.0, 0, 0]), config) for b in (0.0, 1e-9, 5.0))
  np.testing.assert_array_equal(none.index_BTA, small.index_BTA)
  np.testing.assert_array_equal(none.weight_BTA, small.weight_BTA)
  assert (np.asarray(large.index_BTA) == 0).any(-1).all() and not (np.asarray(none.index_BTA) == 0).any(
    -1
  ).all()
  for routing in (none, large):
    np.testing.assert_allclose(routing.weight_BTA.sum(-1), config.scale, rtol=1e-12)
  score = np.take_along_axis(np.asarray(jax.nn.sigmoid(logits)), np.asarray(large.index_BTA), -1)
  np.testing.assert_allclose(
    large.weight_BTA, config.scale * score / score.sum(-1, keepdims=True), rtol=1e-12
  )
  loads = moe.expert_load(large.index_BTA, E)
  np.testing.assert_array_equal(loads, np.bincount(np.asarray(large.index_BTA).reshape(-1), minlength=E))


def test_sinkhorn_scores_are_the_transport_within_each_token(x64, rng):
  """Row sums, the order of experts, and the derivative of the exact solution."""
  logits = jnp.asarray(2 * rng.normal(size=(1, 200, 64)))
  scores = moe.sinkhorn_scores(logits, 6)
  np.testing.assert_allclose(scores.sum(-1), 6, atol=1e-6)
  np.testing.assert_array_equal(jnp.argsort(scores), jnp.argsort(logits))
  price = np.log(1 / np.asarray(scores) - 1) + np.asarray(logits)
  np.testing.assert_allclose(price - price[..., :1], 0, atol=1e-9)  # one price per token
  direction = rng.normal(size=logits.shape)
  found = jax.jvp(lambda x: moe.sinkhorn_scores(x, 6), (logits,), (direction,))[1]
  near = [np.asarray(moe.sinkhorn_scores(logits + h * direction, 6, 500)) for h in (1e-5, -1e-5)]
  # 20 iterations leave 1e-6; central differences err by h^2 and by rounding over h.
  np.testing.assert_allclose(found, (near[0] - near[1]) / 2e-5, atol=1e-5)


@functools.cache
def initial(config):
  return jax.jit(lambda key: Transformer(config).init(key, TOKENS, SEGMENTS)['params'])(jax.random.key(0))


@functools.cache
def gradients(config, mesh=None):
  """parameters -> ((loss, records), gradients)."""

  def loss(params):
    logits, records = Transformer(config, mesh).apply({'params': params}, TOKENS, SEGMENTS, record=1)
    total, count = loss_sums(logits, np.roll(TOKENS, -1, 1), jnp.ones((B, T)))
    return total / count, records[1]

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_a_loop_over_layers_is_the_scan(x64):
  scan, loop = model(), model(scan=False)
  params = initial(scan)
  unstacked = {name: leaf for name, leaf in params.items() if name != 'layers'}
  unstacked |= {f'layer_{i}': jax.tree.map(lambda leaf, i=i: leaf[i - 1], params['layers']) for i in (1, 2)}
  outputs = [
    jax.jit(lambda p, c=c: Transformer(c).apply({'params': p}, TOKENS, SEGMENTS))(p)
    for c, p in ((scan, params), (loop, unstacked))
  ]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13), *outputs)
  loads = jnp.asarray([[0, 5, 2, 5], [3, 3, 3, 3]])
  moved, unstacked_moved = (balance(p, loads, c) for p, c in ((params, scan), (unstacked, loop)))
  for i in (1, 2):
    jax.tree.map(
      np.testing.assert_array_equal,
      unstacked_moved[f'layer_{i}'],
      jax.tree.map(lambda leaf, i=i: leaf[i - 1], moved['layers']),
    )


def test_gradients_respect_time_and_documents_through_the_router():
  """Tokens are all different, so the gradient of their embedding rows is that of the positions."""
  config = model({'router': 'sinkhorn'}, dtype='float32')
  token_1T, segments_1T = np.arange(T, dtype=np.int32)[None], np.array([[0, 0, 1, 1, 1, 2]], np.int32)
  weight_V = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)

  @jax.jit
  def influence(params):
    def outputs(embedding):
      changed = {**params, 'embedding': embedding}
      return Transformer(config).apply({'params': changed}, token_1T, segments_1T)[0][0] @ weight_V

    backward = jax.vjp(outputs, params['embedding'])[1]
    return jax.lax.map(lambda g_T: jnp.abs(backward(g_T)[0]).max(-1)[:T], jnp.eye(T))

  found = np.asarray(influence(initial(config)))
  allowed = np.tril(np.ones((T, T), bool)) & np.equal.outer(segments_1T[0], segments_1T[0])
  assert (found[allowed] > 0).all() and (found[~allowed] == 0).all(), found


@pytest.mark.slow
def test_the_bias_moves_by_the_loads_and_by_nothing_else():
  """One update with weight decay and clipping: AdamW leaves the bias, balancing moves it by its rate."""
  c = base_config()
  c.optimizer.update({'warmup_steps': 0, 'clip_norm': 0.1, 'weight_decay': 0.5, 'eps': 1e-20})
  config, optimizer = model({'bias_rate': 0.25}, dtype='bfloat16', remat='layer'), build_optimizer(c)
  batch = {'inputs': TOKENS, 'targets': np.roll(TOKENS, -1, 1), 'segments': SEGMENTS}
  batch['weights'] = np.ones((B, T), np.float32)
  hparams = {'lr': 0.1, 'weight_decay': 0.5, 'num_steps': 10.0, 'warmup': 0.0}

  @jax.jit
  def update(key):
    start = init_state(key, config, optimizer)
    bias_LE = jnp.asarray([[0.5, 0, -0.5, 0], [0, 0, 0, 0]])
    start.params['layers']['feed_forward']['router_bias'] = bias_LE
    state, metrics = train_step(start, batch, hparams, model=config, optimizer=optimizer)
    _, records = Transformer(config).apply({'params': start.params}, TOKENS, SEGMENTS)
    return bias_LE, state, metrics, records[1]['load_E']

  bias_LE, state, metrics, load_LE = jax.tree.map(np.asarray, update(jax.random.key(0)))
  mean = B * T * A / E
  assert load_LE.sum(-1).tolist() == [B * T * A] * 2 and (load_LE != mean).any()
  new_LE = state.params['layers']['feed_forward']['router_bias']
  moved_LE = bias_LE + 0.25 * np.sign(mean - load_LE)
  np.testing.assert_array_equal(new_LE, moved_LE - moved_LE.mean(-1, keepdims=True))
  np.testing.assert_allclose(metrics['load_max_over_mean'], load_LE.max(-1) / mean, rtol=1e-6)
  for name in ('mu', 'nu'):
    moments = optax.tree_utils.tree_get(state.opt_state, name)['layers']['feed_forward']
    assert (moments['router_bias'] == 0).all()
    assert all((moments[name] != 0).any() for name in ('router', 'expert_gate', 'expert_up', 'expert_down'))


def test_what_the_mesh_does_not_divide(rng):
  """A single sequence is computed by every device; experts must be divided."""
  x, logits, *weights = arrays(rng)
  config, mesh, bias = model().moe, meshed(1, 2, 2, 2), jnp.zeros(E)
  single = (x[:1], logits[:1], *weights, bias, config)
  np.testing.assert_array_equal(layer(*single, mesh), layer(*single))
  with pytest.raises(ConfigError, match=r'mesh\.expert=2 does not divide model\.moe\.experts=3'):
    layer(x, logits[..., :3], *(w[:3] for w in weights), bias[:3], config, mesh)


def test_a_manifold_takes_each_expert_of_each_layer_as_a_matrix(rng):
  w_LEDF = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  params = {'layers': {'feed_forward': {'expert_gate': w_LEDF}}}
  found = manifold_updates.project_params(manifold_updates.row_sphere, '.*expert_gate', params)
  norms = np.linalg.norm(found['layers']['feed_forward']['expert_gate'], axis=-1)
  np.testing.assert_allclose(norms, 1, rtol=1e-6)
