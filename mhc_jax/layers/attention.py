"""Causal attention within documents: heads in groups that share keys and values (GQA, arXiv 2305.13245)."""

import jax
import jax.numpy as jnp


def causal_mask(segments_BT: jax.Array) -> jax.Array:
  """(B, T, T) booleans: query t sees key s <= t of the same document."""
  time_T = jnp.arange(segments_BT.shape[1])
  causal_TT = time_T[:, None] >= time_T[None]
  return causal_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None])


def attention(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, scale: float
) -> jax.Array:
  """softmax(scale q k^T) v for H query heads in G groups of H / G; logits and softmax in float32.

  Returns (B, T, H, size of a value) in v's dtype.
  """
  batch, time, heads, head_dim = q_BTHK.shape
  groups = k_BSGK.shape[2]
  wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
  q_BTGRK = q_BTHK.reshape(batch, time, groups, heads // groups, head_dim)
  logits_BGRTS = jnp.einsum('btgrk,bsgk->bgrts', q_BTGRK, k_BSGK, preferred_element_type=wide)
  logits_BGRTS = jnp.where(mask_BTS[:, None, None], logits_BGRTS * scale, jnp.finfo(wide).min)
  weights_BGRTS = jax.nn.softmax(logits_BGRTS, -1).astype(v_BSGK.dtype)
  return jnp.einsum('bgrts,bsgk->btgrk', weights_BGRTS, v_BSGK).reshape(batch, time, heads, -1)
