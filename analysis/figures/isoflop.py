"""IsoFLOP panels, and the best size and token count at each budget (Hoffmann 2203.15556, approach 2).

Where: Study -> here -> all_figures.py. Each returns a Panel, or the sentence that says why it is absent.
"""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..minima import METHODS, Minimum, isoflop, power_law
from ..selection import PARAMS
from ..study import Study
from .draw import WIDE, Panel, figure, legend, log_axis, looks, panels, save

NO_BUDGET = 'no arm has three sizes at one compute budget (within 5 %).'
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')


def profiles(s: Study, column: str, method: str) -> dict[str, list[tuple[float, Minimum]]]:
  """By arm, (budget in FLOPs, minimum over `column`) of every budget with a curve; seeds are averaged."""
  found = {}
  for arm, own in s.grid.groupby('arm', sort=False):
    log_c, log_x = np.log(own['flops'].to_numpy()), np.log(own[column].to_numpy())
    budgets = isoflop(log_c, log_x, own['validation_loss'].to_numpy(), method)
    budgets = [(float(np.exp(c)), m) for c, m in budgets if len(m.curve_log_x)]
    if budgets:
      found[arm] = budgets
  return found


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


def isoflop_panels(s: Study, folder: Path) -> Panel | str:
  """Loss against N at equal FLOPs, one panel per arm, with the minima of both methods inside the grid."""
  column = f'params_{s.params}'
  found = profiles(s, column, 'parabola')
  if not found:
    return f'IsoFLOP panels: {NO_BUDGET}'
  akima, rows = profiles(s, column, 'akima'), []
  look = _budget_looks([c for budgets in found.values() for c, _ in budgets])
  with panels(len(found), 2.8) as (fig, axes):
    for ax, (arm, budgets) in zip(axes, found.items(), strict=True):
      own = s.grid[s.grid['arm'] == arm]
      for c, m in budgets:
        near = own[np.abs(np.log(own['flops'] / c)) < 0.05]
        minima = {'parabola': m, 'akima': dict(akima.get(arm, ())).get(c)}
        drawn = _draw_budget(ax, near, column, minima, look[c])
        rows += [{'arm': arm, 'flops': c} | row for row in drawn]
      ax.set_title(arm)
      log_axis(ax, PARAMS[s.params].split(' (')[0])
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
      ax.set_ylim(low, high)
    axes[0].set_ylabel('validation loss (nats per token)')
    legend(fig, *axes)
  caption = (
    'IsoFLOP panels: loss against size at equal training FLOPs. Lines: parabolas; stars: their minima inside '
    f'the grid; crosses: minima of the Akima interpolation. N: {PARAMS[s.params]}.'
  )
  return save(fig, folder, 'paper_isoflop', caption, pd.DataFrame(rows))


def _draw_budget(
  ax: Axes, near: pd.DataFrame, column: str, minima: dict[str, Minimum | None], look: dict
) -> list[dict]:
  """Runs, parabola and minima of one arm at one budget; returns their numbers."""
  ax.plot(near[column], near['validation_loss'], ls='none', ms=3.5, **look)
  m = minima['parabola']
  ax.plot(np.exp(m.curve_log_x), m.curve_loss, color=look['color'], lw=0.9)
  rows = []
  for method, found in minima.items():
    if found is None:  # too few sizes for this method
      continue
    best = {'params': None if found.log_x is None else np.exp(found.log_x), 'loss': found.loss}
    rows.append({'kind': 'minimum', 'method': method} | best | {'problem': found.problem})
    if found.log_x is not None:
      marker = {'parabola': {'marker': '*', 'ms': 9}, 'akima': {'marker': 'X', 'ms': 7}}[method]
      ax.plot(best['params'], best['loss'], **marker, color=look['color'], mec='black', mew=0.7, zorder=4)
  runs = near[['run_id', 'seed', column, 'validation_loss']].to_dict('records')
  rows += [
    {
      'kind': 'run',
      'run_id': r['run_id'],
      'seed': r['seed'],
      'params': r[column],
      'loss': r['validation_loss'],
    }
    for r in runs
  ]
  rows += [
    {'kind': 'curve', 'method': 'parabola', 'params': a, 'loss': b}
    for a, b in zip(np.exp(m.curve_log_x), m.curve_loss, strict=True)
  ]
  return rows


def optimal_sizes(s: Study, folder: Path) -> Panel | str:
  """N*(C) and D*(C) of each arm: the minima of the IsoFLOP curves and a power law through them."""
  rows, words = [], []
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    columns = {'N*': f'params_{s.params}', 'D*': 'tokens'}
    for ax, (name, column) in zip(axes, columns.items(), strict=True):
      for method in METHODS:
        for arm, budgets in profiles(s, column, method).items():
          inside = [(c, m.log_x) for c, m in budgets if m.log_x is not None]
          if inside:
            made, sentence = _draw_optima(ax, s, arm, name, method, inside)
            rows += made
            words += [sentence] if sentence else []
      log_axis(ax, 'training FLOPs')
      log_axis(ax, f'{name}: ' + {'N*': PARAMS[s.params].split(' (')[0], 'D*': 'training tokens'}[name], 'y')
    legend(fig, *axes)
  if not rows:
    return f'N*(C) and D*(C): {NO_BUDGET}'
  caption = (
    'Best size and token count at each compute budget, with power laws through the minima of the parabolas '
    f'(filled) and of the Akima interpolation (hollow). {" ".join(words)} N: {PARAMS[s.params]}.'
  )
  return save(fig, folder, 'paper_optimal_sizes', caption, pd.DataFrame(rows))


def _draw_optima(
  ax: Axes, s: Study, arm: str, name: str, method: str, inside: list[tuple[float, float]]
) -> tuple[list[dict], str | None]:
  """One arm's optima by one method with their power law: the numbers, and the law as a sentence."""
  look = looks(list(dict.fromkeys(s.table['arm'])))[arm]
  c, log_x = np.array(inside).T
  face = look['color'] if method == 'parabola' else 'none'
  label = arm if method == 'parabola' else None
  ax.plot(c, np.exp(log_x), look['marker'], color=look['color'], markerfacecolor=face, label=label)
  law = power_law(np.log(c), log_x)
  base = {'arm': arm, 'optimum': name, 'method': method}
  if law is not None:
    base |= {'coefficient': np.exp(law.log_coefficient), 'exponent': law.exponent}
    base |= {'low': law.low, 'high': law.high}
  rows = [base | {'flops': b, 'value': np.exp(x)} for b, x in inside]
  if law is None:
    return rows, None
  if method == 'parabola':
    line = np.exp(law.log_coefficient + law.exponent * np.log(c))
    ax.plot(c, line, linestyle=look['linestyle'], color=look['color'])
  ends = '' if law.low is None else f' (95 % {law.low:.2f} to {law.high:.2f})'
  return rows, f'{arm}, {method}: {name} ~ C^{law.exponent:.2f}{ends}.'
