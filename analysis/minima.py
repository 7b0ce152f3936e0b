"""Minima along one axis: IsoFLOP optima (parabola, Akima), their power laws, learning-rate optima.

Where: beside the parametric fit, as plot and cross-check. The parabola is biased when alpha != beta
or the grid is off-centre (2603.22339); both methods refuse a minimum at the edge of the grid, and
the parabola a curve that opens downwards.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from scipy import stats
from scipy.interpolate import Akima1DInterpolator

METHODS = ('parabola', 'akima')


@dataclasses.dataclass(frozen=True)
class Minimum:
  """Arg-min of log loss over a log axis; `problem` says why there is none."""

  log_x: float | None
  loss: float | None
  problem: str | None
  curve_log_x: np.ndarray
  curve_loss: np.ndarray


def _none(problem: str) -> Minimum:
  return Minimum(None, None, problem, np.array([]), np.array([]))


def minimum(log_x: np.ndarray, loss: np.ndarray, method: str = 'parabola', in_nats: bool = False) -> Minimum:
  """Minimum of loss over log x from measured points (repeats at one x are averaged first).

  The curve goes through log loss, or through the loss itself (in_nats; the Llama 3 report does that).
  """
  if method not in METHODS:
    raise ValueError(f'method {method!r} is not one of {METHODS}')
  grid = np.unique(np.round(log_x, 9))
  values = loss if in_nats else np.log(loss)
  back = np.asarray if in_nats else np.exp
  y = np.array([values[np.isclose(log_x, g, atol=1e-8)].mean() for g in grid])
  needed = 3 if method == 'parabola' else 5
  if len(grid) < needed:
    return _none(f'{len(grid)} points: {method} needs {needed}')
  if method == 'parabola':
    return _parabola(grid, y, back)
  # 25 points per gap, arg-min on them, as Porian et al. 2406.19146 do.
  fine = np.concatenate([np.linspace(a, b, 26)[:-1] for a, b in itertools.pairwise(grid)])
  fine = np.append(fine, grid[-1])
  values = Akima1DInterpolator(grid, y)(fine)
  best = int(np.argmin(values))
  inside = 0 < best < len(fine) - 1
  return Minimum(
    float(fine[best]) if inside else None,
    float(back(values[best])) if inside else None,
    None if inside else 'the minimum is at the edge of the grid',
    fine,
    back(values),
  )


def _parabola(grid: np.ndarray, y: np.ndarray, back: Callable) -> Minimum:
  centre = grid.mean()
  c2, c1, c0 = np.polyfit(grid - centre, y, 2)
  fine = np.linspace(grid[0], grid[-1], 101)
  curve = back(np.polyval([c2, c1, c0], fine - centre))
  if c2 <= 0:
    return Minimum(None, None, 'the parabola opens downwards', fine, curve)
  vertex = centre - c1 / (2 * c2)
  if not grid[0] < vertex < grid[-1]:
    return Minimum(None, None, 'the vertex lies outside the grid', fine, curve)
  return Minimum(float(vertex), float(back(c0 - c1**2 / (4 * c2))), None, fine, curve)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """x* = coefficient * C^exponent by least squares in logs; intervals by Student's t (n - 2).

  low, high: of the exponent; coefficient_low, coefficient_high: of the coefficient; None for two points.
  """

  exponent: float
  log_coefficient: float
  low: float | None
  high: float | None
  points: int
  coefficient_low: float | None
  coefficient_high: float | None
  log_c: np.ndarray
  error: float | None  # t quantile times the residual standard deviation

  def at(self, log_c: float) -> tuple[float, float | None, float | None]:
    """log x* at another budget, and the ends of the curve's band there."""
    middle = self.log_coefficient + self.exponent * log_c
    if self.error is None:
      return middle, None, None
    centre = self.log_c.mean()
    lever = 1 / self.points + (log_c - centre) ** 2 / np.sum((self.log_c - centre) ** 2)
    half = self.error * float(np.sqrt(lever))
    return middle, middle - half, middle + half


def power_law(log_c: np.ndarray, log_optimum: np.ndarray, level: float = 0.95) -> PowerLaw | None:
  """Power law through optima, or None with fewer than two of them."""
  n = len(log_c)
  if n < 2 or np.ptp(log_c) == 0:
    return None
  line = stats.linregress(log_c, log_optimum)
  exponent, log_coefficient = float(line.slope), float(line.intercept)
  if n == 2:
    return PowerLaw(exponent, log_coefficient, None, None, n, None, None, log_c, None)
  quantile = float(stats.t.ppf(0.5 + level / 2, n - 2))
  half, wide = quantile * line.stderr, quantile * line.intercept_stderr
  residual = log_optimum - log_coefficient - exponent * log_c
  return PowerLaw(
    exponent,
    log_coefficient,
    float(exponent - half),
    float(exponent + half),
    n,
    float(np.exp(log_coefficient - wide)),
    float(np.exp(log_coefficient + wide)),
    log_c,
    quantile * float(np.sqrt(np.sum(residual**2) / (n - 2))),
  )


def minima_by_budget(
  log_c: np.ndarray, log_n: np.ndarray, loss: np.ndarray, method: str = 'parabola', in_nats: bool = False
) -> list[tuple[float, Minimum]]:
  """(log budget, minimum over log N) of every budget; budgets are equal within 5 %.

  Runs whose compute has no gaps between budgets have no minimum.
  """
  out = []
  order = np.argsort(log_c)
  breaks = np.flatnonzero(np.diff(log_c[order]) > 0.05) + 1
  for rows in np.split(order, breaks):
    factor = float(np.exp(np.ptp(log_c[rows])))
    m = minimum(log_n[rows], loss[rows], method, in_nats)
    if factor > 1.25:  # five steps of 5 %
      m = _none(f'not one budget: the compute of its runs spans a factor of {factor:.2g} without a gap')
    out.append((float(log_c[rows].mean()), m))
  return out


def best_learning_rate(learning_rate: np.ndarray, loss: np.ndarray) -> Minimum:
  """Learning rate of lowest loss by interpolation in log lr (Akima from 5 rates, parabola from 3).

  Only finite losses count; a minimum at the edge of the grid is refused (widen the grid).
  """
  keep = np.isfinite(loss)
  log_lr = np.log(learning_rate[keep])
  method = 'akima' if len(np.unique(np.round(log_lr, 9))) >= 5 else 'parabola'
  return minimum(log_lr, loss[keep], method)


def learning_rate_sensitivity(learning_rate: np.ndarray, loss: np.ndarray, initial: float) -> float:
  """Mean of min(loss, initial loss) - best over rates drawn log-uniformly from the grid's range (2309.14322).

  nats; linear in log lr between grid points. A loss that is not finite (diverged) counts as the initial one.
  """
  order = np.argsort(learning_rate)
  log_lr = np.log(learning_rate[order])
  capped = np.minimum(np.where(np.isfinite(loss), loss, initial), initial)[order]
  return float(np.trapezoid(capped - capped.min(), log_lr) / np.ptp(log_lr))
