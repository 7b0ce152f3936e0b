"""Figures by sublayer at the largest size that all arms share: gains (mHC Fig. 3, 7), H_res itself (Fig. 8).

Where: Study -> here -> all_figures.py. Both show the last state that a run logged, also of diverged runs.
"""

import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..runs import Run, last_list
from ..selection import largest
from ..study import Study
from .draw import WIDE, Panel, figure, legend, log_axis, looks, save
from .training import place

GAINS = {
  'gain_forward': 'forward gain',
  'gain_backward': 'backward gain',
  'composite_gain_forward': 'forward gain of the product',
  'composite_gain_backward': 'backward gain of the product',
}
MATRICES = ('res_mean', 'composite_res_mean')


def gains(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 3 and 7: single and composite gains, forward and backward; mean over seeds."""
  rows, shown = [], largest(s.table, s.reference)
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    for ax, name in zip(axes.flat, GAINS, strict=True):
      rows += _draw_gain(ax, s, shown, name)
    if not rows:
      return 'Gains by sublayer: no run logged diagnostics.'
    legend(fig, *axes.flat)
  caption = (
    'Amax gains of H_res by sublayer l, single (top) and of the product of sublayers 1 to l (bottom), '
    'forward (largest row sum of |H_res|) and backward (largest column sum): last logged value, mean '
    f'over tokens and seeds; {place(s, shown)}.'
  )
  return save(fig, folder, 'paper_gains', caption, pd.DataFrame(rows))


def _draw_gain(ax: Axes, s: Study, shown: pd.DataFrame, name: str) -> list[dict]:
  style, rows = looks(list(dict.fromkeys(s.table['arm']))), []
  for arm, own in shown.groupby('arm', sort=False):
    lists = {i: last_list(s.sweep.runs[i], f'diagnostics/{name}') for i in own['run_id']}
    longest = max((len(v) for v in lists.values() if v), default=0)
    kept = {i: v for i, v in lists.items() if v and len(v) == longest}
    if not kept:
      continue
    x = np.arange(1, longest + 1)
    mean = np.array(list(kept.values())).mean(0)
    ax.plot(x, mean, **style[arm], label=arm, ms=3)
    state = own.set_index('run_id')['state']
    if (state == 'diverged').any():
      ax.plot(x[-1:], mean[-1:], 'x', color='#D00000', ms=7)
    rows += [
      {'gain': name, 'arm': arm, 'run_id': i, 'state': state[i], 'sublayer': k, 'value': v}
      for i, row in kept.items()
      for k, v in zip(x, row, strict=True)
    ]
  if not rows:
    return rows
  ax.axhline(1, color='#7F7F7F', lw=0.8, ls='--')
  y = np.array([row['value'] for row in rows], float)
  if np.nanmax(y) > 10 * max(np.nanmin(y), 1e-30):
    log_axis(ax, '', 'y')
  elif np.nanmax(y) - np.nanmin(y) < 1e-3:
    ax.set_ylim(np.nanmin(y) - 0.05, np.nanmax(y) + 0.05)
  ax.set(xlabel='sublayer (attention, feed-forward, ...)', ylabel=GAINS[name])
  return rows


def heat_maps(s: Study, folder: Path) -> Panel | str:
  """mHC Fig. 8: token-mean H_res of the first, middle and last sublayer, single and composite.

  Reads metrics rows 'diagnostics/res_mean' and 'diagnostics/composite_res_mean': one n x n matrix per
  sublayer. Row sums are written at the right, column sums below.
  """
  found, shown = [], largest(s.table, s.reference)
  for arm, own in shown.groupby('arm', sort=False):
    run_id = own['run_id'].iloc[0]
    matrices = _matrices(s.sweep.runs[run_id])
    if any(len(stack[0]) > 1 for stack in matrices.values()):  # one stream has nothing to show
      found.append((arm, run_id, matrices))
  if not found:
    return 'Heat maps of H_res: no run of several streams logged diagnostics/res_mean.'
  rows = []
  with figure(WIDE, 1.3 * len(found) + 0.2, nrows=len(found), ncols=6, squeeze=False) as (fig, axes):
    for line, (arm, run_id, matrices) in zip(axes, found, strict=True):
      line[0].set_ylabel(textwrap.fill(arm.replace('_', ' '), 14), fontsize=6.5)
      for k, name in enumerate(MATRICES):
        stack = matrices.get(name)
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
    f'logged; {place(s, shown)}.'
  )
  return save(fig, folder, 'paper_heat_maps', caption, pd.DataFrame(rows))


def _matrices(run: Run) -> dict[str, np.ndarray]:
  for row in reversed(run.rows):
    if row.get('diagnostics/res_mean') is not None:
      given = {name: row.get(f'diagnostics/{name}') for name in MATRICES}
      return {name: np.array(v, float) for name, v in given.items() if v is not None}
  return {}


def _heat(ax: Axes, matrix: np.ndarray, title: str) -> None:
  limit = max(1.0, float(np.nanmax(np.abs(matrix))))
  ax.imshow(matrix, cmap='RdBu_r', vmin=-limit, vmax=limit)
  ax.set_title(title, fontsize=6.5)
  ax.set(xticks=[], yticks=[])
  ax.grid(visible=False)
  n = len(matrix)
  for k in range(n):
    ax.text(n - 0.4, k, _short(matrix[k].sum()), fontsize=5, va='center')
    ax.text(k, n - 0.1, _short(matrix[:, k].sum()), fontsize=5, ha='center', va='center')
    if n <= 4:
      for j in range(n):
        ink = 'white' if abs(matrix[k, j]) > 0.6 * limit else 'black'
        ax.text(j, k, _short(matrix[k, j]), fontsize=4.5, ha='center', va='center', color=ink)


def _short(value: float) -> str:
  """At most five characters."""
  return f'{value:.2f}' if abs(value) < 9.995 else f'{value:.0f}' if abs(value) < 9999 else f'{value:.0e}'
