"""The two sublayers of a block as Flax modules: attention and feed-forward, each with its own pre-norm.

Where: model.py puts them between reads and writes of the streams; the mathematics is in layers/.
Axes: see model.py.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax.config import ModelConfig
from mhc_jax.layers import moe
from mhc_jax.layers.attention import attention
from mhc_jax.layers.norm import rms_norm
from mhc_jax.layers.rope import rope
from mhc_jax.sharding import constrain, splits_time


def normal(std: float):
  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.result_type(float))

  return init


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, jnp.result_type(float))


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.result_type(float))


class Linear(nn.Module):
  """x W with W of shape (in, *out), or W = U V of rank `rank` with the same variance 1 / in."""

  shape: tuple[int, ...]
  rank: int | None
  dtype: Any
  gain: float = 1.0  # multiplies the standard deviation at the start
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, outputs = self.shape[0], self.shape[1:]
    # Tokens flattened: XLA:CPU then folds the weight gradient's transposes into the product. Where time is
    # split, it would cost a gather.
    y = x if splits_time(self.mesh) else x.reshape(-1, inputs)
    if self.rank is None:
      w = self.param('w', normal(self.gain * inputs**-0.5), self.shape)
      y = y @ w.astype(self.dtype).reshape(inputs, -1)
    else:
      u = self.param('u', normal(self.gain * inputs**-0.5), (inputs, self.rank))
      v = self.param('v', normal(self.rank**-0.5), (self.rank, *outputs))
      y = (y @ u.astype(self.dtype)) @ v.astype(self.dtype).reshape(self.rank, -1)
    return y.reshape(*x.shape[:-1], *outputs)


class Attention(nn.Module):
  """RMSNorm and grouped-query attention: (B, T, D) -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    c = self.config
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype, mesh=self.mesh)
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)  # every time step on every device of `tensor`, in one gather
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    k_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='key')(x_BTD)
    v_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='value')(x_BTD)
    q_BTHK = constrain(q_BTHK, 'BTHK', self.mesh)
    k_BSGK, v_BSGK = constrain(k_BSGK, 'BSGK', self.mesh), constrain(v_BSGK, 'BSGK', self.mesh)
    q_BTHK, k_BSGK = rope(q_BTHK, c.rope_theta), rope(k_BSGK, c.rope_theta)
    out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, c.attention_scale)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * c.head_dim)
    return linear((c.heads * c.head_dim, c.width), gain=c.output_gain, name='output')(out_BTE)


class LatentAttention(nn.Module):
  """RMSNorm and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): (B, T, D) -> (B, T, D).

  Keys and values of all heads are made from one normalised latent of kv_rank numbers per token. Position is
  in rope_dim more numbers of every query and key; the key's are the same for all heads.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    c, m = self.config, self.config.mla
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype, mesh=self.mesh)
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)
    latent_norm_R = self.param('latent_norm', ones, (m.kv_rank,))
    q_BTHK = constrain(linear((c.width, c.heads, c.head_dim), name='query')(x_BTD), 'BTHK', self.mesh)
    q_BTHK, q_rope_BTHK = jnp.split(q_BTHK, [m.head_dim], -1)
    latent_BSR = linear((c.width, m.kv_rank + m.rope_dim), name='kv_down')(x_BTD)
    latent_BSR, k_rope_BSK = jnp.split(latent_BSR, [m.kv_rank], -1)
    latent_BSR = rms_norm(latent_BSR, latent_norm_R, c.norm_eps)
    kv_BSHK = linear((m.kv_rank, c.heads, m.head_dim + m.value_dim), name='kv_up')(latent_BSR)
    k_BSHK, v_BSHK = jnp.split(constrain(kv_BSHK, 'BSHK', self.mesh), [m.head_dim], -1)
    k_rope_BSHK = jnp.broadcast_to(rope(k_rope_BSK[:, :, None], c.rope_theta), q_rope_BTHK.shape)
    q_BTHK = jnp.concatenate([q_BTHK, rope(q_rope_BTHK, c.rope_theta)], -1)
    k_BSHK = jnp.concatenate([k_BSHK, k_rope_BSHK], -1)
    out_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask_BTS, c.attention_scale)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * m.value_dim)
    return linear((c.heads * m.value_dim, c.width), gain=c.output_gain, name='output')(out_BTE)


def _swiglu(x_BTD: jax.Array, width: int, c: ModelConfig, mesh: Mesh | None, prefix: str = '') -> jax.Array:
  """SwiGLU (arXiv 2002.05202) of that width; its maps belong to the calling module."""
  linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype, mesh=mesh)
  gate_BTF = linear((c.width, width), name=f'{prefix}gate')(x_BTD)
  up_BTF = linear((c.width, width), name=f'{prefix}up')(x_BTD)
  hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, 'BTF', mesh)
  return linear((width, c.width), gain=c.output_gain, name=f'{prefix}down')(hidden_BTF)


class FeedForward(nn.Module):
  """RMSNorm and SwiGLU: (B, T, D) -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    return _swiglu(constrain(x_BTD, 'BSD', self.mesh), c.ffn_width, c, self.mesh)


class MixtureOfExperts(nn.Module):
  """RMSNorm and experts (layers/moe.py): (B, T, D) -> (B, T, D), and what the routing did."""

  config: ModelConfig
  mesh: Mesh | None
  record: bool

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """load_E: tokens per routed expert; with `record` also margin_BT (moe.margin)."""
    c, m = self.config, self.config.moe
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    # Output-like, as the unembedding: wide in, E numbers out, whatever the width.
    router_DE = self.param('router', normal(1 / (c.base_width or c.width)), (c.width, m.experts))
    bias_E = self.param('router_bias', zeros, (m.experts,))
    into, out = (m.experts, c.width, m.ffn_width), (m.experts, m.ffn_width, c.width)
    weights = [
      self.param('expert_gate', normal(c.width**-0.5), into),
      self.param('expert_up', normal(c.width**-0.5), into),
      self.param('expert_down', normal(c.output_gain * m.ffn_width**-0.5), out),
    ]
    wide = jnp.promote_types(c.dtype, jnp.float32)
    router = functools.partial(jnp.einsum, 'btd,de->bte', precision=jax.lax.Precision.HIGH)  # as generator.py
    logits_BTE = router(x_BTD.astype(wide), router_DE.astype(wide)) / c.width_ratio
    routing = moe.route(logits_BTE, bias_E, m)
    y_BTD = moe.experts(x_BTD, routing, *(w.astype(c.dtype) for w in weights), self.mesh)
    if m.shared:
      x_BSD = constrain(x_BTD, 'BSD', self.mesh)
      y_BTD += _swiglu(x_BSD, m.shared * m.ffn_width, c, self.mesh, 'shared_')
    found = {'load_E': moe.expert_load(routing.index_BTA, m.experts)}
    if self.record:
      found['margin_BT'] = moe.margin(logits_BTE, bias_E, m)
    return y_BTD, found
