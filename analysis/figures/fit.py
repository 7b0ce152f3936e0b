"""The picture of one fit: loss against compute (or the law's first covariate), runs and law.

Where: a fit, or IsoFLOP optima, of somebody's points -> here -> `mhc fit --figure`.
"""

import numpy as np
import pandas as pd

from ..fitting.estimate import Fit
from ..fitting.intervals import band
from ..fitting.laws import Points
from ..optima import Optimum
from .draw import Drawing, figure, legend, log_axis, looks

LABELS = {
  'C': 'training FLOPs',
  'N': 'parameters',
  'D': 'training tokens',
  'W': 'width',
  'H': 'depth',
  'M': 'tokens per parameter',
}
LOSS = 'loss (nats per token)'


def fitted_curve(fit: Fit, level: float) -> Drawing:
  """Runs, and the law through them: a smooth curve for one covariate, else a line per arm and size."""
  points, law = fit.points, fit.law
  x = law.covariates[0] if len(law.covariates) == 1 or 'C' not in points.log_x else 'C'
  style, rows = looks(list(points.arms)), []
  with figure() as (fig, ax):
    for arm in points.arms:
      own = points.take(points.arm == arm)
      plain = {k: v for k, v in style[arm].items() if k != 'marker'}
      ax.plot(np.exp(own.log_x[x]), own.loss, **style[arm] | {'linestyle': 'none'}, ms=3.5, label=arm)
      for at in _lines(own, law.covariates, x):
        b = band(fit, at, level)
        at_x = np.exp(at.log_x[x])
        ax.plot(at_x, b.loss, **plain | {'linewidth': 0.9})
        ax.fill_between(at_x, b.low, b.high, color=plain['color'], alpha=0.15, lw=0)
        numbers = zip(at_x, b.loss, b.low, b.high, strict=True)
        rows += [
          {'arm': arm, 'kind': 'fit', x: v, 'loss': m, 'low': lo, 'high': hi} for v, m, lo, hi in numbers
        ]
      runs = zip(np.exp(own.log_x[x]), own.loss, own.run, strict=True)
      rows += [{'arm': arm, 'kind': 'run', x: v, 'loss': loss, 'line': line} for v, loss, line in runs]
    log_axis(ax, LABELS[x])
    ax.set_ylabel(LOSS)
    if len(points.arms) > 1:
      legend(fig, ax)
  caption = f'{law.formula}: {len(points)} runs, and the law with its {100 * level:g} % band.'
  return Drawing(fig, caption, pd.DataFrame(rows))


def _lines(own: Points, covariates: tuple[str, ...], x: str) -> list[Points]:
  """Where the law of one arm is drawn."""
  if covariates == (x,) and not own.axes:
    log_x = np.linspace(own.log_x[x].min(), own.log_x[x].max(), 60)
    return [Points({x: log_x}, np.ones(60), np.full(60, own.arm[0]), *[np.arange(60)] * 3)]
  groups = [own.take(own.size == size) for size in dict.fromkeys(own.size.tolist())]
  return [g.take(np.argsort(g.log_x[x], kind='stable')) for g in groups]


def isoflop_curves(points: Points, optima: list[Optimum]) -> Drawing:
  """Loss against N at every budget, the parabolas and their minima inside the grid."""
  style, rows = looks(list(points.arms)), []
  with figure() as (fig, ax):
    for arm in points.arms:
      own = points.take(points.arm == arm)
      ax.plot(np.exp(own.log_x['N']), own.loss, **style[arm] | {'linestyle': 'none'}, ms=3, label=arm)
      runs = zip(np.exp(own.log_x['C']), np.exp(own.log_x['N']), own.loss, strict=True)
      rows += [{'arm': arm, 'kind': 'run', 'C': c, 'N': n, 'loss': loss} for c, n, loss in runs]
    for o in (o for o in optima if (o.name, o.method) == ('N*', 'parabola')):
      for c, m in o.budgets:
        ax.plot(np.exp(m.curve_log_x), m.curve_loss, color=style[o.arm]['color'], lw=0.8)
        if m.log_x is not None:
          ax.plot(np.exp(m.log_x), m.loss, '*', color=style[o.arm]['color'], mec='black', mew=0.5, ms=8)
          rows.append({'arm': o.arm, 'kind': 'minimum', 'C': c, 'N': np.exp(m.log_x), 'loss': m.loss})
    log_axis(ax, LABELS['N'])
    ax.set_ylabel(LOSS)
    if len(points.arms) > 1:
      legend(fig, ax)
  return Drawing(
    fig, 'Loss against size at equal compute; stars: minima of the parabolas.', pd.DataFrame(rows)
  )
