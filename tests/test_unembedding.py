"""The loss with its logits in pieces: the same sums and gradients, on one device and on many."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import base_config
from mhc_jax.layers import unembedding
from mhc_jax.layers.unembedding import cross_entropy_sums, pieces_of
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.sharding import constrain, make_mesh
from mhc_jax.train_step import evaluate_sums, gradients

B, T, D, V = 4, 12, 16, 24


@pytest.fixture
def arrays(rng):
  """x, the unembedding, targets and weights."""
  targets_BT, weights_BT = rng.integers(0, V, (B, T)), (rng.random((B, T)) < 0.7).astype(np.float32)
  return rng.normal(size=(B, T, D)), rng.normal(size=(D, V)), targets_BT.astype(np.int32), weights_BT


def model(dtype='float64', vocab=V):
  c = base_config()
  c.model.update({'width': D, 'depth': 1, 'heads': 2, 'dtype': dtype})
  c.transfer.base_width = D // 2  # logits are divided by 2
  return dataclasses.replace(build_model(c), vocab_size=vocab)


def program(mesh, dtype='float64'):
  def loss(x_BTD, unembedding_DV, targets_BT, weights_BT):
    x_BTD, labels = constrain(x_BTD, 'BTD', mesh), (targets_BT, weights_BT)
    total, count = cross_entropy_sums(x_BTD, unembedding_DV, labels, model(dtype), mesh)
    return 3 * total / count

  return jax.jit(jax.value_and_grad(loss, (0, 1)))


def assert_equal(found, expected, tolerance=1e-13):
  """Up to the order of float64 sums."""
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def test_pieces_leave_loss_and_gradients_as_they_are(x64, arrays, monkeypatch):
  whole = program(None)(*arrays)
  monkeypatch.setattr(unembedding, 'LARGEST', 4 * B * V * T // 3)
  assert pieces_of(B, T, V, None) == 3
  assert_equal(program(None)(*arrays), whole)
  without = jax.jit(lambda *a: cross_entropy_sums(a[0], a[1], a[2:], model(), None))(*arrays)
  assert float(3 * without[0] / without[1]) == pytest.approx(float(whole[0]), rel=1e-13)


@pytest.mark.parametrize(
  'axes', [{'data': 2, 'fsdp': 2}, {'fsdp': 2, 'tensor': 4}, {'fsdp': 4, 'tensor': 2}, {'fsdp': 1}]
)
def test_pieces_on_many_devices(x64, arrays, monkeypatch, axes):
  whole = program(None)(*arrays)
  mesh = make_mesh(axes)
  devices = mesh.size
  monkeypatch.setattr(unembedding, 'LARGEST', 4 * B * V * T // devices // 3)
  assert pieces_of(B, T, V, mesh) == 3
  assert_equal(program(mesh)(*arrays), whole)


def test_a_vocabulary_that_tensor_does_not_divide(x64, arrays, monkeypatch):
  whole = program(None)(*arrays)
  mesh = make_mesh({'fsdp': 1, 'tensor': 3, 'data': 2})
  cut = (arrays[0], arrays[1][:, : V - 1], arrays[2] % (V - 1), arrays[3])
  whole = program(None)(*cut)
  monkeypatch.setattr(unembedding, 'LARGEST', 4 * B * (V - 1) * T // 6 // 2)
  assert pieces_of(B, T, V - 1, mesh) == 2  # of the four time steps of a device
  assert_equal(program(mesh)(*cut), whole)


def test_how_many_pieces():
  assert pieces_of(8, 4096, 256, None) == 1
  assert pieces_of(5, 4096, 129280, None) == 16  # 10.6 GB in at least 10 pieces that divide 4096
  assert pieces_of(1, 13, 2**28, None) == 13


def test_no_device_sees_all_logits(arrays, monkeypatch):
  monkeypatch.setattr(unembedding, 'LARGEST', 4 * B * V * T // 8 // 3)
  mesh = make_mesh({'fsdp': 4, 'tensor': 2})
  text = program(mesh, 'float32').lower(
    *(jnp.asarray(x, jnp.float32 if x.ndim == 3 else None) for x in arrays)
  )
  text = text.compile().as_text()
  shapes = {tuple(map(int, dims.split(','))) for dims in re.findall(r'\w\[([\d,]+)\]', text)}
  assert (1, T // 3, V // 2) in shapes  # a piece of one row and half of the vocabulary
  logits = [dims for dims in shapes if len(dims) > 1 and dims[-1] in (V, V // 2) and np.prod(dims) > D * V]
  assert not logits
  gathered = re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', text)
  assert all(dims in (f'1,{T},{D}', f'{D},{V // 2}') for dims in gathered), gathered


def test_training_and_evaluation_make_pieces(monkeypatch):
  config = model('float32')
  tokens_BT = jnp.zeros((B, T), jnp.int32)
  batch = dict.fromkeys(('inputs', 'targets', 'segments'), tokens_BT) | {'weights': jnp.ones((B, T))}
  params = jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens_BT, tokens_BT)['params']

  def has_all_logits(function):
    return f'f32[{B},{T},{V}]' in str(jax.make_jaxpr(lambda params: function(params, batch, config))(params))

  assert has_all_logits(evaluate_sums)
  monkeypatch.setattr(unembedding, 'LARGEST', 4 * B * V * T // 4)
  assert not any(map(has_all_logits, (gradients, evaluate_sums)))
