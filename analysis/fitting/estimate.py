"""Fit one scaling law to runs, and say how far the optimum can be trusted.

Where: metrics of finished runs -> points -> fit -> intervals, comparisons, report. Pure functions;
the arithmetic is in laws.py (design) and solve.py (optimiser), the command line in fit.py.
"""

import dataclasses
import functools

import numpy as np

from mhc_jax.errors import ConfigError

from .laws import HUBER_WIDTH, LOSSES, ArmModel, Design, Law, Points, design, natural, natural_map
from .noise import Noise, noise, rank, robust_scale
from .solve import (
  GRADIENT_TOLERANCE,
  SAME_OPTIMUM,
  Problem,
  descend,
  gradient_norm,
  residuals,
  starts,
  variable_projection,
)

E_GONE = 'E -> 0'  # the boundary of a floor


@dataclasses.dataclass(frozen=True)
class Fit:
  """A fitted law with all that is needed to judge it.

  objective: the summed loss itself (Huber or half squares), not scaled. warnings: reasons to doubt the
  optimum, in words. boundaries: label of a parameter at the edge of what it may be -> which edge.
  """

  law: Law
  points: Points
  problem: Problem
  theta_P: np.ndarray
  parameters: dict[str, float]
  objective: float
  converged: bool
  starts: int
  starts_at_optimum: int
  moved_from_init: bool
  warnings: tuple[str, ...]
  boundaries: dict[str, str]

  @property
  def design(self) -> Design:
    return self.problem.design

  @property
  def theta_names(self) -> tuple[str, ...]:
    return self.design.names

  @property
  def flags(self) -> tuple[str, ...]:
    """Warnings and boundaries as sentences."""
    return (*self.warnings, *(f'{label} at its boundary: {why}' for label, why in self.boundaries.items()))

  @functools.cached_property
  def noise(self) -> Noise:
    """What is known of the runs' noise; intervals and tests rest on it."""
    return noise(self.theta_P, self.problem, self.points)

  @property
  def degrees_of_freedom(self) -> int:
    """Runs less the directions of the parameters that some run sees."""
    return len(self.points) - rank(self.noise.jac_RP)


def make_problem(
  law: Law, points: Points, arms: ArmModel, loss: str = 'huber', width: float | str = HUBER_WIDTH
) -> Problem:
  """The numerical problem of a fit; raises ConfigError when no fit can exist.

  width: of Huber's loss; 'auto' is max(1e-3, 1.345 x robust residual scale of the least-squares start):
  95 % of the efficiency of least squares under normal noise, where 1e-3 behaves like L1 (64 %).
  """
  if loss not in LOSSES:
    raise ConfigError(f'unknown loss {loss!r}: choose from {", ".join(LOSSES)}')
  d = design(law, points, arms)
  if len(points) < len(d.names):
    raise ConfigError(f'{len(points)} runs cannot fit the {len(d.names)} parameters of {law.formula}')
  weight_R = np.ones(len(points))
  if points.sigma is not None:
    # Relative noise; residuals may be in nats. Median 1: delta keeps its meaning for a typical run.
    spread_R = points.sigma * (points.loss if loss in ('mse', 'huber_raw') else 1.0)
    weight_R = np.median(spread_R) / spread_R
  if width == 'auto':
    squares = 'mse' if loss == 'huber_raw' else 'mse_log'
    p = Problem(d, points.loss, weight_R, np.ones(len(points)), squares, HUBER_WIDTH)
    theta_P, _ = descend(variable_projection(p), p)
    width = max(HUBER_WIDTH, 1.345 * robust_scale(residuals(theta_P, p)[0], len(theta_P)))
  return Problem(d, points.loss, weight_R, np.ones(len(points)), loss, float(width))


def fit(
  points: Points,
  law: Law,
  arms: ArmModel | None = None,
  loss: str = 'huber',
  width: float | str = HUBER_WIDTH,
  start_count: int = 27,
  init: np.ndarray | None = None,
) -> Fit:
  """Fits `law` to all runs jointly; the best of the data-driven starts and variable projection.

  loss: 'huber' (of log loss), 'mse_log', 'huber_raw' or 'mse' (of the loss itself). `init` (in
  the design's own parameters) replaces all starts.
  """
  p = make_problem(law, points, arms or ArmModel(), loss, width)
  laid_out = starts(p, start_count) if init is None else [np.asarray(init, float)]
  tried = [(start, *descend(start, p)) for start in laid_out]
  if init is None:
    start = variable_projection(p)
    tried.append((start, *descend(start, p)))
  best_P, best = min(((theta_P, value) for _, theta_P, value in tried), key=lambda t: t[1])
  best_P, best = descend(best_P, p)  # once more, whitened at the optimum
  agree = [value <= best + SAME_OPTIMUM * (abs(best) + 10) for *_, value in tried]
  # Variable projection may start at the optimum itself, so only laid-out starts can be "stuck".
  moved = not laid_out or any(
    bool(np.any(np.abs(theta_P - start) > 1e-6)) for start, theta_P, _ in tried[: len(laid_out)]
  )
  return _judged(points, p, best_P, best, len(tried), sum(agree), moved)


def _judged(
  points: Points, p: Problem, theta_P: np.ndarray, best: float, count: int, agree: int, moved: bool
) -> Fit:
  gradient = gradient_norm(theta_P, p)
  converged = bool(np.isfinite(best)) and gradient < 30 * GRADIENT_TOLERANCE
  return Fit(
    law=p.design.law,
    points=points,
    problem=p,
    theta_P=theta_P,
    parameters=natural(theta_P, p.design),
    objective=best * p.scale,
    converged=converged,
    starts=count,
    starts_at_optimum=agree,
    moved_from_init=moved,
    warnings=tuple(_warnings(converged, gradient, count, agree, moved)),
    boundaries=_boundaries(theta_P, p),
  )


def _warnings(converged: bool, gradient: float, count: int, agree: int, moved: bool) -> list[str]:
  """Reasons to doubt an optimum, in words; empty for a sound one."""
  out = []
  if not converged:
    out.append(f'not converged: whitened gradient {gradient:.1e}')
  if not moved:
    out.append('did not move from its starting point')
  if count > 1 and agree < max(2, 0.1 * count):
    out.append(f'only {agree} of {count} starts reached the best objective')
  return out


def _boundaries(theta_P: np.ndarray, p: Problem) -> dict[str, str]:
  """Label of each parameter that ran to the edge of what it may be -> which edge."""
  out, values = {}, natural(theta_P, p.design)
  for parameter in natural_map(p.design)[0]:
    value = values[parameter.label]
    if parameter.kind == 'constant' and value < 1e-3 * p.loss_R.min():
      out[parameter.label] = E_GONE
    if parameter.kind == 'exponent' and value < 0.01:
      out[parameter.label] = 'exponent -> 0'
  return out
