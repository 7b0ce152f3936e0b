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

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

F32 = jnp.float32
LANES, GROUP = 128, 16  # lanes of a register; tokens that the inner loop does at once


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known when a kernel is made."""

  streams: int
  width: int
  products: int  # K
  maps: int  # phi has one map per stream (n), or one for all (1)
  separate: bool  # products and mean squares of each stream by itself, not of all together
  mixes: bool  # there is a res
  given: bool  # pre comes from outside, not from this boundary's own products
  dtype: jnp.dtype  # of the streams
  # Functions of rows: of sums and parameters to pre, and of pre's gradient and the same to theirs.
  read: tuple[Callable, Callable] | None
  tile: int = 128  # tokens
  cores: int = 1
  vmem: int = 60 * 2**20  # bytes that the kernel may use
  interpret: bool = False

  @property
  def pieces(self) -> int:
    """bfloat16 numbers that stand for one float32 number of phi."""
    return 3 if self.dtype == jnp.bfloat16 else 1

  @property
  def chunk(self) -> int:
    """Lanes of the width that are done at once."""
    if self.width % LANES:
      return self.width
    return max(c for c in range(LANES, min(self.width, 512) + 1, LANES) if self.width % c == 0)

  @property
  def lanes(self) -> int:
    """Lanes over which a token's weight is spread."""
    return self.width if self.width % LANES else LANES

  @property
  def weights(self) -> int:
    """M: post, res and, where it is given, pre."""
    return self.streams + self.streams**2 * self.mixes + self.streams * self.given

  @property
  def sums(self) -> tuple[int, int]:
    """Rows of phi^T x' and of mean squares."""
    groups = self.streams if self.separate else 1
    return groups * self.products, groups

  def bytes(self) -> tuple[int, int]:
    """VMEM of the forward and of the backward kernel; blocks that move are there twice."""
    n, item, tile = self.streams, self.dtype.itemsize, self.tile
    stream, phi = tile * self.width * item, self.maps * self.products * self.width * item
    weight, part = 4 * tile * self.lanes, tile * self.chunk
    forward = 2 * (2 * n + 2) * stream + self.pieces * phi + (self.weights + 2 * n) * weight
    backward = 2 * (3 * n + 3) * stream + (self.pieces + (self.pieces > 1)) * phi
    backward += 2 * 4 * self.maps * self.products * self.width + n * part * (4 + item)
    backward += 2 * (self.weights + n + 1) * weight
    return forward, backward


def split(phi_NKC: jax.Array, plan: Plan) -> jax.Array:
  """phi as the kernels take it: its pieces along K, and the first once more for the backward."""
  if plan.pieces == 1:
    return phi_NKC
  pieces = _pieces(phi_NKC, 3)
  return jnp.concatenate([*pieces, pieces[0]], 1)


def _pieces(x: jax.Array, count: int) -> list[jax.Array]:
  """bfloat16 arrays whose sum is x to 8 bits each."""
  found, rest = [], x
  for _ in range(count):
    found.append(rest.astype(jnp.bfloat16))
    rest = rest - found[-1].astype(F32)
  return found


def _product(a: jax.Array, b: jax.Array, axes: tuple[int, int], plan: Plan) -> jax.Array:
  """a b contracted over one axis of each, in float32: exact products of bfloat16 pieces, or of float32."""
  precision = None if plan.pieces > 1 else lax.Precision.HIGHEST
  numbers = (((axes[0],), (axes[1],)), ((), ()))
  return lax.dot_general(a, b, numbers, preferred_element_type=F32, precision=precision)


def _add(terms: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def _folded(rows: jax.Array, size: int) -> jax.Array:
  """Pieces side by side added up."""
  return _add([rows[i : i + size] for i in range(0, len(rows), size)])


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
  return _add([x[:, i : i + lanes] for i in range(0, x.shape[1], lanes)])


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


def _mixed(plan: Plan, xs: list[jax.Array], y: jax.Array, weight: Callable) -> list[jax.Array]:
  """The new streams of a group of tokens and a chunk of the width, float32."""
  n, new = plan.streams, []
  for i in range(n):
    mixed = _add([weight(n + i * n + j) * xs[j] for j in range(n)]) if plan.mixes else xs[i]
    new.append(mixed + weight(i) * y)
  return new


def _parameters(plan: Plan, ref) -> list[jax.Array]:
  """Rows of parameters, for each token its own, as their gradients are."""
  return [jnp.broadcast_to(ref[p : p + 1], (1, plan.tile)) for p in range(ref.shape[0])]


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
      new = _mixed(plan, xs, y[r, at].astype(F32), lambda m: _wide(weight[m, r], plan.chunk))
      squares = []
      for i, wide in enumerate(new):
        rounded = wide.astype(plan.dtype)
        x_new[i, r, at] = rounded
        squares.append(_partial(jnp.square(rounded.astype(F32)), lanes))
      for i, part in enumerate(squares if plan.separate else [_add(squares)]):
        square[i, r] += part

    _groups(plan, group, written_out=True)
    products = [_product(phi[i % plan.maps, :k, at], x_new[i, :, at], (1, 1), plan) for i in range(n)]
    raw[...] += jnp.concatenate(products) if plan.separate else _add(products)

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
    rows = [whole[r : r + 1] for r in range(len(whole))]
    _spread(weight, jnp.concatenate(plan.read[0]([*rows, *_parameters(plan, small)])))

  def read(at):
    def group(r):
      terms = [_wide(weight[i, r], plan.chunk) * x_new[i, r, at].astype(F32) for i in range(n)]
      h[r, at] = _add(terms).astype(plan.dtype)

    _groups(plan, group, written_out=True)

  _chunks(plan, read)


def _read_gradients(plan: Plan, mix_MT: jax.Array, inner: list[jax.Array]) -> list[jax.Array]:
  """Rows of <dh, x'_i>, from <dh, y> and <dh, x_j>: x' is linear in them, so it need not be made for this."""
  n, (with_y, *with_x) = plan.streams, inner

  def row(m: int) -> jax.Array:
    return mix_MT[m : m + 1]

  return [
    row(i) * with_y + (_add([row(n + i * n + j) * with_x[j] for j in range(n)]) if plan.mixes else with_x[i])
    for i in range(n)
  ]


def _row_gradients(plan: Plan, mix_MT, small, sums, d_sums, d_pre):
  """(rows of pre, gradients of the sums, of parameters), from those of the read."""
  n, count = plan.streams, sum(plan.sums)
  d_rows = [d_sums[r : r + 1] for r in range(count)]
  if plan.given:
    first = plan.weights - n
    return [mix_MT[first + i : first + i + 1] for i in range(n)], d_rows, []
  read, gradient = plan.read
  rows = [sums[r : r + 1] for r in range(count)] + _parameters(plan, small)
  more = gradient([*d_pre, *rows])
  return read(rows), list(map(jnp.add, d_rows, more[:count])), more[count:]


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
  d_pre = _read_gradients(plan, mix_MT, _token_rows([total[mixing + j] for j in range(n + 1)]))
  pre, d_rows, d_parameters = _row_gradients(plan, mix_MT, small, sums, d_sums, d_pre)
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
    left = [jnp.concatenate(_pieces(d, 3)) for d in groups]
    high_low = [_pieces(d, 2) for d in groups]
    right = [jnp.concatenate([high] * 3 + [low]) for high, low in high_low]

  def outer(at):
    for i in range(n):
      through[i] = _product(right[i * plan.separate], phi[i % plan.maps, :, at], (0, 0), plan)

    def group(r):
      def w(m):
        return _wide(weight[m, r], plan.chunk)

      xs, y_r, dh = [x[j, r, at].astype(F32) for j in range(n)], y[r, at].astype(F32), gh[r, at].astype(F32)
      wide, d_y, d_x = _mixed(plan, xs, y_r, w), None, [None] * n
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


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """How arrays of T tokens are cut; rows come as (K, T), in tiles of less than 128 as (T / tile, K, tile)."""

  plan: Plan
  tokens: int

  @property
  def whole(self) -> bool:
    """Whether a block of rows may be cut from (K, T): its lanes are whole registers, or all there are."""
    return self.plan.tile % LANES == 0 or self.plan.tile == self.tokens

  def _at(self, core, step):
    return core * (self.tokens // self.plan.tile // self.plan.cores) + step

  def streams(self) -> pl.BlockSpec:
    plan = self.plan
    return pl.BlockSpec((plan.streams, plan.tile, plan.width), lambda c, s: (0, self._at(c, s), 0))

  def vectors(self) -> pl.BlockSpec:
    return pl.BlockSpec((self.plan.tile, self.plan.width), lambda c, s: (self._at(c, s), 0))

  def rows(self, count: int) -> pl.BlockSpec:
    if self.whole:
      return pl.BlockSpec((count, self.plan.tile), lambda c, s: (0, self._at(c, s)))
    return pl.BlockSpec((None, count, self.plan.tile), lambda c, s: (self._at(c, s), 0, 0))

  def row_shape(self, count: int) -> jax.ShapeDtypeStruct:
    shape = (count, self.tokens) if self.whole else (self.tokens // self.plan.tile, count, self.plan.tile)
    return jax.ShapeDtypeStruct(shape, F32)

  def cut(self, rows_KT: jax.Array) -> jax.Array:
    """Rows as the kernel takes them."""
    return rows_KT if self.whole else rows_KT.reshape(len(rows_KT), -1, self.plan.tile).swapaxes(0, 1)

  def joined(self, rows: jax.Array) -> jax.Array:
    return rows if rows.ndim == 2 else rows.swapaxes(0, 1).reshape(rows.shape[1], -1)

  def constant(self, shape: tuple[int, ...]) -> pl.BlockSpec:
    once = {} if self.plan.interpret else {'pipeline_mode': pl.Buffered(1)}
    return pl.BlockSpec(shape, lambda c, s: (0,) * len(shape), **once)

  def of_core(self, shape: tuple[int, ...]) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda c, s: (c, *(0 for _ in shape)))

  def call(self, kernel: Callable, name: str, flops: int, **how):
    """pl.pallas_call over the grid, with an estimate of its cost: blocks moved once."""
    plan = self.plan
    shapes = jax.tree.leaves(how['out_shape'])
    written = sum(s.size * s.dtype.itemsize for s in shapes)

    def run(*arrays):
      read = sum(a.size * a.dtype.itemsize for a in arrays)
      estimate = pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=read + written)
      parameters = pltpu.CompilerParams(
        dimension_semantics=('parallel', 'arbitrary'), vmem_limit_bytes=plan.vmem
      )
      return pl.pallas_call(
        functools.partial(kernel, plan=plan),
        grid=(plan.cores, self.tokens // plan.tile // plan.cores),
        cost_estimate=estimate,
        compiler_params=parameters,
        interpret=plan.interpret,
        name=name,
        **how,
      )(*arrays)

    return run


def forward(
  plan: Plan, x_NTC: jax.Array, y_TC: jax.Array, mix_MT: jax.Array, phi: jax.Array, small_P1: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x', h and the rows of sums (R, T) in float32: raw products, then mean squares.

  mix: rows of post, res (row-major) and, where it is given, pre. phi: of split(). small: the read's
  parameters.
  """
  n, tokens, width = x_NTC.shape
  blocks, rows, weights = _Blocks(plan, tokens), sum(plan.sums), plan.weights
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
  n, tokens, width = x_NTC.shape
  blocks, rows, weights = _Blocks(plan, tokens), sum(plan.sums), plan.weights
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
