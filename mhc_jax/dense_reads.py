"""Dynamic dense reads (MUDD, arXiv 2502.12170): weights over all earlier layers, made from the last one.

    A = GELU(norm(x_last) W_1) W_2 + a     (eq. 6; a row for each of W ways: queries, keys, values, residual)

Streams are the embedding and each layer's output, a layer's own included once it is done. Shapes are those of
all layers, so W_1 has as many columns as the last layer's. Axes as in hyper_connection.py; W ways, R hidden.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mhc_jax.connection import ConnectionSpec
from mhc_jax.generator import COORDINATES, PRECISION, inverse_rms


def sizes(spec: ConnectionSpec, width: int, ways: int) -> dict[str, tuple[int, ...]]:
  """Shapes of the parameters of one read: W_1, W_2 and a."""
  weights = ways * spec.streams
  return {'read_down': (width, weights), 'read_up': (weights, weights), 'b_read': (weights,)}


def init(
  key: jax.Array, spec: ConnectionSpec, width: int, last: jax.Array | int, ways: int
) -> dict[str, jax.Array]:
  """read_down, variance 1 / C; read_up, zeros; b_read, 1 for stream `last`: every way reads that alone."""
  shapes, dtype = sizes(spec, width, ways), jnp.result_type(float)
  is_last_N = (jnp.arange(spec.streams) == last).astype(dtype)
  return {
    'read_down': jax.random.normal(key, shapes['read_down'], dtype) / width**0.5,
    'read_up': jnp.zeros(shapes['read_up'], dtype),
    'b_read': jnp.tile(is_last_N, ways),
  }


def weights(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec, last: jax.Array | int
) -> jax.Array:
  """(W n, B, T), ways slowest, in at least float32; 0 for streams after `last`, which may be traced."""
  down_DR = params['read_down']
  x_BTD = lax.dynamic_index_in_dim(x_NBTD, last, 0, False)
  x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, down_DR.dtype))
  inverse_BT1 = inverse_rms(jnp.mean(jnp.square(x_BTD), 2, keepdims=True), spec)
  raw_BTR = jnp.einsum('btd,dr->btr', x_BTD * inverse_BT1, down_DR, precision=PRECISION)
  hidden_BTR = jax.nn.gelu(checkpoint_name(raw_BTR, COORDINATES), approximate=False)
  weights_KBT = jnp.einsum('btr,rk->kbt', hidden_BTR, params['read_up'], precision=PRECISION)
  is_written_K = jnp.arange(len(weights_KBT)) % spec.streams <= last
  return jnp.where(is_written_K[:, None, None], weights_KBT + params['b_read'][:, None, None], 0)
