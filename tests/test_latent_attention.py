"""Multi-head latent attention against numpy, and all gradients against the absorbed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import base_config
from mhc_jax.layers.latent_attention import LatentAttention
from mhc_jax.layers.parts import Visible
from mhc_jax.model_config import build_model

B, T, D, H, R, K, P, V = 2, 5, 12, 3, 6, 4, 2, 5  # K without position, P rotary, V of values
SEGMENTS = np.array([[0, 0, 0, 0, 0], [0, 0, 1, 1, 1]])
MASK = np.tril(np.ones((T, T), bool))[None] & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
SEEN = Visible(SEGMENTS, MASK)


def model(base_width=None):
  c = base_config()
  c.model.update({'width': D, 'depth': 1, 'heads': H, 'dtype': 'float64', 'norm_eps': 1e-3})
  c.model.mla.update({'kv_rank': R, 'head_dim': K, 'rope_dim': P, 'value_dim': V})
  c.transfer.base_width = base_width
  return dataclasses.replace(build_model(c), vocab_size=11)


@pytest.fixture
def layer(x64, rng):
  """(parameters, x), the norms' weights too at random."""
  x_BTD = jnp.asarray(rng.normal(size=(B, T, D)))
  params = jax.jit(lambda key: LatentAttention(model()).init(key, x_BTD, SEEN)['params'])(jax.random.key(0))
  params |= {name: jnp.asarray(rng.normal(1, 0.3, params[name].shape)) for name in ('norm', 'latent_norm')}
  return params, x_BTD


def rotated(x_TP):
  """The one pair of P = 2 numbers turned by the position, in radians."""
  z_T = (x_TP[:, 0] + 1j * x_TP[:, 1]) * np.exp(1j * np.arange(T))
  return np.stack([z_T.real, z_T.imag], 1)


def normed(x, weight):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * weight


def textbook(params, x_BTD, scale):
  """DeepSeek-V3's equations 1 to 11 without a query latent: loops over sequences, heads and positions."""
  p = jax.tree.map(np.asarray, params)
  rows = []
  for x_TD, mask_TT in zip(normed(np.asarray(x_BTD), p['norm']), MASK, strict=True):
    down = x_TD @ p['kv_down']['w']
    latent_TR, key_rope_TP = normed(down[:, :R], p['latent_norm']), rotated(down[:, R:])
    heads = []
    for h in range(H):
      query = x_TD @ p['query']['w'][:, h]
      up = latent_TR @ p['kv_up']['w'][:, h]
      q = np.concatenate([query[:, :K], rotated(query[:, K:])], 1)
      k = np.concatenate([up[:, :K], key_rope_TP], 1)
      out_TV = np.zeros((T, V))
      for t in range(T):
        e = np.exp(q[t] @ k[mask_TT[t]].T * scale)
        out_TV[t] = e / e.sum() @ up[mask_TT[t], K:]
      heads.append(out_TV)
    rows.append(np.concatenate(heads, 1) @ p['output']['w'])
  return np.stack(rows)


def test_it_is_the_textbook(layer):
  """Float64 rounding of some hundred additions; with transfer the scale is 1 / (K + P)."""
  for base_width, scale in ((None, (K + P) ** -0.5), (D, 1 / (K + P))):
    found = LatentAttention(model(base_width)).apply({'params': layer[0]}, layer[1], SEEN)[0]
    np.testing.assert_allclose(found, textbook(*layer, scale), rtol=1e-10, atol=1e-13)


def absorbed(params, x_BTD):
  """The same function as multi-query attention on the latent: up-projections move to queries and outputs."""
  x = x_BTD * jax.lax.rsqrt((x_BTD**2).mean(-1, keepdims=True) + 1e-3) * params['norm'][None, None]
  latent, rope = x @ params['kv_down']['w'][:, :R], x @ params['kv_down']['w'][:, R:]
  latent *= jax.lax.rsqrt((latent**2).mean(-1, keepdims=True) + 1e-3) * params['latent_norm'][None, None]
  w_q, w_up = params['query']['w'], params['kv_up']['w']
  cos, sin = jnp.cos(jnp.arange(T)), jnp.sin(jnp.arange(T))
  turn_TPP = jnp.stack([jnp.stack([cos, -sin], 1), jnp.stack([sin, cos], 1)], 1)
  scores = jnp.einsum('btd,dhk,rhk,bsr->bhts', x, w_q[..., :K], w_up[..., :K], latent)
  scores += jnp.einsum('btd,dhp,tqp,sqo,bso->bhts', x, w_q[..., K:], turn_TPP, turn_TPP, rope)
  weights = jax.nn.softmax(jnp.where(MASK[:, None], scores * (K + P) ** -0.5, -jnp.inf))
  w_out = params['output']['w'].reshape(H, V, D)
  return jnp.einsum('bhts,bsr,rhv,hvd->btd', weights, latent, w_up[..., K:], w_out)


def test_values_and_gradients_are_those_of_the_absorbed_form(layer, rng):
  weight_BTD = rng.normal(size=(B, T, D))

  def ours(params, x_BTD):
    return jnp.sum(weight_BTD * LatentAttention(model()).apply({'params': params}, x_BTD, SEEN)[0])

  def reference(params, x_BTD):
    return jnp.sum(weight_BTD * absorbed(params, x_BTD))

  found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(*layer) for f in (ours, reference))
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
    # Float64 rounding of some hundred additions.
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(b).max(), err_msg=str(path))
    assert np.abs(b).max() > 1e-3
