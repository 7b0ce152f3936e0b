"""Doubly stochastic matrices by entropic projection, solved on the dual (mHC-proj, arXiv 2606.07574).

H = argmin KL(P || exp(logits)) over doubly stochastic P = diag(r) exp(logits) diag(c): what Sinkhorn
tends to, reached here to rounding. The rows are eliminated (r normalises them), and Newton's method
balances the columns over log c:

    (diag(c-sums) - P^T P) x = 1 - c-sums

The matrix is a graph Laplacian with weights W_jk = sum_i P_ij P_ik, so elimination needs no
subtraction, and float32 loses nothing where P is close to a permutation. A few Sinkhorn steps come
first; logits of wide range start at a higher temperature, which is halved until it is 1. Backward by
the implicit function theorem: one more solve with the same matrix.

Stages are stored one by one (base.materialise): otherwise XLA:CPU recomputes the whole chain for
every entry of its result. Where tokens are sharded, each Newton step has one scalar all-reduce.
"""

import functools
import itertools
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.constraints.base import Constraint, log_near_identity, materialise, promote, stochastic_defect
from mhc_jax.derivatives import with_backward
from mhc_jax.values import Within

WARM_UP = 6  # Sinkhorn iterations before Newton's; each costs a fifth of one of those
HOT = 30.0  # range of the logits from which on the temperature starts above 1, ...
COOL = 15.0  # ... at range / COOL
LONGEST_STEP = 4.0  # largest change of log c_j - log c_k in one Newton step
UNROLLED = 8  # up to this n the elimination is written out, which is faster; the code grows as n^4


def _sum(terms: list[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, terms)


def _row_factors(k_NMX: jax.Array, c_MX: jax.Array) -> jax.Array:
  """r (n, *X) with diag(r) K diag(c) 1 = 1."""
  return 1 / _sum([k_NMX[:, j] * c_MX[j][None] for j in range(len(c_MX))])


def _column_factors(k_NMX: jax.Array, r_NX: jax.Array) -> jax.Array:
  return 1 / _sum([k_NMX[i] * r_NX[i][None] for i in range(len(r_NX))])


def _share_rounding(k_NMX: jax.Array, r_NX: jax.Array, c_MX: jax.Array) -> jax.Array:
  """c such that rows and columns bear half of the rounding each: with exact rows, the columns bear all."""
  return c_MX * (1.5 - 0.5 * _sum([k_NMX[i] * r_NX[i][None] for i in range(len(r_NX))]) * c_MX)


def _laplacian(k_NMX: jax.Array, r_NX: jax.Array, c_MX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The weights W_jk of P = diag(r) K diag(c), and 1 - column sums (n, *X).

  The weights of all pairs j < k, row by row, (n(n-1)/2, *X) up to n = UNROLLED; beyond it the whole
  matrix (n, n, *X), whose diagonal nobody reads.
  """
  n = len(r_NX)
  p_NMX = [k_NMX[i] * r_NX[i][None] for i in range(n)]
  residual_MX = 1 - _sum(p_NMX) * c_MX
  if n > UNROLLED:
    gram_NMX = _sum([p_MX[:, None] * p_MX[None] for p_MX in p_NMX])
    return gram_NMX * c_MX[:, None] * c_MX[None], residual_MX
  pairs = [
    _sum([p_MX[j] * p_MX[k] for p_MX in p_NMX]) * c_MX[j] * c_MX[k]
    for j, k in itertools.combinations(range(n), 2)
  ]
  return jnp.stack(pairs), residual_MX


def _solve_unrolled(w_PX: jax.Array, b_MX: jax.Array) -> jax.Array:
  n, eps = len(b_MX), jnp.finfo(b_MX.dtype).eps
  w = dict(zip(itertools.combinations(range(n), 2), w_PX, strict=True))
  b, inverse = list(b_MX), []
  for j in range(n - 1):
    inverse.append(1 / (eps + _sum([w[j, k] for k in range(j + 1, n)])))
    for k in range(j + 1, n):
      share_X = w[j, k] * inverse[j]
      b[k] = b[k] + share_X * b[j]
      for m in range(k + 1, n):
        w[k, m] = w[k, m] + share_X * w[j, m]
  x = [jnp.zeros_like(b[0])] * n
  for j in reversed(range(n - 1)):
    x[j] = inverse[j] * _sum([b[j], *(w[j, k] * x[k] for k in range(j + 1, n - 1))])
  return jnp.stack(x)


def _solve_in_loops(w_NMX: jax.Array, b_MX: jax.Array) -> jax.Array:
  n, eps = len(b_MX), jnp.finfo(b_MX.dtype).eps
  index_M = jnp.arange(n).reshape(n, *(1,) * (b_MX.ndim - 1))

  def later_row(w_NMX, j):
    row_MX = jnp.where(index_M > j, lax.dynamic_index_in_dim(w_NMX, j, 0, False), 0)
    return row_MX, 1 / (eps + row_MX.sum(0, keepdims=True))

  def eliminate(j, carry):
    w_NMX, b_MX = carry
    row_MX, inverse_1X = later_row(w_NMX, j)
    share_MX = materialise(j >= 0, jnp.multiply, row_MX, inverse_1X)
    b_1X = lax.dynamic_index_in_dim(b_MX, j, 0)
    return w_NMX + share_MX[:, None] * row_MX[None], b_MX + share_MX * b_1X

  w_NMX, b_MX = lax.fori_loop(0, n - 1, eliminate, (w_NMX, b_MX))

  def substitute(k, x_MX):
    j = n - 2 - k
    row_MX, inverse_1X = later_row(w_NMX, j)
    b_1X = lax.dynamic_index_in_dim(b_MX, j, 0)
    solved_1X = inverse_1X * (b_1X + (row_MX * x_MX).sum(0, keepdims=True))
    return jnp.where(index_M == j, solved_1X, x_MX)

  return lax.fori_loop(0, n - 1, substitute, jnp.zeros_like(b_MX))


def _solve(weights: jax.Array, b_MX: jax.Array) -> jax.Array:
  """x (n, *X), x_n = 0, of the Laplacian system with weights W, by eliminating one node after the other.

  eps joins every node to the last one: where W vanishes, rounding errors of b do not move x.
  """
  return (_solve_unrolled if len(b_MX) <= UNROLLED else _solve_in_loops)(weights, b_MX)


def _newton(weights: jax.Array, residual_MX: jax.Array, c_MX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The next c, one step of at most LONGEST_STEP (c_n stays), and what |1 - column sum| it may leave.

  A full step leaves a term of second order, about the residual times a quarter of the step's length; nothing
  where the residual was rounding already.
  """
  x_MX = _solve(weights, residual_MX)
  steps = list(x_MX)
  longest_X = functools.reduce(jnp.maximum, steps) - functools.reduce(jnp.minimum, steps)
  worst_X = functools.reduce(jnp.maximum, list(jnp.abs(residual_MX)))
  c_MX = c_MX * jnp.exp(jnp.minimum(1, LONGEST_STEP / longest_X)[None] * x_MX)
  left_X = worst_X * jnp.minimum(1, longest_X / 4)
  return c_MX, jnp.where(worst_X > _rounding(c_MX), left_X, 0)


def _row_max(z_NMX: jax.Array) -> jax.Array:
  return functools.reduce(jnp.maximum, [z_NMX[:, j] for j in range(z_NMX.shape[1])])


def _rounding(c_MX: jax.Array) -> float:
  """What is left of a column sum's error by the rounding of n terms."""
  return min(max(len(c_MX), 4), 8) * jnp.finfo(c_MX.dtype).eps


def _kernel(z_NMX: jax.Array) -> jax.Array:
  """exp(z) with the largest entry of each row scaled to 1."""
  return jnp.exp(z_NMX - _row_max(z_NMX)[:, None])


def _annealed_potential(logits_NMX: jax.Array) -> jax.Array:
  """log c (n, *X) from one Sinkhorn and one Newton step per temperature; 0 where the range is at most HOT."""
  one_MX = jnp.ones_like(logits_NMX[0])

  def first_temperature() -> jax.Array:
    range_NX = _row_max(logits_NMX) + _row_max(-logits_NMX)
    range_X = functools.reduce(jnp.maximum, list(range_NX))
    return jnp.where((range_X > HOT) & jnp.isfinite(range_X), range_X / COOL, 1)

  def cool(carry):
    count, potential_MX, temperature_X = carry
    temperature_X = jnp.where(count == 0, first_temperature(), temperature_X)
    stage = functools.partial(materialise, count >= 0)
    k_NMX = stage(_kernel, (logits_NMX + potential_MX[None]) / temperature_X[None, None])
    c_MX = stage(_column_factors, k_NMX, stage(_row_factors, k_NMX, one_MX))
    r_NX = stage(_row_factors, k_NMX, c_MX)
    c_MX, _ = stage(_newton, *stage(_laplacian, k_NMX, r_NX, c_MX), c_MX)
    potential_MX += temperature_X[None] * jnp.log(c_MX)
    return count + 1, potential_MX, jnp.maximum(temperature_X / 2, 1)

  # No range exceeds HOT unless an entry exceeds half of it: one cheap pass tells whether the loop starts. (A
  # lax.cond round the loop hangs XLA:CPU of jaxlib 0.10.2, the second time the program runs.)
  hot = jnp.max(jnp.abs(logits_NMX)) > HOT / 2
  start = (0, jnp.zeros_like(logits_NMX[0]), jnp.full_like(logits_NMX[0, 0], jnp.where(hot, 2, 1)))
  return lax.while_loop(lambda carry: jnp.any(carry[2] > 1), cool, start)[1]


def _sinkhorn(k_NMX: jax.Array) -> tuple[jax.Array, jax.Array]:
  def iteration(_, factors):
    c_MX = _column_factors(k_NMX, factors[0])
    return _row_factors(k_NMX, c_MX), c_MX

  one_MX = jnp.ones_like(k_NMX[0])
  return lax.fori_loop(0, WARM_UP, iteration, (_row_factors(k_NMX, one_MX), one_MX))


def project(logits_NMX: jax.Array, max_iterations: int) -> jax.Array:
  """The entropic projection of exp(logits) (n, n, *X), float32 or float64, onto the Birkhoff polytope.

  Newton stops when all column sums are within 4 to 8 ulp of 1 (those of NaN tokens aside), or after
  max_iterations.
  """
  n = logits_NMX.shape[0]
  if n == 1:
    return jnp.ones_like(logits_NMX)
  tolerance = 4 * jnp.finfo(logits_NMX.dtype).eps
  # True unless the input is broken, which the compiler cannot know.
  stage = functools.partial(materialise, logits_NMX[(0,) * logits_NMX.ndim] < jnp.inf)
  k_NMX = stage(_kernel, logits_NMX + _annealed_potential(logits_NMX)[None])
  r_NX, c_MX = _sinkhorn(k_NMX)

  def improve(carry):
    count, r_NX, c_MX, _ = carry
    stage = functools.partial(materialise, count >= 0)
    c_MX, left_X = stage(_newton, *stage(_laplacian, k_NMX, r_NX, c_MX), c_MX)
    return count + 1, stage(_row_factors, k_NMX, c_MX), c_MX, jnp.nanmax(left_X, initial=0)

  def unbalanced(carry):
    return (carry[0] < max_iterations) & (carry[3] > tolerance)

  start = (0, r_NX, c_MX, jnp.full((), jnp.inf, c_MX.dtype))
  _, r_NX, c_MX, _ = lax.while_loop(unbalanced, improve, start)
  return k_NMX * r_NX[:, None] * stage(_share_rounding, k_NMX, r_NX, c_MX)[None]


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
  one_NX = jnp.ones_like(h_NMX[0])

  def centred(h_NMX, g_NMX):
    return g_NMX - _sum([h_NMX[:, j] * g_NMX[:, j] for j in range(n)])[:, None]

  def column_sums(h_NMX, g_NMX):
    return _sum([h_NMX[i] * g_NMX[i] for i in range(n)])

  g_NMX = stage(centred, h_NMX, g_NMX)
  weights, _ = stage(_laplacian, h_NMX, one_NX, one_NX)
  b_MX = stage(_solve, weights, stage(column_sums, h_NMX, g_NMX))
  means_NX = _sum([h_NMX[:, j] * b_MX[j][None] for j in range(n)])
  return (h_NMX * (g_NMX - b_MX[None] + means_NX[:, None]),)


project = with_backward(project, _project_forward, _project_backward, (1,))


def birkhoff_dual(max_iterations: Annotated[int, Within(1, 10_000)] = 50) -> Constraint:
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
