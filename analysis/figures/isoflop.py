"""IsoFLOP panels, and the best size and token count at each budget (Hoffmann 2203.15556, approach 2).

Where: Study -> here -> catalogue.py. Each is a drawing, or the sentence that says why it is absent.
"""

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..conventions import PARAMS
from ..minima import Minimum
from ..optima import Optimum
from ..study import Study
from . import grids
from .draw import WIDE, Drawing, explain, figure, legend, line, log_axis, looks, panels

NO_BUDGET = 'no arm has three sizes at one compute budget (within 5 %).'
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
EDGE = {'mec': 'black', 'mew': 0.7, 'zorder': 4}
STARS = {'parabola': {'marker': '*', 'ms': 9}, 'akima': {'marker': 'X', 'ms': 7}}


def _budget_looks(budgets: list[float]) -> dict[float, dict]:
  """Budget -> colour and marker, the same in every panel: dark to light, and budgets within 5 % are one."""
  levels = []
  for c in sorted(budgets):
    if not levels or np.log(c / levels[-1]) > 0.05:
      levels.append(c)
  shades = matplotlib.colormaps['viridis'](np.linspace(0, 0.85, len(levels)))
  out = {}
  for c in budgets:
    k = int(np.argmin(np.abs(np.log(np.array(levels) / c))))
    out[c] = {'color': shades[k], 'marker': MARKERS[k % len(MARKERS)], 'label': f'{levels[k]:.2g} FLOPs'}
  return out


def isoflop_panels(s: Study) -> Drawing | str | None:
  """Loss against N at equal FLOPs, one panel per arm, with the minima of both methods inside the grid."""
  if not grids.budgets(s):
    return None
  parabola, akima = (
    {o.arm: o for o in s.optima if (o.name, o.method) == ('N*', method)} for method in ('parabola', 'akima')
  )
  if not parabola:
    return f'IsoFLOP panels: {NO_BUDGET}'
  column, rows = f'params_{s.params}', []
  look = _budget_looks([c for o in parabola.values() for c, _ in o.budgets])
  with panels(len(parabola), 2.8) as (fig, axes):
    for ax, (arm, o) in zip(
      axes, sorted(parabola.items(), key=lambda item: s.arms.index(item[0])), strict=True
    ):
      own = s.grid[s.grid['arm'] == arm].rename(columns={column: 'params', 'validation_loss': 'loss'})
      others = dict(akima[arm].budgets) if arm in akima else {}
      for c, m in o.budgets:
        near = own[np.abs(np.log(own['flops'] / c)) < 0.05]
        drawn = _draw_budget(ax, near, {'parabola': m, 'akima': others.get(c)}, look[c])
        rows += [{'arm': arm, 'flops': c} | row for row in drawn]
      ax.set_title(arm)
      log_axis(ax, PARAMS[s.params].split(' (')[0])
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
      ax.set_ylim(low, high)
    axes[0].set_ylabel('validation loss (nats per token)')
    explain(axes[0], 'parabola', linestyle='-', linewidth=0.9)
    for method, star in STARS.items():
      explain(axes[0], f'minimum, {method}', **star, **EDGE)
    legend(fig, *axes)
  caption = (
    'IsoFLOP panels: loss against size at equal training FLOPs. Lines: parabolas; stars: their minima inside '
    f'the grid; crosses: minima of the Akima interpolation. N: {PARAMS[s.params]}.'
  )
  return Drawing(fig, caption, pd.DataFrame(rows))


def _draw_budget(ax: Axes, near: pd.DataFrame, minima: dict[str, Minimum | None], look: dict) -> list[dict]:
  """Runs, parabola and minima of one arm at one budget; returns their numbers."""
  ax.plot(near['params'], near['loss'], ls='none', ms=3.5, **look)
  curve = minima['parabola']
  ax.plot(np.exp(curve.curve_log_x), curve.curve_loss, color=look['color'], lw=0.9)
  rows = []
  for method, m in minima.items():
    if m is None:  # too few sizes for this method
      continue
    best = {'params': None if m.log_x is None else np.exp(m.log_x), 'loss': m.loss}
    rows.append({'kind': 'minimum', 'method': method} | best | {'problem': m.problem})
    if m.log_x is not None:
      ax.plot(best['params'], best['loss'], **STARS[method], **EDGE, color=look['color'])
  rows += [{'kind': 'run'} | run for run in near[['run_id', 'seed', 'params', 'loss']].to_dict('records')]
  rows += [
    {'kind': 'curve', 'method': 'parabola', 'params': a, 'loss': b}
    for a, b in zip(np.exp(curve.curve_log_x), curve.curve_loss, strict=True)
  ]
  return rows


def optimal_sizes(s: Study) -> Drawing | str | None:
  """N*(C) and D*(C) of each arm: the minima of the IsoFLOP curves and a power law through them."""
  if not grids.budgets(s):
    return None
  shown = sorted((o for o in s.optima if o.inside), key=lambda o: s.arms.index(o.arm))
  if not shown:
    return f'N*(C) and D*(C): {NO_BUDGET}'
  style, rows, words = looks(s.arms), [], []
  labels = {'N*': PARAMS[s.params].split(' (')[0], 'D*': 'training tokens'}
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
      for o in (o for o in shown if o.name == name):
        rows += _draw_optima(ax, o, style[o.arm])
        if o.law is not None:
          ends = '' if o.law.low is None else f' (95 % {o.law.low:.2f} to {o.law.high:.2f})'
          words.append(f'{o.arm}, {o.method}: {name} ~ C^{o.law.exponent:.2f}{ends}.')
      log_axis(ax, 'training FLOPs')
      log_axis(ax, f'{name}: {label}', 'y')
    explain(axes[0], 'minimum, parabola', marker='o')
    explain(axes[0], 'minimum, akima', marker='o', markerfacecolor='none')
    explain(axes[0], 'power law', linestyle='-')
    legend(fig, *axes)
  caption = (
    'Best size and token count at each compute budget, with power laws through the minima of the parabolas '
    f'(filled) and of the Akima interpolation (hollow). {" ".join(words)} N: {PARAMS[s.params]}.'
  )
  return Drawing(fig, caption, pd.DataFrame(rows))


def _draw_optima(ax: Axes, o: Optimum, look: dict[str, str]) -> list[dict]:
  """One arm's optima by one method, the power law through those of the parabolas; returns the numbers."""
  c, value = np.array(o.inside).T
  filled = o.method == 'parabola'
  face, label = (look['color'], o.arm) if filled else ('none', None)
  ax.plot(c, value, look['marker'], color=look['color'], markerfacecolor=face, label=label)
  row = {'arm': o.arm, 'optimum': o.name, 'method': o.method}
  if o.law is not None:
    row |= {'coefficient': np.exp(o.law.log_coefficient), 'exponent': o.law.exponent}
    row |= {'low': o.law.low, 'high': o.law.high}
    if filled:
      fitted = np.exp(o.law.log_coefficient + o.law.exponent * np.log(c))
      ax.plot(c, fitted, **line(look))
  return [row | {'flops': b, 'value': x} for b, x in o.inside]
