"""Pallas calls whose kernels compute with one register, or one per thread, for each entry of many tokens.

TPU: an entry's tokens are whole registers (8, 128), and blocks of (M, T) lie in memory as (M, T / 128, 128).
GPU: an entry's tokens are one per thread of a program.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton
from jax.extend import core as jex

LANES = 128
# TPU: rows of the arrays that stand for entries. Two registers each hide latencies, a quarter of the cycles
# at four streams. Beyond so many entries, or for few tokens, one each.
SHORT, TALL = 8, 16
FEW_ENTRIES = 24
# TPU: bytes of the blocks of one grid step, which costs some 600 cycles whatever it does.
BLOCK_BYTES = 2**21
# TPU: steps run on so many cores at once (v4, v5p), or one after the other.
CORES = 2
# GPU: tokens of one program, one per thread.
THREADS = 128
SLOW = frozenset(
  """acos acosh asin asinh atan atan2 atanh cbrt cos cosh div erf erf_inv erfc exp exp2 expm1 lgamma log log1p
  logistic pow rsqrt sin sinh sqrt tan tanh""".split()
)


class Work(NamedTuple):
  """What a kernel is to compute.

  registers(shape): a jaxpr from arrays of this shape, one per scalar, then one per row of arrays and
    cotangents, to arrays of this shape: `sums` of them, then one per row of the outputs.
  scalars (P,): what all tokens share.
  arrays, cotangents: (M, T) each. Beyond the last token come copies of it, with cotangents 0.
  sizes: rows M of each output (M, T). sums: how many results are summed over tokens instead.
  """

  registers: Callable[[tuple[int, ...]], Any]
  scalars: jax.Array
  arrays: list[jax.Array]
  cotangents: list[jax.Array]
  sizes: list[int]
  sums: int
  tokens: int

  @property
  def name(self) -> str:
    return 'lanes_backward' if self.cotangents else 'lanes_forward'

  def padded(self, tokens: int) -> list[jax.Array]:
    """Arrays and cotangents of so many tokens."""
    more = ((0, 0), (0, tokens - self.tokens))
    if tokens == self.tokens:
      return [*self.arrays, *self.cotangents]
    return [*(jnp.pad(x, more, 'edge') for x in self.arrays), *(jnp.pad(g, more) for g in self.cotangents)]


def tpu_call(work: Work, interpret: bool) -> tuple[list[jax.Array], jax.Array]:
  """The outputs (M, T), and the sums (work.sums,)."""
  height, cores, steps, block = _tpu_blocks(work)
  jaxpr = work.registers((height, LANES))
  rows, total = cores * steps * block, work.sums
  inputs = [x.reshape(-1, rows, LANES) for x in work.padded(rows * LANES)]

  def by_step(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size, block, LANES), lambda core, i: (0, core * steps + i, 0))

  specs = [by_step(size) for size in work.sizes]
  shapes = [jax.ShapeDtypeStruct((size, rows, LANES), jnp.float32) for size in work.sizes]
  if total:
    specs.append(pl.BlockSpec((1, total, height, LANES), lambda core, i: (core, 0, 0, 0)))
    shapes.append(jax.ShapeDtypeStruct((cores, total, height, LANES), jnp.float32))
  # Of two axes: members of a population add one, and Mosaic cuts rows of SMEM no shorter.
  scalars = [work.scalars[None]] if work.scalars.size else []
  outputs = pl.pallas_call(
    functools.partial(_tpu_kernel, jaxpr, height, work.scalars.size, len(inputs), total),
    grid=(cores, steps),
    in_specs=[*(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in scalars), *(by_step(len(x)) for x in inputs)],
    out_specs=specs,
    out_shape=shapes,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'arbitrary' if total else 'parallel')
    ),
    cost_estimate=_cost(jaxpr, work),
    interpret=interpret,
    name=work.name,
  )(*scalars, *inputs)
  made = [y.reshape(len(y), -1)[:, : work.tokens] for y in outputs[: len(work.sizes)]]
  return made, outputs[-1].sum((0, 2, 3)) if total else jnp.zeros(0)


def _tpu_blocks(work: Work) -> tuple[int, int, int, int]:
  """(rows of an entry, cores, grid steps of each, rows of a block): as few steps as their bytes allow."""
  sizes = [*map(len, [*work.arrays, *work.cotangents]), *work.sizes]
  few = max(sizes, default=0) <= FEW_ENTRIES and work.tokens > CORES * SHORT * LANES
  height = TALL if few else SHORT
  bytes_per_group = 4 * height * LANES * sum(sizes)
  groups = pl.cdiv(work.tokens, height * LANES)
  cores = min(CORES, groups)
  steps = pl.cdiv(groups, cores * max(BLOCK_BYTES // bytes_per_group, 1))
  return height, cores, steps, pl.cdiv(groups, cores * steps) * height


def _tpu_kernel(jaxpr: Any, height: int, scalars: int, count: int, total: int, *refs: Any) -> None:
  """One grid step, a set of registers after the other. refs: scalars, `count` inputs, outputs, sums."""
  shared_ref, refs = (refs[0], refs[1:]) if scalars else (None, refs)
  ins, outs = refs[:count], refs[count : len(refs) - bool(total)]
  shared = [jnp.full((height, LANES), shared_ref[0, p], jnp.float32) for p in range(scalars)]
  if total:
    sums_ref = refs[-1]

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
      sums_ref[...] = jnp.zeros(sums_ref.shape, jnp.float32)

  def group(i: jax.Array, carry: None) -> None:
    at = pl.ds(pl.multiple_of(i * height, height), height)
    results = jex.jaxpr_as_fun(jaxpr)(*shared, *(ref[m, at, :] for ref, m in _rows(ins)))
    for p in range(total):
      sums_ref[0, p] += results[p]
    for (ref, m), result in zip(_rows(outs), results[total:], strict=True):
      ref[m, at, :] = result

  lax.fori_loop(0, (ins or outs)[0].shape[1] // height, group, None)


def _rows(refs: tuple) -> list[tuple[Any, int]]:
  return [(ref, m) for ref in refs for m in range(ref.shape[0])]


def gpu_call(work: Work) -> tuple[list[jax.Array], jax.Array]:
  """The outputs (M, T), and the sums (work.sums,), to which each program adds a row."""
  jaxpr = work.registers((THREADS,))
  steps, total = pl.cdiv(work.tokens, THREADS), work.sums
  inputs = work.padded(steps * THREADS)

  def by_step(size: int) -> pl.BlockSpec:
    return pl.BlockSpec((size, THREADS), lambda i: (0, i))

  specs = [by_step(size) for size in work.sizes]
  shapes = [jax.ShapeDtypeStruct((size, steps * THREADS), jnp.float32) for size in work.sizes]
  if total:
    specs.append(pl.BlockSpec((1, total), lambda i: (i, 0)))
    shapes.append(jax.ShapeDtypeStruct((steps, total), jnp.float32))
  scalars = [work.scalars] if work.scalars.size else []
  outputs = pl.pallas_call(
    functools.partial(_gpu_kernel, jaxpr, work.scalars.size, len(inputs), total),
    grid=(steps,),
    in_specs=[*(pl.BlockSpec(x.shape, lambda i: (0,)) for x in scalars), *(by_step(len(x)) for x in inputs)],
    out_specs=specs,
    out_shape=shapes,
    compiler_params=triton.CompilerParams(num_warps=THREADS // 32, num_stages=1),
    cost_estimate=_cost(jaxpr, work),
    name=work.name,
  )(*scalars, *inputs)
  made = [y[:, : work.tokens] for y in outputs[: len(work.sizes)]]
  return made, outputs[-1].sum(0) if total else jnp.zeros(0)


def _gpu_kernel(jaxpr: Any, scalars: int, count: int, total: int, *refs: Any) -> None:
  """One program's tokens. refs: scalars, `count` inputs, outputs, sums."""
  shared_ref, refs = (refs[0], refs[1:]) if scalars else (None, refs)
  ins, outs = refs[:count], refs[count : len(refs) - bool(total)]
  shared = [jnp.full((THREADS,), shared_ref[p], jnp.float32) for p in range(scalars)]
  results = jex.jaxpr_as_fun(jaxpr)(*shared, *(ref[m, :] for ref, m in _rows(ins)))
  for p in range(total):
    refs[-1][0, p] = jnp.sum(results[p])
  for (ref, m), result in zip(_rows(outs), results[total:], strict=True):
    ref[m, :] = result


def _cost(jaxpr: Any, work: Work) -> pl.CostEstimate:
  """One operation per instruction and token; the turns of a conditional loop, which nobody knows, are one."""
  flops, slow = _operations(jaxpr.jaxpr)
  numbers = work.tokens * (sum(map(len, [*work.arrays, *work.cotangents])) + sum(work.sizes))
  return pl.CostEstimate(flops * work.tokens, slow * work.tokens, 4 * (numbers + work.scalars.size))


def _operations(jaxpr: Any) -> tuple[int, int]:
  """Instructions on lanes, and how many of them are divisions or transcendental."""
  flops, slow = 0, 0
  for eqn in jaxpr.eqns:
    inner = [p.jaxpr for p in eqn.params.values() if hasattr(p, 'jaxpr')]
    for counts in map(_operations, inner):
      flops += eqn.params.get('length', 1) * counts[0]
      slow += eqn.params.get('length', 1) * counts[1]
    if not inner and eqn.outvars[0].aval.ndim and eqn.primitive.name != 'broadcast_in_dim':
      flops += 1
      slow += eqn.primitive.name in SLOW
  return flops, slow


def instructions(jaxpr: Any) -> int:
  """The length of a jaxpr as code."""
  inner = [p.jaxpr for eqn in jaxpr.eqns for p in eqn.params.values() if hasattr(p, 'jaxpr')]
  return len(jaxpr.eqns) + sum(map(instructions, inner))
