"""The boundary between two sublayers as kernels for NVIDIA GPUs, forward and backward, in Pallas (Triton).

Forward: one program for each 16 tokens goes over the width twice, once for x', its products with phi on the
tensor cores and its mean squares, and once for h, which makes x' again from x and y (in the L2 cache by
then): (2n + 2) C numbers a token. Backward: dphi is a sum over tokens, the weights' gradients are sums over
the width, and a program can hold neither all of phi nor wait for the others, so there are two kernels. The
first, by tokens, finds the gradients of the read weights and of the sums (n + 2); the second, by chunks of
the width and a few parts of the tokens, does the rest (3n + 3), keeps its chunk of dphi, and leaves the
weights' gradients of its chunk to be added up.

Arrays and names as in boundary_tpu.py. Triton knows shapes that are powers of 2 alone: K is padded.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mhc_jax.kernels.boundary_plan import F32, Plan, add, mixed, pieces, read_gradients, row_gradients

STREAMS = 4  # at most: eight spill 2 to 4 kB a thread, which moves more than the kernels save
TILE = 16  # tokens of a step: the least that tensor cores take
PARTS = 8  # of the tokens, in the backward's second kernel
HELD = 2**14  # numbers of dphi that a program holds in registers
# Channels of all streams together that a program has in registers: with twice as many, n = 4 spills hundreds
# of bytes a thread (ptxas for an H100).
FORWARD, BACKWARD = 128, 256


def fits(plan: Plan, tokens: int) -> bool:
  """Whether the width comes in chunks and the tokens in steps."""
  return plan.width % 16 == 0 and tokens % TILE == 0


def _padded(plan: Plan) -> int:
  return max(16, pl.next_power_of_2(plan.products))


def _chunk(plan: Plan, most: int) -> int:
  """The largest power of 2 that divides the width, up to `most`."""
  return min(plan.width & -plan.width, max(16, most))


def _phi(phi_NKC: jax.Array, plan: Plan) -> jax.Array:
  """phi as (pieces, n or 1, C, padded K)."""
  phi = jnp.pad(phi_NKC, ((0, 0), (0, _padded(plan) - plan.products), (0, 0))).swapaxes(1, 2)
  return jnp.stack(pieces(phi, 3)) if plan.pieces > 1 else phi[None]


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], plan: Plan) -> jax.Array:
  a, b = (a.T if axes[0] == 0 else a), (b.T if axes[1] == 1 else b)
  precision = None if plan.pieces > 1 else lax.Precision.HIGHEST
  return lax.dot_general(a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=F32)


def _columns(matrix_TK: jax.Array, count: int) -> list[jax.Array]:
  """The first columns of a matrix in registers, (T,) each."""
  column = lax.broadcasted_iota(jnp.int32, matrix_TK.shape, 1)
  return [jnp.sum(jnp.where(column == k, matrix_TK, 0.0), 1) for k in range(count)]


def _streams(plan: Plan, x, y, tokens, at) -> tuple[list[jax.Array], jax.Array]:
  return [x[j, tokens, at].astype(F32) for j in range(plan.streams)], y[tokens, at].astype(F32)


def _parameters(plan: Plan, small) -> list[jax.Array]:
  return [] if plan.given else [jnp.full((TILE,), small[p, 0], F32) for p in range(small.shape[0])]


def _rows(ref, tokens) -> list[jax.Array]:
  return [ref[r, tokens] for r in range(ref.shape[0])]


def _over(width: int, chunk: int, body: Callable, start: tuple) -> tuple:
  """body(slice of the width, carry) -> carry, for every chunk."""

  def step(q, carry):
    return body(pl.ds(q * chunk, chunk), carry)

  return lax.fori_loop(0, width // chunk, step, start)


def _forward_kernel(x, y, mix, phi, small, x_new, h, sums, *, plan: Plan):
  n, chunk, (_, groups) = plan.streams, _chunk(plan, FORWARD // plan.streams), plan.sums
  tokens = pl.ds(pl.program_id(0) * TILE, TILE)
  mix_M = _rows(mix, tokens)

  def new(at):
    return mixed(plan, *_streams(plan, x, y, tokens, at), lambda m: mix_M[m][:, None])

  def write(at, carry):
    squares, raw = list(carry[0]), list(carry[1])
    for i, wide in enumerate(new(at)):
      rounded = wide.astype(plan.dtype)
      x_new[i, tokens, at] = rounded
      g = i * plan.separate
      squares[g] += jnp.sum(jnp.square(rounded.astype(F32)), 1)
      for p in range(plan.pieces):
        raw[g] += _dot(rounded, phi[p, i % plan.maps, at, :], (1, 0), plan)
    return tuple(squares), tuple(raw)

  start = (jnp.zeros((TILE,), F32),) * groups, (jnp.zeros((TILE, _padded(plan)), F32),) * groups
  squares, raw = _over(plan.width, chunk, write, start)
  size = plan.width * (1 if plan.separate else n)
  rows = [row for matrix in raw for row in _columns(matrix, plan.products)] + [s / size for s in squares]
  for r, row in enumerate(rows):
    sums[r, tokens] = row
  pre = mix_M[-n:] if plan.given else plan.read[0]([*rows, *_parameters(plan, small)])

  def read(at, carry):
    terms = [pre[i][:, None] * wide.astype(plan.dtype).astype(F32) for i, wide in enumerate(new(at))]
    h[tokens, at] = add(terms).astype(plan.dtype)
    return carry

  _over(plan.width, chunk, read, ())


def _row_kernel(x, y, mix, small, sums, gh, d_sums, pre, d_rows, d_small, d_read, *, plan: Plan):
  """Of 16 tokens: the read weights, and the gradients of sums, of parameters and of the read weights."""
  n, tokens = plan.streams, pl.ds(pl.program_id(0) * TILE, TILE)
  mix_M = _rows(mix, tokens)

  def inner(at, carry):
    xs, y_TC = _streams(plan, x, y, tokens, at)
    dh = gh[tokens, at].astype(F32)
    return tuple(total + jnp.sum(dh * v, 1) for total, v in zip(carry, (y_TC, *xs), strict=True))

  inner = _over(plan.width, _chunk(plan, 128), inner, (jnp.zeros((TILE,), F32),) * (n + 1))
  d_pre = read_gradients(plan, mix_M, inner)
  found = row_gradients(
    plan, mix_M, _parameters(plan, small), _rows(sums, tokens), _rows(d_sums, tokens), d_pre
  )
  for ref, rows in zip((pre, d_rows, d_small, d_read), (*found, d_pre), strict=True):
    for r, row in enumerate(rows):
      ref[r, tokens] = row


def _wide_kernel(x, y, mix, pre, scale, d_raw, phi, g, gh, dx, dy, d_mix, d_phi, *, plan: Plan, chunk: int):
  """Of a chunk of the width and a part of the tokens. d_raw (groups, T, padded K)."""
  n, steps = plan.streams, x.shape[1] // TILE // d_phi.shape[0]
  column, part = pl.program_id(0), pl.program_id(1)
  at = pl.ds(column * chunk, chunk)

  def step(s, d_maps):
    d_maps = list(d_maps)
    tokens = pl.ds((part * steps + s) * TILE, TILE)
    weight, pre_N, scale_S = _rows(mix, tokens), _rows(pre, tokens), _rows(scale, tokens)
    xs, y_TC = _streams(plan, x, y, tokens, at)
    dh = gh[tokens, at].astype(F32)
    d_y, d_x = jnp.zeros_like(y_TC), [jnp.zeros_like(y_TC)] * n
    for i, wide in enumerate(mixed(plan, xs, y_TC, lambda m: weight[m][:, None])):
      group = i * plan.separate
      d_products = d_raw[group, tokens, :]
      left = pieces(d_products, 3) if plan.pieces > 1 else [d_products]
      d_new = g[i, tokens, at].astype(F32) + pre_N[i][:, None] * dh + scale_S[group][:, None] * wide
      right = [(0, 0), (0, 1), (0, 2), (1, 0)] if plan.pieces > 1 else [(0, 0)]  # less what is below 2^-24
      for a, b in right:
        d_new += _dot(left[a], phi[b, i % plan.maps, at, :], (1, 1), plan)
      for piece in left:
        d_maps[i % plan.maps] += _dot(piece, wide.astype(plan.dtype), (0, 0), plan)
      d_y += weight[i][:, None] * d_new
      d_mix[column, i, tokens] = jnp.sum(d_new * y_TC, 1)
      for j in range(n) if plan.mixes else (i,):
        m = n + i * n + j
        d_x[j] += weight[m][:, None] * d_new if plan.mixes else d_new
        if plan.mixes:
          d_mix[column, m, tokens] = jnp.sum(d_new * xs[j], 1)
    dy[tokens, at] = d_y.astype(plan.dtype)
    for j in range(n):
      dx[j, tokens, at] = d_x[j].astype(plan.dtype)
    return tuple(d_maps)

  d_maps = lax.fori_loop(0, steps, step, (jnp.zeros((_padded(plan), chunk), F32),) * plan.maps)
  for i, d_map in enumerate(d_maps):
    d_phi[part, i, :, at] = d_map


def _call(
  kernel: Callable, plan: Plan, name: str, grid: tuple[int, ...], shapes: list, warps: int, flops: int
):
  """pl.pallas_call on whole arrays, of which each program takes its part."""

  def run(*arrays: jax.Array):
    moved = sum(a.size * a.dtype.itemsize for a in [*arrays, *shapes])
    return pl.pallas_call(
      kernel,
      grid=grid,
      out_shape=shapes,
      compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=2),
      cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved),
      interpret=plan.interpret,
      name=name,
    )(*arrays)

  return run


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, F32)


def forward(
  plan: Plan, x_NTC: jax.Array, y_TC: jax.Array, mix_MT: jax.Array, phi_NKC: jax.Array, small_P1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """As boundary_tpu.forward."""
  n, tokens, width = x_NTC.shape
  return _call(
    functools.partial(_forward_kernel, plan=plan),
    plan,
    'mhc_boundary_forward',
    (tokens // TILE,),
    [jax.ShapeDtypeStruct(v.shape, plan.dtype) for v in (x_NTC, y_TC)] + [_shape(sum(plan.sums), tokens)],
    warps=4,
    flops=2 * tokens * n * width * (plan.products + 2 * n * plan.mixes + 3),
  )(x_NTC, y_TC, mix_MT, _phi(phi_NKC, plan), small_P1)


def backward(
  plan: Plan,
  arrays: tuple[jax.Array, ...],
  sums_RT: jax.Array,
  d_x: jax.Array,
  d_h: jax.Array,
  d_sums_RT: jax.Array,
) -> tuple[jax.Array, ...]:
  """As boundary_tpu.backward."""
  x_NTC, y_TC, mix_MT, phi_NKC, small_P1 = arrays
  n, tokens, width = x_NTC.shape
  raw, groups = plan.sums
  flops, padded = 2 * tokens * n * width, _padded(plan)
  pre, d_rows, d_small, d_pre = _call(
    functools.partial(_row_kernel, plan=plan),
    plan,
    'mhc_boundary_backward_rows',
    (tokens // TILE,),
    [_shape(size, tokens) for size in (n, sum(plan.sums), len(small_P1), n)],
    warps=4,
    flops=flops,
  )(x_NTC, y_TC, mix_MT, small_P1, sums_RT, d_h, d_sums_RT)
  d_raw = d_rows[:raw].reshape(groups, plan.products, tokens).swapaxes(1, 2)
  d_raw = jnp.pad(d_raw, ((0, 0), (0, 0), (0, padded - plan.products)))
  scale = d_rows[raw:] * (2 / (width * (1 if plan.separate else n)))
  chunk = _chunk(plan, min(BACKWARD // n, HELD // (plan.maps * padded)))
  parts = next(p for p in (PARTS, 4, 2, 1) if tokens % (p * TILE) == 0)
  mixing = n + n * n * plan.mixes
  d_x, d_y, d_mix, d_phi = _call(
    functools.partial(_wide_kernel, plan=plan, chunk=chunk),
    plan,
    'mhc_boundary_backward',
    (width // chunk, parts),
    [jax.ShapeDtypeStruct(v.shape, plan.dtype) for v in (x_NTC, y_TC)]
    + [_shape(width // chunk, mixing, tokens), _shape(parts, plan.maps, padded, width)],
    warps=8,
    flops=flops * (2 * plan.products + 3 * n * plan.mixes + 4),
  )(x_NTC, y_TC, mix_MT, pre, scale, d_raw, _phi(phi_NKC, plan), d_x, d_h)
  d_mix_MT = jnp.concatenate([d_mix.sum(0), *([d_pre] if plan.given else [])])
  d_small_P1 = jnp.zeros_like(small_P1) if plan.given else d_small.sum(1, keepdims=True)
  return d_x, d_y, d_mix_MT, d_phi.sum(0)[:, : plan.products], d_small_P1
