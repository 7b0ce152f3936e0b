"""DiLoCo and its streaming form against a plain numpy version, data parallelism and the run alone."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import config, corpus, rows

from experiments.compile.abstract_step import device_bytes, trace_step
from experiments.compile.hlo_cost import count, in_scope
from experiments.compile.hlo_text import parse_module
from mhc_jax import clusters, manifold_updates, memory, train
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.clusters import ClusterConfig
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh, put_batch, state_sharding
from mhc_jax.train_step import hparams_of, init_state, programs
from mhc_jax.weights import importing
from mhc_jax.weights.tensors import published

TIMES = ('time/', 'device/')
M, STEPS, RATE = 3, 11, 0.25
PUBLISHED = ClusterConfig(M, 4, 0.7, 0.9, 1, 0, 32)


def toy(rng):
  """Parameters of every kind: stacked layers after a single one, one number per layer, a frozen one."""
  shapes = {
    'embedding': (5, 3),
    'final_norm': (3,),
    'layer_0/feed_forward/gate/w': (3, 5),
    'layers/feed_forward/gate/w': (3, 3, 5),
    'layers/feed_forward/router_bias': (3, 4),
    'layers/attention_connection/alpha_res': (3,),
  }
  tree = {}
  for name, shape in shapes.items():
    *path, last = name.split('/')
    functools.reduce(lambda node, key: node.setdefault(key, {}), path, tree)[last] = rng.normal(size=shape)
  return tree


def slope(params, row):
  """The gradient of a loss of one row, not linear in the parameters, for numpy and JAX alike."""
  return jax.tree.map(lambda p: row * p - 1 / (1 + p * p), params)


def sgd(params, opt_state, batch):
  grads = jax.tree.map(
    lambda *leaves: sum(leaves) / len(batch['inputs']), *[slope(params, r) for r in batch['inputs']]
  )
  updates, opt_state = optax.sgd(RATE).update(grads, opt_state)
  metrics = {'loss': batch['inputs'].mean(), 'targets': jnp.asarray(len(batch['inputs']))}
  return optax.apply_updates(params, updates), opt_state, metrics


def trained(params, batches_SB, cluster, **more):
  """(outer parameters, Clusters) after every update."""
  state, every = (params, clusters.start(params, optax.sgd(RATE).init(params), cluster)), []
  hparams = clusters.hparams_of(cluster) | {'num_steps': len(batches_SB)}
  hparams |= {
    name: getattr(cluster, name) for name in ('outer_lr', 'outer_momentum')
  }  # not rounded to float32

  @jax.jit
  def step(state, batch, done):
    return clusters.update(*state, {'inputs': batch}, done, hparams, cluster, sgd, **more)[:2]

  for done, batch in enumerate(batches_SB):
    state = step(state, batch, jnp.int32(done + 1))
    every.append(jax.device_get(state))
  return every


NUMBERS = np.array([0, *(sign * 2.0**power for power in range(-6, 1) for sign in (1, -1))])


def nearest(x):
  """E3M0 by search; x: one matrix."""
  scale = np.abs(x).max()
  y = np.abs(x) / scale if scale else x
  away = np.abs(y[..., None] - np.abs(NUMBERS))
  ties = away <= away.min(-1, keepdims=True)  # the larger of two
  return np.copysign(np.where(ties, np.abs(NUMBERS), 0).max(-1) * scale, x)


def leaves_of(tree):
  return {
    jax.tree_util.keystr(p, simple=True, separator='/'): x
    for p, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def fragment_of(name, row, fragments):
  if name.startswith('layers/'):
    return (row + 1) % fragments
  return 0 if name.startswith(('embedding', 'layer_0')) else fragments - 1


def plain_numpy(params, batches_SB, c):
  """Algorithms 1 and 2, a matrix at a time."""
  flat, parts = leaves_of(params), {}
  for name, x in flat.items():
    rows_ = range(len(x)) if name.startswith('layers/') else [None]
    parts |= {(name, row): x if row is None else x[row] for row in rows_}
  outer, v = dict(parts), {key: 0 * x for key, x in parts.items()}
  workers, under_way, every = [dict(parts) for _ in range(c.workers)], {}, []
  for done, batch_B in enumerate(batches_SB, 1):
    for m, worker in enumerate(workers):
      mine = np.split(batch_B, c.workers)[m]
      for key, p in worker.items():
        worker[key] = p - RATE * sum(slope(p, row) for row in mine) / len(mine)
    end = done == len(batches_SB)
    for key in parts:
      fragment = fragment_of(*key, c.fragments)
      offset = fragment * c.sync_every // c.fragments
      frozen = key[0].endswith('router_bias')
      if done % c.sync_every == offset or end:
        moved = [outer[key] - worker[key] for worker in workers]
        moved = moved if c.outer_bits == 32 or frozen else [nearest(d) for d in moved]
        under_way[key] = (0 if end else c.overlap, sum(moved) / len(moved))
      if key in under_way and under_way[key][0] == 0:
        d = under_way.pop(key)[1]
        v[key] = v[key] if frozen else c.outer_momentum * v[key] + d
        by = d if frozen else c.outer_lr * (d + c.outer_momentum * v[key])
        outer[key] = outer[key] - by
        mix = 0.5 if c.overlap and not end else 0
        for worker in workers:
          worker[key] = mix * worker[key] + (1 - mix) * outer[key]
    under_way = {key: (left - 1, d) for key, (left, d) in under_way.items()}

    def whole(of):
      return {
        name: of[name, None] if (name, None) in of else np.stack([of[name, r] for r in range(3)])
        for name in flat
      }

    every.append((whole(outer), [whole(worker) for worker in workers]))
  return every


CASES = [
  PUBLISHED,
  dataclasses.replace(PUBLISHED, outer_bits=4, outer_momentum=0.0, outer_lr=1.0),
  dataclasses.replace(PUBLISHED, fragments=2),
  dataclasses.replace(PUBLISHED, fragments=3, overlap=2, outer_bits=4),
  dataclasses.replace(PUBLISHED, overlap=3),
]


@pytest.mark.parametrize(
  'cluster', CASES, ids=lambda c: f'{c.fragments} fragments, overlap {c.overlap}, {c.outer_bits} bits'
)
def test_every_update_is_that_of_a_plain_program(x64, rng, cluster):
  """Rounding alone: some ten float64 operations an update, on numbers of size 1."""
  params, batches = toy(rng), rng.random((STEPS, 2 * M))
  found, wanted = trained(params, batches, cluster), plain_numpy(params, batches, cluster)
  for (outer, state), (outer_wanted, workers) in zip(found, wanted, strict=True):
    for name, x in leaves_of(outer).items():
      np.testing.assert_allclose(x, outer_wanted[name], rtol=0, atol=1e-12, err_msg=name)
      of_workers = np.stack([worker[name] for worker in workers])
      np.testing.assert_allclose(leaves_of(state.params)[name], of_workers, rtol=0, atol=1e-12, err_msg=name)
  apart = [max(np.ptp(x, 0).max() for x in jax.tree.leaves(state.params)) for _, state in found]
  assert apart[0] > 0 and apart[-1] == 0, 'workers go their own ways and end at the same bits'
  assert (apart[3] == 0) == (cluster.fragments == 1 and not cluster.overlap)


def test_averages_of_every_update_are_data_parallelism(x64, rng):
  cluster = ClusterConfig(M, 1, 1.0, 0.0, 1, 0, 32)
  params, batches = toy(rng), rng.random((STEPS, 2 * M))
  alone = params
  for (outer, _), batch in zip(trained(params, batches, cluster), batches, strict=True):
    alone = sgd(alone, optax.sgd(RATE).init(alone), {'inputs': batch})[0]
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-14), outer, alone)


def test_losses_of_workers_weigh_as_their_targets(rng):
  """By layer too: loss_NAME is per target, as the loss is."""
  params, cluster = toy(rng), dataclasses.replace(PUBLISHED, workers=2)
  start = clusters.start(params, optax.sgd(RATE).init(params), cluster)

  def inner(params, opt_state, batch):
    x = batch['inputs'][0]
    metrics = {'loss': x, 'loss_index': jnp.stack([x, 2 * x]), 'grad_norm': x, 'targets': 3 * x}
    return params, opt_state, metrics

  hparams = clusters.hparams_of(cluster) | {'num_steps': 9}
  batch = {'inputs': jnp.array([1.0, 3.0])}
  metrics = clusters.update(params, start, batch, jnp.int32(1), hparams, cluster, inner)[2]
  assert float(metrics['loss']) == 2.5 and metrics['loss_index'].tolist() == [2.5, 5]
  assert float(metrics['grad_norm']) == 2 and float(metrics['targets']) == 12


def test_low_bits_are_the_nearest_numbers(rng):
  x = np.exp2(rng.uniform(-12, 3, (5, 7))).astype(np.float32) * rng.choice([-1, 1], (5, 7)).astype(np.float32)
  ties = np.array([[1, -0.75, 0.375, 3 / 256, 1 / 128, 0.99 / 128, 0]], np.float32)
  for case in (x, ties, ties * np.float32(0.3), np.zeros((1, 7), np.float32), x[:, :2], x[:1, :1]):
    codes, scale = jax.jit(clusters.encode, static_argnums=1)(case, (0, 1))
    assert codes.dtype == np.uint8 and codes.shape == (case.shape[0], -(-case.shape[1] // 2))
    back = jax.jit(clusters.decode, static_argnums=2)(codes, scale, case.shape[1])
    np.testing.assert_array_equal(back, nearest(case))


@pytest.mark.parametrize('fragments', (1, 2, 3))
def test_fragments_cover_every_number_once(rng, fragments):
  params = toy(rng)
  seen = jax.tree.map(np.zeros_like, params)
  for fragment, piece in enumerate(clusters.pieces(params, fragments)):
    part = clusters.take(seen, piece)
    seen = clusters.put(
      jax.tree.map(jnp.asarray, seen), piece, jax.tree.map(lambda x, f=fragment: x + 1 + f, part)
    )
  for name, x in leaves_of(seen).items():
    stacked = name.startswith('layers/')
    of_rows = (
      [fragment_of(name, row, fragments) for row in range(3)] if stacked else fragment_of(name, 0, fragments)
    )
    wanted = np.reshape(of_rows, (-1, *[1] * (x.ndim - 1))) if stacked else of_rows
    np.testing.assert_array_equal(x, 1 + np.broadcast_to(wanted, x.shape), err_msg=name)


def test_the_average_is_put_on_the_manifold(rng):
  pattern = 'layers/feed_forward/gate/w'
  project = functools.partial(manifold_updates.project_params, manifold_updates.row_sphere, pattern)
  for fragments in (1, 2):
    cluster = dataclasses.replace(PUBLISHED, fragments=fragments)
    outer, state = trained(toy(rng), rng.random((4, M)), cluster, project=project)[-1]
    for w in (leaves_of(outer)[pattern], leaves_of(state.params)[pattern]):
      np.testing.assert_allclose(np.linalg.norm(w, axis=-1), 1, rtol=1e-6)


@pytest.mark.parametrize('every,fragments,overlap', ((1, 1, 0), (4, 1, 0), (5, 3, 0), (5, 3, 2)))
def test_bytes_are_counted_as_they_are_sent(every, fragments, overlap):
  cluster = ClusterConfig(4, every, 1.0, 0.0, fragments, overlap, 32)
  messages, sent = [100 + fragment for fragment in range(fragments)], 0
  for step, fragment in itertools.product(range(1, 14), range(fragments)):
    sent += (step == 13 or step % every == fragment * every // fragments) * messages[fragment]
    if fragment == fragments - 1:
      assert clusters.bytes_sent(messages, cluster, step, 13) == sent


def fields(**more):
  return {f'cluster__{name}': value for name, value in more.items()}


def stepped(updates, **settings):
  """(program's text, states after each update, losses, plan) of updates on random tokens."""
  plan = resolve(config(**settings), 'digest')
  mesh, rng = make_mesh(plan.resolved['mesh']), np.random.default_rng(0)
  of_run = programs(plan.model, plan.optimizer, mesh, plan.loose)
  state, hparams = of_run.init(jax.random.key(0)), hparams_of(plan.optimizer, 10, plan.loose)
  states, losses, compiled = [], [], None
  for _ in range(updates):
    tokens = rng.integers(0, 9, (plan.resolved['data']['batch_size'], 17)).astype(np.int32)
    batch = {'inputs': tokens[:, :-1], 'targets': tokens[:, 1:], 'segments': 0 * tokens[:, 1:]}
    batch = put_batch(batch | {'weights': np.ones((len(tokens), 16), np.float32)}, mesh)
    compiled = compiled or of_run.step.lower(state, batch, hparams).compile()
    state, metrics = compiled(state, batch, hparams)
    states.append(jax.device_get(state))
    losses.append(float(metrics['loss']))
  return compiled.as_text(), states, losses, plan


def test_one_worker_is_the_run_alone_to_the_bit():
  _, alone, losses, _ = stepped(5)
  _, found, same, _ = stepped(5, **fields(workers=1, sync_every=2, outer_lr=1.0, outer_momentum=0.0))
  assert losses == same
  for before, after in zip(alone[1::2], found[1::2], strict=True):
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state.opt_state)


STREAMING = {'model__depth': 2, 'data__batch_size': 8}
STREAMING |= fields(workers=2, sync_every=3, fragments=2, overlap=1, outer_bits=4)


@functools.cache
def on_mesh():
  return stepped(4, mesh__data=2, mesh__fsdp=2, optimizer__microbatches=2, **STREAMING)


@pytest.mark.slow
def test_on_a_mesh_the_numbers_are_those_of_one_device():
  """By float32 sums in another order, which Adam's first updates enlarge where gradients vanish."""
  _, alone, losses, _ = stepped(4, **STREAMING)
  _, found, same, _ = on_mesh()
  np.testing.assert_allclose(same, losses, rtol=1e-4)
  for name, x in leaves_of(alone[-1].params).items():
    difference = np.abs(leaves_of(found[-1].params)[name] - x)
    assert np.mean(difference) < 1e-4, name


@pytest.mark.slow
def test_only_averages_go_from_worker_to_worker():
  """Of the compiled program: bytes gathered are those that are counted; outside, the numbers of the log."""
  text, states, _, plan = on_mesh()
  inside, outside = [], []
  for operation in count(parse_module(text)).operations:
    if operation.collective and len({device // 2 for device in operation.group}) > 1:
      (inside if in_scope(operation.op_name, 'synchronised') else outside).append(operation)
  assert all(max(operation.arrays) == 1 for operation in outside), 'an array crosses outside of the averaging'
  assert {operation.collective for operation in inside} == {'all-gather'}
  params = states[-1].params
  where = state_sharding(params, make_mesh(plan.resolved['mesh']))
  shards = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(at.shard_shape(x.shape), x.dtype), params, where)
  assert sum(operation.payload for operation in inside) == sum(clusters.message_bytes(shards, plan.loose))


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_one_that_was_not(tmp_path):
  """With an average under way, on a manifold; rows, outer parameters, workers and their moments."""
  settings = fields(workers=2, sync_every=4, fragments=2, overlap=2, outer_bits=4) | {'model__depth': 2}
  settings |= {'optimizer__manifold': 'row_sphere', 'optimizer__manifold_pattern': 'layers/attention/query/w'}
  plan = resolve(config(**settings), 'digest')
  abstract = programs(plan.model, plan.optimizer, make_mesh({}), plan.loose).abstract
  ends = {}
  for name, stops in (('whole', ()), ('stopped', (5, 7))):
    folder = tmp_path / name
    for stop in stops:
      status = train.run(
        config(**settings), str(folder), corpus(), quiet=True, stops_at=lambda step, at=stop: step >= at
      )
      assert status['state'] == 'interrupted' and status['step'] == stop
    assert train.run(config(**settings), str(folder), corpus(), quiet=True)['state'] == 'finished'
    kept = [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows(folder)]
    ends[name] = kept, Checkpoints(folder / 'checkpoints').restore_latest(abstract)[1]
  assert ends['whole'][0] == ends['stopped'][0]
  jax.tree.map(np.testing.assert_array_equal, ends['whole'][1], ends['stopped'][1])
  state, last = ends['whole'][1], ends['whole'][0][-1]
  jax.tree.map(
    lambda x, p: np.testing.assert_array_equal(x, np.stack([p] * 2)), state.opt_state.params, state.params
  )
  assert max(np.ptp(x, 0).max() for x in jax.tree.leaves(state.opt_state.opt_state)) > 0, 'moments stay apart'
  np.testing.assert_allclose(
    np.linalg.norm(state.params['layers']['attention']['query']['w'].reshape(2, 16, -1), axis=-1),
    1,
    rtol=1e-6,
  )
  assert last['cluster/bytes'] == plan.derived['cluster_bytes_per_token'] * last['tokens']
  assert last['cluster/bytes'] == 3 * sum(plan.derived['cluster_messages']), (
    'after 4, 6, 8 and 10 of 10 updates'
  )


def test_imported_weights_begin_with_all_workers():
  """An export of such a run brings its clusters along."""
  plan = resolve(config(**fields(workers=2, sync_every=4, overlap=1)), 'd')
  init = functools.partial(init_state, model=plan.model, optimizer=plan.optimizer, cluster=plan.loose)
  state = jax.jit(init)(jax.random.key(0))
  found = importing._state(plan, published(state.params, plan.model, folded=False))
  jax.tree.map(np.testing.assert_array_equal, found, state)


REFUSED = {
  (('sync_every', 4),): 'cluster.sync_every needs cluster.workers',
  (('workers', 2), ('fragments', 2)): 'cluster.fragments needs cluster.sync_every',
  (('workers', 3), ('sync_every', 4)): 'must be a multiple of 3: cluster.workers',
  (('workers', 0),): 'cluster.workers must be at least 1',
  (('workers', 2), ('sync_every', 0)): 'cluster.sync_every must be at least 1',
  (('workers', 2), ('sync_every', 4), ('fragments', 2)): 'fragments must lie between 1 and 1 here, got 2',
  (('workers', 2), ('sync_every', 4), ('overlap', 4)): 'overlap must lie between 0 and 3 here, got 4',
  (('workers', 2), ('sync_every', 4), ('outer_bits', 8)): 'outer_bits must be 4 or 32, got 8',
  (('workers', 2), ('sync_every', 4), ('outer_lr', 0.0)): 'outer_lr must be positive',
  (
    ('workers', 2),
    ('sync_every', 4),
    ('outer_momentum', 1.0),
  ): r'outer_momentum must lie in \[0, 1\), got 1.0',
}


@pytest.mark.parametrize('given', REFUSED, ids=lambda given: ' '.join(f'{k}={v}' for k, v in given))
def test_what_does_not_fit_is_refused(given):
  with pytest.raises(ConfigError, match=REFUSED[given]):
    resolve(config(**fields(**dict(given))), 'digest')


def test_meshes_manifolds_and_populations_that_do_not_fit_are_refused(tmp_path):
  on = fields(workers=4, sync_every=4)
  with pytest.raises(ConfigError, match=r'mesh.data=3 must be a multiple or a divisor of cluster.workers=4'):
    resolve(
      config(mesh__data=3, data__batch_size=12, evaluation__batch_size=3, evaluation__sequences=9, **on), 'd'
    )
  with pytest.raises(ConfigError, match='they have no average'):
    loro = {
      'optimizer__manifold': 'loro',
      'optimizer__manifold_pattern': '.*/[uv]',
      'optimizer__manifold_value': 4.0,
    }
    resolve(config(model__weights__rank=4, **loro, **on), 'd')
  with pytest.raises(ConfigError, match='clusters are no member of a population'):
    train.run_population([config(**on)], [str(tmp_path)], corpus())


def test_off_it_is_no_part_of_a_run_and_coupled_tightly_it_changes_no_program():
  plain, tight = resolve(config(), 'd'), resolve(config(**fields(workers=4)), 'd')
  assert plain.cluster is None and tight.loose is None and plain.shapes == tight.shapes
  assert tight.run_id != plain.run_id and 'cluster_messages' not in plain.derived
  assert tight.derived['cluster_messages'] == [2 * 3 * 4 * plain.derived['params']['total']]
  assert tight.derived['cluster_bytes_per_token'] == tight.derived['cluster_messages'][0] / 64
  loose = [
    resolve(config(**fields(workers=4, sync_every=h, outer_lr=lr)), 'd') for h, lr in ((2, 1.0), (5, 0.7))
  ]
  assert loose[0].shapes == loose[1].shapes != plain.shapes and loose[0].run_id != loose[1].run_id


def test_the_estimate_and_the_compile_report_know_of_workers():
  """State by terms is that of the abstract one, on one device and on a mesh."""
  for data, settings in (
    (1, {'workers': 4, 'sync_every': 4}),
    (2, {'workers': 4, 'sync_every': 4, 'overlap': 1}),
  ):
    c = config(mesh__data=data, model__width=32, **fields(**settings))
    plan = resolve(c, 'd')
    assert plan.derived['tokens_per_step'] == 4 * 16, 'of all workers'
    terms = memory.terms(plan)
    abstract = programs(plan.model, plan.optimizer, make_mesh({'data': data}), plan.loose).abstract
    assert terms['parameters'] + terms['optimizer state'] == pytest.approx(device_bytes(abstract), rel=1e-3)
    assert terms['gradients'] == 4 * plan.derived['params']['total'] * 4 / data
    traced, state, _, _ = trace_step(c, make_mesh({'data': data}))
    assert device_bytes(state) == device_bytes(abstract) and traced.out_info[1]['drift'].shape == ()
