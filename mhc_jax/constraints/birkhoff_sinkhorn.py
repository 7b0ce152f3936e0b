"""Doubly stochastic matrices by t Sinkhorn iterations (mHC, arXiv 2512.24880, eq. 8-9).

Conventions differ between codes by data, not by branches: `order` (which normalisation comes first
in an iteration), `transpose` (the sequence runs on the transposed logits), where and how eps
enters. With eps = 0 DeepSeek-V4's operator is the paper's on transposed logits.

The first normalisation is a softmax and, where eps is 0, the second one too: after both, every sum
that a later normalisation divides by lies in [1/n, n], so logits of 1e3 stay finite without
leaving the linear domain. The other iterations run in one loop whose backward recomputes them
and differentiates exactly those that ran, with respect to the logarithms of the entries: these
gradients stay finite where an entry or a clamped sum vanishes.
"""

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.constraints.base import Constraint, log_near_identity, materialise, promote, stochastic_defect
from mhc_jax.derivatives import with_backward
from mhc_jax.values import Within

# order: 'columns' first (rows last) or 'rows' first. eps_mode 'add': x / (sum + eps), 'clamp':
# x / max(sum, eps). softmax_eps is added to every entry after the first normalisation.
PRESETS: dict[str, dict[str, Any]] = {
  'paper': {
    'order': 'columns',
    'transpose': False,
    'eps': 0.0,
    'eps_mode': 'add',
    'softmax_eps': 0.0,
  },
  'deepseek_v4': {
    'order': 'columns',
    'transpose': True,
    'eps': 1e-6,
    'eps_mode': 'add',
    'softmax_eps': 1e-6,
  },
  'megatron_main': {
    'order': 'rows',
    'transpose': False,
    'eps': 1e-6,
    'eps_mode': 'clamp',
    'softmax_eps': 0.0,
  },
  'lucidrains': {
    'order': 'rows',
    'transpose': False,
    'eps': 0.0,
    'eps_mode': 'add',
    'softmax_eps': 0.0,
  },
}


class _Steps(NamedTuple):
  """What one iteration does: the axis it normalises first (0: columns, 1: rows) and its eps."""

  axis: int
  eps: float
  eps_mode: str
  softmax_eps: float


def _terms(m_NMX: jax.Array, axis: int) -> list[jax.Array]:
  return [lax.index_in_dim(m_NMX, k, axis) for k in range(m_NMX.shape[axis])]


def _sum(m_NMX: jax.Array, axis: int) -> jax.Array:
  """Sum over one of the leading axes; explicit additions, which XLA:CPU vectorises over tokens."""
  return functools.reduce(jnp.add, _terms(m_NMX, axis))


def _log_sum_exp(z_NMX: jax.Array, axis: int) -> jax.Array:
  top = functools.reduce(jnp.maximum, _terms(z_NMX, axis))
  return top + jnp.log(_sum(jnp.exp(z_NMX - top), axis))


def _inverse_sum(m_NMX: jax.Array, axis: int, steps: _Steps) -> jax.Array:
  """What one normalisation over `axis` multiplies m by."""
  total = _sum(m_NMX, axis)
  return 1 / (jnp.maximum(total, steps.eps) if steps.eps_mode == 'clamp' else total + steps.eps)


def _inner(u_NMX: jax.Array, inverse: jax.Array, axis: int, steps: _Steps) -> jax.Array:
  """The s in u - m s: from the gradient u with respect to log of a normalisation's result m to that
  with respect to log of its input. The same formula holds for divisors sum + eps and for plain sums.
  """
  inner = _sum(u_NMX, axis)
  if steps.eps_mode == 'clamp':  # where the clamp holds, the divisor is a constant
    inner = jnp.where(inverse * steps.eps < 1, inner, 0)
  return inner


def _first_iteration(logits_NMX: jax.Array, steps: _Steps) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The matrix after the first softmax, after the iteration, and the latter's inverse divisors."""
  axis, other = steps.axis, 1 - steps.axis
  stage = functools.partial(materialise, logits_NMX[(0,) * logits_NMX.ndim] < jnp.inf)
  log_sum = stage(lambda z_NMX: _log_sum_exp(z_NMX, axis), logits_NMX)
  if steps.eps or steps.softmax_eps:
    p_NMX = jnp.exp(logits_NMX - log_sum)
    inverse = stage(lambda p: _inverse_sum(p + steps.softmax_eps, other, steps), p_NMX)
    return p_NMX, (p_NMX + steps.softmax_eps) * inverse, inverse
  # Without eps a sum may underflow here, and only here: so a softmax again.
  second = stage(lambda z, log_sum: _log_sum_exp(z - log_sum, other), logits_NMX, log_sum)
  m_NMX = stage(lambda z, *logs: jnp.exp(z - logs[0] - logs[1]), logits_NMX, log_sum, second)
  return jnp.exp(logits_NMX - log_sum), m_NMX, jnp.ones_like(second)


def _iteration(count: jax.Array, m_NMX: jax.Array, steps: _Steps) -> tuple[jax.Array, tuple]:
  """Two normalisations, the first over steps.axis; returns the matrix and their inverse divisors."""
  axis, other = steps.axis, 1 - steps.axis
  stage = functools.partial(materialise, count >= 0)
  first = stage(lambda m: _inverse_sum(m, axis, steps), m_NMX)
  second = stage(lambda m, first: _inverse_sum(m * first, other, steps), m_NMX, first)
  return m_NMX * first * second, (first, second)


def _iterate(logits_NMX: jax.Array, iterations: int, steps: _Steps) -> jax.Array:
  m_NMX = _first_iteration(logits_NMX, steps)[1]
  return lax.fori_loop(0, iterations - 1, lambda count, m_NMX: _iteration(count, m_NMX, steps)[0], m_NMX)


def _iterate_forward(logits_NMX, iterations, steps):
  return _iterate(logits_NMX, iterations, steps), logits_NMX


def _back(carry, inverses, steps):
  """Back through one _iteration: (m, gradient with respect to log m) after it, to those before it."""
  count, m_NMX, u_NMX = carry
  first, second = inverses
  axis, other = steps.axis, 1 - steps.axis
  stage = functools.partial(materialise, count >= 0)

  def first_inner(m_NMX, u_NMX, first, s):
    return _inner(u_NMX - m_NMX * s, first, axis, steps)

  s = stage(lambda u_NMX, second: _inner(u_NMX, second, other, steps), u_NMX, second)
  t = stage(first_inner, m_NMX, u_NMX, first, s)
  between_NMX = m_NMX / second
  return (count + 1, between_NMX / first, u_NMX - m_NMX * s - between_NMX * t), None


def _iterate_backward(iterations, steps, logits_NMX, g_NMX):
  """Reruns the iterations, keeping the 2n inverse divisors of each, and walks back through them."""

  def forward(carry, _):
    count, m_NMX = carry
    m_NMX, inverses = _iteration(count, m_NMX, steps)
    return (count + 1, m_NMX), inverses

  p_NMX, m_NMX, inverse = _first_iteration(logits_NMX, steps)
  (_, m_NMX), inverses = lax.scan(forward, (0, m_NMX), length=iterations - 1)
  back = functools.partial(_back, steps=steps)
  (_, m_NMX, u_NMX), _ = lax.scan(back, (0, m_NMX, m_NMX * g_NMX), inverses, reverse=True)
  u_NMX -= m_NMX * _inner(u_NMX, inverse, 1 - steps.axis, steps)
  if steps.softmax_eps:
    u_NMX = u_NMX * p_NMX / (p_NMX + steps.softmax_eps)
  return (u_NMX - p_NMX * _sum(u_NMX, steps.axis),)


_iterate = with_backward(_iterate, _iterate_forward, _iterate_backward, (1, 2))


def _steps(order: str, eps: float, eps_mode: str, softmax_eps: float) -> _Steps:
  if order not in ('columns', 'rows'):
    raise ValueError(f'birkhoff_sinkhorn: order must be columns or rows, got {order!r}')
  if eps_mode not in ('add', 'clamp'):
    raise ValueError(f'birkhoff_sinkhorn: eps_mode must be add or clamp, got {eps_mode!r}')
  return _Steps(0 if order == 'columns' else 1, eps, eps_mode, softmax_eps)


def sinkhorn(
  logits_NMX: jax.Array,
  iterations: int = 20,
  order: str = 'columns',
  eps: float = 0.0,
  eps_mode: str = 'add',
  softmax_eps: float = 0.0,
) -> jax.Array:
  """t iterations of two normalisations of exp(logits), (n, n, *tokens) -> the same shape (eq. 9).

  order 'columns' normalises columns first and rows last (the paper: row sums exact, column sums
  approximate), 'rows' the reverse. Computed in at least float32. Raises ValueError for another
  order or eps_mode.
  """
  return _iterate(promote(logits_NMX), iterations, _steps(order, eps, eps_mode, softmax_eps))


def birkhoff_sinkhorn(
  iterations: Annotated[int, Within(1, 10_000)] = 20,
  preset: str = 'paper',
  order: str | None = None,
  transpose: bool | None = None,
  eps: Annotated[float, Within(0, 1)] | None = None,
  eps_mode: str | None = None,
  softmax_eps: Annotated[float, Within(0, 1)] | None = None,
) -> Constraint:
  """Doubly stochastic up to t Sinkhorn iterations; the coordinates are row-major logits (n * n).

  preset: 'paper', 'deepseek_v4', 'megatron_main' or 'lucidrains' (source tables in PRESETS);
  the others replace single values of it. Raises ValueError for an unknown preset or value.
  """
  if preset not in PRESETS:
    raise ValueError(f'birkhoff_sinkhorn: unknown preset {preset!r}, one of {", ".join(PRESETS)}')
  if iterations < 1:
    raise ValueError(f'birkhoff_sinkhorn: iterations must be at least 1, got {iterations}')
  given = {'order': order, 'transpose': transpose, 'eps': eps, 'eps_mode': eps_mode}
  given['softmax_eps'] = softmax_eps
  settings = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
  transpose = settings.pop('transpose')
  steps = _steps(**settings)

  def matrix(coords_KX: jax.Array, n: int) -> jax.Array:
    logits_NMX = promote(coords_KX).reshape(n, n, *coords_KX.shape[1:])
    if transpose:
      logits_NMX = logits_NMX.swapaxes(0, 1)
    return _iterate(logits_NMX, iterations, steps)

  # With eps the sums normalised last miss 1 by as much as eps is of them.
  last = 'row_stochastic' if settings['order'] == 'columns' else 'column_stochastic'
  last_sums = {last} if settings['eps'] == 0 else set()
  return Constraint(
    name='birkhoff_sinkhorn',
    params={'iterations': iterations, 'transpose': transpose, **settings},
    num_coordinates=lambda n: n * n,
    matrix=matrix,
    identity=log_near_identity,  # symmetric: the same point for every order and transpose
    dimension=lambda n: (n - 1) ** 2,
    defect=stochastic_defect,
    properties=frozenset({'nonnegative'} | last_sums),
    flops=lambda n: 4 * iterations * n * n,
  )
