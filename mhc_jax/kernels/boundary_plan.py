"""What the boundary's kernels have in common: their plan, and the arithmetic of a tile of tokens.

Axes as in boundary_tpu.py: rows are (1, T) or (T,), one number of each token of a tile.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

F32 = jnp.float32
LANES = 128  # of a TPU's register


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
  platform: str = 'tpu'  # or 'gpu'
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


def pieces(x: jax.Array, count: int) -> list[jax.Array]:
  """bfloat16 arrays whose sum is x to 8 bits each."""
  found, rest = [], x
  for _ in range(count):
    found.append(rest.astype(jnp.bfloat16))
    rest = rest - found[-1].astype(F32)
  return found


def add(terms: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def mixed(plan: Plan, xs: list[jax.Array], y: jax.Array, weight: Callable) -> list[jax.Array]:
  """The new streams of a group of tokens and a chunk of the width, float32."""
  n, new = plan.streams, []
  for i in range(n):
    mixed = add([weight(n + i * n + j) * xs[j] for j in range(n)]) if plan.mixes else xs[i]
    new.append(mixed + weight(i) * y)
  return new


def read_gradients(plan: Plan, mix: Sequence[jax.Array], inner: Sequence[jax.Array]) -> list[jax.Array]:
  """Rows of <dh, x'_i>, from <dh, y> and <dh, x_j>: x' is linear in them, so it need not be made for this."""
  n, (with_y, *with_x) = plan.streams, inner
  return [
    mix[i] * with_y + (add([mix[n + i * n + j] * with_x[j] for j in range(n)]) if plan.mixes else with_x[i])
    for i in range(n)
  ]


def row_gradients(
  plan: Plan,
  mix: Sequence[jax.Array],
  parameters: Sequence[jax.Array],
  sums: Sequence[jax.Array],
  d_sums: Sequence[jax.Array],
  d_pre: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
  """(rows of pre, gradients of the sums, of parameters), with those that come through the read."""
  if plan.given:
    return list(mix[-plan.streams :]), list(d_sums), []
  read, gradient = plan.read
  more = gradient([*d_pre, *sums, *parameters])
  d_rows = [a + b for a, b in zip(d_sums, more, strict=False)]
  return read([*sums, *parameters]), d_rows, more[len(d_rows) :]
