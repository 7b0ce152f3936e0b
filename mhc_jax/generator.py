"""The generator of a connection: from normed streams to the dynamic part of its coordinates.

    dynamic = phi^T norm(x)     (mHC, arXiv 2512.24880, eq. 7 and 14-16)

phi is a full matrix, of low rank, or a CP product; the reads of Qwen4-Exp and of attention residuals are here
too. Axes as in
hyper_connection.py, and R rank, X tokens.
"""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mhc_jax.connection import ConnectionSpec
from mhc_jax.derivatives import with_backward

# What the generator sums over C: a name for policies of recomputation.
COORDINATES = 'coordinates of connections'
# Float32 products of the generator take at least tf32's accuracy on accelerators (paper: phi in tf32).
PRECISION = lax.Precision.HIGH


def init_generator(
  key: jax.Array, spec: ConnectionSpec, width: int, phi_scale: float
) -> dict[str, jax.Array]:
  """phi (n, C, K); phi_in (n, C, R) and phi_out (R, K); or phi of the gates alone and res as a CP product.

  All with the same variance of the product. The CP product (TEMPER, arXiv 2608.07851) has factors
  phi_res_NAME (length, R): of streams, width, and each side of the matrix where res has n^2 coordinates.
  """
  inputs, outputs = spec.generator_shape
  std, rank, dtype = spec.init.phi * phi_scale / math.sqrt(inputs * width), spec.rank, jnp.result_type(float)
  if rank is None:
    return {'phi': std * jax.random.normal(key, (inputs, width, outputs), dtype)}
  if spec.generator == 'matrix':
    key_in, key_out = jax.random.split(key)
    return {
      'phi_in': std * jax.random.normal(key_in, (inputs, width, rank), dtype),
      'phi_out': jax.random.normal(key_out, (rank, outputs), dtype) / rank**0.5,
    }
  key, key_gates = jax.random.split(key)
  gates, params = outputs - spec.parts['res'], {}
  if gates:
    params['phi'] = std * jax.random.normal(key_gates, (inputs, width, gates), dtype)
  for name, size in cp_shapes(spec, width).items():
    key, key_now = jax.random.split(key)
    scale = std / rank**0.5 if name == 'width' else 1.0
    params[f'phi_res_{name}'] = scale * jax.random.normal(key_now, (size, rank), dtype)
  return params


def cp_shapes(spec: ConnectionSpec, width: int) -> dict[str, int]:
  """Factor of res -> its length, for generator 'cp'."""
  n, size = spec.units, spec.parts['res']
  sides = {'row': n, 'column': n} if size == n * n else {'out': size}
  return {'stream': n, 'width': width, **sides}


def _cp_factors(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """The gates' phi beside the CP factors of res as phi_in (n, C, K + R), and res's phi_out (R, K_res)."""
  inner_NDR = params['phi_res_stream'][:, None] * params['phi_res_width'][None]
  phi_NDK = jnp.concatenate([params['phi'], inner_NDR], -1) if 'phi' in params else inner_NDR
  if 'phi_res_out' in params:
    return phi_NDK, params['phi_res_out'].T
  rows, columns = params['phi_res_row'], params['phi_res_column']
  return phi_NDK, (rows[:, None] * columns[None]).reshape(-1, rows.shape[1]).T


def inverse_rms(mean_square: jax.Array, spec: ConnectionSpec) -> jax.Array:
  """1 / rms with the spec's eps, of mean squares."""
  if spec.norm_eps_outside:
    return 1 / (jnp.sqrt(mean_square) + spec.norm_eps)
  return lax.rsqrt(mean_square + spec.norm_eps)


def _raw_product(phi_NDK: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  """phi^T x (K, B T). One product per stream: contracting (n, C) at once, XLA:CPU transposes the streams."""
  products = [
    jnp.dot(x_BTD.astype(phi_NDK.dtype).reshape(-1, x_BTD.shape[-1]), phi_DK, precision=PRECISION)
    for x_BTD, phi_DK in zip(x_NBTD, phi_NDK, strict=True)
  ]
  # The barriers here and below keep XLA:CPU from moving transposes into the products: 3 to 8 times slower.
  return lax.optimization_barrier(functools.reduce(jnp.add, products)).T


def _normed_product(phi_NDK: jax.Array, x_NBTD: jax.Array, inverse: Callable) -> jax.Array:
  """phi^T (x / rms(x)) over (n, C), as (phi^T x) / rms(x) (mHC eq. 14-16): (K, B, T).

  With a backward of its own, that keeps the streams as they are stored and makes their gradient in one
  pass; autodiff would keep them three times.
  """
  return _normed_product_forward(phi_NDK, x_NBTD, inverse)[0]


def _normed_product_forward(phi_NDK, x_NBTD, inverse):
  raw_KBT = _raw_product(phi_NDK, x_NBTD).reshape(-1, *x_NBTD.shape[1:3])
  mean_square_BT = jnp.mean(jnp.square(x_NBTD.astype(phi_NDK.dtype)), (0, 3))
  raw_KBT, mean_square_BT = checkpoint_name((raw_KBT, mean_square_BT), COORDINATES)
  return raw_KBT * inverse(mean_square_BT)[None], (phi_NDK, x_NBTD, raw_KBT, mean_square_BT)


def _normed_product_backward(inverse, saved, g_KBT):
  phi_NDK, x_NBTD, raw_KBT, mean_square_BT = saved
  n, _, _, width = x_NBTD.shape
  inverse_BT, pull = jax.vjp(inverse, mean_square_BT)
  (d_mean_square_BT,) = pull(jnp.sum(g_KBT * raw_KBT, 0))
  scale_BT1 = (2 / (n * width) * d_mean_square_BT)[..., None]
  g_XK = lax.optimization_barrier((g_KBT * inverse_BT[None]).reshape(len(g_KBT), -1).T)
  d_phi, d_x = [], []
  for x_BTD, phi_DK in zip(x_NBTD.astype(phi_NDK.dtype), phi_NDK, strict=True):
    d_phi_KD = jnp.dot(g_XK.T, x_BTD.reshape(-1, width), precision=PRECISION)
    d_phi.append(lax.optimization_barrier(d_phi_KD).T)
    through_phi_BTD = jnp.dot(g_XK, phi_DK.T, precision=PRECISION).reshape(x_BTD.shape)
    d_x.append((through_phi_BTD + scale_BT1 * x_BTD).astype(x_NBTD.dtype))
  return jnp.stack(d_phi), jnp.stack(d_x)


_normed_product = with_backward(_normed_product, _normed_product_forward, _normed_product_backward, (2,))


def factors(params: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array | None]:
  """(phi, out): phi (n or 1, C, K) makes products with the streams, and out (R, K') maps the last R of them.

  The weight of the norm is in phi. out is None for a generator of full rank.
  """
  if 'phi_res_width' in params:
    phi_NDK, out_RK = _cp_factors(params)
  elif 'phi_in' in params:
    phi_NDK, out_RK = params['phi_in'], params['phi_out']
  else:
    phi_NDK, out_RK = params['phi'], None
  if 'norm_weight' in params:
    phi_NDK = params['norm_weight'][..., None] * phi_NDK
  return phi_NDK, out_RK


def project(params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec) -> jax.Array:
  """The generator's outputs for normed streams, before alpha: (K, B, T)."""
  phi_NDK, out_RK = factors(params)
  phi_NDK = phi_NDK.astype(jnp.promote_types(x_NBTD.dtype, phi_NDK.dtype))
  inverse = functools.partial(inverse_rms, spec=spec)
  if spec.scope == 'joint' and spec.norm_scope == 'per_stream':
    single = [_normed_product(phi_NDK[i : i + 1], x_NBTD[i : i + 1], inverse) for i in range(len(x_NBTD))]
    out_KBT = functools.reduce(jnp.add, single)
  else:
    out_KBT = _normed_product(phi_NDK, x_NBTD, inverse)
  return _outputs(out_RK, out_KBT)


def _outputs(out_RK: jax.Array | None, normed_KX: jax.Array) -> jax.Array:
  """The last R of the normed products through out, (K, *X)."""
  if out_RK is None:
    return normed_KX
  flat_KX = normed_KX.reshape(len(normed_KX), -1)
  full_KX, low_RX = flat_KX[: -len(out_RK)], flat_KX[-len(out_RK) :]
  flat_KX = jnp.concatenate([full_KX, jnp.dot(out_RK.T, low_RX, precision=PRECISION)])
  return flat_KX.reshape(-1, *normed_KX.shape[1:])


def products(spec: ConnectionSpec) -> int:
  """Number of products with the streams, K of factors()'s phi."""
  outputs = spec.generator_shape[1]
  if spec.rank is None:
    return outputs
  return spec.rank if spec.generator == 'matrix' else outputs - spec.parts['res'] + spec.rank


def separate(spec: ConnectionSpec) -> bool:
  """Whether each stream's products are normed by that stream alone, so that they are not added up before."""
  return spec.scope == 'per_stream' or spec.norm_scope == 'per_stream'


def coordinates_of_products(
  out_RK: jax.Array | None, raw_KX: jax.Array, mean_square_SX: jax.Array, spec: ConnectionSpec
) -> dict[str, jax.Array]:
  """dynamic_coordinates from phi^T x, not yet normed, and mean squares: what a kernel has summed over C.

  raw (K, *X) and mean_square (1, *X) of all streams; where they are separate, raw (n, K, *X) and (n, *X).
  """
  inverse_SX = inverse_rms(mean_square_SX, spec)
  if not separate(spec):
    return _split(_outputs(out_RK, raw_KX * inverse_SX), spec)
  normed_NKX = raw_KX * inverse_SX[:, None]
  if spec.scope == 'joint':
    return _split(_outputs(out_RK, functools.reduce(jnp.add, normed_NKX)), spec)
  return _regrouped(_outputs(out_RK, normed_NKX.swapaxes(0, 1)), spec)


def _split(out_KX: jax.Array, spec: ConnectionSpec) -> dict[str, jax.Array]:
  stops = list(itertools.accumulate(spec.parts.values()))
  return dict(zip(spec.parts, jnp.split(out_KX, stops[:-1]), strict=True))


def _regrouped(out_KNX: jax.Array, spec: ConnectionSpec) -> dict[str, jax.Array]:
  """Of one map for all streams: stream j yields coordinates j, j + n, j + 2n, ... of each part."""
  dynamic, start = {}, 0
  for part, size in spec.parts.items():
    stop = start + -(-size // spec.units)
    dynamic[part] = out_KNX[start:stop].reshape(-1, *out_KNX.shape[2:])[:size]
    start = stop
  return dynamic


def dynamic_coordinates(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec
) -> dict[str, jax.Array]:
  """phi^T norm(x), (K_part, B, T) of each part (mHC eq. 7).

  scope 'per_stream' (HC, 2409.19606; mHC eq. 5): one map for all streams, each normed on its own; stream j
  yields its own read weight, its own write weight and column j of H_res: coordinates j, j + n, j + 2n, ... of
  each part, whether n divides their number or not.
  """
  if spec.scope == 'joint':
    return _split(project(params, x_NBTD, spec), spec)
  n, b, t, width = x_NBTD.shape
  raw_KNBT = project(params, x_NBTD.reshape(1, n * b, t, width), spec).reshape(-1, n, b, t)
  return _regrouped(raw_KNBT, spec)


def init_elementwise_read(key: jax.Array, spec: ConnectionSpec, width: int) -> dict[str, jax.Array]:
  """read_down (n, C, R) and read_up (R, n, C), normal with variance 1 / fan-in."""
  n, rank, dtype = spec.streams, spec.read_rank, jnp.result_type(float)
  key_down, key_up = jax.random.split(key)
  return {
    'read_down': jax.random.normal(key_down, (n, width, rank), dtype) / (n * width) ** 0.5,
    'read_up': jax.random.normal(key_up, (rank, n, width), dtype) / rank**0.5,
  }


def elementwise_read(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec, scale: float
) -> jax.Array:
  """Read weights per stream and channel, (n, B, T, C), of Qwen4-Exp's gated residual (transformers 5.23).

  sigmoid(U silu(D v / n)) * scale of the normed streams v = norm(x) * weight, each stream by its own norm;
  the norm is part of the weights, so that read() applies them to the streams as they are.
  """
  x_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, params['read_down'].dtype))
  norm_NBT1 = inverse_rms(jnp.mean(jnp.square(x_NBTD), 3, keepdims=True), spec)
  norm_NBTD = norm_NBT1 * params['norm_weight'][:, None, None] if 'norm_weight' in params else norm_NBT1
  normed_NBTD = x_NBTD * norm_NBTD
  down = functools.partial(jnp.einsum, 'nbtd,ndr->btr', precision=PRECISION)
  hidden_BTR = jax.nn.silu(down(normed_NBTD, params['read_down']) / len(x_NBTD))
  gate_NBTD = jax.nn.sigmoid(jnp.einsum('btr,rnd->nbtd', hidden_BTR, params['read_up'], precision=PRECISION))
  return scale * gate_NBTD * norm_NBTD


def init_source_read(spec: ConnectionSpec, width: int) -> dict[str, jax.Array]:
  """read_query (C,), zeros: the mean of all sources; and norm_weight (1, C) if the spec has one."""
  dtype = jnp.result_type(float)
  weight = {'norm_weight': jnp.ones((1, width), dtype)} if spec.norm_weight else {}
  return {'read_query': jnp.zeros(width, dtype), **weight}


def source_read(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec, written: jax.Array | int
) -> jax.Array:
  """Read weights of attention residuals (arXiv 2603.15031), (n, B, T), or (n, B, T, C) with several heads.

  softmax over streams i < written of query . (weight * x_i / rms(x_i)); one softmax for each of read_heads
  slices of the channels (MHAR, arXiv 2607.27230). read_normed: of normed streams (Inkling-2), whose
  norm is part of the weights.
  """
  x_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, params['read_query'].dtype))
  inverse_NBT1 = inverse_rms(jnp.mean(jnp.square(x_NBTD), 3, keepdims=True), spec)
  query_D = (
    params['read_query'] * params['norm_weight'][0] if 'norm_weight' in params else params['read_query']
  )
  terms_NBTHK = (x_NBTD * query_D[None, None, None]).reshape(*x_NBTD.shape[:3], spec.read_heads, -1)
  logits_NBTH = jnp.sum(terms_NBTHK, 4) * inverse_NBT1
  is_written = (jnp.arange(len(x_NBTD)) < written)[:, None, None, None]
  weights_NBTH = jax.nn.softmax(jnp.where(is_written, logits_NBTH, -jnp.inf), 0)
  if spec.read_normed:
    weights_NBTH = weights_NBTH * inverse_NBT1
  if spec.read_heads == 1:
    return weights_NBTH[..., 0]
  return jnp.repeat(weights_NBTH, x_NBTD.shape[3] // spec.read_heads, 3)
