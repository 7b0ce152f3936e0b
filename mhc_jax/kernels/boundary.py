"""The boundary between two sublayers by kernels: which of them, when, and the weights around them.

hyper_connection.boundary is the definition: write a sublayer's output, generate the next one's coefficients,
read its input. A kernel does what goes over the width in one pass (boundary_tpu.py); what is left is a few
numbers a token, which the definition itself computes with tokens in lanes (lanes.py), from the kernel's sums.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mhc_jax import generator
from mhc_jax import hyper_connection as hc
from mhc_jax.connection import ConnectionSpec
from mhc_jax.kernels import boundary_gpu, boundary_tpu, lanes
from mhc_jax.kernels.boundary_plan import Plan
from mhc_jax.kernels.choice import Chip
from mhc_jax.kernels.entries import array_of, entries_of, spread
from mhc_jax.kernels.single_token import evaluate

TILES = (128, 64, 32, 16)  # tokens; fewer are cut from larger widths, to fit


def why_not(spec: ConnectionSpec, width: int, tokens: int, dtype: Any, chip: Chip) -> str | None:
  """Why XLA's program computes this connection, in words; None where the kernels do.

  tokens: of one device and microbatch.
  """
  if not spec.parts or not spec.dynamic:
    return 'the connection generates nothing from the streams'
  if spec.read_gate.kind == 'elementwise':
    return 'its read has a weight per channel'
  if spec.fractions > 1:
    return 'its streams come in fractions'
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f'streams in {jnp.dtype(dtype).name}'
  if chip.platform == 'gpu' and spec.streams > boundary_gpu.STREAMS:
    return f'{spec.streams} streams, for which a GPU has too few registers; it takes {boundary_gpu.STREAMS}'
  said = _why_no_weights(spec, chip.lanes)
  if said is not None:
    return said
  if _tile(spec, width, tokens, dtype, chip) is None:
    return (
      f'{tokens} tokens of width {width} on a device do not come in tiles of {TILES[-1]} to {TILES[0]} for '
      f'{chip.cores} core(s) and {chip.vmem // 2**20} MiB'
    )
  return None


class Pending(NamedTuple):
  """hyper_connection.Pending as kernels pass it on: streams, a sublayer's output, and all weights as rows.

  mix (M, B, T), float32: post (n), res (n^2, row-major) if the connection mixes, and the next sublayer's read
  weights (n) where they are known before its streams are.
  """

  x_NBTD: jax.Array
  y_BTD: jax.Array
  mix_MBT: jax.Array


def start(pending: hc.Pending, spec: ConnectionSpec) -> Pending:
  """Streams to which zeros are still to be written, by the identity: a start for loops over boundaries."""
  n, tokens = spec.streams, pending.x_NBTD.shape[1:3]
  rows = [jnp.zeros(n)] + [jnp.eye(n).reshape(-1)] * _mixes(spec)
  rows = jnp.broadcast_to(jnp.concatenate(rows)[:, None, None], (sum(map(len, rows)), *tokens))
  given = pending.pre_NBT if spec.single_pass else hc.read_weights({}, spec, tokens, jnp.float32)
  mix_MBT = jnp.concatenate([rows, given]) if read_is_given(spec) else rows
  return Pending(pending.x_NBTD, jnp.zeros_like(pending.x_NBTD[0]), mix_MBT)


def definition(pending: Pending, spec: ConnectionSpec) -> hc.Pending:
  """The same as the definition has it."""
  n, mix_MBT = spec.streams, pending.mix_MBT
  res_NMBT = mix_MBT[n : n + n * n].reshape(n, n, *mix_MBT.shape[1:]) if _mixes(spec) else None
  pre_NBT = mix_MBT[-n:] if spec.single_pass else None
  return hc.Pending(pending.x_NBTD, pending.y_BTD, mix_MBT[:n], res_NMBT, pre_NBT)


def boundary(
  params: dict[str, jax.Array], pending: Pending, spec: ConnectionSpec, sublayer: jax.Array, chip: Chip
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x', h, mix): the streams with y written, the next sublayer's input and its weights.

  Of the tokens of one device, where why_not says None. Reverse mode only.
  """
  n, batch, time, width = pending.x_NBTD.shape
  phi_NCK, out_RK = generator.factors(params)
  small = _small(params, out_RK)
  plan, rows = _plan(spec, small, width, batch * time, pending.x_NBTD.dtype, chip)
  x_NTC, h_TC, sums_RT = _boundary(
    plan,
    pending.x_NBTD.reshape(n, -1, width),
    pending.y_BTD.reshape(-1, width).astype(pending.x_NBTD.dtype),
    pending.mix_MBT.reshape(-1, batch * time),
    phi_NCK.astype(jnp.float32).swapaxes(1, 2),
    rows,
  )
  mix_MT = _mix(small, sums_RT, spec, sublayer, chip)
  tokens = batch, time
  return x_NTC.reshape(n, *tokens, width), h_TC.reshape(*tokens, width), mix_MT.reshape(-1, *tokens)


def _small(params: dict[str, jax.Array], out_RK: jax.Array | None) -> dict[str, jax.Array]:
  """The parameters that meet a token's sums."""
  small = {name: value for name, value in params.items() if name.startswith(('b_', 'alpha_'))}
  return small if out_RK is None else small | {'out': out_RK}


def _mixes(spec: ConnectionSpec) -> bool:
  return spec.constraint.name != 'identity'


def read_is_given(spec: ConnectionSpec) -> bool:
  """Whether a boundary's read weights are known before its streams are."""
  return spec.single_pass or not spec.read_gate.has_coordinates


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _boundary(plan, x_NTC, y_TC, mix_MT, phi_NKC, small_P1):
  return _forward(plan, x_NTC, y_TC, mix_MT, phi_NKC, small_P1)[0]


def _kernels(plan: Plan) -> Any:
  return boundary_gpu if plan.platform == 'gpu' else boundary_tpu


def _forward(plan, x_NTC, y_TC, mix_MT, phi_NKC, small_P1):
  x_new, h_TC, sums_RT = _kernels(plan).forward(plan, x_NTC, y_TC, mix_MT, phi_NKC, small_P1)
  sums_RT = checkpoint_name(sums_RT, generator.COORDINATES)
  return (x_new, h_TC, sums_RT), (x_NTC, y_TC, mix_MT, phi_NKC, small_P1, sums_RT)


def _backward(plan, saved, gradients):
  *arrays, sums_RT = saved
  return _kernels(plan).backward(plan, tuple(arrays), sums_RT, *gradients)


_boundary.defvjp(_forward, _backward)


def _sums(spec: ConnectionSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of one token's raw products and mean squares."""
  n, products = spec.streams, generator.products(spec)
  return ((n, products), (n,)) if generator.separate(spec) else ((products,), (1,))


def _mix(
  small: dict[str, jax.Array], sums_RT: jax.Array, spec: ConnectionSpec, sublayer: jax.Array, chip: Chip
) -> jax.Array:
  """Pending's rows of weights (M, T) from the sums."""
  mix_MT = lanes.in_lanes(_weights_of_token(spec), chip.lanes)(small, sums_RT)
  if spec.write_gate.kind != 'one_hot':
    return mix_MT
  # Of the sublayer's number, which is no constant.
  where_NT = hc.one_hot(hc.written_by(sublayer, spec), spec.streams, sums_RT.shape[1:], jnp.float32)
  return jnp.concatenate([spec.write_gate.scale * where_NT, mix_MT])


def _weights_of_token(spec: ConnectionSpec) -> Callable:
  """Pending's rows of one token from its sums, less those of a write to one stream."""
  raw, mean = _sums(spec)
  one_hot = spec.write_gate.kind == 'one_hot'

  def of_token(small: dict[str, jax.Array], sums_R: jax.Array) -> jax.Array:
    split = len(sums_R) - mean[0]
    dynamic = generator.coordinates_of_products(
      small.get('out'), sums_R[:split].reshape(raw), sums_R[split:], spec
    )
    coords = hc.start_and_dynamic(small, dynamic, spec, (), jnp.float32)
    post_N, res_NM = hc.write_weights(coords, spec, (), jnp.float32, 0)
    post_N = jnp.ones(spec.streams) if post_N is None else post_N
    rows = [jnp.zeros(0) if one_hot else post_N]
    rows += [] if res_NM is None else [res_NM.reshape(-1)]
    rows += [hc.read_weights(coords, spec, (), jnp.float32)] * read_is_given(spec)
    return jnp.concatenate(rows)

  return of_token


@functools.lru_cache(256)
def _why_no_weights(spec: ConnectionSpec, platform: str) -> str | None:
  """Why the weights of a token cannot be computed in lanes."""
  params = jax.eval_shape(lambda: hc.init_params(jax.random.key(0), spec, 128, 0))
  small = jax.eval_shape(lambda params: _small(params, generator.factors(params)[1]), params)
  raw, mean = _sums(spec)
  sums_R = jax.ShapeDtypeStruct((math.prod(raw) + mean[0],), jnp.float32)
  return lanes.refused(_weights_of_token(spec), platform, small, sums_R)


def _plan(
  spec: ConnectionSpec, small: dict[str, jax.Array], width: int, tokens: int, dtype: Any, chip: Chip
) -> tuple[Plan, jax.Array]:
  """The kernel's plan, and the parameters of the read as rows (P, 1)."""
  raw, mean = _sums(spec)
  part = spec.alpha_of('pre')
  used = {name: small[name] for name in ('b_pre', f'alpha_{part}', 'out') if name in small}
  if read_is_given(spec):
    used = {}
  leaves, structure = jax.tree.flatten(used)

  def of_token(raw, mean, *leaves):
    small = structure.unflatten(leaves)
    dynamic = generator.coordinates_of_products(small.get('out'), raw, mean, spec)
    # The parts that are not read cost nothing: what no output needs is left out.
    coords = hc.start_and_dynamic(small, {'pre': dynamic['pre']}, spec, (), jnp.float32, parts=('pre',))
    return hc.read_weights(coords, spec, (), jnp.float32)

  def gradient(d_pre, *arrays):
    return jax.vjp(of_token, *arrays)[1](d_pre)

  shapes = [raw, mean, *(leaf.shape for leaf in leaves)]
  read = (
    None
    if read_is_given(spec)
    else (_in_rows(of_token, shapes, chip), _in_rows(gradient, [(spec.streams,), *shapes], chip))
  )
  rows = [leaf.astype(jnp.float32).reshape(-1, 1) for leaf in leaves] or [jnp.zeros((1, 1))]
  plan = _shape(spec, width, dtype, chip, _tile(spec, width, tokens, dtype, chip), read)
  return plan, jnp.concatenate(rows)


def _in_rows(function: Callable, shapes: list[tuple[int, ...]], chip: Chip) -> Callable:
  """A function of one token's arrays of these shapes as one of rows (1, T), one for each of their entries."""
  traced = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))

  def run(rows: list[jax.Array]) -> list[jax.Array]:
    rest = iter(rows)
    inputs = [array_of([next(rest) for _ in range(math.prod(s))], s, jnp.float32) for s in shapes]
    outputs = evaluate(traced.jaxpr, traced.consts, inputs, chip.lanes)
    return [spread(entry, rows[0].shape, jnp.float32) for x in outputs for entry in entries_of(x)]

  return run


def _shape(spec: ConnectionSpec, width: int, dtype: Any, chip: Chip, tile: int, read: Any = None) -> Plan:
  raw, _ = _sums(spec)
  return Plan(
    streams=spec.streams,
    width=width,
    products=raw[-1],
    maps=spec.generator_shape[0],
    separate=generator.separate(spec),
    mixes=_mixes(spec),
    given=read_is_given(spec),
    dtype=jnp.dtype(dtype),
    read=read,
    tile=tile,
    cores=chip.cores,
    vmem=chip.vmem,
    platform=chip.platform,
    interpret=chip.interpret,
  )


def _tile(spec: ConnectionSpec, width: int, tokens: int, dtype: Any, chip: Chip) -> int | None:
  """The most tokens that are done at once; None where none fits."""
  if chip.platform == 'gpu':
    return boundary_gpu.TILE if boundary_gpu.fits(_shape(spec, width, dtype, chip, 0), tokens) else None
  for tile in TILES:
    if tokens % (tile * chip.cores) == 0 and max(_shape(spec, width, dtype, chip, tile).bytes()) < chip.vmem:
      return tile
  return None
