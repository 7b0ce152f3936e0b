"""What tells one hyper-connection from another, as data: gates, start values, ConnectionSpec.

`presets.py` names the usual ones; `hyper_connection.py` computes with them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mhc_jax.constraints.base import Constraint


@dataclasses.dataclass(frozen=True)
class Gate:
  """The map from a coordinate to a read or write weight: scale * kind(coordinate) + eps.

  'linear', 'sigmoid', 'tanh': per stream; 'softmax': over the streams. Without coordinates: 'fixed', the
  weight is `scale` for ever; 'one_hot' (writes), sublayer s writes stream 1 + s // write_period alone;
  'elementwise' (reads), a low-rank map yields one weight per stream and channel (generator.elementwise_read);
  'sources' (reads), attention over the streams written so far (generator.source_read); 'dense' (reads),
  before attention weights from the last stream (dense_reads.py), and before feed-forward 'written', the
  stream that attention wrote.
  """

  kind: str
  scale: float = 1.0
  eps: float = 0.0

  @property
  def has_coordinates(self) -> bool:
    """Whether the generator yields one coordinate per stream for it."""
    return self.kind in KINDS

  def __call__(self, coords_NBT: jax.Array) -> jax.Array:
    return self.scale * KINDS[self.kind](coords_NBT) + self.eps


KINDS = {
  'linear': lambda coords_NBT: coords_NBT,
  'sigmoid': jax.nn.sigmoid,
  'tanh': jnp.tanh,
  'softmax': lambda coords_NBT: jax.nn.softmax(coords_NBT, 0),
}
# Coordinates at the start of weights between different fractions: 0, or next to it where nothing else is.
ACROSS = {'linear': 0.0, 'sigmoid': -4.0, 'tanh': 0.0, 'softmax': -4.0}
READ_GATES = ('fixed', *KINDS, 'elementwise', 'sources', 'dense')
WRITE_GATES = ('fixed', *KINDS, 'one_hot')


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
  norm_scope: str = 'joint'  # the norm before phi is of the whole nC vector or 'per_stream'
  norm_weight: bool = False  # a learned weight after that norm (the paper absorbs it in phi)
  activation: str = 'none'  # 'tanh' bounds the dynamic part (HC)
  phi_only: bool = False  # coordinates without biases, alpha fixed at its start (Qwen4-Exp)
  share_alpha: bool = False  # one alpha for reads and mixing (HC)
  generator: str = 'matrix'  # 'cp': phi of res is a sum of `rank` outer products (TEMPER)
  rank: int | None = None  # rank of the generator phi; None is full
  read_rank: int | None = None  # of the 'elementwise' read gate
  read_heads: int = 1  # of the 'sources' read gate: slices of the channels with weights of their own
  read_normed: bool = False  # 'sources' adds up normed streams
  write_period: int = 1  # sublayers in a row that a 'one_hot' write adds up in one stream
  norm_eps: float = 1e-6
  norm_eps_outside: bool = False  # 1 / (rms + eps) instead of 1 / sqrt(mean square + eps)
  single_pass: bool = False  # each sublayer reads by the map that the sublayer before it generated (V4.1)
  expansion: str = 'replicate'  # 'one_hot': the embedding in stream 0; 'learned': scaled copies
  collapse: str = 'mean'  # 'mean', 'sum', 'learned', 'weights', 'read', 'sources' or 'dense'
  collapse_eps: float = 0.0
  read_ways: int = 1  # of the 'dense' read gate: 4 for queries, keys, values and the residual apart
  depth_norm: bool = False  # norms before and after the 'dense' read gate's sums
  fractions: int = 1  # m, in which each stream is read, mixed and written (fractions.py)
  write_across: bool = True  # False: each fraction of a sublayer's output goes to that fraction of streams

  @property
  def units(self) -> int:
    """Number of what is mixed: streams, or the fractions of all streams."""
    return self.streams * self.fractions

  @property
  def parts(self) -> dict[str, int]:
    """Number of coordinates of each part that has any, in the order pre, post, res."""
    n, m = self.units, self.fractions
    sizes = {
      'pre': n * m * self.read_gate.has_coordinates,
      'post': n * (m if self.write_across else 1) * self.write_gate.has_coordinates,
      'res': self.constraint.num_coordinates(n),
    }
    return {part: size for part, size in sizes.items() if size}

  def alpha_of(self, part: str) -> str:
    """The part whose alpha multiplies this one's dynamic coordinates."""
    return 'pre' if part == 'res' and self.share_alpha and 'pre' in self.parts else part

  @property
  def generator_shape(self) -> tuple[int, int]:
    """(number of inputs per unit of a fraction's width, number of outputs) of phi."""
    sizes, n = self.parts.values(), self.units
    return (n, sum(sizes)) if self.scope == 'joint' else (1, sum(-(-size // n) for size in sizes))

  @property
  def has_params(self) -> bool:
    """Whether a sublayer's connection has any parameter."""
    return bool(self.parts) or self.read_gate.kind in ('elementwise', 'sources', 'dense')

  def of_sublayer(self, index: int) -> 'ConnectionSpec':
    """That of a layer's sublayer 0 or 1, which differ with dense reads."""
    if self.read_gate.kind != 'dense' or index == 0:
      return self
    return dataclasses.replace(self, read_gate=Gate('written'), read_ways=1)

  @property
  def norm_inputs(self) -> int:
    """Number of streams that the learned weight of the norm tells apart."""
    if self.read_gate.kind == 'sources':
      return 1
    return self.generator_shape[0] if self.parts else self.units
