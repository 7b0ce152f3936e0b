"""manifold_updates.py: projections by their definitions, LORO and Manifold Muon against dense algebra."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from mhc_jax import manifold_updates as mu
from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.errors import ConfigError
from mhc_jax.model_config import build_model
from mhc_jax.plan import resolve
from mhc_jax.train_step import init_state, train_step

SHAPES = ((6, 4), (4, 6), (5, 5))


def svd_with(w, change):
  u, s, v = np.linalg.svd(w, full_matrices=False)
  return u @ np.diag(change(s)) @ v


ORACLES = {
  'fixed_rank': (2, lambda w: svd_with(w, lambda s: s * (np.arange(len(s)) < 2))),
  'stiefel': (None, lambda w: scipy.linalg.polar(w)[0]),
  'row_sphere': (3.0, lambda w: 3 * w / np.linalg.norm(w, axis=1, keepdims=True)),
  'spectral_ball': (1.5, lambda w: svd_with(w, lambda s: np.minimum(s, 1.5))),
}


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('name', ORACLES)
def test_projections_are_their_formulas(x64, rng, name, shape):
  value, oracle = ORACLES[name]
  w = rng.normal(size=shape)
  project = jax.jit(mu.PROJECTIONS[name](value))
  np.testing.assert_allclose(project(w), oracle(w), rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(project(project(w)), project(w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('n', (2, 4))
def test_the_doubly_stochastic_projection_is_the_nearest_point(x64, rng, n):
  """<W - P, V - P> <= 0 for every corner V of the polytope holds at the projection P alone."""
  for scale in (0.3, 3.0):
    w = np.eye(n) / 2 + scale * rng.normal(size=(n, n))
    p = np.asarray(jax.jit(mu.doubly_stochastic)(w))
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-13)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-13)
    assert p.min() > -1e-12
    corners = [np.eye(n)[list(order)] for order in itertools.permutations(range(n))]
    assert max(np.sum((w - p) * (v - p)) for v in corners) < 1e-10 * max(1, scale)
  np.testing.assert_allclose(mu.doubly_stochastic(p.reshape(-1, 1)), p.reshape(-1, 1), atol=1e-12)
  with pytest.raises(ValueError, match='n x n'):
    mu.doubly_stochastic(jnp.ones(5))


def test_row_sphere_leaves_zero_rows():
  np.testing.assert_array_equal(mu.row_sphere(jnp.zeros((2, 3))), np.zeros((2, 3)))


def test_projected_ends_on_the_set_and_leaves_the_others_alone(x64, rng):
  params = {
    'layers': {'map': {'w': jnp.asarray(rng.normal(size=(2, 4, 2, 3)))}},
    'norm': jnp.ones(4),
  }
  base = optax.adam(0.1)
  ours = optax.chain(base, mu.projected(mu.PROJECTIONS['fixed_rank'](2), 'layers/map/w'))
  grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  moved = optax.apply_updates(params, jax.jit(ours.update)(grads, ours.init(params), params)[0])
  plain = optax.apply_updates(params, base.update(grads, base.init(params), params)[0])
  np.testing.assert_array_equal(moved['norm'], plain['norm'])
  for got, free in zip(moved['layers']['map']['w'], plain['layers']['map']['w'], strict=True):
    wanted = ORACLES['fixed_rank'][1](np.asarray(free).reshape(4, 6))
    np.testing.assert_allclose(got.reshape(4, 6), wanted, rtol=1e-10, atol=1e-12)
  with pytest.raises(ValueError, match='no parameter matches'):
    mu.projected(mu.stiefel, 'layers/nothing').update(grads, optax.EmptyState(), params)


def test_loro_step_is_the_dense_riemannian_step(x64, rng):
  m, n = rng.normal(size=(7, 2)), rng.normal(size=(5, 2))
  g = rng.normal(size=(7, 5))
  u, v = np.linalg.qr(m)[0], np.linalg.qr(n)[0]
  pu, pv = u @ u.T, v @ v.T
  tangent = pu @ g + g @ pv - pu @ g @ pv
  wanted = svd_with(m @ n.T - 0.3 * tangent, lambda s: s * (np.arange(len(s)) < 2))
  new_m, new_n = jax.jit(mu.loro_step)(m, n, g @ n, g.T @ m, 0.3)
  np.testing.assert_allclose(new_m @ new_n.T, wanted, rtol=1e-9, atol=1e-12)
  np.testing.assert_allclose(new_m.T @ new_m, new_n.T @ new_n, rtol=1e-9, atol=1e-12)  # balanced


def test_loro_takes_an_exact_step_every_second_time(x64, rng):
  u, v = jnp.asarray(rng.normal(size=(3, 6, 2))), jnp.asarray(rng.normal(size=(3, 2, 2, 2)))
  params = {'layers': {'query': {'u': u, 'v': v}}}
  grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
  ours = mu.loro(optax.sgd(0.1, momentum=0.9), 0.2, every=2)
  state = ours.init(params)
  updates, state = jax.jit(ours.update)(grads, state, params)
  np.testing.assert_allclose(updates['layers']['query']['u'], -0.1 * grads['layers']['query']['u'])
  updates, state = jax.jit(ours.update)(grads, state, params)
  new = optax.apply_updates(params, updates)['layers']['query']
  g = grads['layers']['query']
  for layer in range(3):
    flat = [a[layer].reshape(2, 4).T for a in (v, g['v'])]
    m, n = mu.loro_step(u[layer], flat[0], g['u'][layer], flat[1], 0.2)
    got = new['u'][layer] @ new['v'][layer].reshape(2, 4)
    np.testing.assert_allclose(got, m @ n.T, rtol=1e-9, atol=1e-12)
  assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(state.factors)), 'momentum starts anew'
  with pytest.raises(ValueError, match='factors'):
    mu.loro(optax.sgd(0.1), 0.2, 1).update({'w': u}, mu.loro(optax.sgd(0.1), 0.2, 1).init({'w': u}), {'w': u})


def test_manifold_muon_on_the_sphere_is_the_tangent_step(x64, rng):
  w, g = rng.normal(size=(2, 6, 1))
  w /= np.linalg.norm(w)
  tangent = g - w * (w.T @ g)
  wanted = w - 0.1 * tangent / np.linalg.norm(tangent)
  wanted /= np.linalg.norm(wanted)
  new = mu.manifold_muon_step(w, g, 0.1, iterations=2000, rate=0.1)
  np.testing.assert_allclose(new, wanted, atol=1e-6)  # what the dual ascent leaves


@pytest.mark.parametrize('shape', ((8, 3), (64, 32), (32, 32)))
def test_manifold_muon_as_shipped_is_tangent_to_a_hundredth(rng, shape):
  w, g = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
  w, lr = np.linalg.qr(w)[0], 1e-3
  step = (w - np.asarray(mu.manifold_muon_step(w, g, lr))) / lr
  # The polar factor's own error is of order lr; float32 rounds W, divided by lr, to 1e-4.
  assert np.linalg.norm(w.T @ step + step.T @ w, 2) < 0.01 + 2 * lr


def test_fixed_rank_starts_with_the_full_maps_norm(rng):
  w = rng.normal(size=(6, 4)).astype(np.float32)
  low = mu.fixed_rank_start(w, 2)
  assert np.linalg.matrix_rank(np.asarray(low), tol=1e-5) == 2
  assert np.linalg.norm(low) == pytest.approx(np.linalg.norm(w), rel=1e-6)
  np.testing.assert_allclose(
    low / np.linalg.norm(low), mu.fixed_rank(w, 2) / np.linalg.norm(mu.fixed_rank(w, 2)), atol=1e-6
  )


def test_manifold_muon_stays_and_descends(x64, rng):
  w, g = np.linalg.qr(rng.normal(size=(8, 3)))[0], rng.normal(size=(8, 3))
  step = jax.jit(functools.partial(mu.manifold_muon_step, iterations=1000, rate=0.1))
  new = np.asarray(step(w, g, 1e-3))
  np.testing.assert_allclose(new.T @ new, np.eye(3), atol=1e-12)
  move = (new - w) / 1e-3
  assert np.linalg.norm(move, 2) == pytest.approx(1, abs=0.02)
  # No tangent direction of spectral norm 1 descends faster; the projected gradient is one of them.
  sym = 0.5 * (w.T @ g + g.T @ w)
  gradient = g - w @ sym
  assert np.sum(move * g) <= -np.sum(gradient * g) / np.linalg.norm(gradient, 2) + 1e-3


def test_wide_matrices_are_moved_by_their_transpose(x64, rng):
  w = np.linalg.qr(rng.normal(size=(6, 3)))[0]
  g = rng.normal(size=(6, 3))
  tall, wide = mu.manifold_muon(0.1), mu.manifold_muon(0.1)
  a, _ = tall.update({'w': g}, tall.init({'w': w}), {'w': jnp.asarray(w)})
  b, _ = wide.update({'w': g.T}, wide.init({'w': w.T}), {'w': jnp.asarray(w.T)})
  np.testing.assert_allclose(a['w'], b['w'].T, atol=1e-12)


MAPS = r'layers/(attention/(query|output)|feed_forward/down)/w'
CASES = {
  'fixed_rank': (MAPS, 3.0, lambda w: np.linalg.svd(w)[1][..., 3:] / np.linalg.svd(w)[1][..., :1]),
  'stiefel': (MAPS, None, lambda w: np.linalg.svd(w)[1] - 1),
  'manifold_muon': (MAPS, None, lambda w: np.linalg.svd(w)[1] - 1),
  'spectral_ball': (MAPS, 0.5, lambda w: np.maximum(np.linalg.svd(w)[1] - 0.5, 0)),
  'row_sphere': ('embedding', None, lambda w: np.linalg.norm(w, axis=-1) - 1),
  'doubly_stochastic': (r'layers/\w+_connection/b_res', None, lambda b: b.reshape(2, 4, 4).sum(1) - 1),
}


def config(manifold, pattern, value, connection=None, rank=None):
  c = base_config()
  c.model.update({'width': 8, 'depth': 2, 'heads': 2, 'ffn_width': 8})
  c.model.connection.update(connection or {'name': 'residual'})
  c.model.weights.rank = rank
  c.optimizer.update({'warmup_steps': 0, 'schedule': 'constant', 'weight_decay': 0.1})
  c.optimizer.update({'manifold': manifold, 'manifold_pattern': pattern, 'manifold_value': value})
  c.duration.steps = 3
  return c


def trained(c):
  """Parameters after no and after three updates of one batch."""
  model, optimizer = dataclasses.replace(build_model(c), vocab_size=11), build_optimizer(c)
  tokens = np.random.default_rng(0).integers(0, 11, (2, 7)).astype(np.int32)
  batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': np.zeros((2, 6), np.int32)}
  batch['weights'] = np.ones((2, 6), np.float32)
  hparams = {'lr': 0.02, 'weight_decay': 0.1, 'num_steps': 3.0, 'warmup': 0.0}
  hparams = jax.tree.map(jnp.float32, hparams)
  step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer))
  begun = state = jax.jit(functools.partial(init_state, model=model, optimizer=optimizer))(jax.random.key(0))
  losses = []
  for _ in range(3):
    state, metrics = step(state, batch, hparams)
    losses.append(float(metrics['loss']))
  return begun.params, state.params, losses


@pytest.mark.slow
@pytest.mark.parametrize('manifold', CASES)
def test_training_stays_on_the_manifold(manifold):
  pattern, value, defect = CASES[manifold]
  connection = {'name': 'hc', 'preset': 'static'} if manifold == 'doubly_stochastic' else None
  begun, ended, losses = trained(config(manifold, pattern, value, connection))
  found = mu.matches(pattern, ended)
  moved = 0
  for before, after, ours in zip(*map(jax.tree.leaves, (begun, ended, found)), strict=True):
    if ours:
      layers = after.shape[:1] if pattern.startswith('layers') else ()
      for leaf in (before, after):
        matrices = np.asarray(leaf, np.float64).reshape(*layers, leaf.shape[len(layers)], -1)
        assert np.abs(defect(matrices)).max() < 2e-6  # a few roundings of float32
      moved += bool(np.abs(after - before).max() > 1e-4)
  assert moved and losses[-1] < losses[0]


@pytest.mark.slow
def test_loro_trains_factors():
  pattern = r'layers/attention/(query|output)/[uv]'
  begun, ended, losses = trained(config('loro', pattern, 3.0, rank=2))
  assert losses[-1] < losses[0]
  for name in ('query', 'output'):  # the third update is exact, and leaves u^T u = v v^T
    moved, before = ended['layers']['attention'][name], begun['layers']['attention'][name]
    assert np.abs(moved['u'] - before['u']).max() > 1e-3
    for (u, v), balanced in (((moved['u'], moved['v']), True), ((before['u'], before['v']), False)):
      u, v = (np.asarray(x, np.float64).reshape(2, *shape) for x, shape in ((u, (-1, 2)), (v, (2, -1))))
      difference = u.swapaxes(1, 2) @ u - v @ v.swapaxes(1, 2)
      assert (np.abs(difference).max() < 2e-6) == balanced  # a few roundings of float32


@pytest.mark.parametrize('manifold', mu.MANIFOLDS)
def test_a_pattern_may_match_one_map_of_many(manifold):
  pattern = {'loro': 'layers/attention/query/[uv]', 'doubly_stochastic': 'layers/attention_connection/b_res'}
  connection, value = {'name': 'hc', 'preset': 'static'}, 2.0 if manifold in ('fixed_rank', 'loro') else None
  rank = 2 if manifold == 'loro' else None
  c = config(manifold, pattern.get(manifold, 'layers/attention/query/w'), value, connection, rank)
  assert resolve(c, 'digest').optimizer.manifold == manifold  # which traces an update


@pytest.mark.parametrize(
  'fields,message',
  (
    (('banach', 'x', None), 'must be one of fixed_rank'),
    (('stiefel', None, None), 'need each other'),
    (('fixed_rank', 'x', None), 'needs optimizer.manifold_value >= 1'),
    (('stiefel', 'layers/nothing/w', None), "no parameter matches 'layers/nothing/w'"),
    (('stiefel', 'layers/(', None), 'not a regular expression'),
    (('doubly_stochastic', 'final_norm', None), 'n x n'),
    (('loro', MAPS, 4.0), 'factors'),
  ),
)
def test_mistakes_end_in_one_line(fields, message):
  with pytest.raises(ConfigError, match=message) as error:
    resolve(config(*fields), 'digest')
  assert '\n' not in str(error.value)


def test_projected_start_does_not_change_the_others():
  c = config('stiefel', MAPS, None)
  optimizer = build_optimizer(c)
  params = {'layers': {'attention': {'query': {'w': jnp.ones((1, 2, 2))}}}, 'embedding': jnp.ones((2, 2))}
  np.testing.assert_array_equal(optim.start(optimizer, params)['embedding'], np.ones((2, 2)))
