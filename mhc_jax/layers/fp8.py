"""Products with weights in FP8 as DeepSeek-V3 trains (arXiv 2412.19437, section 3.3), exact on any backend.

All three products of a linear map y = x W (forward, gradients of x and of W) multiply E4M3 numbers, scaled by
448 / amax of their tile: activations and their gradients in tiles of 1 x 128 along what is contracted,
weights in blocks of 128 x 128; both factors of the weights' gradient, which contracts tokens, in tiles of
128 x 1. Sums are float32. 'fp8_tensor' is the control with one scale for each array.

Numbers are rounded to E4M3 and multiplied in float32: what the format does to training is there, its speed
is not. Tiles of tokens never leave a sequence, so that no number depends on how a batch is cut, by devices or
microbatches. One scale for an array does depend on that, and on what comes later in the sequence.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.derivatives import with_backward

FORMAT = jnp.float8_e4m3fn
LARGEST = float(jnp.finfo(FORMAT).max)  # 448
SMALLEST_NORMAL = float(jnp.finfo(FORMAT).smallest_normal)  # 2**-6
STEP = float(jnp.finfo(FORMAT).smallest_subnormal)  # 2**-9, between numbers below that

Tile = tuple[int, int] | None  # sizes on the last two axes; None is all of an array


class Tiles(NamedTuple):
  """Of rows (activations that meet weights), of weights, and of columns (products that contract tokens)."""

  row: Tile
  block: Tile
  column: Tile


TILES = {'fp8_v3': Tiles((1, 128), (128, 128), (128, 1)), 'fp8_tensor': Tiles(None, None, None)}


class Quantised(NamedTuple):
  """E4M3 numbers, and the float32 scale by which each tile of them was multiplied."""

  numbers: jax.Array
  scale: jax.Array


def rounded(x: jax.Array) -> jax.Array:
  """float32 of at most 448 to the nearest E4M3 number, ties to even; what is not finite becomes NaN.

  Rounded by arithmetic first, so that the conversion is exact: a compiler that converts by way of float16
  would round twice.
  """
  fine = jnp.round(x * (1 / STEP)) * STEP
  near = jnp.where(jnp.abs(x) < SMALLEST_NORMAL, fine, lax.reduce_precision(x, 8, 3))
  return lax.optimization_barrier(near.astype(FORMAT))


def scale_of(amax: jax.Array) -> jax.Array:
  """448 / amax in float32, not a power of two; at the most the largest number with a normal inverse, 2^126.

  So zeros stay zeros. With NaN or infinity in a tile all of it becomes NaN, and the run is seen to diverge.
  """
  scale = jnp.minimum(LARGEST / amax, 1 / jnp.finfo(jnp.float32).tiny)
  return lax.optimization_barrier(scale)  # else 1 / (448 / amax) may become amax / 448


def inverse(scale: jax.Array) -> jax.Array:
  """1 / scale, rounded to float32, by which numbers are multiplied: compilers make of a division either."""
  return lax.optimization_barrier(1 / scale)


def quantise(x: jax.Array, tile: Tile) -> Quantised:
  """x (..., M, N) in E4M3 with one scale for each tile (t, u) of the last two axes, cut short at the ends.

  Scales are (..., ceil(M / t), ceil(N / u)), or of size 1 in all axes for a tile of None. No gradient.
  """
  x = lax.stop_gradient(x).astype(jnp.float32)
  if tile is None:
    amax = jnp.max(jnp.abs(x), keepdims=True)
  else:
    (m, n), (t, u) = x.shape[-2:], tile
    filled = jnp.pad(jnp.abs(x), [(0, 0)] * (x.ndim - 2) + [(0, -m % t), (0, -n % u)])
    amax = filled.reshape(*x.shape[:-2], -(-m // t), t, -(-n // u), u).max((-3, -1))
  scale = scale_of(amax)
  return Quantised(rounded(x * _spread(scale, tile, x.shape)), scale)


def dequantise(q: Quantised, tile: Tile) -> jax.Array:
  """numbers * (1 / scale) in float32."""
  return q.numbers.astype(jnp.float32) * _spread(inverse(q.scale), tile, q.numbers.shape)


def _spread(scale: jax.Array, tile: Tile, shape: tuple[int, ...]) -> jax.Array:
  """The scale of every number."""
  if tile is None:
    return jnp.broadcast_to(scale, shape)
  for axis, size in zip((-2, -1), tile, strict=True):
    scale = lax.slice_in_dim(jnp.repeat(scale, size, axis), 0, shape[axis], axis=axis)
  return scale


def _wide(x: jax.Array) -> Any:
  return jnp.promote_types(x.dtype, jnp.float32)


def _fake(x: jax.Array, tile: Tile) -> jax.Array:
  """x as FP8 has it, in float32 or more; its gradient is straight through, as if it were x."""
  return dequantise(quantise(x, tile), tile).astype(_wide(x))


def _fake_by_rows(x_RD: jax.Array, tile_R: jax.Array, count: int) -> jax.Array:
  """The same with a scale for each column of a tile's rows. tile_R: every row's tile, ascending, of count."""
  x32_RD = lax.stop_gradient(x_RD).astype(jnp.float32)
  amax_SD = jax.ops.segment_max(jnp.abs(x32_RD), tile_R, count, indices_are_sorted=True)
  scale_SD = scale_of(jnp.maximum(amax_SD, 0))
  numbers_RD = rounded(x32_RD * scale_SD[tile_R])
  return (numbers_RD.astype(jnp.float32) * inverse(scale_SD)[tile_R]).astype(_wide(x_RD))


fake = with_backward(
  _fake,
  lambda x, tile: (_fake(x, tile), jnp.zeros((), x.dtype)),
  lambda tile, like, g: (g.astype(like.dtype),),
  (1,),
)
fake_by_rows = with_backward(
  _fake_by_rows,
  lambda x, tile, count: (_fake_by_rows(x, tile, count), jnp.zeros((), x.dtype)),
  lambda count, like, g: (g.astype(like.dtype), None),
  (2,),
)


def product(x: jax.Array, w: jax.Array, precision: str, flat: bool = True) -> jax.Array:
  """x W, (..., T, K) times (K, N), in x's dtype, by the scheme TILES[precision].

  What its backward pass keeps of x is FP8, a byte for a number and a scale for a tile; as in V3, that is what
  is tiled anew along tokens. flat: multiply with all tokens in one axis.
  """
  return _product(x, w, precision, flat)


def _dot(x: jax.Array, w: jax.Array, flat: bool) -> jax.Array:
  y = jnp.matmul(x.reshape(-1, x.shape[-1]) if flat else x, w, precision=lax.Precision.HIGHEST)
  return y.reshape(*x.shape[:-1], w.shape[-1])


def _forward(x: jax.Array, w: jax.Array, precision: str, flat: bool) -> tuple[jax.Array, Any]:
  row, block, _ = TILES[precision]
  q = quantise(x, row)
  y = _dot(dequantise(q, row).astype(_wide(x)), fake(w, block).astype(_wide(x)), flat)
  return y.astype(x.dtype), (q, w)


def _backward(precision: str, flat: bool, saved: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  (q, w), (row, block, column) = saved, TILES[precision]
  d_x = _dot(fake(g, row), fake(w, block).astype(_wide(g)).T, flat)
  x = dequantise(q, row)
  x = (x if row == column else fake(x, column)).astype(_wide(g))
  d_y = fake(g, column)
  if flat:
    x, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, g.shape[-1])
  tokens = tuple(range(x.ndim - 1))
  d_w = lax.dot_general(x, d_y, ((tokens, tokens), ((), ())), precision=lax.Precision.HIGHEST)
  return d_x.astype(g.dtype), d_w.astype(w.dtype)


_product = with_backward(lambda *args: _forward(*args)[0], _forward, _backward, (2, 3))


def measures(x: jax.Array, w: jax.Array, precision: str) -> dict[str, jax.Array]:
  """What FP8 does to one product: `shares` of x, weight_underflow of W, and the product's row errors.

  row_error: row_errors' mean over rows (tokens), and row_error_max, the largest.
  """
  wide, (row, block, _) = _wide(x), TILES[precision]
  exact = _dot(x.astype(wide), w.astype(wide), True)
  errors = row_errors(product(x.astype(wide), w, precision), exact)
  weights = {'weight_underflow': shares(w, block)['underflow']}
  return shares(x, row) | weights | {'row_error': errors.mean(), 'row_error_max': errors.max()}


def shares(x: jax.Array, tile: Tile) -> dict[str, jax.Array]:
  """Of x's numbers, what share becomes 0 without being it, and what share lies at +-448 (of a tile, one)."""
  numbers = quantise(x, tile).numbers.astype(_wide(x))
  lost, largest = (numbers == 0) & (x != 0), jnp.abs(numbers) == LARGEST
  return {'underflow': jnp.mean(lost, dtype=_wide(x)), 'saturated': jnp.mean(largest, dtype=_wide(x))}


def row_errors(y: jax.Array, exact: jax.Array) -> jax.Array:
  """|y - exact| / |exact| of every row, by Euclidean norms over the last axis; 0 where both are 0."""
  wide = _wide(y)
  y, exact = y.astype(wide), exact.astype(wide)
  square, whole = jnp.sum(jnp.square(y - exact), -1), jnp.sum(jnp.square(exact), -1)
  return jnp.sqrt(square / jnp.maximum(whole, jnp.finfo(wide).tiny))


def records(measured: Sequence[dict[str, jax.Array]] | None) -> dict[str, jax.Array]:
  """measures of a sublayer's products as its records, fp8_NAME: means, and the largest row error."""
  names = dict.fromkeys(name for one in measured or () for name in one)
  stacked = {name: jnp.stack([one[name] for one in measured if name in one]) for name in names}
  return {f'fp8_{name}': (jnp.max if name.endswith('max') else jnp.mean)(x) for name, x in stacked.items()}
