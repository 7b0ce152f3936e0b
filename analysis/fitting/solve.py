"""Minimise the summed robust loss of one design from many data-driven starts.

Where: the numerical core under estimate.py. The objective is a *sum* over runs, divided by the width^2:
averaged, or left at its natural size of 1e-4, it meets the optimiser's default tolerances at once
and the fit stops early (the error documented in Besiroglu et al. 2404.10102, section 4).
"""

import dataclasses
import itertools

import numpy as np
from scipy.optimize import minimize, nnls

from mhc_jax.errors import require

from .laws import Design, log_loss

SAME_OPTIMUM = 1e-6  # relative difference of objectives below which two starts agree
THINNED = 500  # runs that the grid of variable projection looks at
MAX_EXPONENT = 4.0  # of starts only: a descent may go beyond


@dataclasses.dataclass(frozen=True)
class Problem:
  """A design with its measurements: loss in nats, weights (median 1) and counts per run."""

  design: Design
  loss_R: np.ndarray
  weight_R: np.ndarray
  count_R: np.ndarray
  kind: str
  width: float  # of Huber's loss, in log loss ('huber_raw': in nats)

  @property
  def robust(self) -> bool:
    """Whether large residuals are clipped."""
    return self.kind in ('huber', 'huber_raw')

  @property
  def in_nats(self) -> bool:
    """Whether residuals are of the loss itself, not of its logarithm."""
    return self.kind in ('mse', 'huber_raw')

  @property
  def scale(self) -> float:
    """What the objective is divided by: the square of a residual that matters."""
    if self.robust:
      return self.width**2
    return 1e-6 if self.kind == 'mse_log' else 1e-6 * float(np.mean(self.loss_R)) ** 2


def residuals(theta_P: np.ndarray, p: Problem) -> tuple[np.ndarray, np.ndarray]:
  """Weighted residuals (R,), in log loss or nats, and their Jacobian (R, P)."""
  log_R, jac_RP = log_loss(theta_P, p.design)
  if p.in_nats:
    # 700 is the largest exponent of a float64: a wild line-search step is rejected, not inf.
    value_R = np.exp(np.minimum(log_R, 700.0))
    return p.weight_R * (value_R - p.loss_R), (p.weight_R * value_R)[:, None] * jac_RP
  return p.weight_R * (log_R - np.log(p.loss_R)), p.weight_R[:, None] * jac_RP


def score(residual_R: np.ndarray, p: Problem) -> np.ndarray:
  """Derivative psi of the loss of one residual: r clipped to +-width for Huber, else r."""
  return np.clip(residual_R, -p.width, p.width) if p.robust else residual_R


def objective(theta_P: np.ndarray, p: Problem) -> tuple[float, np.ndarray]:
  """Summed loss over `scale`, and its gradient. Huber: r^2/2 inside the width; otherwise r^2/2."""
  residual_R, jac_RP = residuals(theta_P, p)
  psi_R = score(residual_R, p)
  # |psi| * (|r| - |psi|/2) is r^2/2 inside the width w and w (|r| - w/2) outside.
  value_R = np.abs(psi_R) * (np.abs(residual_R) - 0.5 * np.abs(psi_R))
  return float(p.count_R @ value_R) / p.scale, (p.count_R * psi_R) @ jac_RP / p.scale


def starts(p: Problem, count: int = 27) -> list[np.ndarray]:
  """Starting points laid out by the data: E below the smallest loss, exponents by covariate range.

  With the covariates centred, each term starts with an equal share of the reducible loss, so no
  start lies where a term is dead (the reason why large literal grids mostly fail).
  """
  d, low, pinned = p.design, float(p.loss_R.min()), dict(p.design.law.pinned)
  typical = float(np.exp(np.mean(np.log(p.loss_R))))
  groups = tuple(name for name in d.law.exponents if name not in pinned)
  spread = {
    name: max(1e-3, max(np.std(d.cov_JR[j]) for j, t in enumerate(d.law.terms) if t.exponent == name))
    for name in groups
  }
  constants = [pinned['E']] if 'E' in pinned else [part * low for part in (0.4, 0.7, 0.92)]
  # As many levels per exponent as the count allows once the levels of E are taken.
  levels = max(1, round((count / len(constants)) ** (1 / max(len(groups), 1))))
  steps = np.geomspace(0.2, 1.0, levels) if levels > 1 else np.array([0.45])
  out = []
  for e, *speeds in itertools.product(constants, *([steps] * len(groups))):
    share = np.log(max(typical - e, 1e-3 * typical) / len(d.law.terms))
    theta_P = np.zeros(len(d.names))
    for q, parameter in enumerate(d.parameters):
      if parameter.kind == 'constant':
        theta_P[q] = np.log(e)
      elif parameter.kind == 'exponent':
        speed = speeds[groups.index(parameter.base)]
        theta_P[q] = _exponent_start(d, parameter.base, share, speed, speed / spread[parameter.base])
      elif parameter.kind == 'coefficient':
        j = d.law.coefficients.index(parameter.base)
        theta_P[q] = share + np.mean(d.x_JR[j] * d.cov_JR[j])  # 0 unless the exponent is pinned
    out.append(theta_P)
  return out[:count]


def _exponent_start(d: Design, name: str, share: float, speed: float, otherwise: float) -> float:
  """Where a coefficient is pinned, the exponent that gives its term about that share of the loss."""
  for j, term in enumerate(d.law.terms):
    middle = float(d.cov_JR[j].mean())
    if term.exponent == name and term.coefficient in dict(d.law.pinned) and abs(middle) > 1:
      return (float(d.a_JR[j].mean()) - share - np.log(2 * speed)) / middle
  return otherwise


def linear_solve(theta_P: np.ndarray, p: Problem) -> tuple[np.ndarray, float, np.ndarray]:
  """Best E and coefficients at fixed exponents and multipliers (non-negative least squares).

  Returns theta with them put in, half the weighted sum of squares of L - L_hat over L (in nats:
  of L - L_hat), and its gradient in theta (envelope theorem: exact for the exponents).
  """
  d = p.design
  weight_R = p.weight_R * np.sqrt(p.count_R) / (1.0 if p.in_nats else p.loss_R)
  alpha_JR = d.x_JR + d.x_JRP @ theta_P
  z_JR = d.cov_JR + d.m_JRP @ theta_P
  power_JR = np.exp(-alpha_JR * z_JR)
  basis_RP = d.e_RP + np.einsum('jr,jrp->rp', power_JR, d.a_JRP)
  pinned_JR = np.where(d.a_JRP.any(2), 0.0, np.exp(d.a_JR))
  rest_R = p.loss_R - np.where(d.e_RP.any(1), 0.0, np.exp(d.e_R)) - (power_JR * pinned_JR).sum(0)
  coefficient_P = np.zeros(len(d.names))
  if d.linear.any():
    coefficient_P[d.linear], _ = nnls(
      weight_R[:, None] * basis_RP[:, d.linear], weight_R * rest_R, maxiter=1000
    )
  residual_R = weight_R * (basis_RP @ coefficient_P - rest_R)
  term_JR = power_JR * (pinned_JR + d.a_JRP @ coefficient_P)
  slope_RP = -np.einsum('jr,jrp->rp', term_JR * z_JR, d.x_JRP)
  slope_RP -= np.einsum('jr,jrp->rp', term_JR * alpha_JR, d.m_JRP)
  # 1e-9 of the typical loss stands for a coefficient at zero: its log must stay finite.
  floor = 1e-9 * float(p.loss_R.mean())
  out_P = np.where(d.linear, np.log(np.maximum(coefficient_P, floor)), theta_P)
  return out_P, 0.5 * float(residual_R @ residual_R), (residual_R * weight_R) @ slope_RP


def _thinned(p: Problem) -> Problem:
  """At most about THINNED of its runs, evenly spaced in loss: enough to find the basin of the optimum."""
  step = len(p.loss_R) // THINNED
  if step < 2:
    return p
  rows = np.argsort(p.loss_R, kind='stable')[::step]
  by_run = {name: getattr(p.design, name)[rows] for name in ('e_RP', 'e_R')}
  by_term = ('a_JRP', 'x_JRP', 'm_JRP', 'cov_JR', 'a_JR', 'x_JR')
  d = dataclasses.replace(p.design, **by_run, **{name: getattr(p.design, name)[:, rows] for name in by_term})
  return Problem(d, p.loss_R[rows], p.weight_R[rows], p.count_R[rows], p.kind, p.width)


def variable_projection(p: Problem) -> np.ndarray:
  """Start from the separable least-squares problem (Golub & Pereyra 1973; 2603.22339).

  A grid over the exponents with E and the coefficients solved linearly, then a polish of the
  exponents and multipliers by the envelope gradient.
  """
  d = p.design
  groups = tuple(name for name in d.law.exponents if name not in dict(d.law.pinned))
  grid = np.geomspace(0.05, 1.2, {1: 40, 2: 12}.get(len(groups), 6))
  best, best_value, few = None, np.inf, _thinned(p)
  for speeds in itertools.product(grid, repeat=len(groups)):
    theta_P = np.zeros(len(d.names))
    for q in np.flatnonzero(d.is_exponent):
      theta_P[q] = speeds[groups.index(d.parameters[q].base)]
    _, value, _ = linear_solve(theta_P, few)
    if value < best_value:
      best, best_value = theta_P, value
  require(best is not None, 'no fit: no start has a finite loss; some number is too extreme')
  free = ~d.linear
  if not free.any():
    return linear_solve(best, p)[0]
  # The box keeps the powers finite; a log multiplier of 5 is a factor of 150.
  low = np.where(d.is_exponent, 1e-3, -5.0)[free]
  high = np.where(d.is_exponent, MAX_EXPONENT, 5.0)[free]

  def outer(free_P: np.ndarray) -> tuple[float, np.ndarray]:
    theta_P = best.copy()
    theta_P[free] = np.clip(free_P, low, high)
    _, value, gradient_P = linear_solve(theta_P, p)
    # Outside the box a quadratic wall; 1e6: residuals of 1e-3 become of order one.
    over_P = free_P - theta_P[free]
    return 1e6 * (value + over_P @ over_P), 1e6 * (gradient_P[free] * (over_P == 0) + 2 * over_P)

  optimum = minimize(outer, best[free], jac=True, method='BFGS', options={'maxiter': 100})
  theta_P = best.copy()
  theta_P[free] = np.clip(optimum.x, low, high)
  return linear_solve(theta_P, p)[0]


def curvature(theta_P: np.ndarray, p: Problem) -> np.ndarray:
  """Majorising Gauss-Newton matrix (P, P) of the scaled objective: weights psi(r)/r per run."""
  residual_R, jac_RP = residuals(theta_P, p)
  weight_R = np.ones_like(residual_R)
  outside = np.abs(residual_R) > p.width
  if p.robust:
    weight_R[outside] = p.width / np.abs(residual_R[outside])
  return (jac_RP * (p.count_R * weight_R)[:, None]).T @ jac_RP / p.scale


def whitener(theta_P: np.ndarray, p: Problem) -> np.ndarray:
  """Matrix W with theta = W u such that the objective has about unit curvature in u."""
  matrix_PP = curvature(theta_P, p)
  diagonal_P = np.diag(matrix_PP)
  # The ridge (relative to each parameter's own curvature) keeps a dead direction finite.
  matrix_PP = matrix_PP + np.diag(1e-3 * diagonal_P + 1e-9 * diagonal_P.max() + 1e-12)
  return np.linalg.inv(np.linalg.cholesky(matrix_PP)).T


# In whitened coordinates the distance to the optimum is about |gradient|^2 / 2, in units in which
# one residual of the width counts one half: 1e-3 leaves 5e-7 of such a unit.
GRADIENT_TOLERANCE = 1e-3


def descend(
  theta_P: np.ndarray, p: Problem, tolerance: float = GRADIENT_TOLERANCE
) -> tuple[np.ndarray, float]:
  """One local minimisation: BFGS in whitened coordinates; returns (theta, scaled objective)."""
  white_PP = whitener(theta_P, p)

  def whitened(u_P: np.ndarray) -> tuple[float, np.ndarray]:
    value, gradient_P = objective(theta_P + white_PP @ u_P, p)
    return value, white_PP.T @ gradient_P

  with np.errstate(over='ignore', invalid='ignore', divide='ignore'):  # wild line-search steps
    optimum = minimize(
      whitened,
      np.zeros_like(theta_P),
      jac=True,
      method='BFGS',
      options={'gtol': tolerance, 'maxiter': 500},
    )
  value, _ = objective(theta_P, p)
  if not np.isfinite(optimum.fun) or optimum.fun > value:
    return theta_P, value
  return theta_P + white_PP @ optimum.x, float(optimum.fun)


def gradient_norm(theta_P: np.ndarray, p: Problem) -> float:
  """Size of the gradient at theta in coordinates whitened there (see GRADIENT_TOLERANCE)."""
  return float(np.linalg.norm(whitener(theta_P, p).T @ objective(theta_P, p)[1]))
