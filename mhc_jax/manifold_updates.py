"""Weights kept on a manifold M: the projected step Pi, and two optimizers that move on M themselves.

    W <- argmin_{W' in M} ||W' - (W + update)||_F

`projected` is an optax transform to put after any optimizer; it acts on the parameters whose path matches a
regular expression, as matrices (rows: the first axis after those of scanned layers and experts, columns: all
others). m x n is a matrix's size, k = min(m, n). What is added to W is the difference, so a point of M is
left by the rounding of one addition.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mhc_jax.parameters import matches, path_name

Projection = Callable[[jax.Array], jax.Array]  # (m, n) -> (m, n)


def fixed_rank(w_MN: jax.Array, rank: int) -> jax.Array:
  """Matrices of rank <= rank: truncated SVD, exact (Eckart-Young). O(m n k) per step."""
  u_MK, s_K, v_KN = jnp.linalg.svd(w_MN, full_matrices=False)
  return (u_MK[:, :rank] * s_K[None, :rank]) @ v_KN[:rank]


def stiefel(w_MN: jax.Array) -> jax.Array:
  """Orthonormal columns (rows if m < n): the polar factor U V^T, exact where W has full rank. O(m n k)."""
  u_MK, _, v_KN = jnp.linalg.svd(w_MN, full_matrices=False)
  return u_MK @ v_KN


def row_sphere(w_MN: jax.Array, radius: float = 1.0) -> jax.Array:
  """Every row of Euclidean norm radius, exact but for rows of norm 0, which stay. O(m n)."""
  norm_M1 = jnp.linalg.norm(w_MN, axis=1, keepdims=True)
  return jnp.where(norm_M1 > 0, radius * w_MN / jnp.where(norm_M1 > 0, norm_M1, 1), w_MN)


def spectral_ball(w_MN: jax.Array, radius: float = 1.0) -> jax.Array:
  """Spectral norm <= radius: singular values clipped, exact. O(m n k)."""
  u_MK, s_K, v_KN = jnp.linalg.svd(w_MN, full_matrices=False)
  return (u_MK * jnp.minimum(s_K, radius)[None]) @ v_KN


def doubly_stochastic(w_MN: jax.Array, iterations: int = 1000) -> jax.Array:
  """Non-negative n x n matrices with unit row and column sums; a vector of n^2 is taken as such a matrix.

  Dykstra's algorithm (Boyle and Dykstra 1986) between the affine set of unit sums, whose projection is a
  formula, and W >= 0: O(n^2) per iteration, until no entry moves by more than 4 eps or `iterations` are
  done. Row and column sums are exact; what is left is negative entries of the size of the last move: rounding
  up to n = 8; -2e-4 at n = 16 and -3e-3 at n = 64 for points 30 away, which need more iterations.
  Sinkhorn's scaling projects in relative entropy, not in this norm.
  """
  n = round(w_MN.size**0.5)
  if n * n != w_MN.size:
    raise ValueError(f'doubly_stochastic needs n x n entries, got {w_MN.shape}')
  x_NN, tolerance = w_MN.reshape(n, n), 4 * jnp.finfo(w_MN.dtype).eps

  def unit_sums(x_NN):
    rows_N1, columns_1N = x_NN.sum(1, keepdims=True) - 1, x_NN.sum(0, keepdims=True) - 1
    return x_NN - rows_N1 / n - columns_1N / n + rows_N1.sum() / n**2

  def unsettled(carry):
    return (carry[0] < iterations) & (carry[3] > tolerance)

  def step(carry):
    count, x_NN, correction_NN, _ = carry  # the affine set needs no correction
    clipped_NN = jnp.maximum(x_NN + correction_NN, 0)
    correction_NN += x_NN - clipped_NN
    new_NN = unit_sums(clipped_NN)
    return count + 1, new_NN, correction_NN, jnp.max(jnp.abs(new_NN - clipped_NN))

  start = (0, unit_sums(x_NN), jnp.zeros_like(x_NN), jnp.asarray(jnp.inf, x_NN.dtype))
  return lax.while_loop(unsettled, step, start)[1].reshape(w_MN.shape)


# name -> projection; the number is the rank, the radius (1 if None) or nothing.
PROJECTIONS: dict[str, Callable[[float | None], Projection]] = {
  'fixed_rank': lambda rank: functools.partial(fixed_rank, rank=int(rank)),
  'stiefel': lambda _: stiefel,
  'row_sphere': lambda radius: functools.partial(row_sphere, radius=radius or 1.0),
  'spectral_ball': lambda radius: functools.partial(spectral_ball, radius=radius or 1.0),
  'doubly_stochastic': lambda _: doubly_stochastic,
}
MANIFOLDS = (*PROJECTIONS, 'loro', 'manifold_muon')


def fixed_rank_start(w_MN: jax.Array, rank: int) -> jax.Array:
  """fixed_rank, scaled back to the norm of W, so that the map starts with the full-rank map's variance."""
  low_MN = fixed_rank(w_MN, rank)
  return low_MN * (jnp.linalg.norm(w_MN) / jnp.linalg.norm(low_MN))


def check_matches(manifold: str, pattern: str, params: Any) -> None:
  """Raises ValueError, naming the parameter, where the pattern matches none or one that is no matrix.

  doubly_stochastic takes vectors of n^2 too; loro both factors u and v of a map and nothing else.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  ours = jax.tree.leaves(matches(pattern, params))
  names = {path_name(path): leaf for (path, leaf), is_ours in zip(leaves, ours, strict=True) if is_ours}
  for name, leaf in names.items():
    shape = leaf.shape[_stacked(name) :]
    if manifold == 'loro':
      other = name[:-1] + ('v' if name.endswith('/u') else 'u')
      fits = name.endswith(('/u', '/v')) and other in names
    elif manifold == 'doubly_stochastic':
      fits = bool(shape) and math.isqrt(math.prod(shape)) ** 2 == math.prod(shape)
    else:
      fits = len(shape) > 1
    if not fits:
      wants = {'loro': 'both factors u and v of a map', 'doubly_stochastic': 'n x n entries'}
      raise ValueError(
        f'{pattern!r} matches {name} of shape {shape}, but it takes {wants.get(manifold, "matrices")}'
      )


def _stacked(name: str) -> int:
  """Leading axes of a parameter of that path, of scanned layers and of experts."""
  return name.startswith('layers/') + ('/expert_' in name)


def _matrices(name: str, w: jax.Array) -> jax.Array:
  """A parameter of that path as the matrices of its layers and experts, (number, m, n)."""
  stacked = _stacked(name)
  return w.reshape(math.prod(w.shape[:stacked]), w.shape[stacked], -1)


def one_by_one(function: Callable) -> Callable:
  """jax.vmap as a loop: batches of decompositions can hang XLA:CPU (constraints/spectra.py)."""
  return lambda *stacks: lax.map(lambda each: function(*each), stacks)


def project_params(projection: Projection, pattern: str, params: Any) -> Any:
  """The matching parameters projected, the others as they are. Computed in at least float32."""

  def project(path, leaf):
    name = path_name(path)
    if not re.fullmatch(pattern, name):
      return leaf
    wide = _matrices(name, leaf).astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return one_by_one(projection)(wide).reshape(leaf.shape).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(project, params)


def projected(projection: Projection, pattern: str) -> optax.GradientTransformation:
  """Pi: turns the updates of the optimizer before it in a chain into those that end on M."""

  def update(updates: Any, params: Any) -> Any:
    moved = project_params(projection, pattern, optax.apply_updates(params, updates))
    return jax.tree.map(
      lambda new, old, plain, ours: new - old if ours else plain,
      *(moved, params, updates, matches(pattern, params)),
    )

  return optax.stateless(update)


def loro_step(
  m_MR: jax.Array, n_NR: jax.Array, d_m_MR: jax.Array, d_n_NR: jax.Array, lr: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One Riemannian gradient step of W = M N^T on the matrices of rank r, by its factors (LORO, ICLR 2025).

  The tangent-space gradient and the truncated SVD of W - lr * P_T(G) from dM = G N and dN = G^T M alone: W
  and G are never formed. O((m + n) r^2); error: rounding, where M and N have full rank.
  """
  u_MR, r_m = jnp.linalg.qr(m_MR)
  v_NR, r_n = jnp.linalg.qr(n_NR)
  gv_MR = jax.scipy.linalg.solve_triangular(r_n, d_m_MR.T, trans='T').T  # G V = dM R_n^-1
  gu_NR = jax.scipy.linalg.solve_triangular(r_m, d_n_NR.T, trans='T').T  # G^T U = dN R_m^-1
  k0 = u_MR.T @ gv_MR
  q1_NR, k1 = jnp.linalg.qr(gu_NR - v_NR @ (v_NR.T @ gu_NR))
  q2_MR, k2 = jnp.linalg.qr(gv_MR - u_MR @ k0)
  rank = m_MR.shape[1]
  zero = jnp.zeros((rank, rank), m_MR.dtype)
  core = jnp.block([[r_m @ r_n.T - lr * k0, -lr * k1.T], [-lr * k2, zero]])
  a, s, b = jnp.linalg.svd(core)
  root = jnp.sqrt(s[None, :rank])
  left_MR, right_NR = jnp.concatenate([u_MR, q2_MR], 1), jnp.concatenate([v_NR, q1_NR], 1)
  return (left_MR @ a[:, :rank]) * root, (right_NR @ b[:rank].T) * root


class LoroState(NamedTuple):
  """Number of updates done, and the state of the optimizer of the factors between exact steps."""

  count: jax.Array
  factors: Any


def loro(factors: optax.GradientTransformation, lr: jax.Array, every: int) -> optax.GradientTransformation:
  """LORO for trees whose dicts {'u': (..., m, r), 'v': (..., r, *n)} are W = u v.

  Every `every`-th update is loro_step with rate lr, after which the state of `factors`, an optimizer whose
  updates are ready to be added, starts anew; the others are those of `factors`.
  """

  def exact(updates: Any, params: Any) -> Any:
    if isinstance(params, optax.MaskedNode):  # another optimizer's
      return updates
    if not isinstance(params, dict):
      raise ValueError('LORO takes only factors u and v of the same map')
    if set(params) != {'u', 'v'}:
      return {name: exact(updates[name], params[name]) for name in params}
    if isinstance(params['u'], optax.MaskedNode):  # likewise, and so is v
      return updates
    step = functools.partial(loro_step, lr=lr)
    for _ in range(params['u'].ndim - 2):
      step = one_by_one(step)
    shape = (*params['u'].shape[:-2], params['u'].shape[-1], -1)
    v, d_v = (jnp.moveaxis(tree['v'].reshape(shape), -1, -2) for tree in (params, updates))
    m, n = step(params['u'], v, updates['u'], d_v)
    new = {'u': m, 'v': jnp.moveaxis(n, -1, -2).reshape(params['v'].shape)}
    return jax.tree.map(jnp.subtract, new, params)

  def init(params: Any) -> LoroState:
    return LoroState(jnp.zeros((), jnp.int32), factors.init(params))

  def update(updates: Any, state: LoroState, params: Any) -> tuple[Any, LoroState]:
    def riemannian(_):
      return False, exact(updates, params), factors.init(params)

    # A loop of one iteration or none: exact has loops of its own, and a lax.cond round these can hang XLA:CPU
    # of jaxlib 0.10.2 (constraints/birkhoff_dual.py).
    due = (state.count + 1) % every == 0
    start = (due, *factors.update(updates, state.factors, params))
    _, new, inner = lax.while_loop(lambda carry: carry[0], riemannian, start)
    return new, LoroState(state.count + 1, inner)

  return optax.GradientTransformation(init, update)


def manifold_muon_step(
  w_MN: jax.Array, g_MN: jax.Array, lr: jax.Array, iterations: int = 100, rate: float = 0.1
) -> jax.Array:
  """The next W^T W = I after the steepest step of spectral norm lr in the tangent space (Manifold Muon).

  Dual ascent on A = msign(G + 2 W L) until W^T A + A^T W = 0 (thinking-machines-lab/manifolds), then the
  polar factor of W - lr A. m >= n; G is scaled to spectral norm 1, on which the converged A does not depend.
  `iterations` SVDs, O(iterations m n^2); A leaves the tangent space by what the ascent has not closed: at 100
  iterations |W^T A + A^T W| is at most 0.01 for random G at 8x3 to 128x32. W^T W = I holds to rounding.
  """
  g_MN = g_MN / jnp.maximum(jnp.linalg.norm(g_MN, 2), jnp.finfo(g_MN.dtype).tiny)

  def ascend(k, dual_NN):
    a_MN = stiefel(g_MN + 2 * w_MN @ dual_NN)
    defect_NN = w_MN.T @ a_MN + a_MN.T @ w_MN
    return dual_NN - rate * (1 - k / iterations) * defect_NN

  dual_NN = lax.fori_loop(0, iterations, ascend, -0.25 * (w_MN.T @ g_MN + g_MN.T @ w_MN))
  return stiefel(w_MN - lr * stiefel(g_MN + 2 * w_MN @ dual_NN))


def manifold_muon(
  lr: jax.Array, momentum: float = 0.9, iterations: int = 100
) -> optax.GradientTransformation:
  """Manifold Muon on every parameter it is given, as matrices like `projected`; wide ones by their transpose.

  Its updates are ready to be added. Parameters must start with orthonormal columns or rows (project_params).
  """

  def move(w_MN: jax.Array, g_MN: jax.Array) -> jax.Array:
    wide = w_MN.shape[0] < w_MN.shape[1]
    w, g = (w_MN.T, g_MN.T) if wide else (w_MN, g_MN)
    new = manifold_muon_step(w, g, lr, iterations)
    return (new.T if wide else new) - w_MN

  def update(updates: Any, params: Any) -> Any:
    def leaf(path, gradient, w):
      matrices = (_matrices(path_name(path), a) for a in (w, gradient))
      return one_by_one(move)(*matrices).reshape(w.shape)

    return jax.tree_util.tree_map_with_path(leaf, updates, params)

  return optax.chain(optax.trace(momentum), optax.stateless(update))
