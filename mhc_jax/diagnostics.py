"""What the coefficients of a model do to its streams: pure functions of one sequence's records.

The model records, for each of its S = 2L sublayers, its coefficients and their coordinates, res_NMBT (None
for H_res = I), and the Gram matrix of the streams after it. Gains follow mHC's Amax gain (arXiv
2512.24880, section 3.1 and Fig. 3, 7). All in NumPy on the host, of records of one sequence: nothing to
compile, and accelerators have no eigenvalues of non-symmetric matrices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mhc_jax.connection import Gate
from mhc_jax.constraints.base import Constraint
from mhc_jax.model_config import ModelConfig

Array = np.ndarray


def interleave(records: list[dict[str, Any]], name: str) -> Array | None:
  """One recorded array over all sublayers in order, (2L, ...); None where nothing was recorded."""
  if records[0].get(name) is None:
    return None
  pair = np.stack([np.asarray(record[name]) for record in records], 1)  # (L, 2, ...)
  return pair.reshape(-1, *pair.shape[2:])


def composites(res_SNMBT: Array) -> Array:
  """Products H_s ... H_1 H_0 for every sublayer s, per token: what sublayer 0's streams have become."""
  products = [res_SNMBT[0]]
  for res_NMBT in res_SNMBT[1:]:
    products.append(np.einsum('nkbt,kmbt->nmbt', res_NMBT, products[-1]))
  return np.stack(products)


def gains(h_SNMBT: Array) -> dict[str, Array]:
  """Amax gains of matrices (S, n, n, B, T): mean over tokens of each token's largest row or column sum.

  forward: rows, backward: columns. The paper leaves open whether the absolute value is inside the sum;
  plain names take sum |H_ij|, '_signed' take |sum H_ij| (equal for non-negative matrices); '_of_mean' and
  '_signed_of_mean' are those of the token-mean matrix (Fig. 8's labels).
  """
  absolute, mean_SNM = np.abs(h_SNMBT), h_SNMBT.mean((3, 4))
  return {
    'gain_forward': absolute.sum(2).max(1).mean((1, 2)),
    'gain_backward': absolute.sum(1).max(1).mean((1, 2)),
    'gain_forward_signed': np.abs(h_SNMBT.sum(2)).max(1).mean((1, 2)),
    'gain_backward_signed': np.abs(h_SNMBT.sum(1)).max(1).mean((1, 2)),
    'gain_forward_of_mean': np.abs(mean_SNM).sum(2).max(1),
    'gain_backward_of_mean': np.abs(mean_SNM).sum(1).max(1),
    'gain_forward_signed_of_mean': np.abs(mean_SNM.sum(2)).max(1),
    'gain_backward_signed_of_mean': np.abs(mean_SNM.sum(1)).max(1),
  }


def singular_values(h_SNMBT: Array) -> Array:
  """Of the matrices of every token, largest first, (S, B, T, n); NaN where a matrix is not finite."""
  h_SBTNM = np.moveaxis(h_SNMBT, (1, 2), (-2, -1))
  finite_SBT11 = np.isfinite(h_SBTNM).all((-2, -1), keepdims=True)
  sigma_SBTN = np.linalg.svd(np.where(finite_SBT11, h_SBTNM, 0), compute_uv=False)
  return np.where(finite_SBT11[..., 0], sigma_SBTN, np.nan)


def shape_of(h_SNMBT: Array) -> dict[str, Array]:
  """Means over tokens of singular values and distances (Frobenius), and the token-mean matrix itself.

  spectral_norm, sigma_min: largest and smallest singular value (float32: sigma_min below 1e-7 of the largest
  is rounding). distance_to_mean: from J/n, all streams alike; distance_to_identity: from I.
  """
  n = h_SNMBT.shape[1]
  sigma_SBTN = singular_values(h_SNMBT)

  def distance(centre_NM):
    difference = h_SNMBT - centre_NM[None, :, :, None, None].astype(h_SNMBT.dtype)
    return np.sqrt(np.sum(np.square(difference), (1, 2))).mean((1, 2))

  return {
    'spectral_norm': sigma_SBTN[..., 0].mean((1, 2)),
    'sigma_min': sigma_SBTN[..., -1].mean((1, 2)),
    'distance_to_mean': distance(np.full((n, n), 1 / n)),
    'distance_to_identity': distance(np.eye(n)),
    'res_mean': h_SNMBT.mean((3, 4)),
  }


def effective_rank(spectrum: Array) -> Array:
  """exp of the entropy of a spectrum normalised to sum 1, over the last axis (Roy and Vetterli 2007)."""
  share = np.maximum(spectrum, 0)
  share = share / np.maximum(share.sum(-1, keepdims=True), 1e-30)
  return np.exp(-np.sum(share * np.log(np.where(share > 0, share, 1)), -1))


def depth_matrix(pre_SNBT: Array, post_SNBT: Array, res_SNMBT: Array) -> Array:
  """A_ts = pre_t (H_{t-1} ... H_{s+1}) post_s, (S, S, B, T): how much sublayer t reads of what s wrote.

  Zero for s >= t. Its blocks below the diagonal have rank <= n. With m fractions, weights of all their pairs
  (m N rows, fractions.py) make it (S m, S m, B, T): fraction f of t's input of fraction g of s's output.
  """
  s, n = res_SNMBT.shape[:2]
  m, tokens = pre_SNBT.shape[1] // n, pre_SNBT.shape[2:]
  pre_SFNBT, post_SFNBT = (value.reshape(s, m, n, *tokens) for value in (pre_SNBT, post_SNBT))
  carried_NSBT = np.zeros((n, s * m, *tokens), pre_SNBT.dtype)
  rows = []
  for t, (pre_FNBT, post_FNBT, res_NMBT) in enumerate(zip(pre_SFNBT, post_SFNBT, res_SNMBT, strict=True)):
    rows.append(np.einsum('fnbt,nsbt->fsbt', pre_FNBT, carried_NSBT))
    carried_NSBT = np.einsum('nmbt,msbt->nsbt', res_NMBT, carried_NSBT)
    carried_NSBT[:, t * m : (t + 1) * m] = post_FNBT.swapaxes(0, 1)
  return np.concatenate(rows)


def _of_pairs(value_SNBT: Array, m: int) -> Array:
  """Weights of units (n m) with their own fraction, as weights of all pairs (m n m); others as they are."""
  own_FN = np.arange(m)[:, None] == np.arange(value_SNBT.shape[1])[None] % m
  pairs_SFNBT = value_SNBT[:, None] * own_FN[None, :, :, None, None].astype(value_SNBT.dtype)
  return pairs_SFNBT.reshape(len(value_SNBT), -1, *value_SNBT.shape[2:])


def gate_values(value_SNBT: Array, gate: Gate, name: str) -> dict[str, Array]:
  """Mean weight of a gate over streams and tokens; for bounded gates, the share within 1 % of its bounds."""
  out = {f'{name}_mean': value_SNBT.mean(tuple(range(1, value_SNBT.ndim)))}
  lowest = {'sigmoid': 0.0, 'softmax': 0.0, 'tanh': -1.0}.get(gate.kind)
  if lowest is not None:
    position = ((value_SNBT - gate.eps) / gate.scale - lowest) / (1 - lowest)
    saturated = (position < 0.01) | (position > 0.99)
    out[f'{name}_saturation'] = saturated.mean(tuple(range(1, value_SNBT.ndim)))
  return out


def stream_cosine(gram_SNMBT: Array) -> Array:
  """Mean cosine between two different streams after each sublayer, (S,); 1 for a single stream."""
  n = gram_SNMBT.shape[1]
  if n == 1:
    return np.ones(gram_SNMBT.shape[0])
  norm_SNBT = np.sqrt(np.einsum('snnbt->snbt', gram_SNMBT))
  cosine_SNMBT = gram_SNMBT / np.maximum(norm_SNBT[:, :, None] * norm_SNBT[:, None], 1e-30)
  return (cosine_SNMBT.sum((1, 2)) - n).mean((1, 2)) / (n * (n - 1))


def stream_rank(gram_SNMBT: Array) -> Array:
  """Effective rank of the streams (n vectors of width C) at each token, mean over tokens, (S,).

  From their singular values, the roots of the Gram matrix's eigenvalues; those that its rounding leaves of
  0 count as 0.
  """
  squares_SBTN = singular_values(gram_SNMBT)
  rounding_SBT1 = squares_SBTN.shape[-1] * np.finfo(gram_SNMBT.dtype).eps * squares_SBTN[..., :1]
  sigma_SBTN = np.sqrt(np.where(squares_SBTN > rounding_SBT1, squares_SBTN, 0))
  return effective_rank(sigma_SBTN).mean((1, 2))


def sparsity(attention: dict[str, Any]) -> dict[str, Array]:
  """Means over tokens of what layers/sparse.py records, by layer, (L,); {} where attention is to all."""
  names = ('recall', 'best', 'random', 'entropy')
  given = {name: attention[f'{name}_BT'] for name in names if f'{name}_BT' in attention}
  return {f'attention_{name}': np.asarray(value_LBT).mean((1, 2)) for name, value_LBT in given.items()}


def diagnose(records: list[dict[str, Any]], config: ModelConfig) -> dict[str, Array]:
  """All diagnostics of a batch of sequences: name -> (S,), (S, n, n) for matrices, () for the whole model,
  (L,) for attention.

  Sublayers in order; 'composite_' is the product of H_res up to and with each sublayer. What a connection
  has not is not there.
  """
  spec = config.connection
  gram_SNMBT = interleave(records, 'gram_NMBT')
  res_SNMBT, pre_SNBT, post_SNBT = (interleave(records, name) for name in ('res_NMBT', 'pre_NBT', 'post_NBT'))
  if res_SNMBT is None:
    eye_NM = np.eye(gram_SNMBT.shape[1], dtype=gram_SNMBT.dtype)
    res_SNMBT = np.broadcast_to(eye_NM[None, :, :, None, None], gram_SNMBT.shape)
  # What has overflowed is to be seen in the numbers, not in warnings.
  with np.errstate(all='ignore'):
    product_SNMBT = composites(res_SNMBT)
    composite = gains(product_SNMBT) | shape_of(product_SNMBT)
    out = gains(res_SNMBT) | shape_of(res_SNMBT)
    out |= {f'composite_{name}': value for name, value in composite.items()}
    defect = _defect_of(spec.constraint)
    for name, matrices in (('defect', res_SNMBT), ('composite_defect', product_SNMBT)):
      out[name] = np.asarray(defect(matrices)).max((1, 2))
    out['stream_cosine'], out['stream_rank'] = stream_cosine(gram_SNMBT), stream_rank(gram_SNMBT)
    logits_SKBT = interleave(records, 'coords_KBT')
    if logits_SKBT is not None:
      out['logit_range'] = (logits_SKBT.max(1) - logits_SKBT.min(1)).mean((1, 2))
    for name, value, gate in (('pre', pre_SNBT, spec.read_gate), ('post', post_SNBT, spec.write_gate)):
      if value is not None:
        out |= gate_values(value, gate, name)
    fp8 = [name for name in records[0] if name.startswith('fp8_')]
    out |= {name: interleave(records, name) for name in fp8}
    scalars = all(value is None or value.ndim == 4 for value in (pre_SNBT, post_SNBT))
    if scalars and spec.read_gate.kind != 'dense':  # which go on from what they read, not from H_res x
      out |= _depth_rank(pre_SNBT, post_SNBT, res_SNMBT, spec.fractions)
    out |= sparsity(records[0])
    return out | lambda_2(out)


@functools.lru_cache(maxsize=8)
def _defect_of(constraint: Constraint) -> Callable[[Array], jax.Array]:
  """The defects of matrices (S, n, n, B, T): a function of JAX's, the one program that is compiled here."""
  return jax.jit(jax.vmap(constraint.defect))


def _depth_rank(
  pre_SNBT: Array | None, post_SNBT: Array | None, res_SNMBT: Array, m: int = 1
) -> dict[str, Array]:
  """The effective rank of the token-mean depth matrix; nothing where it is not finite."""
  shape = (res_SNMBT.shape[0], *res_SNMBT.shape[2:])
  if pre_SNBT is None:  # reads stream 0
    pre_SNBT = np.zeros(shape, res_SNMBT.dtype)
    pre_SNBT[:, :m] = 1
  post_SNBT = np.ones(shape, res_SNMBT.dtype) if post_SNBT is None else post_SNBT
  if m > 1:
    units = res_SNMBT.shape[1]
    pre_SNBT, post_SNBT = (
      _of_pairs(value, m) if value.shape[1] == units else value for value in (pre_SNBT, post_SNBT)
    )
  mean_SS = depth_matrix(pre_SNBT, post_SNBT, res_SNMBT).mean((2, 3))
  if not np.isfinite(mean_SS).all():
    return {}
  return {'depth_rank': effective_rank(np.linalg.svd(mean_SS, compute_uv=False))}


def lambda_2(measures: dict[str, Array]) -> dict[str, Array]:
  """The second largest modulus of eigenvalues of the token-mean matrices (0 for one stream), if finite."""
  out = {}
  for name in ('', 'composite_'):
    matrices = measures[f'{name}res_mean']
    if np.isfinite(matrices).all():
      modulus = np.sort(np.abs(np.linalg.eigvals(matrices)), -1)
      out[f'{name}lambda_2'] = modulus[:, -2] if modulus.shape[1] > 1 else np.zeros(len(modulus))
  return out
