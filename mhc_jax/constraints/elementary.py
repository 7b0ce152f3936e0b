"""Sets without a projection: all matrices (HC), the identity alone (iHC), diagonal, row-stochastic ones."""

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint, log_near_identity, near_identity, promote


def unconstrained() -> Constraint:
  """R^{n x n}: the coordinates are the matrix, row-major (HC, 2409.19606)."""
  return Constraint(
    name='unconstrained',
    num_coordinates=lambda n: n * n,
    matrix=lambda coords_KX, n: promote(coords_KX).reshape(n, n, *coords_KX.shape[1:]),
    identity=lambda n, mixing=0.01: near_identity(n, mixing).reshape(-1),
    dimension=lambda n: n * n,
    defect=lambda h_NMX: jnp.zeros(h_NMX.shape[2:], h_NMX.dtype),
    properties=frozenset({'closed_under_product', 'exact'}),
    flops=lambda n: 0,
  )


def _identity_matrix(coords_KX: jax.Array, n: int) -> jax.Array:
  tokens = coords_KX.shape[1:]
  eye_NM = jnp.eye(n, dtype=promote(coords_KX).dtype)
  return jnp.broadcast_to(eye_NM.reshape(n, n, *(1 for _ in tokens)), (n, n, *tokens))


def _identity_defect(h_NMX: jax.Array) -> jax.Array:
  n = h_NMX.shape[0]
  eye_NMX = jnp.eye(n, dtype=h_NMX.dtype).reshape(n, n, *(1 for _ in h_NMX.shape[2:]))
  return jnp.abs(h_NMX - eye_NMX).max((0, 1))


def identity() -> Constraint:
  """{I}: no mixing (iHC; hyper_connection.write skips the product)."""
  return Constraint(
    name='identity',
    num_coordinates=lambda n: 0,
    matrix=_identity_matrix,
    identity=lambda n, mixing=0.01: np.zeros(0),
    dimension=lambda n: 0,
    defect=_identity_defect,
    properties=frozenset(
      {
        'row_stochastic',
        'column_stochastic',
        'nonnegative',
        'orthogonal',
        'nonexpansive',
        'closed_under_product',
        'exact',
      }
    ),
    flops=lambda n: 0,
  )


def diagonal() -> Constraint:
  """diag(sigmoid of n coordinates): streams are kept in part and not mixed (Hyperloop, 2604.21254).

  identity() keeps 1 - mixing of each. A write computes all n^2 products, those with zeros too.
  """

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    kept_KX = jax.nn.sigmoid(promote(coords_KX))
    return _identity_matrix(coords_KX, n) * kept_KX[None]

  def identity(n: int, mixing: float = 0.01) -> np.ndarray:
    lost = np.clip(mixing, 1e-6, 1 - 1e-6)
    return np.full(n, np.log(1 / lost - 1))

  def defect(h_NMX: jax.Array) -> jax.Array:
    kept_NX = jnp.stack([h_NMX[i, i] for i in range(len(h_NMX))])
    outside_X = jnp.maximum(jnp.maximum(-kept_NX, kept_NX - 1), 0).max(0)
    eye_NMX = _identity_matrix(h_NMX[0], len(h_NMX))
    return jnp.maximum(outside_X, jnp.abs(h_NMX * (1 - eye_NMX)).max((0, 1)))

  return Constraint(
    name='diagonal',
    num_coordinates=lambda n: n,
    matrix=matrix,
    identity=identity,
    dimension=lambda n: n,
    defect=defect,
    properties=frozenset({'nonnegative', 'nonexpansive', 'closed_under_product', 'exact'}),
    flops=lambda n: 4 * n,
  )


def row_stochastic() -> Constraint:
  """Rows are softmaxes of row-major logits (n * n)."""

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    return jax.nn.softmax(promote(coords_KX).reshape(n, n, *coords_KX.shape[1:]), 1)

  def defect(h_NMX: jax.Array) -> jax.Array:
    negative_X = jnp.maximum(-h_NMX, 0).max((0, 1))
    return jnp.maximum(jnp.abs(h_NMX.sum(1) - 1).max(0), negative_X)

  return Constraint(
    name='row_stochastic',
    num_coordinates=lambda n: n * n,
    matrix=matrix,
    identity=log_near_identity,
    dimension=lambda n: n * (n - 1),
    defect=defect,
    properties=frozenset({'row_stochastic', 'nonnegative', 'closed_under_product', 'exact'}),
    flops=lambda n: 5 * n * n,
  )
