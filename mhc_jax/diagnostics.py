"""What the coefficients of a model do to its streams: pure functions of one sequence's records.

The model records, for each of its S = 2L sublayers, its coefficients and their coordinates, res_NMBT (None
for H_res = I), and the Gram matrix of the streams after it. Gains follow mHC's Amax gain (arXiv
2512.24880, section 3.1 and Fig. 3, 7). `diagnose` runs on the device; `with_spectra` adds eigenvalues on
the host, because accelerators have no eigenvalues of non-symmetric matrices.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.connection import Gate
from mhc_jax.constraints.spectra import singular_values
from mhc_jax.model_config import ModelConfig


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
  plain names take sum |H_ij|, '_signed' take |sum H_ij| (equal for non-negative matrices); '_of_mean' and
  '_signed_of_mean' are those of the token-mean matrix (Fig. 8's labels).
  """
  absolute, mean_SNM = jnp.abs(h_SNMBT), h_SNMBT.mean((3, 4))
  return {
    'gain_forward': absolute.sum(2).max(1).mean((1, 2)),
    'gain_backward': absolute.sum(1).max(1).mean((1, 2)),
    'gain_forward_signed': jnp.abs(h_SNMBT.sum(2)).max(1).mean((1, 2)),
    'gain_backward_signed': jnp.abs(h_SNMBT.sum(1)).max(1).mean((1, 2)),
    'gain_forward_of_mean': jnp.abs(mean_SNM).sum(2).max(1),
    'gain_backward_of_mean': jnp.abs(mean_SNM).sum(1).max(1),
    'gain_forward_signed_of_mean': jnp.abs(mean_SNM.sum(2)).max(1),
    'gain_backward_signed_of_mean': jnp.abs(mean_SNM.sum(1)).max(1),
  }


def shape_of(h_SNMBT: jax.Array) -> dict[str, jax.Array]:
  """Means over tokens of singular values and distances (Frobenius), and the token-mean matrix itself.

  spectral_norm, sigma_min: largest and smallest singular value (float32: sigma_min below 1e-7 of the largest
  is rounding). distance_to_mean: from J/n, all streams alike; distance_to_identity: from I.
  """
  n = h_SNMBT.shape[1]
  sigma_NSBT = singular_values(jnp.moveaxis(h_SNMBT, 0, 2))

  def distance(centre_NM):
    difference = h_SNMBT - centre_NM[None, :, :, None, None]
    return jnp.sqrt(jnp.sum(jnp.square(difference), (1, 2))).mean((1, 2))

  return {
    'spectral_norm': sigma_NSBT[0].mean((1, 2)),
    'sigma_min': sigma_NSBT[-1].mean((1, 2)),
    'distance_to_mean': distance(jnp.full((n, n), 1 / n)),
    'distance_to_identity': distance(jnp.eye(n)),
    'res_mean': h_SNMBT.mean((3, 4)),
  }


def effective_rank(spectrum: jax.Array) -> jax.Array:
  """exp of the entropy of a spectrum normalised to sum 1, over the last axis (Roy and Vetterli 2007)."""
  share = jnp.maximum(spectrum, 0)
  share = share / jnp.maximum(share.sum(-1, keepdims=True), 1e-30)
  return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share), -1))


def depth_matrix(pre_SNBT: jax.Array, post_SNBT: jax.Array, res_SNMBT: jax.Array) -> jax.Array:
  """A_ts = pre_t (H_{t-1} ... H_{s+1}) post_s, (S, S, B, T): how much sublayer t reads of what s wrote.

  Zero for s >= t. Its blocks below the diagonal have rank <= n.
  """

  def step(carried_NSBT, inputs):
    t, pre_NBT, post_NBT, res_NMBT = inputs
    row_SBT = jnp.einsum('nbt,nsbt->sbt', pre_NBT, carried_NSBT)
    carried_NSBT = jnp.einsum('nmbt,msbt->nsbt', res_NMBT, carried_NSBT)
    return carried_NSBT.at[:, t].set(post_NBT), row_SBT

  s, n = pre_SNBT.shape[:2]
  empty = jnp.zeros((n, s, *pre_SNBT.shape[2:]), pre_SNBT.dtype)
  return jax.lax.scan(step, empty, (jnp.arange(s), pre_SNBT, post_SNBT, res_SNMBT))[1]


def gate_values(value_SNBT: jax.Array, gate: Gate, name: str) -> dict[str, jax.Array]:
  """Mean weight of a gate over streams and tokens; for bounded gates, the share within 1 % of its bounds."""
  out = {f'{name}_mean': value_SNBT.mean(tuple(range(1, value_SNBT.ndim)))}
  lowest = {'sigmoid': 0.0, 'softmax': 0.0, 'tanh': -1.0}.get(gate.kind)
  if lowest is not None:
    position = ((value_SNBT - gate.eps) / gate.scale - lowest) / (1 - lowest)
    saturated = (position < 0.01) | (position > 0.99)
    out[f'{name}_saturation'] = saturated.mean(tuple(range(1, value_SNBT.ndim)))
  return out


def stream_cosine(gram_SNMBT: jax.Array) -> jax.Array:
  """Mean cosine between two different streams after each sublayer, (S,); 1 for a single stream."""
  n = gram_SNMBT.shape[1]
  if n == 1:
    return jnp.ones(gram_SNMBT.shape[0])
  norm_SNBT = jnp.sqrt(jnp.einsum('snnbt->snbt', gram_SNMBT))
  cosine_SNMBT = gram_SNMBT / jnp.maximum(norm_SNBT[:, :, None] * norm_SNBT[:, None], 1e-30)
  return (cosine_SNMBT.sum((1, 2)) - n).mean((1, 2)) / (n * (n - 1))


def stream_rank(gram_SNMBT: jax.Array) -> jax.Array:
  """Effective rank of the streams (n vectors of width C) at each token, mean over tokens, (S,).

  From their singular values, the roots of the Gram matrix's eigenvalues; those that its rounding leaves of
  0 count as 0.
  """
  squares_SBTN = jnp.moveaxis(singular_values(jnp.moveaxis(gram_SNMBT, 0, 2)), 0, -1)
  rounding_SBT1 = squares_SBTN.shape[-1] * jnp.finfo(gram_SNMBT.dtype).eps * squares_SBTN[..., :1]
  sigma_SBTN = jnp.sqrt(jnp.where(squares_SBTN > rounding_SBT1, squares_SBTN, 0))
  return effective_rank(sigma_SBTN).mean((1, 2))


def diagnose(records: list[dict[str, Any]], config: ModelConfig) -> dict[str, jax.Array]:
  """All diagnostics of a batch of sequences: name -> (S,), (S, n, n) for matrices, () for the whole model.

  Sublayers in order; 'composite_' is the product of H_res up to and with each sublayer. What a connection
  has not is not there.
  """
  spec = config.connection
  gram_SNMBT = interleave(records, 'gram_NMBT')
  res_SNMBT, pre_SNBT, post_SNBT = (interleave(records, name) for name in ('res_NMBT', 'pre_NBT', 'post_NBT'))
  if res_SNMBT is None:
    eye_NM = jnp.eye(gram_SNMBT.shape[1], dtype=gram_SNMBT.dtype)
    res_SNMBT = jnp.broadcast_to(eye_NM[None, :, :, None, None], gram_SNMBT.shape)
  product_SNMBT = composites(res_SNMBT)
  composite = gains(product_SNMBT) | shape_of(product_SNMBT)
  out = gains(res_SNMBT) | shape_of(res_SNMBT)
  out |= {f'composite_{name}': value for name, value in composite.items()}
  for name, matrices in (('defect', res_SNMBT), ('composite_defect', product_SNMBT)):
    out[name] = jax.vmap(spec.constraint.defect)(matrices).max((1, 2))
  out['stream_cosine'], out['stream_rank'] = stream_cosine(gram_SNMBT), stream_rank(gram_SNMBT)
  if 'res' in records[0]['coords']:
    logits_SKBT = interleave([record['coords'] for record in records], 'res')
    out['logit_range'] = (logits_SKBT.max(1) - logits_SKBT.min(1)).mean((1, 2))
  weights = {'pre': (pre_SNBT, spec.read_gate), 'post': (post_SNBT, spec.write_gate)}
  for name, (value, gate) in weights.items():
    if value is not None:
      out |= gate_values(value, gate, name)
  if all(value is None or value.ndim == 4 for value in (pre_SNBT, post_SNBT)):
    out['depth_mean'] = _mean_depth_matrix(pre_SNBT, post_SNBT, res_SNMBT)
  return out


def _mean_depth_matrix(
  pre_SNBT: jax.Array | None, post_SNBT: jax.Array | None, res_SNMBT: jax.Array
) -> jax.Array:
  """The token-mean depth matrix, (S, S)."""
  shape = (res_SNMBT.shape[0], *res_SNMBT.shape[2:])
  if pre_SNBT is None:  # reads stream 0
    pre_SNBT = jnp.zeros(shape).at[:, 0].set(1)
  post_SNBT = jnp.ones(shape) if post_SNBT is None else post_SNBT
  return depth_matrix(pre_SNBT, post_SNBT, res_SNMBT).mean((2, 3))


def with_spectra(measures: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Adds lambda_2, the second largest modulus of eigenvalues of token-mean matrices (0 for one stream).

  And depth_rank, the effective rank of the token-mean depth matrix, in that matrix's place.
  """
  out = dict(measures)
  mean_SS = out.pop('depth_mean', None)
  if mean_SS is not None and np.isfinite(mean_SS).all():
    out['depth_rank'] = effective_rank(np.linalg.svd(mean_SS, compute_uv=False))
  for name in ('', 'composite_'):
    matrices = measures[f'{name}res_mean']
    if not np.isfinite(matrices).all():
      continue
    modulus = np.sort(np.abs(np.linalg.eigvals(matrices)), -1)
    out[f'{name}lambda_2'] = modulus[:, -2] if modulus.shape[1] > 1 else np.zeros(len(modulus))
  return out
