"""How the boundary's kernels for TPUs cut their arrays into blocks, and the call of one.

Axes as in boundary_tpu.py.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mhc_jax.kernels.boundary_plan import F32, LANES, Plan


@dataclasses.dataclass(frozen=True)
class Blocks:
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
