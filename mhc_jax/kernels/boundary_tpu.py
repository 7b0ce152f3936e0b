"""The boundary between two sublayers as one kernel for TPUs, forward and backward, in Pallas (Mosaic).

Forward: x' = res x + post^T y, phi^T x' and the mean squares of x', h = pre x'; it reads x and y and writes
x' and h, (2n + 2) C numbers a token. Backward: reads x, y and the gradients of x' and h, writes those of x
and y, (3n + 3) C; x' is made again. boundary.py has the rule of where these run, and all that is not over
C.

How it is laid out. A grid step does a tile of tokens; the first axis of the grid is the cores of a chip,
which the compiler shares out only where it is 'parallel'. Streams are (tokens, width) with width in lanes.
Weights of tokens come as rows (K, tokens), are turned into columns once per tile and spread over the lanes
of a register in VMEM, since a broadcast over lanes in the inner loop would be the limit. The inner loop
does groups of rows, few enough to stay in registers. phi is float32: with bfloat16 streams it goes through
the matrix unit as three bfloat16 pieces side by side, exact to 24 bits and at no cost, as K = 24 columns
leave most of it empty.

Axes: N streams, T tokens of a device, C width, K products of the generator, M weights, R rows of sums, P
parameters of the read.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mhc_jax.kernels.boundary_blocks import Blocks
from mhc_jax.kernels.boundary_plan import F32, Plan, add, mixed, pieces, read_gradients, row_gradients

LANES, GROUP = 128, 16  # lanes of a register; tokens that the inner loop does at once


def split(phi_NKC: jax.Array, plan: Plan) -> jax.Array:
  """phi as the kernels take it: its pieces along K, and the first once more for the backward."""
  if plan.pieces == 1:
    return phi_NKC
  parts = pieces(phi_NKC, 3)
  return jnp.concatenate([*parts, parts[0]], 1)


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], plan: Plan) -> jax.Array:
  """a b contracted over one axis of each, in float32: exact products of bfloat16 pieces, or of float32."""
  precision = None if plan.pieces > 1 else lax.Precision.HIGHEST
  numbers = (((axes[0],), (axes[1],)), ((), ()))
  return lax.dot_general(a, b, numbers, preferred_element_type=F32, precision=precision)


def _folded(rows: jax.Array, size: int) -> jax.Array:
  """Pieces side by side added up."""
  return add([rows[i : i + size] for i in range(0, len(rows), size)])


def _spread(scratch, rows: jax.Array) -> None:
  """Rows (M, T) of weights into scratch (M, T, lanes), each spread over the lanes."""
  count, tokens = rows.shape
  rows = jnp.concatenate([rows, jnp.zeros((-count % 8, tokens), F32)]) if count % 8 else rows
  columns = rows.T
  for m in range(count):
    scratch[m] = jnp.broadcast_to(columns[:, m : m + 1], scratch.shape[1:])


def _wide(weight: jax.Array, width: int) -> jax.Array:
  """(tokens, lanes) -> (tokens, width): the same registers again."""
  return jnp.concatenate([weight] * (width // weight.shape[1]), 1) if weight.shape[1] < width else weight


def _partial(x: jax.Array, lanes: int) -> jax.Array:
  """(tokens, width) -> (tokens, lanes) sums."""
  return add([x[:, i : i + lanes] for i in range(0, x.shape[1], lanes)])


def _token_rows(sums: list[jax.Array]) -> list[jax.Array]:
  """Sums over lanes of (tokens, lanes) arrays as rows (1, tokens): put side by side, then one transpose."""
  tokens, found = sums[0].shape[0], []
  for first in range(0, len(sums), LANES):
    some = sums[first : first + LANES]
    lane = lax.broadcasted_iota(jnp.int32, (tokens, LANES), 1)
    side = jnp.zeros((tokens, LANES), F32)
    for q, x in enumerate(some):
      side = jnp.where(lane == q, jnp.sum(x, 1, keepdims=True), side)
    turned = side.T
    found += [turned[q : q + 1] for q in range(len(some))]
  return found


def _chunks(plan: Plan, body: Callable) -> None:
  """body(slice of the width) for every chunk."""

  def step(q, _):
    body(pl.ds(pl.multiple_of(q * plan.chunk, plan.chunk), plan.chunk))
    return 0

  lax.fori_loop(0, plan.width // plan.chunk, step, 0)


def _groups(plan: Plan, body: Callable, written_out: bool = False) -> None:
  """body(slice of the tokens) for every group of a tile; in a loop, the scheduler keeps few in registers."""
  if written_out:
    for first in range(0, plan.tile, GROUP):
      body(pl.ds(first, GROUP))
    return

  def step(q, _):
    body(pl.ds(pl.multiple_of(q * GROUP, GROUP), GROUP))
    return 0

  lax.fori_loop(0, plan.tile // GROUP, step, 0)


def _rows(x) -> list[jax.Array]:
  return [x[r : r + 1] for r in range(x.shape[0])]


def _parameters(plan: Plan, ref) -> list[jax.Array]:
  """Rows of parameters, for each token its own, as their gradients are."""
  return [jnp.broadcast_to(row, (1, plan.tile)) for row in _rows(ref)]


def forward_kernel(x, y, mix, phi, small, x_new, h, sums, weight, square, raw, *, plan: Plan):
  """One tile. sums: the rows of raw products and mean squares; the last three are scratch."""
  n, lanes = plan.streams, plan.lanes
  k = plan.products * plan.pieces
  given = plan.weights - n
  mix_MT = mix[...]
  _spread(weight, mix_MT[: plan.weights])
  square[...] = jnp.zeros_like(square)
  raw[...] = jnp.zeros_like(raw)

  def write(at):
    def group(r):
      xs = [x[j, r, at].astype(F32) for j in range(n)]
      new = mixed(plan, xs, y[r, at].astype(F32), lambda m: _wide(weight[m, r], plan.chunk))
      squares = []
      for i, wide in enumerate(new):
        rounded = wide.astype(plan.dtype)
        x_new[i, r, at] = rounded
        squares.append(_partial(jnp.square(rounded.astype(F32)), lanes))
      for i, part in enumerate(squares if plan.separate else [add(squares)]):
        square[i, r] += part

    _groups(plan, group, written_out=True)
    products = [_product(phi[i % plan.maps, :k, at], x_new[i, :, at], (1, 1), plan) for i in range(n)]
    raw[...] += jnp.concatenate(products) if plan.separate else add(products)

  _chunks(plan, write)
  groups = plan.sums[1]
  size = plan.width * (1 if plan.separate else n)
  mean = [row / size for row in _token_rows([square[i] for i in range(groups)])]
  raw_RT = [_folded(raw[i * k : (i + 1) * k], plan.products) for i in range(groups)]
  whole = jnp.concatenate([*raw_RT, *mean])
  sums[...] = whole
  if plan.given:
    _spread(weight, mix_MT[given : given + n])
  else:
    _spread(weight, jnp.concatenate(plan.read[0]([*_rows(whole), *_parameters(plan, small)])))

  def read(at):
    def group(r):
      terms = [_wide(weight[i, r], plan.chunk) * x_new[i, r, at].astype(F32) for i in range(n)]
      h[r, at] = add(terms).astype(plan.dtype)

    _groups(plan, group, written_out=True)

  _chunks(plan, read)


def backward_kernel(
  *refs,
  plan: Plan,
):
  """One tile. In: x, y, mix, phi, small, sums and gradients of x', h, sums. Out: gradients of x, y, mix, phi,
  small. The rest is scratch.
  """
  x, y, mix, phi, small, sums, g, gh, d_sums, dx, dy, d_mix, d_phi, d_small, new, weight, total, through = (
    refs
  )
  n, lanes, k = plan.streams, plan.lanes, plan.products
  mixing = n + n * n * plan.mixes

  @pl.when(pl.program_id(1) == 0)
  def _():
    d_phi[...] = jnp.zeros_like(d_phi)
    d_small[...] = jnp.zeros_like(d_small)

  total[...] = jnp.zeros_like(total)

  def inner(at):
    def group(r):
      dh = gh[r, at].astype(F32)
      total[mixing, r] += _partial(dh * y[r, at].astype(F32), lanes)
      for j in range(n):
        total[mixing + 1 + j, r] += _partial(dh * x[j, r, at].astype(F32), lanes)

    _groups(plan, group)

  _chunks(plan, inner)
  mix_MT = mix[...]
  mix_M = _rows(mix_MT)
  d_pre = read_gradients(plan, mix_M, _token_rows([total[mixing + j] for j in range(n + 1)]))
  pre, d_rows, d_parameters = row_gradients(
    plan, mix_M, _parameters(plan, small), _rows(sums), _rows(d_sums), d_pre
  )
  if d_parameters:
    d_small[0] += jnp.concatenate(d_parameters)
  size = plan.width * (1 if plan.separate else n)
  raw = plan.sums[0]
  scale = [2 / size * row for row in d_rows[raw:]]
  _spread(weight, jnp.concatenate([mix_MT[:mixing], *pre, *scale]))
  groups = [jnp.concatenate(d_rows[i * k : (i + 1) * k]) for i in range(plan.sums[1])]
  if plan.pieces == 1:
    left = right = groups
  else:  # x' is exact in bfloat16, so three pieces; phi is not: high and low times its pieces, less low low
    left = [jnp.concatenate(pieces(d, 3)) for d in groups]
    high_low = [pieces(d, 2) for d in groups]
    right = [jnp.concatenate([high] * 3 + [low]) for high, low in high_low]

  def outer(at):
    for i in range(n):
      through[i] = _product(right[i * plan.separate], phi[i % plan.maps, :, at], (0, 0), plan)

    def group(r):
      def w(m):
        return _wide(weight[m, r], plan.chunk)

      xs, y_r, dh = [x[j, r, at].astype(F32) for j in range(n)], y[r, at].astype(F32), gh[r, at].astype(F32)
      wide, d_y, d_x = mixed(plan, xs, y_r, w), None, [None] * n
      for i in range(n):
        new[i, r] = wide[i].astype(plan.dtype)
        d_new = g[i, r, at].astype(F32) + through[i, r]
        d_new += w(mixing + i) * dh + w(mixing + n + i * plan.separate) * wide[i]
        term = w(i) * d_new
        d_y = term if d_y is None else d_y + term
        total[i, r] += _partial(d_new * y_r, lanes)
        for j in range(n) if plan.mixes else (i,):
          m = n + i * n + j
          term = w(m) * d_new if plan.mixes else d_new
          d_x[j] = term if d_x[j] is None else d_x[j] + term
          if plan.mixes:
            total[m, r] += _partial(d_new * xs[j], lanes)
      dy[r, at] = d_y.astype(plan.dtype)
      for j in range(n):
        dx[j, r, at] = d_x[j].astype(plan.dtype)

    _groups(plan, group)
    for i in range(n):
      product = _product(left[i * plan.separate], new[i], (1, 0), plan)
      d_phi[0, i % plan.maps, :, at] += _folded(product, k)

  _chunks(plan, outer)
  rows = _token_rows([total[m] for m in range(mixing)]) + (d_pre if plan.given else [])
  d_mix[...] = jnp.concatenate(rows)


def forward(
  plan: Plan, x_NTC: jax.Array, y_TC: jax.Array, mix_MT: jax.Array, phi: jax.Array, small_P1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x', h and the rows of sums (R, T) in float32: raw products, then mean squares.

  mix: rows of post, res (row-major) and, where it is given, pre. phi (n or 1, K, C). small: the read's
  parameters.
  """
  phi = split(phi, plan)
  n, tokens, width = x_NTC.shape
  blocks, rows, weights = Blocks(plan, tokens), sum(plan.sums), plan.weights
  raw, groups = plan.sums
  scratch = [
    pltpu.VMEM((max(plan.weights, n), plan.tile, plan.lanes), F32),
    pltpu.VMEM((groups, plan.tile, plan.lanes), F32),
    pltpu.VMEM((raw * plan.pieces, plan.tile), F32),
  ]
  x_new, h, sums = blocks.call(
    forward_kernel,
    'mhc_boundary_forward',
    flops=2 * tokens * n * width * (plan.products + n * plan.mixes + 2),
    in_specs=[
      blocks.streams(),
      blocks.vectors(),
      blocks.rows(weights),
      blocks.constant(phi.shape),
      blocks.constant(small_P1.shape),
    ],
    out_specs=[blocks.streams(), blocks.vectors(), blocks.rows(rows)],
    out_shape=[
      jax.ShapeDtypeStruct(x_NTC.shape, plan.dtype),
      jax.ShapeDtypeStruct(y_TC.shape, plan.dtype),
      blocks.row_shape(rows),
    ],
    scratch_shapes=scratch,
  )(x_NTC, y_TC, blocks.cut(mix_MT), phi, small_P1)
  return x_new, h, blocks.joined(sums)


def backward(
  plan: Plan,
  arrays: tuple[jax.Array, ...],
  sums_RT: jax.Array,
  d_x: jax.Array,
  d_h: jax.Array,
  d_sums_RT: jax.Array,
) -> tuple[jax.Array, ...]:
  """Gradients of forward's arrays (x, y, mix, phi, small): phi's as (n or 1, K, C), small's as (P, 1)."""
  x_NTC, y_TC, mix_MT, phi, small_P1 = arrays
  phi = split(phi, plan)
  n, tokens, width = x_NTC.shape
  blocks, rows, weights = Blocks(plan, tokens), sum(plan.sums), plan.weights
  per_core = [(plan.maps, plan.products, width), (small_P1.shape[0], plan.tile)]
  count = plan.weights + n + 1 + plan.sums[1]
  scratch = [
    pltpu.VMEM((n, plan.tile, plan.chunk), plan.dtype),
    pltpu.VMEM((count, plan.tile, plan.lanes), F32),
    pltpu.VMEM((count, plan.tile, plan.lanes), F32),
    pltpu.VMEM((n, plan.tile, plan.chunk), F32),
  ]
  d_x, d_y, d_mix, d_phi, d_small = blocks.call(
    backward_kernel,
    'mhc_boundary_backward',
    flops=2 * tokens * n * width * (2 * plan.products + 3 * n * plan.mixes + 6),
    in_specs=[
      blocks.streams(),
      blocks.vectors(),
      blocks.rows(weights),
      blocks.constant(phi.shape),
      blocks.constant(small_P1.shape),
      blocks.rows(rows),
      blocks.streams(),
      blocks.vectors(),
      blocks.rows(rows),
    ],
    out_specs=[blocks.streams(), blocks.vectors(), blocks.rows(weights), *map(blocks.of_core, per_core)],
    out_shape=[
      jax.ShapeDtypeStruct(x_NTC.shape, plan.dtype),
      jax.ShapeDtypeStruct(y_TC.shape, plan.dtype),
      blocks.row_shape(weights),
      *(jax.ShapeDtypeStruct((plan.cores, *shape), F32) for shape in per_core),
    ],
    scratch_shapes=scratch,
  )(
    x_NTC,
    y_TC,
    blocks.cut(mix_MT),
    phi,
    small_P1,
    blocks.cut(sums_RT),
    d_x,
    d_h,
    blocks.cut(d_sums_RT),
  )
  return d_x, d_y, blocks.joined(d_mix), d_phi.sum(0), d_small.sum((0, 2))[:, None]
