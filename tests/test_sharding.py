"""One update on meshes of 8 (fake) devices is the update of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from mhc_jax.config import ConfigError, base_config, build_model, build_optimizer
from mhc_jax.sharding import make_mesh, put_batch, state_sharding
from mhc_jax.train_step import programs

VOCAB, B, T = 16, 8, 8


def batch():
  rng = np.random.default_rng(0)
  token_BS = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  segments_BT = np.cumsum(rng.random((B, T)) < 0.2, 1).astype(np.int32)
  weights_BT = (rng.random((B, T)) < 0.9).astype(np.float32)  # rows count differently in the mean
  inputs_BT, targets_BT = token_BS[:, :-1].copy(), token_BS[:, 1:].copy()
  return {'inputs': inputs_BT, 'targets': targets_BT, 'weights': weights_BT, 'segments': segments_BT}


@functools.cache
def updated(arm, data, fsdp):
  """(initial state, state after two updates, metrics of the second), as they lie on the mesh.

  Adam's eps of 1 makes an update nearly proportional to its gradient: with a small one, rounding
  decides the sign of an update where the gradient vanishes.
  """
  c = base_config()
  c.model.update({'width': 16, 'depth': 2, 'heads': 2})
  c.model.connection.update({'name': arm, 'streams': 2})
  c.optimizer.warmup_steps, c.optimizer.eps, c.optimizer.clip_norm = 0, 1.0, 0.1
  mesh = make_mesh(data, fsdp)
  found = programs(build_model(c, VOCAB), build_optimizer(c), mesh)
  start = found.init(jax.random.key(0))
  initial = jax.tree.map(jnp.copy, start)  # start is donated
  hparams = {'lr': 0.1, 'weight_decay': 0.1, 'num_steps': 10.0, 'warmup': 0.0}
  inputs = (put_batch(batch(), mesh), jax.tree.map(jnp.float32, hparams))
  state, _ = found.step(start, *inputs)
  state, metrics = found.step(state, *inputs)
  return initial, state, metrics


@pytest.mark.parametrize('arm,data,fsdp', (('mhc', 2, 4), ('residual', 1, 8)))
def test_the_sharded_step_is_the_step_of_one_device(arm, data, fsdp):
  alone, sharded = updated(arm, 1, 1), updated(arm, data, fsdp)
  for before, after in zip(jax.tree.leaves(alone[0]), jax.tree.leaves(sharded[0]), strict=True):
    np.testing.assert_array_equal(before, after)
  # The only difference is the order of float32 sums over some hundred terms.
  for name, value in alone[2].items():
    assert float(sharded[2][name]) == pytest.approx(float(value), rel=1e-5), name
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(compare, sharded[1], alone[1])
  moved = 0.0
  for before, after in zip(jax.tree.leaves(alone[0].params), jax.tree.leaves(alone[1].params), strict=True):
    moved = max(moved, float(jnp.abs(before - after).max()))
  assert moved > 1e-3, 'the updates are too small to tell'


@pytest.mark.parametrize('arm,data,fsdp', (('mhc', 2, 4), ('residual', 1, 8)))
def test_fsdp_splits_every_large_parameter_and_moment(arm, data, fsdp):
  _, state, _ = updated(arm, data, fsdp)
  moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ('mu', 'nu')]
  for tree in (state.params, *moments):
    assert jax.tree.structure(tree) == jax.tree.structure(state.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      divisible = any(size % fsdp == 0 for size in leaf.shape)
      shares = leaf.size // leaf.addressable_shards[0].data.size
      assert shares == (fsdp if divisible else 1), jax.tree_util.keystr(path)
  rows = put_batch(batch(), make_mesh(data, fsdp))['inputs'].addressable_shards[0].data.shape
  assert rows == (B // (data * fsdp), T)


def test_the_largest_divisible_dimension_is_split():
  shapes = [(3, 8, 16), (16, 6), (5, 7), (), (4, 4)]
  abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  specs = [sharding.spec for sharding in state_sharding(abstract, make_mesh(2, 4))]
  assert specs[:4] == [P(None, None, 'fsdp'), P('fsdp', None), P(None, None), P()]
  assert sorted(specs[4], key=str) == [None, 'fsdp']
  assert {s.spec for s in state_sharding(abstract[:1], make_mesh(8, 1))} == {P(None, None, None)}


def test_a_mesh_larger_than_the_machine_is_refused():
  with pytest.raises(ConfigError, match=r'= 16 devices, but 8 cpu device\(s\) are here'):
    make_mesh(4, 4)
