"""Hyper-connections as pure functions: generate, read, write, expand, collapse. No Flax.

One sublayer F of a model with n residual streams x (mHC, arXiv 2512.24880, eq. 3 and 7-8):

    c = generate(params, x, spec);  h = read(c.pre, x);  x = write(c.res, c.post, x, F(h))

H_pre (`pre`) reads the streams, H_post (`post`) writes F's output to them, H_res (`res`) mixes them. What
differs between HC, mHC, iHC and their relatives is data in ConnectionSpec. Streams are stream-major
x_NBTD and stored in the model's dtype; coefficients keep tokens minor (pre_NBT, res_NMBT) and are
computed in at least float32. Axes: N streams out, M streams in, B batch, T time, D width, K coordinates; of
streams in fractions, N counts the fractions of all, and D is the width of one (fractions.py).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax import dense_reads, fractions, generator
from mhc_jax.connection import ConnectionSpec, Gate
from mhc_jax.derivatives import with_backward
from mhc_jax.stream_sums import inner, weighted_sum


class Coefficients(NamedTuple):
  """What generate returns. None stands for the identity (res), unit writes, or a read of stream 0 alone.

  An elementwise read gate has pre (n, B, T, C).
  """

  pre_NBT: jax.Array | None
  post_NBT: jax.Array | None
  res_NMBT: jax.Array | None


class Pending(NamedTuple):
  """Streams x, and a sublayer's output y that is still to be written to them, if there is one.

  pre: in single-pass order, the read weights that the sublayer before generated for the next one.
  """

  x_NBTD: jax.Array
  y_BTD: jax.Array | None = None
  post_NBT: jax.Array | None = None
  res_NMBT: jax.Array | None = None
  pre_NBT: jax.Array | None = None


def init_params(
  key: jax.Array,
  spec: ConnectionSpec,
  width: int,
  sublayer: jax.Array | int,
  phi_scale: float = 1.0,
) -> dict[str, jax.Array]:
  """Parameters of one sublayer's connection, float32 (float64 in x64), {} for a plain residual.

  b_PART (K_PART,) and alpha_PART () unless spec.phi_only; the generator's phi (generator.init_generator);
  norm_weight (n, C), or (1, C) for one map per stream. sublayer sets the home stream and may be traced.
  phi_scale multiplies phi's start (width transfer). width: of a stream; with fractions, n counts those of all
  streams and C is the width of one.
  """
  n, parts, dtype, width = spec.units, spec.parts, jnp.result_type(float), width // spec.fractions
  bias = {
    'pre': lambda: fractions.first_weights(spec.init.read, spec.read_gate, spec, sublayer, True),
    'post': lambda: fractions.first_weights(
      spec.init.write, spec.write_gate, spec, sublayer, spec.write_across
    ),
    'res': lambda: (
      jnp.zeros(parts['res'])
      if spec.init.mixing is None
      else jnp.asarray(spec.constraint.identity(n, spec.init.mixing))
    ),
  }
  params = {} if spec.phi_only else {f'b_{part}': bias[part]().astype(dtype) for part in parts}
  if spec.dynamic and parts:
    for part in () if spec.phi_only else parts:
      params[f'alpha_{spec.alpha_of(part)}'] = jnp.asarray(spec.init.alpha, dtype)
    params |= generator.init_generator(key, spec, width, phi_scale)
  if spec.read_gate.kind == 'elementwise':
    params |= generator.init_elementwise_read(jax.random.fold_in(key, 1), spec, width)
  if spec.read_gate.kind == 'dense':
    params |= dense_reads.init(key, spec, width, written_by(sublayer, spec) - 1, spec.read_ways)
  if spec.read_gate.kind == 'sources':
    params |= generator.init_source_read(spec, width)
  elif spec.norm_weight and spec.dynamic and spec.has_params:
    params['norm_weight'] = jnp.ones((spec.norm_inputs, width), dtype)
  return params


def coordinates(
  params: dict[str, jax.Array], x_NBTD: jax.Array, spec: ConnectionSpec
) -> dict[str, jax.Array]:
  """alpha * f(phi^T norm(x)) + b of each part, (K_part, B, T), before gates and constraint (mHC eq. 7)."""
  dynamic = {}
  if spec.dynamic and spec.parts:
    phi = {name: value for name, value in params.items() if name.startswith(('phi', 'norm_weight'))}
    dynamic = generator.dynamic_coordinates(phi, x_NBTD, spec)
  return start_and_dynamic(params, dynamic, spec, x_NBTD.shape[1:3], x_NBTD.dtype)


def start_and_dynamic(
  params: dict[str, jax.Array],
  dynamic: dict[str, jax.Array],
  spec: ConnectionSpec,
  tokens: tuple[int, ...],
  dtype: Any,
  parts: Sequence[str] | None = None,
) -> dict[str, jax.Array]:
  """b + alpha f(dynamic) of each part, (K_part, *tokens), in at least float32; dynamic may be {}.

  dtype: of the streams. params: b_PART and alpha_PART. parts: those wanted, None for all.
  """
  dtype, coords = jnp.promote_types(dtype, jnp.float32), {}
  for part in spec.parts if parts is None else parts:
    size = spec.parts[part]
    start = jnp.zeros(size) if spec.phi_only else params[f'b_{part}']
    coords[part] = start.reshape(-1, *(1 for _ in tokens)).astype(dtype)
    if part in dynamic:
      alpha = spec.init.alpha if spec.phi_only else params[f'alpha_{spec.alpha_of(part)}']
      value = jnp.tanh(dynamic[part]) if spec.activation == 'tanh' else dynamic[part]
      coords[part] = coords[part] + alpha * value
  return {part: jnp.broadcast_to(value, (value.shape[0], *tokens)) for part, value in coords.items()}


def generate(
  params: dict[str, jax.Array],
  x_NBTD: jax.Array,
  spec: ConnectionSpec,
  sublayer: jax.Array | int = 0,
  matrix: Callable[..., jax.Array] | None = None,
) -> Coefficients:
  """The coefficients of one sublayer (mHC eq. 7-8) from streams (n, B, T, C), in at least float32.

  pre (n, B, T), post (n, B, T), res (n, n, B, T), or as in fractions.py; each coordinate is
  alpha * f(norm(x) phi) + b, taken through the gates and the constraint. sublayer: its index; matrix
  computes what constraint.matrix does, by default that.
  """
  tokens, coords = x_NBTD.shape[1:3], coordinates(params, x_NBTD, spec)
  if spec.read_gate.kind == 'elementwise':
    pre_NBT = generator.elementwise_read(params, x_NBTD, spec, spec.read_gate.scale)
  elif spec.read_gate.kind == 'sources':
    written = 1 + (sublayer + spec.write_period - 1) // spec.write_period
    pre_NBT = generator.source_read(params, x_NBTD, spec, written)
  elif spec.read_gate.kind == 'dense':
    pre_NBT = dense_reads.weights(params, x_NBTD, spec, written_by(sublayer, spec) - 1)
  elif spec.read_gate.kind == 'written':
    pre_NBT = one_hot(written_by(sublayer, spec), spec.streams, tokens, x_NBTD.dtype)
  else:
    pre_NBT = read_weights(coords, spec, tokens, x_NBTD.dtype)
  return Coefficients(pre_NBT, *write_weights(coords, spec, tokens, x_NBTD.dtype, sublayer, matrix))


def read_weights(
  coords: dict[str, jax.Array], spec: ConnectionSpec, tokens: Any, dtype: Any
) -> jax.Array | None:
  """pre (n, *tokens) from its coordinates, for all gates that have any; None reads stream 0 alone."""
  shape, dtype = (spec.units, *tokens), jnp.promote_types(dtype, jnp.float32)
  return _gate(spec.read_gate, coords.get('pre'), shape, dtype, free=spec.streams == 1)


def write_weights(
  coords: dict[str, jax.Array],
  spec: ConnectionSpec,
  tokens: Any,
  dtype: Any,
  sublayer: jax.Array | int,
  matrix: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
  """(post (n, *tokens), res (n, n, *tokens)) from their coordinates; None as in Coefficients."""
  n, dtype = spec.units, jnp.promote_types(dtype, jnp.float32)
  if spec.write_gate.kind == 'one_hot':
    post = spec.write_gate.scale * one_hot(written_by(sublayer, spec), n, tokens, dtype)
  else:
    post = _gate(spec.write_gate, coords.get('post'), (n, *tokens), dtype, free=True)
  if spec.constraint.name == 'identity':
    return post, None
  # With one stream, some sets have no coordinates.
  matrix = matrix or spec.constraint.matrix
  return post, matrix(coords.get('res', jnp.zeros((0, *tokens), dtype)), n)


def written_by(sublayer: jax.Array | int, spec: ConnectionSpec) -> jax.Array | int:
  """The stream to which a 'one_hot' write goes."""
  return (sublayer // spec.write_period + 1) % spec.streams


def one_hot(stream: jax.Array | int, n: int, tokens: Any, dtype: Any) -> jax.Array:
  """Weights (n, *tokens) of that one of n streams alone, in at least float32."""
  is_stream_N = (jnp.arange(n) == stream).astype(jnp.promote_types(dtype, jnp.float32))
  return jnp.broadcast_to(is_stream_N.reshape(n, *(1 for _ in tokens)), (n, *tokens))


def _gate(
  gate: Gate, coords_NBT: jax.Array | None, shape: tuple[int, ...], dtype: Any, free: bool
) -> jax.Array | None:
  """The gate's weights; None for fixed weights of 1 where they need no product (free)."""
  if coords_NBT is not None and len(coords_NBT) > shape[0]:  # all pairs of fractions: a gate for each one's
    return jax.vmap(gate)(coords_NBT.reshape(-1, *shape)).reshape(coords_NBT.shape)
  if coords_NBT is not None:
    return gate(coords_NBT)
  return None if free and gate.scale == 1.0 else jnp.full(shape, gate.scale, dtype)


def _read(pre_NBT: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  return weighted_sum(lax.optimization_barrier(pre_NBT), x_NBTD).astype(x_NBTD.dtype)


def _read_backward(saved, g_BTD):
  pre_NBT, x_NBTD = saved
  pre_NBT, g_BTD = lax.optimization_barrier((pre_NBT, g_BTD))
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  d_pre = jnp.stack(inner([(g_BTD, x_BTD) for x_BTD in x_NBTD]))
  d_x = pre_NBT[..., None] * g_BTD.astype(wide)[None]
  return d_pre.astype(pre_NBT.dtype), d_x.astype(x_NBTD.dtype)


_read = with_backward(_read, lambda *args: (_read(*args), args), _read_backward)


def read(pre_NBT: jax.Array | None, x_NBTD: jax.Array, m: int = 1) -> jax.Array:
  """H_pre x: the sublayer's input (B, T, C) in the streams' dtype; accumulated in float32.

  pre (n, B, T), or (n, B, T, C) for a weight per channel; None reads stream 0. m: fractions of a
  stream, or several reads, (m n, B, T), which come side by side, (B, T, m C).
  """
  if m > 1:
    return fractions.read(pre_NBT, x_NBTD, m)
  if pre_NBT is None:
    return x_NBTD[0]
  if pre_NBT.ndim == x_NBTD.ndim:
    return jnp.sum(pre_NBT * x_NBTD.astype(pre_NBT.dtype), 0).astype(x_NBTD.dtype)
  return _read(pre_NBT, x_NBTD)


def _write(res_NMBT: jax.Array | None, post_NBT: jax.Array, x_NBTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  res_NMBT, post_NBT = lax.optimization_barrier((res_NMBT, post_NBT))
  new = []
  for i in range(x_NBTD.shape[0]):
    kept = x_NBTD[i].astype(wide) if res_NMBT is None else weighted_sum(res_NMBT[i], x_NBTD)
    new.append((kept + post_NBT[i][..., None] * y_BTD.astype(wide)).astype(x_NBTD.dtype))
  return jnp.stack(new)


def _write_backward(saved, g_NBTD):
  res_NMBT, post_NBT, x_NBTD, y_BTD = saved
  res_NMBT, post_NBT, g_NBTD = lax.optimization_barrier((res_NMBT, post_NBT, g_NBTD))
  n, pairs = len(x_NBTD), [(g_BTD, y_BTD) for g_BTD in g_NBTD]
  if res_NMBT is not None:
    pairs += [(g_BTD, x_BTD) for g_BTD in g_NBTD for x_BTD in x_NBTD]
  products = jnp.stack(inner(pairs))
  d_post = products[:n].astype(post_NBT.dtype)
  d_y = lax.optimization_barrier(weighted_sum(post_NBT, g_NBTD).astype(y_BTD.dtype))
  if res_NMBT is None:
    return None, d_post, g_NBTD, d_y
  d_res = products[n:].reshape(res_NMBT.shape)
  columns = [weighted_sum(res_NMBT[:, j], g_NBTD) for j in range(x_NBTD.shape[0])]
  return d_res.astype(res_NMBT.dtype), d_post, jnp.stack(columns).astype(x_NBTD.dtype), d_y


_write = with_backward(_write, lambda *args: (_write(*args), args), _write_backward)


def write(
  res_NMBT: jax.Array | None,
  post_NBT: jax.Array | None,
  x_NBTD: jax.Array,
  y_BTD: jax.Array,
  m: int = 1,
) -> jax.Array:
  """H_res x + H_post^T y (eq. 3): the new streams (n, B, T, C), accumulated in float32, rounded once.

  None stands for H_res = I and for unit writes. The sums over streams are unrolled behind barriers, with a
  backward of their own: XLA:CPU otherwise recomputes the coefficients for each element they multiply.
  m: fractions of a stream.
  """
  if m > 1:
    return fractions.write(res_NMBT, post_NBT, x_NBTD, y_BTD, m)
  if post_NBT is None and res_NMBT is None:
    return (x_NBTD + y_BTD[None]).astype(x_NBTD.dtype)
  if post_NBT is None:
    post_NBT = jnp.ones(x_NBTD.shape[:3], res_NMBT.dtype)
  return _write(res_NMBT, post_NBT, x_NBTD, y_BTD)


def boundary(
  params: dict[str, jax.Array], pending: Pending, spec: ConnectionSpec, sublayer: jax.Array | int = 0
) -> tuple[jax.Array, jax.Array, Coefficients]:
  """(the streams with y written, the next sublayer's input, its coefficients): write, generate, read.

  The definition of what kernels/boundary.py does in one pass.
  """
  x_NBTD = settled(pending, spec.fractions)
  own = generate(params, x_NBTD, spec, sublayer)
  pre_NBT = pending.pre_NBT if spec.single_pass else own.pre_NBT
  x_BTD = read(pre_NBT, x_NBTD, spec.fractions * spec.read_ways)
  return x_NBTD, dense_reads.finished(params, x_BTD, x_NBTD, spec, sublayer // spec.write_period), own


def settled(pending: Pending, m: int = 1) -> jax.Array:
  """The streams, of m fractions each, with y written to them."""
  if pending.y_BTD is None:
    return pending.x_NBTD
  return write(pending.res_NMBT, pending.post_NBT, pending.x_NBTD, pending.y_BTD, m)


def init_expand(spec: ConnectionSpec, width: int) -> dict[str, jax.Array]:
  """Parameters of the learned expansion, {} otherwise: one factor per stream and channel.

  1 for stream 0 and 0.6 for the others, so that streams differ from the start (Learned Stream Scaling, arXiv
  2606.03483, gives the 0.6).
  """
  if spec.expansion != 'learned':
    return {}
  scale_N = jnp.where(jnp.arange(spec.streams) == 0, 1.0, 0.6)
  return {'scale': jnp.broadcast_to(scale_N[:, None], (spec.streams, width)).astype(jnp.result_type(float))}


def expand(
  x_BTD: jax.Array, n: int, how: str = 'replicate', params: dict[str, jax.Array] | None = None, m: int = 1
) -> jax.Array:
  """The embedding (B, T, C) to n streams (n, B, T, C), or to their m fractions each (n m, B, T, C / m).

  'replicate' copies it; 'one_hot' puts it in stream 0 and zeros elsewhere (DeepSeek-V4.1); 'learned' scales
  each copy by params['scale'] (n, C). Raises ValueError for another name.
  """
  if m > 1:
    return fractions.split(expand(x_BTD, n, how, params), m)
  if how == 'one_hot':
    return jnp.concatenate([x_BTD[None], jnp.zeros((n - 1, *x_BTD.shape), x_BTD.dtype)])
  if how not in ('replicate', 'learned'):
    raise ValueError(f'expansion must be replicate, one_hot or learned, got {how!r}')
  x_NBTD = jnp.stack([x_BTD] * n)  # whose gradient adds n terms; that of broadcast_to is a slow sum on CPU
  return x_NBTD if how == 'replicate' else (params['scale'][:, None, None] * x_NBTD).astype(x_BTD.dtype)


def init_collapse(spec: ConnectionSpec, width: int, key: jax.Array | None = None) -> dict[str, jax.Array]:
  """Parameters of the learned collapses, {} for the others.

  'learned' (DeepSeek-V4's head): phi 0, so it starts as a mean. 'weights': n ones, so it starts as a sum.
  """
  n, dtype = spec.streams, jnp.result_type(float)
  if spec.collapse == 'weights':
    return {'b': jnp.ones(n, dtype)}
  if spec.collapse == 'sources':
    return generator.init_source_read(spec, width)
  if spec.collapse == 'dense':
    return dense_reads.init(jax.random.key(0) if key is None else key, spec, width, n - 1, 1)
  if spec.collapse != 'learned':
    return {}
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
  pre_NBT: jax.Array | None = None,
) -> jax.Array:
  """Streams (n, B, T, C), or the fractions of spec, to the output (B, T, C): 'mean', 'sum' (HC), 'learned',
  'weights', 'read', 'sources' or 'dense'.

  'learned' is DeepSeek-V4's head, sum_i (sigmoid(alpha (norm(x) phi)_i + b_i) + eps) x_i, and needs params
  and spec; 'weights' is sum_i b_i x_i; 'read' takes the last sublayer's read map pre_NBT (V4.1);
  'sources' and 'dense' are one more read of such. Raises ValueError for another name.
  """
  x_NBTD = fractions.merge(x_NBTD, 1 if spec is None else spec.fractions)
  if how == 'learned':
    projected_NBT = generator.project({'phi': params['phi']}, x_NBTD, spec)
    coords_NBT = params['alpha'] * projected_NBT + params['b'][:, None, None]
    return read(jax.nn.sigmoid(coords_NBT) + spec.collapse_eps, x_NBTD)
  if how == 'weights':
    return read(jnp.broadcast_to(params['b'][:, None, None], x_NBTD.shape[:3]), x_NBTD)
  if how == 'read':
    return read(pre_NBT, x_NBTD)
  if how == 'sources':
    return read(generator.source_read(params, x_NBTD, spec, len(x_NBTD)), x_NBTD)
  if how == 'dense':
    last = len(x_NBTD) - 1
    x_BTD = read(dense_reads.weights(params, x_NBTD, spec, last), x_NBTD)
    return dense_reads.finished(params, x_BTD, x_NBTD, spec, last)
  if how not in ('mean', 'sum'):
    raise ValueError(f'collapse must be mean, sum, learned, weights, read, sources or dense, got {how!r}')
  wide_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, jnp.float32))
  total_BTD = functools.reduce(jnp.add, wide_NBTD)  # XLA:CPU's sum over the first axis is slow
  return (total_BTD / len(x_NBTD) if how == 'mean' else total_BTD).astype(x_NBTD.dtype)
