"""What a constraint is: a set of n x n mixing matrices, a map into it, and facts about it.

A constraint is a frozen dataclass of pure functions. hyper_connection.py calls `matrix`; the model
calls `identity` for the initial bias; cost.py and the sweeps read the counts. Everything is
computed in promote_types(dtype, float32): bfloat16 is raised to float32, float64 stays float64.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PROPERTIES = (
  'row_stochastic',  # H 1 = 1
  'column_stochastic',  # 1^T H = 1^T
  'nonnegative',  # H_ij >= 0
  'orthogonal',  # H^T H = I
  'nonexpansive',  # spectral norm <= 1
  'closed_under_product',  # H, H' in the set => H H' in the set
  'exact',  # matrix() lands on the set up to rounding, for any coordinates
)


@dataclasses.dataclass(frozen=True, eq=False)
class Constraint:
  """A set of mixing matrices H, applied to streams as x'_i = sum_j H[i, j] x_j.

  name, params: together they enter the run id. Equal ones make equal constraints (and share compiled
    programs) within the package; one of your own is also its function, so that a redefined one is new.
  num_coordinates(n): how many unconstrained numbers pick a point of the set.
  matrix(coords_KX, n) -> h_NMX: coordinates (K, *tokens) to matrices (n, n, *tokens).
  identity(n, mixing=0.01) -> coords_K: a point whose rows have off-diagonal mass `mixing` (or as
    near to it as the set allows), where gradients still flow.
  dimension(n): intrinsic dimension of the set.
  defect(h_NMX) -> X: largest violation of the set's stated equations and inequalities, 0 on the
    set; a lower bound where membership is hard to decide (the constraint then says so).
  properties: a subset of PROPERTIES.
  flops(n): multiply-adds counted as 2, divisions and exponentials as 1, of one matrix() per token.
  """

  name: str
  num_coordinates: Callable[[int], int]
  matrix: Callable[[jax.Array, int], jax.Array]
  identity: Callable[..., np.ndarray]
  dimension: Callable[[int], int]
  defect: Callable[[jax.Array], jax.Array]
  properties: frozenset[str]
  flops: Callable[[int], int]
  params: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    unknown = set(self.properties) - set(PROPERTIES)
    if unknown:
      raise ValueError(f'constraint {self.name!r} claims unknown properties {sorted(unknown)}')

  @property
  def is_of_package(self) -> bool:
    """Whether it comes from this package: its name and params say everything."""
    return (getattr(self.matrix, '__module__', None) or '').startswith(f'{__package__}.')

  @property
  def _key(self) -> tuple[object, ...]:
    return self.name, None if self.is_of_package else self.matrix

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Constraint) and self._key == other._key and self.params == other.params

  def __hash__(self) -> int:
    return hash(self._key)


def promote(coords_KX: jax.Array) -> jax.Array:
  """Raises to at least float32: coefficients are never computed in less."""
  return coords_KX.astype(jnp.promote_types(coords_KX.dtype, jnp.float32))


def stochastic_defect(h_NMX: jax.Array) -> jax.Array:
  """Largest of |row sum - 1|, |column sum - 1| and -min(H, 0), per token: (n, n, *X) -> (*X)."""
  rows_X = jnp.abs(h_NMX.sum(1) - 1).max(0)
  columns_X = jnp.abs(h_NMX.sum(0) - 1).max(0)
  negative_X = jnp.maximum(-h_NMX, 0).max((0, 1))
  return jnp.maximum(jnp.maximum(rows_X, columns_X), negative_X)


def linear_map(a_RK: np.ndarray, coords_KX: jax.Array) -> jax.Array:
  """A constant matrix applied to the coordinates, (K, *X) -> (R, *X), without rounding to bfloat16.

  Faster than gather and scatter where a_RK picks entries: both directions are one product.
  """
  return jnp.tensordot(jnp.asarray(a_RK, coords_KX.dtype), coords_KX, 1, precision=lax.Precision.HIGHEST)


def product(a_NKX: jax.Array, b_KMX: jax.Array) -> jax.Array:
  """Matrix products of small matrices with tokens minor, (n, k, *X), (k, m, *X) -> (n, m, *X)."""
  terms = [a_NKX[:, k][:, None] * b_KMX[k][None] for k in range(b_KMX.shape[0])]
  return functools.reduce(jnp.add, terms)


def materialise(flag: jax.Array, stage: Callable[..., Any], *inputs: Any) -> Any:
  """stage(*inputs), stored before anything uses it; flag must be True, without the compiler knowing.

  XLA:CPU drops optimization_barrier and fuses a chain of small operations into each of its
  consumers, which then recompute it; the results of a branch it cannot foresee, it stores. Where
  flag is False after all (NaN logits), the result is NaN.
  """

  def branch(*inputs):
    shapes = jax.eval_shape(stage, *inputs)
    other = jax.tree.map(lambda s: jnp.full(s.shape, jnp.nan, s.dtype), shapes)
    return lax.cond(flag, stage, lambda *_: other, *inputs)

  return lax.platform_dependent(*inputs, cpu=branch, default=stage)


def near_identity(n: int, mixing: float) -> np.ndarray:
  """(n, n): 1 - mixing on the diagonal, mixing / (n - 1) elsewhere; [[1]] for n = 1."""
  if n == 1:
    return np.ones((1, 1))
  return np.eye(n) * (1 - mixing * n / (n - 1)) + mixing / (n - 1)


def log_near_identity(n: int, mixing: float = 0.01) -> np.ndarray:
  """Row-major logits (n * n) of near_identity, 0 on the diagonal.

  mixing is raised to 1e-6: finite logits do not reach the identity, and gradients vanish beside it.
  """
  h_NM = near_identity(n, max(mixing, 1e-6))
  return np.log(h_NM / h_NM[0, 0]).reshape(-1)
