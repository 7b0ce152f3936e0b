"""Figures by sublayer at the largest size that all arms share: gains (mHC Fig. 3, 7), H_res itself (Fig. 8).

Where: Study -> here -> catalogue.py. Both show the last state that a run logged, also of diverged runs.
"""

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..layers import MATRICES
from ..study import Study
from . import grids
from .draw import DIVERGED, WIDE, Drawing, by_arm, explain, figure, legend, log_axis, looks
from .training import place

LABELS = {
  'gain_forward': 'forward gain',
  'gain_backward': 'backward gain',
  'composite_gain_forward': 'forward gain of the product',
  'composite_gain_backward': 'backward gain of the product',
}


def gains(s: Study) -> Drawing | str | None:
  """mHC Fig. 3 and 7: single and composite gains, forward and backward; mean over seeds."""
  if not grids.streams(s):
    return None
  if s.gains.empty:
    return 'Gains by sublayer: no run logged diagnostics.'
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    for ax, (name, label) in zip(axes.flat, LABELS.items(), strict=True):
      own = s.gains[s.gains['gain'] == name]
      if len(own):
        _draw_gain(ax, own, looks(s.arms), label)
    if (s.gains['state'] == 'diverged').any():
      explain(axes.flat[0], 'a run diverged', **DIVERGED | {'markersize': 7})
    explain(axes.flat[0], 'gain 1', linestyle='--', linewidth=0.8)
    legend(fig, *axes.flat)
  caption = (
    'Amax gains of H_res by sublayer l, single (top) and of the product of sublayers 1 to l (bottom), '
    'forward (largest row sum of |H_res|) and backward (largest column sum): last logged value, mean '
    f'over tokens and seeds; {place(s)}.'
  )
  return Drawing(fig, caption, s.gains)


def _draw_gain(ax: Axes, table: pd.DataFrame, style: dict[str, dict], label: str) -> None:
  for arm, own in by_arm(table, list(style)):
    mean = own.groupby('sublayer')['value'].mean()
    ax.plot(mean.index, mean, **style[arm], markerfacecolor='none', label=arm)
    if (own['state'] == 'diverged').any():
      ax.plot(mean.index[-1:], mean[-1:], **DIVERGED, ms=7)
  ax.axhline(1, color='#555555', lw=0.8, ls='--')
  low, high = table['value'].min(), table['value'].max()
  if high > 10 * max(low, 1e-30):
    log_axis(ax, '', 'y')
  elif high - low < 1e-3:
    ax.set_ylim(low - 0.05, high + 0.05)
  ax.set(xlabel='sublayer (attention, feed-forward, ...)', ylabel=label)


def heat_maps(s: Study) -> Drawing | str | None:
  """mHC Fig. 8: token-mean H_res of the first, middle and last sublayer, single and composite.

  Row sums are written at the right, column sums below.
  """
  if not grids.streams(s):
    return None
  if not s.matrices:
    return 'Heat maps of H_res: no run of several streams logged diagnostics/res_mean.'
  rows, count = [], len(s.matrices)
  with figure(WIDE, 1.3 * count + 0.2, nrows=count, ncols=6, squeeze=False) as (fig, axes):
    for line, (arm, run_id, stacks) in zip(axes, s.matrices, strict=True):
      line[0].set_ylabel(textwrap.fill(arm.replace('_', ' '), 14), fontsize=7)
      for k, name in enumerate(MATRICES):
        stack = stacks.get(name)
        for j, ax in enumerate(line[3 * k : 3 * k + 3]):
          if stack is None:
            ax.set_axis_off()
            continue
          sublayer = (0, len(stack) // 2, len(stack) - 1)[j]
          _heat(ax, stack[sublayer], f'{"product to " if k else "sublayer "}{sublayer + 1}')
          rows += [
            {'arm': arm, 'run_id': run_id, 'kind': name, 'sublayer': sublayer + 1}
            | {'row': a, 'column': b, 'value': float(v)}
            for (a, b), v in np.ndenumerate(stack[sublayer])
          ]
  caption = (
    'Token-mean H_res (left) and products of them (right) of the first seed, with row and column sums, last '
    f'logged; {place(s)}.'
  )
  return Drawing(fig, caption, pd.DataFrame(rows))


def _heat(ax: Axes, matrix: np.ndarray, title: str) -> None:
  limit = max(1.0, float(np.nanmax(np.abs(matrix))))
  ax.imshow(matrix, cmap='RdBu_r', vmin=-limit, vmax=limit)
  ax.set_title(title, fontsize=7)
  ax.set(xticks=[], yticks=[])
  ax.grid(visible=False)
  n = len(matrix)
  for k in range(n):
    ax.text(n - 0.4, k, _short(matrix[k].sum()), fontsize=7, va='center')
    ax.text(k, n - 0.05, _short(matrix[:, k].sum()), fontsize=7, ha='center', va='center')
    if n <= 4:
      for j in range(n):
        ink = 'white' if abs(matrix[k, j]) > 0.6 * limit else 'black'
        ax.text(j, k, _short(matrix[k, j]), fontsize=7, ha='center', va='center', color=ink)


def _short(value: float) -> str:
  """At most four characters and a sign: .25, 1.0, 31, 4e4."""
  size = abs(value)
  if size < 0.995:
    return f'{value:.2f}'.replace('0.', '.')
  return (
    f'{value:.1f}' if size < 9.95 else f'{value:.0f}' if size < 999 else f'{value:.0e}'.replace('e+0', 'e')
  )
