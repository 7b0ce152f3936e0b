"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax.layers import fp8, sparse
from mhc_jax.layers.attention import attention_of
from mhc_jax.layers.parts import Output, Visible, linear_of, ones, rms_norm, rope
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain


class LatentAttention(nn.Module):
  """RMSNorm and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): (B, T, D) -> (B, T, D).

  Keys and values of all heads are made from one normalised latent of kv_rank numbers per token, with q_rank
  queries from another one. Position is in rope_dim more numbers of every query and key; the key's are the
  same for all heads.
  """

  config: ModelConfig
  mesh: Mesh | None = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, seen: Visible) -> Output:
    c, m = self.config, self.config.mla
    measured = [] if self.record else None
    linear = linear_of(c, self.mesh, measured)
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)
    latent_norm_R = self.param('latent_norm', ones, (m.kv_rank,))
    queries, query_latent_BSR = (c.heads, c.head_dim), None
    if m.q_rank is None:
      q_BTHK = linear((c.width, *queries), name='query')(x_BTD)
    else:
      query_latent_BSR = linear((c.width, m.q_rank), name='q_down')(x_BTD)
      query_norm_R = self.param('query_norm', ones, (m.q_rank,))
      query_latent_BSR = rms_norm(query_latent_BSR, query_norm_R, c.norm_eps)
      q_BTHK = linear((m.q_rank, *queries), factor_gain=1.0, name='q_up')(query_latent_BSR)
    q_BTHK, q_rope_BTHK = jnp.split(constrain(q_BTHK, 'BTHK', self.mesh), [m.head_dim], -1)
    latent_BSR = linear((c.width, m.kv_rank + m.rope_dim), name='kv_down')(x_BTD)
    latent_BSR, k_rope_BSK = jnp.split(latent_BSR, [m.kv_rank], -1)
    latent_BSR = rms_norm(latent_BSR, latent_norm_R, c.norm_eps)
    kv_up = linear((m.kv_rank, c.heads, m.head_dim + m.value_dim), factor_gain=1.0, name='kv_up')
    kv_BSHK = kv_up(latent_BSR)
    k_BSHK, v_BSHK = jnp.split(constrain(kv_BSHK, 'BSHK', self.mesh), [m.head_dim], -1)
    k_rope_BSHK = jnp.broadcast_to(rope(k_rope_BSK[:, :, None], c.rope_theta), q_rope_BTHK.shape)
    q_BTHK = jnp.concatenate([q_BTHK, rope(q_rope_BTHK, c.rope_theta)], -1)
    k_BSHK = jnp.concatenate([k_BSHK, k_rope_BSHK], -1)
    index_BTS = sparse.index_of(c, self.mesh, x_BTD, query_latent_BSR)
    out_BTHK, records = attention_of(q_BTHK, k_BSHK, v_BSHK, seen, c, self.mesh, index_BTS, self.record)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * m.value_dim)
    y_BTD = linear((c.heads * m.value_dim, c.width), gain=c.output_gain, name='output')(out_BTE)
    return y_BTD, records | fp8.records(measured)
