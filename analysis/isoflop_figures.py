"""IsoFLOP panels, and the best size and token count at each budget (Hoffmann 2203.15556, approach 2).

Where: Study -> here -> `python -m analysis.plots paper`. Each returns a Panel, or the sentence that says
why it is absent.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from analysis.draw import Panel, figure, legend, log_axis, looks, save
from analysis.isoflop import Minimum, isoflop, power_law
from analysis.study import Study

WIDE = 7.0  # inches: a text width
NO_BUDGET = 'no arm has three sizes at one compute budget (within 5 %).'


def profiles(s: Study, column: str) -> dict[str, list[tuple[float, Minimum]]]:
  """By arm, (budget in FLOPs, minimum over `column`) of every budget with a curve; seeds are averaged."""
  found = {}
  for arm, own in s.grid.groupby('arm', sort=False):
    log_c, log_x = np.log(own['flops'].to_numpy()), np.log(own[column].to_numpy())
    budgets = isoflop(log_c, log_x, own['validation_loss'].to_numpy())
    budgets = [(float(np.exp(c)), m) for c, m in budgets if len(m.curve_log_x)]
    if budgets:
      found[arm] = budgets
  return found


def isoflop_panels(s: Study, folder: Path) -> Panel | str:
  """Loss against N at equal FLOPs, one panel per arm, with the parabola's minimum where it is inside."""
  found = profiles(s, 'params_matmul')
  if not found:
    return f'IsoFLOP panels: {NO_BUDGET}'
  rows = []
  with figure(WIDE, 2.8, ncols=len(found), squeeze=False, sharey=True) as (fig, axes):
    for ax, (arm, budgets) in zip(axes[0], found.items(), strict=True):
      own = s.grid[s.grid['arm'] == arm]
      for c, m in budgets:
        near = own[np.abs(np.log(own['flops'] / c)) < 0.05]
        (line,) = ax.plot(near['params_matmul'], near['validation_loss'], 'o', ms=3, label=f'{c:.2g} FLOPs')
        ax.plot(np.exp(m.curve_log_x), m.curve_loss, color=line.get_color(), lw=0.9)
        if m.log_x is not None:
          ax.plot(np.exp(m.log_x), m.loss, '*', color=line.get_color(), ms=9)
        best = {'optimal_params': None if m.log_x is None else np.exp(m.log_x), 'loss': m.loss}
        rows.append({'kind': 'minimum', 'arm': arm, 'flops': c, **best, 'problem': m.problem})
        for kind, x, y in (
          ('run', near['params_matmul'], near['validation_loss']),
          ('curve', np.exp(m.curve_log_x), m.curve_loss),
        ):
          ids = near['run_id'] if kind == 'run' else [None] * len(x)
          rows += [
            {'kind': kind, 'arm': arm, 'flops': c, 'params': a, 'loss': b, 'run_id': i}
            for a, b, i in zip(x, y, ids, strict=True)
          ]
      ax.set_title(arm)
      log_axis(ax, 'parameters (matmul)')
    axes[0][0].set_ylabel('validation loss (nats per token)')
    legend(fig, axes[0][0])
  caption = 'IsoFLOP panels: loss against size at equal training FLOPs; stars are minima inside the grid.'
  return save(fig, folder, 'paper_isoflop', caption, pd.DataFrame(rows))


def optimal_sizes(s: Study, folder: Path) -> Panel | str:
  """N*(C) and D*(C) of each arm: the minima of the IsoFLOP curves and a power law through them."""
  style, rows, words = looks(list(dict.fromkeys(s.table['arm']))), [], []
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, (column, name) in zip(axes, (('params_matmul', 'N*'), ('tokens', 'D*')), strict=True):
      for arm, budgets in profiles(s, column).items():
        inside = [(c, m.log_x) for c, m in budgets if m.log_x is not None]
        if not inside:
          continue
        c, log_x = np.array(inside).T
        ax.plot(c, np.exp(log_x), style[arm]['marker'], color=style[arm]['color'], label=arm)
        rows += [{'arm': arm, 'optimum': name, 'flops': b, 'value': np.exp(x)} for b, x in inside]
        first = len(rows) - len(inside)
        law = power_law(np.log(c), log_x)
        if law is not None:
          ends = '' if law.low is None else f' (95 % {law.low:.2f} to {law.high:.2f})'
          words.append(f'{arm}: {name} ~ C^{law.exponent:.2f}{ends}.')
          for row in rows[first:]:
            row |= {'exponent': law.exponent, 'low': law.low, 'high': law.high}
          line = np.exp(law.log_coefficient + law.exponent * np.log(c))
          ax.plot(c, line, linestyle=style[arm]['linestyle'], color=style[arm]['color'])
      log_axis(ax, 'training FLOPs')
      log_axis(ax, f'{name}: ' + {'N*': 'parameters (matmul)', 'D*': 'training tokens'}[name], 'y')
    legend(fig, axes[0])
  if not rows:
    return f'N*(C) and D*(C): {NO_BUDGET}'
  caption = 'Best size and token count at each compute budget, with power laws. ' + ' '.join(words)
  return save(fig, folder, 'paper_optimal_sizes', caption, pd.DataFrame(rows))
