"""Reads and writes of streams in fractions (Frac-Connections, arXiv 2503.14125; virtual width, 2511.11238).

Each of n streams of width C is m fractions of width C / m. What H_res mixes are the n m fractions: unit
j = (stream j // m, fraction j % m), stored as streams are, x_NBTD with N = n m and D = C / m. A sublayer's
input is m reads side by side, its output is written in m fractions:

    h_f = sum_j pre[f, j] x_j,   x_i <- sum_j res[i, j] x_j + sum_f post[f, i] y_f

Weights (m N, B, T) are those of all pairs, f slowest (VWN's A and B); weights (N, B, T) leave fractions to
themselves: h_f reads units of fraction f, y_f goes to them (Frac-Connections' beta).
"""

import jax
import jax.numpy as jnp

from mhc_jax.connection import ACROSS, ConnectionSpec, Gate
from mhc_jax.stream_sums import mix


def first_weights(
  pair: tuple[float, float], gate: Gate, spec: ConnectionSpec, sublayer: jax.Array | int, across: bool
) -> jax.Array:
  """Coordinates of reads or writes at the start: a pair of other streams and home (connection.Init)."""
  units, m = jnp.arange(spec.units), spec.fractions
  start_N = jnp.where(units // m == sublayer % spec.streams, pair[1], pair[0])
  if m == 1 or not across:
    return start_N
  is_own_FN = jnp.arange(m)[:, None] == (units % m)[None]
  return jnp.where(is_own_FN, start_N[None], ACROSS[gate.kind]).reshape(-1)


def split(x_NBTD: jax.Array, m: int) -> jax.Array:
  """(n, B, T, C) -> the fractions of all streams (n m, B, T, C / m); raises where m does not divide C."""
  if m == 1:
    return x_NBTD
  n, *tokens, width = x_NBTD.shape
  return jnp.moveaxis(x_NBTD.reshape(n, *tokens, m, width // m), 3, 1).reshape(n * m, *tokens, width // m)


def merge(x_NBTD: jax.Array, m: int) -> jax.Array:
  """The inverse of split."""
  if m == 1:
    return x_NBTD
  units, *tokens, width = x_NBTD.shape
  return jnp.moveaxis(x_NBTD.reshape(units // m, m, *tokens, width), 1, 3).reshape(-1, *tokens, m * width)


def read(pre_NBT: jax.Array | None, x_NBTD: jax.Array, m: int) -> jax.Array:
  """The sublayer's input (B, T, C) of units (n m, B, T, C / m); None reads stream 0."""
  units = len(x_NBTD)
  if pre_NBT is None:
    return merge(x_NBTD[:m], m)[0]
  if len(pre_NBT) == units:
    parts = [mix(pre_NBT[f::m][None], x_NBTD[f::m])[0] for f in range(m)]
  else:
    parts = mix(pre_NBT.reshape(m, units, *pre_NBT.shape[1:]), x_NBTD)
  return jnp.concatenate(list(parts), -1).astype(x_NBTD.dtype)


def write(
  res_NMBT: jax.Array | None, post_NBT: jax.Array | None, x_NBTD: jax.Array, y_BTD: jax.Array, m: int
) -> jax.Array:
  """The new units (n m, B, T, C / m), accumulated in float32, rounded once; None as in hyper_connection."""
  units, y_FBTD = len(x_NBTD), split(y_BTD[None], m)
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  kept_NBTD = x_NBTD.astype(wide) if res_NMBT is None else mix(res_NMBT, x_NBTD)
  if post_NBT is None:
    added_NBTD = jnp.concatenate([y_FBTD] * (units // m)).astype(wide)
  elif len(post_NBT) == units:
    by_fraction = [mix(post_NBT[f::m][:, None], y_FBTD[f : f + 1]) for f in range(m)]
    added_NBTD = jnp.stack(by_fraction, 1).reshape(kept_NBTD.shape)
  else:
    added_NBTD = mix(post_NBT.reshape(m, units, *post_NBT.shape[1:]).swapaxes(0, 1), y_FBTD)
  return (kept_NBTD + added_NBTD).astype(x_NBTD.dtype)
