"""Auxiliary losses of sublayers: their gradients are trained on, and the loss stays the language model's."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import model as model_module
from mhc_jax.config import base_config
from mhc_jax.layers.feed_forward import FeedForward
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import gradients, sums_and_beside

VOCAB, B, T = 11, 4, 6


class Punished(nn.Module):
  """A feed-forward sublayer with a loss on its output's squares."""

  config: object
  mesh: object = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD, seen):
    y_BTD, records = FeedForward(self.config, self.mesh, self.record, name='inner')(x_BTD, seen)
    return y_BTD, records | {'losses': {'size': 0.1 * jnp.sum(jnp.square(y_BTD))}}


def model(**fields):
  c = base_config()
  c.model.update({'width': 8, 'depth': 3, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1} | fields)
  c.model.connection.update({'name': 'residual', 'streams': 1})
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


def batch():
  rng = np.random.default_rng(0)
  token_BS = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  arrays = {'inputs': token_BS[:, :-1], 'targets': token_BS[:, 1:]}
  weights_BT = (rng.random((B, T)) < np.linspace(0.2, 1, B)[:, None]).astype(np.float32)
  return arrays | {'weights': weights_BT, 'segments': np.zeros((B, T), np.int32)}


CASES = {
  'a loop, microbatches': ({'scan': False}, 2, None),
  'recomputed layers': ({'remat': 'layer'}, None, None),
  'recomputed blocks on a mesh, microbatches': ({'remat': 'block'}, 2, {'data': 2, 'tensor': 2}),
}


@pytest.mark.parametrize('fields,parts,mesh', CASES.values(), ids=CASES)
def test_gradients_are_those_of_both_and_the_loss_is_the_models(x64, monkeypatch, fields, parts, mesh):
  """Float64 sums of some hundred terms in another order."""
  monkeypatch.setattr(model_module, 'FeedForward', Punished)
  config, mesh = model(**fields), mesh and make_mesh(mesh)
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = jax.jit(lambda key: Transformer(config).init(key, tokens, tokens)['params'])(jax.random.key(0))

  def parts_of(params):
    (total, count), beside = sums_and_beside(params, batch(), config)
    return jnp.stack([total, jnp.sum(beside.losses['size'])]) / count, beside

  (losses, beside), both = jax.jit(lambda p: (parts_of(p), jax.jacrev(lambda p: parts_of(p)[0])(p)))(params)
  program = jax.jit(lambda p: gradients(p, batch(), config, parts, mesh))
  (loss, found), grads = program(params)
  assert beside.losses['size'].shape == (3,) and (beside.losses['size'] > 1e-4).all()
  np.testing.assert_allclose(found.losses['size'], beside.losses['size'], rtol=1e-12)
  np.testing.assert_allclose(loss, losses[0], rtol=1e-13)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(both), strict=True):
    np.testing.assert_allclose(a, b[0] + b[1], rtol=0, atol=1e-12 * np.abs(b).max())
  assert any(np.abs(b[1]).max() > 0 for b in jax.tree.leaves(both))
