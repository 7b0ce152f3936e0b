"""One update on meshes of 8 (fake) devices is the update of one device, and streams stay where they are."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from collectives import token_arrays
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.compile.abstract_step import device_bytes
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.errors import ConfigError
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.sharding import (
  AXES,
  BATCH,
  _check_rows,
  check_mesh,
  constrain,
  make_mesh,
  partition,
  put_batch,
  state_sharding,
)
from mhc_jax.train_step import gradients, init_state, programs

# 7 divides no dimension of a parameter: an array whose size it divides has tokens.
VOCAB, B, T, N, D = 16, 8, 14, 3, 32


def batch():
  rng = np.random.default_rng(0)
  token_BS = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  segments_BT = np.cumsum(rng.random((B, T)) < 0.2, 1).astype(np.int32)
  weights_BT = (rng.random((B, T)) < 0.9).astype(np.float32)  # rows count differently in the mean
  inputs_BT, targets_BT = token_BS[:, :-1].copy(), token_BS[:, 1:].copy()
  return {'inputs': inputs_BT, 'targets': targets_BT, 'weights': weights_BT, 'segments': segments_BT}


def dense(**fields):
  """Grouped queries, SwiGLU and mHC."""
  c = base_config()
  c.model.update({'width': D, 'depth': 3, 'heads': 4, 'kv_heads': 2, 'ffn_width': 48, 'dtype': 'float64'})
  c.model.update({'scan_unroll': 1} | fields)
  c.model.connection.streams = N
  return c


def experts():
  """Latent attention, a dense layer, two with four experts, and mHC."""
  c = dense(kv_heads=None, ffn_width=None)
  c.model.mla.kv_rank = 16
  c.model.moe.update({'experts': 4, 'active': 2, 'shared': 1, 'ffn_width': 16})
  return c


MODELS = {
  'dense': (dense, None),
  'experts': (experts, None),
  'dense, in blocks and microbatches': (functools.partial(dense, remat='block'), 2),
}
MESHES = ((8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2))


def mesh_of(shape):
  return make_mesh(dict(zip(AXES, shape, strict=True)))


@functools.cache
def start(name):
  c = MODELS[name][0]()
  c.optimizer.warmup_steps = 0
  init = functools.partial(
    init_state, model=dataclasses.replace(build_model(c), vocab_size=VOCAB), optimizer=build_optimizer(c)
  )
  return jax.device_get(jax.jit(init)(jax.random.key(0)).params)


@functools.cache
def compiled(name, shape):
  """The program of loss and gradients on a mesh, and its arguments."""
  config, parts = MODELS[name]
  mesh, params = mesh_of(shape), start(name)
  where = state_sharding(params, mesh)
  program = jax.jit(
    functools.partial(
      gradients, model=dataclasses.replace(build_model(config()), vocab_size=VOCAB), parts=parts, mesh=mesh
    ),
    out_shardings=((NamedSharding(mesh, P()),) * 2, where),
  )
  arguments = (jax.device_put(params, where), put_batch(batch(), mesh))
  return program.lower(*arguments).compile(), arguments


@functools.cache
def outcome(name, shape):
  program, arguments = compiled(name, shape)
  return jax.device_get(program(*arguments))


CASES = [('experts', shape) for shape in MESHES]
CASES += [('dense', (1, 2, 2, 2)), ('dense, in blocks and microbatches', (1, 2, 2, 2))]


@pytest.mark.slow
def test_no_choice_of_experts_is_a_matter_of_rounding(x64):
  """Every token's last expert beats the first left out by far more than float64 sums differ."""
  model = dataclasses.replace(build_model(experts()), vocab_size=VOCAB)
  inputs = (batch()['inputs'], batch()['segments'])
  apply = functools.partial(Transformer(model).apply, record=1)
  _, records = jax.jit(apply)({'params': start('experts')}, *inputs)
  assert records[1]['margin_BT'].min() > 1e-8


@pytest.mark.slow
@pytest.mark.parametrize('name,shape', CASES)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(x64, name, shape):
  (loss, beside), grads = outcome(name, shape)
  (alone_loss, alone_beside), alone = outcome(name.split(',')[0], (1, 1, 1, 1))
  np.testing.assert_equal(beside.load_LE, alone_beside.load_LE)
  assert loss.dtype == np.float64 and float(loss) == pytest.approx(float(alone_loss), rel=1e-10)
  # The first sublayer's H_res mixes equal streams: where it is a leaf of its own, its gradient is rounding.
  rounding = 1e-16 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone))
  for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
    found = functools.reduce(lambda node, key: node[key.key], path, grads)
    assert np.abs(leaf).max() > 0 or path[-1].key == 'router_bias', path
    atol = max(1e-8 * np.abs(leaf).max(), rounding)
    np.testing.assert_allclose(found, leaf, rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.slow
@pytest.mark.parametrize('name,shape', CASES)
def test_streams_are_never_gathered(x64, name, shape):
  """By size: with n = 3 streams, a device's own streams are larger than one sublayer's input of all its time.

  A gather of each stream by itself has the size of such an input, so those are counted: per layer the inputs
  of attention and feed-forward, and in the backward pass the gradients of their outputs, perhaps twice.
  Where each device has whole sequences, only experts get tokens of others, one input at a time.
  """
  (data, fsdp, tensor, expert), parts = shape, MODELS[name][1] or 1
  rows, layers = B // (data * fsdp * expert * parts), 3
  own_streams, one_input = N * rows * (T // tensor) * D, rows * T * D
  text = compiled(name, shape)[0].as_text()
  found, routed = (token_arrays(text, 7 * D, routed=flag) for flag in (False, True))
  assert max(routed, default=0) <= one_input * expert
  if tensor == 1:
    assert not found
    return
  assert max(found) == one_input < own_streams
  assert 2 * layers < len(found) / parts <= 6 * layers + 2
  assert max(token_arrays(text, 7 * D, ('all-reduce',))) == one_input  # the outputs' sums over heads are seen


@pytest.fixture
def not_kept():
  """Keeps no program: unoptimised ones of several CPU devices wait for ever when read back (jaxlib 0.10)."""
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  yield
  jax.config.update(name, before)


def test_two_updates_on_a_mesh_are_those_of_one_device(not_kept):
  """From the start on: init, step and their layouts, as training calls them."""
  c = dense(dtype='float32')
  c.model.connection.name = 'identity'
  # Adam's eps of 1 makes an update nearly proportional to its gradient: with a small one, rounding
  # decides the sign of an update where the gradient vanishes.
  c.optimizer.warmup_steps, c.optimizer.eps, c.optimizer.clip_norm = 0, 1.0, 0.1
  hparams = jax.tree.map(np.float32, {'lr': 0.1, 'weight_decay': 0.1, 'num_steps': 10.0, 'warmup': 0.0})

  def updated(shape):
    mesh = mesh_of(shape)
    found = programs(dataclasses.replace(build_model(c), vocab_size=VOCAB), build_optimizer(c), mesh)
    state = found.init(jax.random.key(0))
    before, inputs = jax.device_get(state.params), put_batch(batch(), mesh)
    state, _ = found.step(state, inputs, hparams)
    state, metrics = found.step(state, inputs, hparams)
    assert jax.tree.map(lambda x: x.sharding, state) == state_sharding(state, mesh)
    return before, jax.device_get(state), metrics

  alone, sharded = updated((1, 1, 1, 1)), updated((1, 2, 2, 2))
  jax.tree.map(np.testing.assert_array_equal, alone[0], sharded[0])
  # The only difference is the order of float32 sums over some hundred terms.
  for name, value in alone[2].items():
    assert float(sharded[2][name]) == pytest.approx(float(value), rel=1e-5), name
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), sharded[1], alone[1])
  moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), alone[0], alone[1].params)
  assert max(jax.tree.leaves(moved)) > 1e-3, 'the updates are too small to tell'


@pytest.mark.parametrize('fsdp', (2, 8))
def test_parameters_and_moments_fall_as_one_over_devices(fsdp):
  """Leaves under 1024 elements are whole on every device; layers are not split among devices."""
  c = base_config()
  c.optimizer.warmup_steps = 0
  model, optimizer = dataclasses.replace(build_model(c), vocab_size=VOCAB), build_optimizer(c)
  found = {size: programs(model, optimizer, make_mesh({'fsdp': size})).abstract for size in (1, fsdp)}
  assert device_bytes(found[fsdp]) * fsdp <= 1.05 * device_bytes(found[1])
  for path, leaf in jax.tree_util.tree_leaves_with_path(found[fsdp]):
    name, spec = jax.tree_util.keystr(path, simple=True, separator='/'), leaf.sharding.spec
    assert ('fsdp' in str(spec)) == (leaf.size >= 1024), name
    assert '/layers/' not in name or spec[0] is None, name
  count = len(jax.tree.leaves(found[1].params))
  assert sum('fsdp' in str(leaf.sharding.spec) for leaf in jax.tree.leaves(found[fsdp])) > count


def test_layout_of_parameters():
  shapes = {
    'embedding': ((16, 96), P('tensor', 'fsdp')),
    'unembedding': ((96, 16), P('fsdp', 'tensor')),
    'final_norm': ((2048,), P('fsdp')),
    'layers/attention/query/w': ((4, 96, 4, 8), P(None, 'fsdp', 'tensor', None)),
    'layers/attention/output/w': ((4, 32, 96), P(None, 'tensor', 'fsdp')),
    'layers/feed_forward/gate/w': ((4, 96, 256), P(None, 'fsdp', 'tensor')),
    'layers/feed_forward/down/v': ((4, 8, 96), P(None, None, 'fsdp')),
    'layers/feed_forward/down/u': ((4, 256, 8), P(None, ('tensor', 'fsdp'), None)),
    'layers/attention_connection/phi': ((4, 2, 96, 12), P(None, None, 'fsdp', None)),
    'layers/attention_connection/b_res': ((4, 16), P(None, None)),  # small
    'layers/other': ((8, 31, 33), P('fsdp', None, None)),  # nothing else divides
    'other': ((31, 33), P(None, None)),
  }
  for prefix in ('', 'opt_state/0/mu/'):
    tree = {prefix + name: jax.ShapeDtypeStruct(shape, 'float32') for name, (shape, _) in shapes.items()}
    for name, sharding in state_sharding(tree, mesh_of((1, 2, 2, 2))).items():
      assert sharding.spec == shapes[name.removeprefix(prefix)][1], name


def test_layout_of_activations():
  mesh, whole = (
    mesh_of((1, 2, 2, 2)),
    {'N': 3, 'B': 8, 'T': 4, 'S': 4, 'H': 4, 'K': 8, 'V': 16, 'D': 8, 'F': 6},
  )
  rows, split = BATCH, ('tensor',)
  cases = {'NBTD': [(), rows, split, ()], 'BTHK': [rows, (), split, ()], 'BSD': [rows, (), ()]}
  cases |= {'BTF': [rows, (), split], 'BTV': [rows, (), split], 'BT': [rows, split]}
  for letters, expected in cases.items():
    assert partition(letters, whole, mesh) == expected, letters
  assert partition('NBTD', whole | {'B': 1}, mesh) == [(), (), split, ()]  # diagnostics of one sequence
  assert partition('BTV', whole | {'V': 257}, mesh) == [rows, split, ()]  # bytes: over time instead
  x_BTD = np.zeros((8, 4, 8))
  assert constrain(x_BTD, 'BTD', None) is x_BTD is constrain(x_BTD, 'BTD', make_mesh({}))


def test_impossible_meshes_are_refused():
  with pytest.raises(ConfigError, match=r'= 16 devices, but 8 cpu device\(s\) are here'):
    make_mesh({'data': 4, 'expert': 4})
  with pytest.raises(ConfigError, match=r'mesh.pipe is not an axis of the mesh; the axes are data, fsdp'):
    make_mesh({'pipe': 2})
  model, axes = (
    dataclasses.replace(build_model(dense()), vocab_size=VOCAB),
    {'data': 1, 'fsdp': 1, 'expert': 1},
  )
  check_mesh({**axes, 'tensor': 2}, model, T)
  with pytest.raises(ConfigError, match=r'mesh.tensor=4 does not divide model.kv_heads=2'):
    check_mesh({**axes, 'tensor': 4}, model, T)
  with pytest.raises(ConfigError, match=r'mesh.tensor=2 does not divide data.seq_len=7'):
    check_mesh({**axes, 'tensor': 2}, model, 7)


def test_rows_that_two_processes_would_share_are_refused():
  def grid(shape, processes):
    devices = np.empty(8, object)
    devices[:] = [types.SimpleNamespace(process_index=i * processes // 8) for i in range(8)]
    return devices.reshape(shape)

  _check_rows(grid((1, 2, 2, 2), 2))
  _check_rows(grid((8, 1, 1, 1), 8))
  for shape, processes in (((1, 2, 2, 2), 4), ((1, 1, 8, 1), 2)):
    with pytest.raises(ConfigError, match=r'mesh.tensor crosses processes'):
      _check_rows(grid(shape, processes))
