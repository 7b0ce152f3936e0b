"""Dynamic dense reads (MUDD, arXiv 2502.12170): weights over all earlier layers, made from the last one.

    A = GELU(norm(x_last) W_1) W_2 + a     (eq. 6; a row for each of W ways: queries, keys, values, residual)

Streams are the embedding and each layer's output, a layer's own included once it is done. Shapes are those of
all layers, so W_1 has as many columns as the last layer's. With depth_norm, sources are normed, without
weights, and a read is x_last + norm(sum_j A_j x_j) * post_norm, which starts small. Axes as in
hyper_connection.py; W ways, R hidden.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mhc_jax.connection import ConnectionSpec
from mhc_jax.generator import COORDINATES, PRECISION, inverse_rms


def sizes(spec: ConnectionSpec, width: int, ways: int) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters of one read: W_1, W_2, a, and weights of the norm after it."""
  weights = ways * spec.streams
  norm = {'post_norm': (ways, width)} if spec.depth_norm else {}
  return {'read_down': (width, weights), 'read_up': (weights, weights), 'b_read': (weights,), **norm}


def init(
  key: jax.Array, spec: ConnectionSpec, width: int, last: jax.Array | int, ways: int
) -> dict[str, jax.Array]:
  """read_down, variance 1 / C; read_up, zeros; b_read, 1 for stream `last`: every way reads that alone.

  With depth_norm b_read is 0 too, and post_norm 0.001.
  """
  shapes, dtype = sizes(spec, width, ways), jnp.result_type(float)
  is_last_N = (jnp.arange(spec.streams) == last).astype(dtype)
  return {
    'read_down': jax.random.normal(key, shapes['read_down'], dtype) / width**0.5,
    'read_up': jnp.zeros(shapes['read_up'], dtype),
    'b_read': jnp.tile(is_last_N * (not spec.depth_norm), ways),
    **({'post_norm': jnp.full(shapes['post_norm'], 1e-3, dtype)} if spec.depth_norm else {}),
  }


def weights(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec, last: jax.Array | int
) -> jax.Array:
  """(W n, B, T), ways slowest, in at least float32; streams after `last`, which may be traced, are zeros."""
  down_DR = params['read_down']
  x_BTD = lax.dynamic_index_in_dim(x_NBTD, last, 0, False)
  x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, down_DR.dtype))
  inverse_BT1 = inverse_rms(jnp.mean(jnp.square(x_BTD), 2, keepdims=True), spec)
  raw_BTR = jnp.einsum('btd,dr->btr', x_BTD * inverse_BT1, down_DR, precision=PRECISION)
  hidden_BTR = jax.nn.gelu(checkpoint_name(raw_BTR, COORDINATES), approximate=False)
  weights_KBT = jnp.einsum('btr,rk->kbt', hidden_BTR, params['read_up'], precision=PRECISION)
  weights_KBT = weights_KBT + params['b_read'][:, None, None]
  if not spec.depth_norm:
    return weights_KBT
  inverse_NBT = inverse_rms(jnp.mean(jnp.square(x_NBTD.astype(weights_KBT.dtype)), 3), spec)
  return weights_KBT * jnp.tile(inverse_NBT, (len(weights_KBT) // len(inverse_NBT), 1, 1))


def finished(
  params: dict[str, jax.Array],
  x_BTD: jax.Array,
  x_NBTD: jax.Array,
  spec: ConnectionSpec,
  last: jax.Array | int,
) -> jax.Array:
  """Reads (B, T, W C) as sublayers get them: beside the last stream, normed, where the spec says so."""
  if not spec.depth_norm or 'post_norm' not in params:
    return x_BTD
  post_norm_WD = params['post_norm']
  ways, width = post_norm_WD.shape
  wide_BTWD = x_BTD.reshape(*x_BTD.shape[:2], ways, width)
  wide_BTWD = wide_BTWD.astype(jnp.promote_types(x_BTD.dtype, post_norm_WD.dtype))
  inverse_BTW1 = inverse_rms(jnp.mean(jnp.square(wide_BTWD), 3, keepdims=True), spec)
  last_BT1D = lax.dynamic_index_in_dim(x_NBTD, last, 0, False)[:, :, None].astype(wide_BTWD.dtype)
  reads_BTWD = last_BT1D + wide_BTWD * inverse_BTW1 * post_norm_WD[None, None]
  return reads_BTWD.reshape(x_BTD.shape).astype(x_BTD.dtype)
