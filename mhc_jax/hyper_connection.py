"""Hyper-connections as pure functions: generate, read, write, expand, collapse. No Flax.

One sublayer F of a model with n residual streams x (mHC, arXiv 2512.24880, eq. 3 and 7-8):

    c = generate(params, x, spec);  h = read(c.pre, x);  x = write(c.res, c.post, x, F(h))

H_pre (`pre`) reads the streams, H_post (`post`) writes F's output to them, H_res (`res`) mixes them. What
differs between HC, mHC, iHC and their relatives is data in ConnectionSpec. Streams are stream-major
x_NBTD and stored in the model's dtype; coefficients keep tokens minor (pre_NBT, res_NMBT) and are
computed in at least float32. Axes: N streams out, M streams in, B batch, T time, D width, K coordinates.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.constraints.base import Constraint

# Float32 products of the generator take at least tf32's accuracy on accelerators (paper: phi in tf32).
PRECISION = lax.Precision.HIGH


class Coefficients(NamedTuple):
  """What generate returns. None stands for the identity (res) or for unit gates (pre, post)."""

  pre_NBT: jax.Array | None
  post_NBT: jax.Array | None
  res_NMBT: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Gate:
  """The map from a coordinate to a read or write weight: scale * kind(coordinate) + eps.

  kind 'fixed' has no coordinate: the weight is `scale` for ever.
  """

  kind: str  # 'fixed', 'linear' or 'sigmoid'
  scale: float = 1.0
  eps: float = 0.0

  def __call__(self, coords_NBT: jax.Array) -> jax.Array:
    value_NBT = jax.nn.sigmoid(coords_NBT) if self.kind == 'sigmoid' else coords_NBT
    return self.scale * value_NBT + self.eps


@dataclasses.dataclass(frozen=True)
class Init:
  """Start values. A (other, home) pair gives the bias of all streams and that of the home stream.

  The home stream of sublayer l is l mod n. mixing: off-diagonal mass of each row of H_res at the start,
  None for zero coordinates. phi: standard deviation of the generator times sqrt(its fan-in). alpha: the
  scalar in front of the generator.
  """

  read: tuple[float, float]
  write: tuple[float, float]
  mixing: float | None
  phi: float
  alpha: float


@dataclasses.dataclass(frozen=True)
class ConnectionSpec:
  """Everything that tells one connection from another; `presets.py` names the usual ones."""

  streams: int
  constraint: Constraint
  read_gate: Gate
  write_gate: Gate
  init: Init
  dynamic: bool = True  # False: biases only
  scope: str = 'joint'  # 'joint': phi sees the whole nC vector; 'per_stream': one map for every stream
  activation: str = 'none'  # 'tanh' bounds the dynamic part (HC)
  share_alpha: bool = False  # one alpha for reads and mixing (HC)
  rank: int | None = None  # rank of the generator phi; None is full
  norm_eps: float = 1e-6
  norm_eps_outside: bool = False  # 1 / (rms + eps) instead of 1 / sqrt(mean square + eps)
  collapse: str = 'mean'  # 'mean', 'sum' or 'learned'
  collapse_eps: float = 0.0

  @property
  def parts(self) -> dict[str, int]:
    """Number of coordinates of each part that has any, in the order pre, post, res."""
    n = self.streams
    sizes = {
      'pre': 0 if self.read_gate.kind == 'fixed' else n,
      'post': 0 if self.write_gate.kind == 'fixed' else n,
      'res': self.constraint.num_coordinates(n),
    }
    return {part: size for part, size in sizes.items() if size}

  @property
  def generator_shape(self) -> tuple[int, int]:
    """(number of inputs per unit of width, number of outputs) of phi."""
    outputs = sum(self.parts.values())
    return (self.streams, outputs) if self.scope == 'joint' else (1, outputs // self.streams)


def init_params(
  key: jax.Array,
  spec: ConnectionSpec,
  width: int,
  sublayer: jax.Array | int,
  phi_scale: float = 1.0,
) -> dict[str, jax.Array]:
  """Parameters of one sublayer's connection, float32 (float64 in x64), {} for a plain residual.

  phi (n, C, K), or phi_in (n, C, r) and phi_out (r, K) of the same product variance for rank r;
  alpha_PART (); b_PART (K_PART,). sublayer sets the home stream and may be traced. phi_scale
  multiplies phi's start (width transfer).
  """
  n, parts, dtype = spec.streams, spec.parts, jnp.result_type(float)
  is_home_N = jnp.arange(n) == sublayer % n
  bias = {
    'pre': lambda: jnp.where(is_home_N, spec.init.read[1], spec.init.read[0]),
    'post': lambda: jnp.where(is_home_N, spec.init.write[1], spec.init.write[0]),
    'res': lambda: (
      jnp.zeros(parts['res'])
      if spec.init.mixing is None
      else jnp.asarray(spec.constraint.identity(n, spec.init.mixing))
    ),
  }
  params = {f'b_{part}': bias[part]().astype(dtype) for part in parts}
  if not spec.dynamic or not parts:
    return params
  for part in parts:
    if not (part == 'res' and spec.share_alpha):
      params[f'alpha_{part}'] = jnp.asarray(spec.init.alpha, dtype)
  inputs, outputs = spec.generator_shape
  std = spec.init.phi * phi_scale / math.sqrt(inputs * width)
  if spec.rank is None:
    params['phi'] = std * jax.random.normal(key, (inputs, width, outputs), dtype)
  else:
    key_in, key_out = jax.random.split(key)
    params['phi_in'] = std * jax.random.normal(key_in, (inputs, width, spec.rank), dtype)
    params['phi_out'] = jax.random.normal(key_out, (spec.rank, outputs), dtype) / spec.rank**0.5
  return params


def _inverse_rms(mean_square: jax.Array, spec: ConnectionSpec) -> jax.Array:
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normed_product(phi_NDK: jax.Array, x_NBTD: jax.Array, inverse: Callable) -> jax.Array:
  """phi^T (x / rms(x)) over (n, C), as (phi^T x) / rms(x) (mHC eq. 14-16): (K, B, T).

  With a backward of its own, that keeps the streams as they are stored and makes their gradient in one
  pass; autodiff would keep them three times.
  """
  return _normed_product_forward(phi_NDK, x_NBTD, inverse)[0]


def _normed_product_forward(phi_NDK, x_NBTD, inverse):
  raw_KBT = _raw_product(phi_NDK, x_NBTD).reshape(-1, *x_NBTD.shape[1:3])
  mean_square_BT = jnp.mean(jnp.square(x_NBTD.astype(phi_NDK.dtype)), (0, 3))
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


_normed_product.defvjp(_normed_product_forward, _normed_product_backward)


def _project(params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec) -> jax.Array:
  """The generator's outputs for normed streams, before alpha: (K, B, T)."""
  phi_NDK = params['phi'] if 'phi' in params else params['phi_in']
  if 'norm_weight' in params:
    phi_NDK = params['norm_weight'][..., None] * phi_NDK
  dtype = jnp.promote_types(x_NBTD.dtype, phi_NDK.dtype)
  out_KBT = _normed_product(phi_NDK.astype(dtype), x_NBTD, functools.partial(_inverse_rms, spec=spec))
  if 'phi_out' not in params:
    return out_KBT
  out_KX = jnp.dot(params['phi_out'].T, out_KBT.reshape(len(out_KBT), -1), precision=PRECISION)
  return out_KX.reshape(-1, *out_KBT.shape[1:])


def _joint_dynamic(params, x_NBTD, spec) -> dict[str, jax.Array]:
  """The dynamic coordinates from the whole nC vector (mHC eq. 7): (K_part, B, T) of each part."""
  stops = list(itertools.accumulate(spec.parts.values()))
  return dict(zip(spec.parts, jnp.split(_project(params, x_NBTD, spec), stops[:-1]), strict=True))


def _per_stream_dynamic(params, x_NBTD, spec) -> dict[str, jax.Array]:
  """The dynamic coordinates from each stream by one shared map (HC, 2409.19606; mHC eq. 5).

  Stream j yields its own read weight, its own write weight and column j of H_res.
  """
  n, b, t, width = x_NBTD.shape
  raw_KNBT = _project(params, x_NBTD.reshape(1, n * b, t, width), spec).reshape(-1, n, b, t)
  dynamic, start = {}, 0
  for part, size in spec.parts.items():
    stop = start + size // n
    dynamic[part] = raw_KNBT[start:stop].reshape(size, b, t)
    start = stop
  return dynamic


def generate(params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec) -> Coefficients:
  """The coefficients of one sublayer (mHC eq. 7-8) from streams (n, B, T, C), in at least float32.

  pre (n, B, T), post (n, B, T), res (n, n, B, T); each coordinate is alpha * f(norm(x) phi) + b, taken
  through the gates and the constraint. A norm with a learned weight (n, C), or (1, C) per stream, is
  params['norm_weight'] in addition (the paper absorbs it in phi).
  """
  n, tokens = spec.streams, x_NBTD.shape[1:3]
  dtype = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  coords = {part: params[f'b_{part}'][:, None, None].astype(dtype) for part in spec.parts}
  if spec.dynamic and spec.parts:
    phi = {name: value for name, value in params.items() if name.startswith(('phi', 'norm_weight'))}
    dynamic = (_joint_dynamic if spec.scope == 'joint' else _per_stream_dynamic)(phi, x_NBTD, spec)
    for part, value in dynamic.items():
      alpha = params['alpha_pre' if part == 'res' and spec.share_alpha else f'alpha_{part}']
      coords[part] = coords[part] + alpha * (jnp.tanh(value) if spec.activation == 'tanh' else value)
  coords = {part: jnp.broadcast_to(value, (value.shape[0], *tokens)) for part, value in coords.items()}
  pre_NBT = _gate(spec.read_gate, coords.get('pre'), (n, *tokens), dtype)
  post_NBT = _gate(spec.write_gate, coords.get('post'), (n, *tokens), dtype)
  res_NMBT = None
  if spec.constraint.name != 'identity':  # with one stream, some sets have no coordinates
    res_NMBT = spec.constraint.matrix(coords.get('res', jnp.zeros((0, *tokens), dtype)), n)
  return Coefficients(pre_NBT, post_NBT, res_NMBT)


def _gate(gate: Gate, coords_NBT: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> jax.Array | None:
  if coords_NBT is not None:
    return gate(coords_NBT)
  return None if gate.scale == 1.0 else jnp.full(shape, gate.scale, dtype)


def _weighted_sum(weights_NBT: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  """sum_n weights_n x_n, in float32 or more, not yet rounded. Unrolled: n is small, and one pass suffices."""
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  terms = [weights_NBT[i][..., None] * x_NBTD[i].astype(wide) for i in range(x_NBTD.shape[0])]
  return functools.reduce(jnp.add, terms)


def _inner(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
  wide = jnp.promote_types(a_BTD.dtype, jnp.float32)
  return jnp.sum(a_BTD.astype(wide) * b_BTD.astype(wide), -1)


@jax.custom_vjp
def _read(pre_NBT: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  return _weighted_sum(lax.optimization_barrier(pre_NBT), x_NBTD).astype(x_NBTD.dtype)


def _read_backward(saved, g_BTD):
  pre_NBT, x_NBTD = saved
  pre_NBT, g_BTD = lax.optimization_barrier((pre_NBT, g_BTD))
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  d_pre = jnp.stack([_inner(g_BTD, x_BTD) for x_BTD in x_NBTD])
  d_x = pre_NBT[..., None] * g_BTD.astype(wide)[None]
  return d_pre.astype(pre_NBT.dtype), d_x.astype(x_NBTD.dtype)


_read.defvjp(lambda pre_NBT, x_NBTD: (_read(pre_NBT, x_NBTD), (pre_NBT, x_NBTD)), _read_backward)


def read(pre_NBT: jax.Array | None, x_NBTD: jax.Array) -> jax.Array:
  """H_pre x: the sublayer's input (B, T, C) in the streams' dtype; accumulated in float32."""
  return x_NBTD[0] if pre_NBT is None else _read(pre_NBT, x_NBTD)


@jax.custom_vjp
def _write(res_NMBT: jax.Array | None, post_NBT: jax.Array, x_NBTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  res_NMBT, post_NBT = lax.optimization_barrier((res_NMBT, post_NBT))
  new = []
  for i in range(x_NBTD.shape[0]):
    kept = x_NBTD[i].astype(wide) if res_NMBT is None else _weighted_sum(res_NMBT[i], x_NBTD)
    new.append((kept + post_NBT[i][..., None] * y_BTD.astype(wide)).astype(x_NBTD.dtype))
  return jnp.stack(new)


def _write_backward(saved, g_NBTD):
  res_NMBT, post_NBT, x_NBTD, y_BTD = saved
  res_NMBT, post_NBT, g_NBTD = lax.optimization_barrier((res_NMBT, post_NBT, g_NBTD))
  d_post = jnp.stack([_inner(g_BTD, y_BTD) for g_BTD in g_NBTD]).astype(post_NBT.dtype)
  d_y = lax.optimization_barrier(_weighted_sum(post_NBT, g_NBTD).astype(y_BTD.dtype))
  if res_NMBT is None:
    return None, d_post, g_NBTD, d_y
  d_res = jnp.stack([jnp.stack([_inner(g_BTD, x_BTD) for x_BTD in x_NBTD]) for g_BTD in g_NBTD])
  columns = [_weighted_sum(res_NMBT[:, j], g_NBTD) for j in range(x_NBTD.shape[0])]
  return d_res.astype(res_NMBT.dtype), d_post, jnp.stack(columns).astype(x_NBTD.dtype), d_y


_write.defvjp(lambda *inputs: (_write(*inputs), inputs), _write_backward)


def write(
  res_NMBT: jax.Array | None, post_NBT: jax.Array | None, x_NBTD: jax.Array, y_BTD: jax.Array
) -> jax.Array:
  """H_res x + H_post^T y (eq. 3): the new streams (n, B, T, C), accumulated in float32, rounded once.

  None stands for H_res = I and for unit writes. The sums over streams are unrolled behind barriers, with a
  backward of their own: XLA:CPU otherwise recomputes the coefficients for each element they multiply.
  """
  if post_NBT is None and res_NMBT is None:
    return x_NBTD + y_BTD[None]
  if post_NBT is None:
    post_NBT = jnp.ones(x_NBTD.shape[:3], res_NMBT.dtype)
  return _write(res_NMBT, post_NBT, x_NBTD, y_BTD)


def expand(x_BTD: jax.Array, n: int) -> jax.Array:
  """Copies the embedding to n streams: (B, T, C) -> (n, B, T, C)."""
  return jnp.broadcast_to(x_BTD[None], (n, *x_BTD.shape))


def init_collapse(spec: ConnectionSpec, width: int) -> dict[str, jax.Array]:
  """Parameters of the learned collapse (DeepSeek-V4's head), {} otherwise: phi 0, so it starts as a mean."""
  if spec.collapse != 'learned':
    return {}
  n, dtype = spec.streams, jnp.result_type(float)
  return {
    'phi': jnp.zeros((n, width, n), dtype),
    'alpha': jnp.asarray(spec.init.alpha, dtype),
    'b': jnp.full(n, -math.log(max(n - 1, 1)), dtype),  # sigmoid = 1 / n
  }


def collapse(
  x_NBTD: jax.Array,
  how: str,
  params: dict[str, jax.Array] | None = None,
  spec: ConnectionSpec | None = None,
) -> jax.Array:
  """Streams (n, B, T, C) to the output (B, T, C): 'mean', 'sum' (HC) or 'learned'.

  'learned' is DeepSeek-V4's head, sum_i (sigmoid(alpha (norm(x) phi)_i + b_i) + eps) x_i, and needs params
  and spec. Raises ValueError for another name.
  """
  if how == 'learned':
    coords_NBT = params['alpha'] * _project({'phi': params['phi']}, x_NBTD, spec) + params['b'][:, None, None]
    return read(jax.nn.sigmoid(coords_NBT) + spec.collapse_eps, x_NBTD)
  if how not in ('mean', 'sum'):
    raise ValueError(f'collapse must be mean, sum or learned, got {how!r}')
  wide_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, jnp.float32))
  total_BTD = wide_NBTD.mean(0) if how == 'mean' else wide_NBTD.sum(0)
  return total_BTD.astype(x_NBTD.dtype)
