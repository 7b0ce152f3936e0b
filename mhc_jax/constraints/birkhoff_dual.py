"""Doubly stochastic matrices by entropic projection, solved on the dual (mHC-proj, arXiv 2606.07574).

H = argmin KL(P || exp(logits)) over doubly stochastic P = diag(r) exp(logits) diag(c): what Sinkhorn
tends to, reached here to rounding. The rows are eliminated (r normalises them), and Newton's method
balances the columns over log c:

    (diag(c-sums) - P^T P) x = 1 - c-sums

The matrix is a graph Laplacian with weights W_jk = sum_i P_ij P_ik, so elimination needs no
subtraction, and float32 loses nothing where P is close to a permutation. A few Sinkhorn steps come
first; logits of wide range start at a higher temperature, which is halved until it is 1. Backward by
the implicit function theorem: one more solve with the same matrix.

Entries are lists of arrays over tokens, and stages are stored one by one (base.materialise):
otherwise XLA:CPU recomputes the whole chain for every entry of its result.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.constraints.base import Constraint, materialise, promote, stochastic_defect
from mhc_jax.constraints.elementary import log_near_identity

WARM_UP = 8  # Sinkhorn iterations before Newton's; each costs a fifth of one of those
HOT = 30.0  # range of the logits from which on the temperature starts above 1, ...
COOL = 15.0  # ... at range / COOL
LONGEST_STEP = 4.0  # largest change of log c_j - log c_k in one Newton step

Vectors = tuple[jax.Array, ...]  # n arrays over tokens
Weights = tuple[Vectors, ...]  # W_jk for k > j at [j][k - j - 1]


def _sum(terms: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def _row_factors(k_NMX: jax.Array, c_M: Vectors) -> Vectors:
  """r with diag(r) K diag(c) 1 = 1."""
  return tuple(1 / _sum([k_X * c_X for k_X, c_X in zip(k_MX, c_M, strict=True)]) for k_MX in k_NMX)


def _column_factors(k_NMX: jax.Array, r_N: Vectors) -> Vectors:
  return _row_factors(k_NMX.swapaxes(0, 1), r_N)


def _laplacian(k_NMX: jax.Array, r_N: Vectors, c_M: Vectors) -> tuple[Weights, Vectors]:
  """The weights W of diag(r) K diag(c) and the residual 1 - column sums."""
  n = len(c_M)
  p = [[k_NMX[i, j] * r_N[i] for j in range(n)] for i in range(n)]
  residual = tuple(1 - _sum([p[i][j] for i in range(n)]) * c_M[j] for j in range(n))
  weights = tuple(
    tuple(_sum([p[i][j] * p[i][k] for i in range(n)]) * c_M[j] * c_M[k] for k in range(j + 1, n))
    for j in range(n)
  )
  return weights, residual


def _solve(weights: Weights, b_M: Vectors) -> list[jax.Array]:
  """x_1 .. x_{n-1} of the Laplacian system with x_n = 0, by elimination of one node after the other.

  eps joins every node to the last one: where W vanishes, rounding errors of b do not move x.
  """
  n, eps = len(b_M), jnp.finfo(b_M[0].dtype).eps
  w = {(j, k): weights[j][k - j - 1] for j in range(n) for k in range(j + 1, n)}
  b, inverse = list(b_M), []
  for j in range(n - 1):
    inverse.append(1 / (eps + _sum([w[j, k] for k in range(j + 1, n)])))
    for k in range(j + 1, n - 1):
      share = w[j, k] * inverse[j]
      b[k] = b[k] + share * b[j]
      for m in range(k + 1, n):
        w[k, m] = w[k, m] + share * w[j, m]
  x = [None] * (n - 1)
  for j in reversed(range(n - 1)):
    x[j] = inverse[j] * _sum([b[j], *(w[j, k] * x[k] for k in range(j + 1, n - 1))])
  return x


def _newton(weights: Weights, residual: Vectors, c_M: Vectors) -> Vectors:
  """One step of at most LONGEST_STEP; c_n stays."""
  x = _solve(weights, residual)
  highest = jnp.maximum(functools.reduce(jnp.maximum, x), 0)
  lowest = jnp.minimum(functools.reduce(jnp.minimum, x), 0)
  damping = jnp.minimum(1, LONGEST_STEP / (highest - lowest))
  return (*(c * jnp.exp(damping * step) for c, step in zip(c_M, x, strict=False)), c_M[-1])


def _row_max(z_NMX: jax.Array) -> jax.Array:
  return functools.reduce(jnp.maximum, [z_NMX[:, j] for j in range(z_NMX.shape[1])])


def _kernel(logits_NMX: jax.Array, potential_MX: jax.Array, temperature_X: jax.Array) -> jax.Array:
  """exp((logits + potential) / temperature) with the largest entry of each row scaled to 1."""
  z_NMX = (logits_NMX + potential_MX[None]) / temperature_X[None, None]
  return jnp.exp(z_NMX - _row_max(z_NMX)[:, None])


def _annealed_potential(logits_NMX: jax.Array) -> jax.Array:
  """log c (n, *X) from one Sinkhorn and one Newton step per temperature; 0 for moderate logits."""
  one_M = (jnp.ones_like(logits_NMX[0, 0]),) * logits_NMX.shape[0]
  range_NX = _row_max(logits_NMX) + _row_max(-logits_NMX)
  range_X = functools.reduce(jnp.maximum, list(range_NX))

  def cool(carry):
    count, potential_MX, temperature_X = carry
    stage = functools.partial(materialise, count >= 0)
    k_NMX = stage(_kernel, logits_NMX, potential_MX, temperature_X)
    r_N = stage(_row_factors, k_NMX, one_M)
    c_M = stage(_column_factors, k_NMX, r_N)
    r_N = stage(_row_factors, k_NMX, c_M)
    c_M = stage(_newton, *stage(_laplacian, k_NMX, r_N, c_M), c_M)
    potential_MX += temperature_X[None] * jnp.log(jnp.stack(c_M))
    return count + 1, potential_MX, jnp.maximum(temperature_X / 2, 1)

  start = (0, jnp.zeros_like(logits_NMX[0]), jnp.where(range_X > HOT, range_X / COOL, 1))
  return lax.while_loop(lambda carry: jnp.any(carry[2] > 1), cool, start)[1]


def _sinkhorn(k_NMX: jax.Array, r_NX: jax.Array) -> tuple[Vectors, Vectors]:
  def iteration(_, factors):
    r_NX, _ = factors
    c_MX = 1 / _sum([k_NMX[i] * r_NX[i][None] for i in range(len(k_NMX))])
    return 1 / _sum([k_NMX[:, j] * c_MX[j][None] for j in range(len(k_NMX))]), c_MX

  r_NX, c_MX = lax.fori_loop(0, WARM_UP, iteration, (r_NX, r_NX))
  return tuple(r_NX), tuple(c_MX)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def project(logits_NMX: jax.Array, max_iterations: int) -> jax.Array:
  """The entropic projection of exp(logits) (n, n, *X), float32 or float64, onto the Birkhoff polytope.

  Newton stops when all column sums are within max(n, 4) ulp of 1, or after max_iterations.
  """
  n = logits_NMX.shape[0]
  if n == 1:
    return jnp.ones_like(logits_NMX)
  tolerance = max(n, 4) * jnp.finfo(logits_NMX.dtype).eps
  # True unless the input is broken, which the compiler cannot know.
  stage = functools.partial(materialise, logits_NMX[(0,) * logits_NMX.ndim] < jnp.inf)
  potential_MX = _annealed_potential(logits_NMX)
  k_NMX = stage(_kernel, logits_NMX, potential_MX, jnp.ones_like(potential_MX[0]))
  r_N, c_M = _sinkhorn(k_NMX, 1 / _sum([k_NMX[:, j] for j in range(n)]))

  def unbalanced(carry):
    count, _, _, (_, residual) = carry
    worst = jnp.max(functools.reduce(jnp.maximum, [jnp.abs(b) for b in residual]))
    return (count < max_iterations) & (worst > tolerance)

  def improve(carry):
    count, _, c_M, system = carry
    stage = functools.partial(materialise, count >= 0)
    c_M = stage(_newton, *system, c_M)
    r_N = stage(_row_factors, k_NMX, c_M)
    return count + 1, r_N, c_M, stage(_laplacian, k_NMX, r_N, c_M)

  start = (0, r_N, c_M, stage(_laplacian, k_NMX, r_N, c_M))
  _, r_N, c_M, _ = lax.while_loop(unbalanced, improve, start)
  return k_NMX * jnp.stack(r_N)[:, None] * jnp.stack(c_M)[None]


def _project_forward(logits_NMX, max_iterations):
  h_NMX = project(logits_NMX, max_iterations)
  return h_NMX, h_NMX


def _project_backward(max_iterations, h_NMX, g_NMX):
  """H * (G - a 1^T - 1 b^T) with a, b such that rows and columns sum to 0: the projection of G onto
  the directions in which a doubly stochastic matrix can move, in the metric 1 / H.
  """
  n = h_NMX.shape[0]
  if n == 1:
    return (jnp.zeros_like(h_NMX),)
  stage = functools.partial(materialise, h_NMX[(0,) * h_NMX.ndim] < jnp.inf)
  one_N = (jnp.ones_like(h_NMX[0, 0]),) * n

  def centred(h_NMX, g_NMX):
    return g_NMX - _sum([h_NMX[:, j] * g_NMX[:, j] for j in range(n)])[:, None]

  def potentials(weights, h_NMX, g_NMX):
    b_M = tuple(_sum([h_NMX[i] * g_NMX[i] for i in range(n)]))
    return jnp.stack([*_solve(weights, b_M), jnp.zeros_like(b_M[0])])

  g_NMX = stage(centred, h_NMX, g_NMX)
  weights, _ = stage(_laplacian, h_NMX, one_N, one_N)
  b_MX = stage(potentials, weights, h_NMX, g_NMX)
  means_NX = _sum([h_NMX[:, j] * b_MX[j][None] for j in range(n)])
  return (h_NMX * (g_NMX - b_MX[None] + means_NX[:, None]),)


project.defvjp(_project_forward, _project_backward)


def birkhoff_dual(max_iterations: int = 50) -> Constraint:
  """Doubly stochastic to rounding; the coordinates are row-major logits (n * n).

  Raises ValueError for max_iterations < 1. Logits of standard deviation 1, 3, 10, 100 take about 2, 7,
  10, 15 Newton iterations at n = 4; flops counts 7.
  """
  if max_iterations < 1:
    raise ValueError(f'birkhoff_dual: max_iterations must be at least 1, got {max_iterations}')

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    return project(promote(coords_KX).reshape(n, n, *coords_KX.shape[1:]), max_iterations)

  def flops(n: int) -> int:
    newton = 3 * n**2 + 2 * n**2 * (n - 1) + (n - 1) * n * (n + 1) + 8 * n
    return 0 if n == 1 else 4 * n**2 + WARM_UP * 4 * n**2 + 7 * newton

  return Constraint(
    name='birkhoff_dual',
    params={'max_iterations': max_iterations},
    num_coordinates=lambda n: n * n,
    matrix=matrix,
    identity=log_near_identity,
    dimension=lambda n: (n - 1) ** 2,
    defect=stochastic_defect,
    properties=frozenset(
      {
        'row_stochastic',
        'column_stochastic',
        'nonnegative',
        'nonexpansive',
        'closed_under_product',
        'exact',
      }
    ),
    flops=flops,
  )
