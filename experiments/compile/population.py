"""Train steps of populations on one chip: what `mhc compile --population` compiles, and its table. Pure.

The runs are of experiments/quick.py's kind (depth 4, batches of 8 x 128 tokens, float32) at four widths, as
members of one program (mhc_jax/population.py). The step alone: the loop around it adds no operation of note.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.config import build_optimizer
from mhc_jax.model_config import build_model
from mhc_jax.population import member_step
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs, without_traced

from .. import quick
from .abstract_step import abstract_inputs

ARMS, DEPTH = ('residual', 'mhc'), 4
WIDTHS, MEMBERS = (64, 128, 256, 512), (1, 8, 32)


def steps(device: jax.Device) -> Iterator[tuple[str, Callable]]:
  """(name, lowering) of every step."""
  for what, at in grid().items():
    yield what, lambda at=at: _lowered(*at, device)


def grid() -> dict[str, tuple[str, int, int]]:
  """name -> (arm, width, members), the smallest first."""
  at = ((arm, width, members) for members in MEMBERS for width in WIDTHS for arm in ARMS)
  return {name(*where): where for where in at}


def name(arm: str, width: int, members: int) -> str:
  """Of a step, in the table's data."""
  return f'{members} x {arm} {width}'


def _lowered(arm: str, width: int, members: int, device: jax.Device) -> Any:
  config, mesh = quick.config(arm, width, DEPTH, seed=0), make_mesh({}, [device])
  model, optimizer = build_model(config), without_traced(build_optimizer(config))

  def stacked(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    shape = leaf.shape if members == 1 else (members, *leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, P()))

  batch, hparams = abstract_inputs(config, mesh)
  arguments = jax.tree.map(stacked, (programs(model, optimizer, mesh).abstract, batch, hparams))
  return jax.jit(member_step(model, optimizer, mesh, members), donate_argnums=0).lower(*arguments)


def table(programs: dict[str, dict[str, Any]], clock: float) -> list[list[str]]:
  """Rows of (arm, width, microseconds of a member and update for each number of members, gain).

  programs: name -> kernels.compiled_program; clock in GHz. The time is that of the compiler's cycles; '-'
  where a step is not compiled, and no row where none is. The gain: members per second of the best number of
  them over those of one; the chip takes one process at a time.
  """
  rows = []
  for arm in ARMS:
    for width in WIDTHS:
      found = [programs.get(name(arm, width, members), {}).get('cycles', np.nan) for members in MEMBERS]
      us = np.array(found) / clock / 1e3 / MEMBERS
      shown, gain = ['-' if np.isnan(value) else f'{value:.0f}' for value in us], ''
      if np.isfinite(us).sum() > 1 and np.isfinite(us[0]):
        best = int(np.nanargmin(us))
        gain = f'{us[0] / us[best]:.2f} x at P = {MEMBERS[best]}'
      rows += [[arm, str(width), *shown, gain]] if np.isfinite(us).any() else []
  return rows
