"""Causal attention within documents: heads in groups that share keys and values (GQA, arXiv 2305.13245)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax.kernels.attention import splash, triton, why_not
from mhc_jax.kernels.choice import kernels_for
from mhc_jax.layers.parts import Output, Visible, linear_of, ones, rms_norm
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain, token_local


def why_formula(c: ModelConfig, mesh: Mesh | None, time: int) -> str | None:
  """For people: why attention over `time` tokens runs the formula below; None where it runs a kernel."""
  kind = kernels_for(c.kernels, mesh)
  return 'model.kernels chooses it here' if kind == 'xla' else why_not(time, c.dtype)


def visible(segments_BT: jax.Array, c: ModelConfig, mesh: Mesh | None) -> Visible:
  """What `attention` is told by the model, once for all layers."""
  formula = why_formula(c, mesh, segments_BT.shape[1]) is not None
  return Visible(segments_BT, causal_mask(segments_BT) if formula else None)


@jax.named_scope('attention_scores')
def causal_mask(segments_BT: jax.Array) -> jax.Array:
  """(B, T, T) booleans: query t sees key s <= t of the same document."""
  time_T = jnp.arange(segments_BT.shape[1])
  causal_TT = time_T[:, None] >= time_T[None]
  return causal_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None])


@jax.named_scope('attention_scores')  # a part whose cost experiments/compile reports
def attention(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, seen: Visible, c: ModelConfig, mesh: Mesh | None
) -> jax.Array:
  """Causal attention within documents of H query heads in G groups: the formula, or a kernel (why_formula).

  Returns (B, T, H, size of a value) in v's dtype. Each device runs a kernel on its own sequences and heads;
  XLA, which cannot cut a kernel, cuts the formula.
  """
  if seen.mask_BTS is not None:
    return formula(q_BTHK, k_BSGK, v_BSGK, seen.mask_BTS, c.attention_scale)
  kind = kernels_for(c.kernels, mesh)
  kernel = triton if kind == 'gpu' else functools.partial(splash, interpret=kind == 'interpret')
  local = token_local(
    functools.partial(kernel, scale=c.attention_scale), mesh, ('BSHK', 'BSGK', 'BSGK', 'BS'), 'BSHK'
  )
  return local(q_BTHK, k_BSGK, v_BSGK, seen.segments_BT)


def formula(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, scale: float
) -> jax.Array:
  """softmax(scale q k^T) v, the definition; logits and softmax in float32."""
  batch, time, heads, head_dim = q_BTHK.shape
  groups = k_BSGK.shape[2]
  wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
  q_BTGRK = q_BTHK.reshape(batch, time, groups, heads // groups, head_dim)
  logits_BGRTS = jnp.einsum('btgrk,bsgk->bgrts', q_BTGRK, k_BSGK, preferred_element_type=wide)
  logits_BGRTS = jnp.where(mask_BTS[:, None, None], logits_BGRTS * scale, jnp.finfo(wide).min)
  weights_BGRTS = jax.nn.softmax(logits_BGRTS, -1).astype(v_BSGK.dtype)
  return jnp.einsum('bgrts,bsgk->btgrk', weights_BGRTS, v_BSGK).reshape(batch, time, heads, -1)


class Attention(nn.Module):
  """RMSNorm and grouped-query attention: (B, T, D) -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, seen: Visible) -> Output:
    c = self.config
    linear = linear_of(c, self.mesh)
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)  # every time step on every device of `tensor`, in one gather
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    k_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='key')(x_BTD)
    v_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='value')(x_BTD)
    q_BTHK = constrain(q_BTHK, 'BTHK', self.mesh)
    k_BSGK, v_BSGK = constrain(k_BSGK, 'BSGK', self.mesh), constrain(v_BSGK, 'BSGK', self.mesh)
    q_BTHK, k_BSGK = rope(q_BTHK, c.rope_theta), rope(k_BSGK, c.rope_theta)
    out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, seen, c, self.mesh)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * c.head_dim)
    return linear((c.heads * c.head_dim, c.width), gain=c.output_gain, name='output')(out_BTE), {}


def rope(x_BTHK: jax.Array, theta: float) -> jax.Array:
  """Rotates the pairs (k, k + K/2) of every head by position * theta^(-2k/K); K must be even."""
  half = x_BTHK.shape[-1] // 2
  wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
  frequency_K = theta ** (-jnp.arange(half, dtype=wide) / half)
  angle_TK = jnp.arange(x_BTHK.shape[1], dtype=wide)[:, None] * frequency_K[None]
  cos_1T1K, sin_1T1K = jnp.cos(angle_TK)[None, :, None], jnp.sin(angle_TK)[None, :, None]
  first, second = jnp.split(x_BTHK.astype(wide), 2, -1)
  rotated = (first * cos_1T1K - second * sin_1T1K, second * cos_1T1K + first * sin_1T1K)
  return jnp.concatenate(rotated, -1).astype(x_BTHK.dtype)
