"""Singular values and determinants of small matrices, tokens minor, in plain array operations.

Not LAPACK's: jaxlib 0.10 cuts a batch of decompositions among XLA:CPU's threads and waits inside one of them,
so that two decompositions at once can wait for each other for ever; and accelerators are slow at many tiny
ones.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

SWEEPS = 12  # convergence is quadratic: 6 to 10 reach float64's rounding for n <= 16


def singular_values(h_NMX: jax.Array) -> jax.Array:
  """Singular values of (n, n, *tokens), largest first, (n, *tokens), each to relative rounding.

  One-sided Jacobi: rotates pairs of columns until they are orthogonal (Hestenes 1958; Demmel and Veselic 1992
  for the accuracy of the small ones).
  """
  n = h_NMX.shape[0]
  if n == 1:
    return jnp.abs(h_NMX[0])
  pairs = jnp.asarray([(i, j) for i in range(n) for j in range(i + 1, n)], jnp.int32).reshape(-1, 2)
  tiny = jnp.finfo(h_NMX.dtype).tiny

  def rotate(k, columns_MNX):
    i, j = pairs[k % len(pairs), 0], pairs[k % len(pairs), 1]
    a_NX, b_NX = columns_MNX[i], columns_MNX[j]
    product_X = (a_NX * b_NX).sum(0)
    zeta_X = ((b_NX * b_NX).sum(0) - (a_NX * a_NX).sum(0)) / (
      2 * jnp.where(jnp.abs(product_X) > tiny, product_X, 1)
    )
    tangent_X = jnp.where(zeta_X < 0, -1, 1) / (jnp.abs(zeta_X) + jnp.hypot(1.0, zeta_X))
    tangent_X = jnp.where(jnp.abs(product_X) > tiny, tangent_X, 0)
    cosine_X = lax.rsqrt(1 + tangent_X * tangent_X)
    sine_X = (cosine_X * tangent_X)[None]
    columns_MNX = columns_MNX.at[i].set(cosine_X[None] * a_NX - sine_X * b_NX)
    return columns_MNX.at[j].set(sine_X * a_NX + cosine_X[None] * b_NX)

  columns_MNX = lax.fori_loop(0, SWEEPS * len(pairs), rotate, h_NMX.swapaxes(0, 1))
  return jnp.flip(jnp.sort(jnp.sqrt((columns_MNX * columns_MNX).sum(1)), 0), 0)


def determinant(h_NMX: jax.Array) -> jax.Array:
  """Determinants of (n, n, *tokens), by elimination with row pivots."""
  n, tokens = h_NMX.shape[0], (1,) * (h_NMX.ndim - 2)
  product_X, rows_N = jnp.ones_like(h_NMX[0, 0]), np.arange(n).reshape(n, *tokens)
  for k in range(n):
    here_X = jnp.argmax(jnp.where(rows_N >= k, jnp.abs(h_NMX[:, k]), -1), 0)
    pivot_MX = jnp.take_along_axis(h_NMX, here_X[None, None], 0)[0]
    first_MX = h_NMX[k]
    h_NMX = jnp.where((rows_N == here_X[None])[:, None], first_MX[None], h_NMX).at[k].set(pivot_MX)
    product_X = product_X * jnp.where(here_X == k, 1, -1) * pivot_MX[k]
    factor_NX = h_NMX[:, k] / jnp.where(pivot_MX[k] == 0, 1, pivot_MX[k])[None]
    h_NMX = h_NMX - jnp.where(rows_N > k, factor_NX, 0)[:, None] * pivot_MX[None]
  return product_X
