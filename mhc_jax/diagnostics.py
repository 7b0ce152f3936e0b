"""What the coefficients of a model do to its streams: pure functions of one sequence's records.

The model records, for each of its 2L sublayers, res_NMBT (None for H_res = I) and the Gram matrix of the
streams after it. Gains follow mHC's Amax gain (arXiv 2512.24880, section 3.1 and Fig. 3, 7).
"""

from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax.config import ModelConfig


def interleave(records: list[dict[str, jax.Array]], name: str) -> jax.Array | None:
  """One recorded array over all sublayers in order, (2L, ...); None where nothing was recorded."""
  if records[0][name] is None:
    return None
  pair = jnp.stack([record[name] for record in records], 1)  # (L, 2, ...)
  return pair.reshape(-1, *pair.shape[2:])


def composites(res_SNMBT: jax.Array) -> jax.Array:
  """Products H_s ... H_1 H_0 for every sublayer s, per token: what sublayer 0's streams have become."""

  def step(product_NMBT, res_NMBT):
    product_NMBT = jnp.einsum('nkbt,kmbt->nmbt', res_NMBT, product_NMBT)
    return product_NMBT, product_NMBT

  n = res_SNMBT.shape[1]
  eye_NMBT = jnp.broadcast_to(jnp.eye(n, dtype=res_SNMBT.dtype)[:, :, None, None], res_SNMBT.shape[1:])
  return jax.lax.scan(step, eye_NMBT, res_SNMBT)[1]


def gains(h_SNMBT: jax.Array) -> dict[str, jax.Array]:
  """Amax gains of matrices (S, n, n, B, T): mean over tokens of each token's largest row or column sum.

  forward: rows, backward: columns. The paper leaves open whether the absolute value is inside the sum;
  plain names take sum |H_ij|, '_signed' take |sum H_ij| (equal for non-negative matrices).
  """
  absolute = jnp.abs(h_SNMBT)
  return {
    'gain_forward': absolute.sum(2).max(1).mean((1, 2)),
    'gain_backward': absolute.sum(1).max(1).mean((1, 2)),
    'gain_forward_signed': jnp.abs(h_SNMBT.sum(2)).max(1).mean((1, 2)),
    'gain_backward_signed': jnp.abs(h_SNMBT.sum(1)).max(1).mean((1, 2)),
  }


def stream_cosine(gram_SNMBT: jax.Array) -> jax.Array:
  """Mean cosine between two different streams after each sublayer, (S,); 1 for a single stream."""
  n = gram_SNMBT.shape[1]
  if n == 1:
    return jnp.ones(gram_SNMBT.shape[0])
  norm_SNBT = jnp.sqrt(jnp.einsum('snnbt->snbt', gram_SNMBT))
  cosine_SNMBT = gram_SNMBT / jnp.maximum(norm_SNBT[:, :, None] * norm_SNBT[:, None], 1e-30)
  return (cosine_SNMBT.sum((1, 2)) - n).mean((1, 2)) / (n * (n - 1))


def diagnose(records: list[dict[str, jax.Array]], config: ModelConfig) -> dict[str, Any]:
  """All diagnostics of one batch of sequences: name -> (2L,) array."""
  gram_SNMBT = interleave(records, 'gram_NMBT')
  res_SNMBT = interleave(records, 'res_NMBT')
  if res_SNMBT is None:
    eye_NM = jnp.eye(gram_SNMBT.shape[1], dtype=gram_SNMBT.dtype)
    res_SNMBT = jnp.broadcast_to(eye_NM[None, :, :, None, None], gram_SNMBT.shape)
  composite = {f'composite_{name}': value for name, value in gains(composites(res_SNMBT)).items()}
  defect_SBT = jax.vmap(config.connection.constraint.defect)(res_SNMBT)
  return {
    **gains(res_SNMBT),
    **composite,
    'defect': defect_SBT.max((1, 2)),
    'stream_cosine': stream_cosine(gram_SNMBT),
  }
