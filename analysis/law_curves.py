"""The fitted law of each arm over compute: curve and band, the arms at equal FLOPs, arrows to equal loss.

Where: the fitted law and the multipliers -> here -> study.py.
"""

import dataclasses

import numpy as np
import pandas as pd

from .fitting.estimate import Fit
from .fitting.identify import doubts
from .fitting.intervals import Band, band
from .fitting.laws import Points
from .multipliers import Multiplier

EXTRAPOLATE = 4.0  # how far past the largest run a curve goes where E is known, as a factor of compute


@dataclasses.dataclass(frozen=True)
class LawCurve:
  """The law of an arm over its runs and, where E is identified, further; L(N, D) along its optimal frontier.

  kappa: C = kappa N D of the arm's largest run (6, attention and hyper-connections); None for L(C).
  """

  arm: str
  fit: Fit
  kappa: float | None
  flops: np.ndarray
  band: Band

  def at(self, flops: np.ndarray) -> Band:
    """The law at other FLOPs."""
    return _band_at(self.fit, self.arm, self.kappa, np.asarray(flops))

  def up_to(self, flops: float) -> np.ndarray:
    """Which of its points lie within so many FLOPs."""
    return self.flops <= flops * (1 + 1e-9)


def _band_at(fit: Fit, arm: str, kappa: float | None, flops: np.ndarray) -> Band:
  log_x = {'C': np.log(flops)}
  if kappa is not None:
    p = fit.parameters
    alpha, beta = p['alpha'], p['beta']
    balance = (np.log(alpha * p['A']) - np.log(beta * p['B'])) / (alpha + beta)
    log_n = balance + beta / (alpha + beta) * np.log(flops / kappa)
    log_x |= {'N': log_n, 'D': np.log(flops / kappa) - log_n}
  n = len(flops)
  return band(fit, Points(log_x, np.ones(n), np.full(n, arm), *[np.arange(n)] * 3))


def law_curves(
  fitted: Fit | None, doc: dict | None, inside: pd.DataFrame, params: str
) -> dict[str, LawCurve]:
  """Arm -> its curve, where the law may be drawn: a sound fit, and for L(N, D) both exponents identified.

  inside: the runs of the law.
  """
  if fitted is None or doubts(fitted):
    return {}
  both = fitted.law.name == 'chinchilla'
  if both and set(fitted.law.exponents) & set(doc['verdicts']):
    return {}
  beyond = 1.0 if doc['floor_unknown'] else EXTRAPOLATE
  curves = {}
  for arm in fitted.points.arms:
    own = inside[inside['arm'] == arm]
    largest = own.loc[own['flops'].idxmax()]
    kappa = largest['flops'] / (largest[f'params_{params}'] * largest['tokens']) if both else None
    flops = np.geomspace(own['flops'].min(), own['flops'].max() * beyond, 60)
    curves[arm] = LawCurve(arm, fitted, kappa, flops, _band_at(fitted, arm, kappa, flops))
  return curves


def at_equal_flops(curves: dict[str, LawCurve], grid: pd.DataFrame, reference: str | None) -> pd.DataFrame:
  """Runs and curves of all arms as % of the reference's curve; empty without curves of several arms."""
  if reference not in curves or len(curves) < 2:
    return pd.DataFrame()
  base, parts = curves[reference], []
  for arm, own in grid.groupby('arm', sort=False):
    percent = 100 * own['validation_loss'] / base.at(own['flops']).loss
    runs = {'arm': arm, 'kind': 'run', 'run_id': own['run_id'], 'flops': own['flops']}
    parts.append(pd.DataFrame(runs | {'percent_of_reference_fit': percent}))
    if arm not in curves:
      continue
    curve = curves[arm]
    inside = curve.up_to(own['flops'].max())
    flops = curve.flops[inside]
    low, middle, high = (
      100 * v[inside] / base.at(flops).loss for v in (curve.band.low, curve.band.loss, curve.band.high)
    )
    line = {'arm': arm, 'kind': 'fit', 'flops': flops, 'percent_of_reference_fit': middle}
    parts.append(pd.DataFrame(line | {'low': low, 'high': high}))
  return pd.concat(parts)


def arrows(curves: dict[str, LawCurve], multipliers: list[Multiplier], grid: pd.DataFrame) -> list[dict]:
  """From each arm's curve near the largest runs to the compute at which the reference has the same loss."""
  shown = [m for m in multipliers if m.flops is not None and m.arm in curves]
  starts = np.geomspace(0.3, 0.9, len(shown)) * float(grid['flops'].max()) if shown else []
  rows = []
  for m, start in zip(shown, starts, strict=True):
    loss = float(curves[m.arm].at(np.array([start])).loss[0])
    row = {'arm': m.arm, 'kind': 'arrow', 'flops': start, 'loss': loss, 'multiplier': m.flops}
    rows.append(row | dict(zip(('low', 'high'), m.flops_interval, strict=True)))
  return rows
