"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half-split layout of GPT-NeoX."""

import jax
import jax.numpy as jnp


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
