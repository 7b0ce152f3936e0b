"""Figures of learning-rate sweeps: loss against rate by size, and what a wrong rate costs (2309.14322).

Where: Study -> here -> catalogue.py.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..conventions import PARAMS
from ..rates import RateSweep
from ..study import Study
from . import grids
from .draw import DASHES, DIVERGED, Drawing, explain, legend, log_axis, looks, panels, variant

# Of runs that have not learned, at the upper edge, where their losses would lie: marker, and words.
TOO_LOW = {'marker': 'v', 'color': '#1F4FD8', 'linestyle': 'none', 'zorder': 4, 'markerfacecolor': 'none'}
STUCK = TOO_LOW | {'marker': 's', 'color': '#8C510A'}
MARKS = {
  'diverged': (DIVERGED, 'a run diverged'),
  'too low': (TOO_LOW, 'rate too low: a run has hardly learned'),
  'not learned': (STUCK, 'a run has hardly learned at a higher rate'),
}
ABSENT = 'no arm has ended at three rates of one size.'


def learning_rates(s: Study) -> Drawing | str | None:
  """Final loss against learning rate, one panel per size, with each arm's interpolated optimum."""
  if not grids.rates(s):
    return None
  if not s.rates:
    return f'Loss against learning rate: {ABSENT}'
  style, rows = looks(s.arms), []
  sizes = list(dict.fromkeys(r.size for r in s.rates))
  with panels(len(sizes)) as (fig, axes):
    for ax, size in zip(axes, sizes, strict=True):
      arms: list[str] = []
      for r in _by_plan(s, [r for r in s.rates if r.size == size]):
        look = variant(style[r.arm], arms.count(r.arm))
        arms.append(r.arm)
        label = f'{r.arm}, {r.budget}' if r.budget else r.arm
        rows += _draw(ax, r, look, label)
        if r.best is not None:
          ax.axvline(r.best, color=look['color'], ls=':', lw=0.9)
          rows.append({'kind': 'optimum', 'arm': r.arm, 'size': size, 'budget': r.budget, 'lr': r.best})
      ax.set_title(size)
      log_axis(ax, 'learning rate')
    _share_y(axes)
    axes[0].set_ylabel('validation loss (nats per token)')
    explain(axes[0], 'interpolated optimum', linestyle=':', linewidth=0.9)
    _explain_marks(axes[0], s)
    legend(fig, *axes)
  caption = (
    'Final loss against learning rate (of the base size) by width x depth, mean over the seeds that '
    'finished; dotted: interpolated optimum; at the upper edge, x: a run of that rate diverged, '
    'triangle: below the best rate, a run has hardly left its loss before the first update (at the left end: '
    'a rate of 0).'
  )
  return Drawing(fig, caption, pd.DataFrame(rows))


def _by_plan(s: Study, sweeps: list[RateSweep]) -> list[RateSweep]:
  return sorted(sweeps, key=lambda r: s.arms.index(r.arm))


def _share_y(axes: list[Axes]) -> None:
  """One range of losses in all panels: their heights compare."""
  low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
  for ax in axes:
    ax.set_ylim(low, high)


def _explain_marks(ax: Axes, s: Study) -> None:
  for outcome, (look, words) in MARKS.items():
    if any((r.rows['outcome'] == outcome).any() for r in s.rates):
      explain(ax, words, **look)


def _draw(ax: Axes, r: RateSweep, look: dict[str, str], label: str | None) -> list[dict]:
  """A line of mean losses, with marks at the edge where runs have not learned; returns the runs."""
  mean = r.rows[r.rows['lr'] > 0].groupby('lr')['validation_loss'].mean().dropna()
  ax.plot(mean.index, mean, **{'markerfacecolor': 'none'} | look, label=label, ms=3.5)
  for outcome, (mark, _) in MARKS.items():
    rates = r.rows.loc[r.rows['outcome'] == outcome, 'lr']
    edge = rates[rates > 0]
    ax.plot(edge, np.full(len(edge), 0.97), **mark, transform=ax.get_xaxis_transform())
    if (rates == 0).any():
      ax.plot(0.01, 0.97, **mark, transform=ax.transAxes)
  columns = ['arm', 'size', 'run_id', 'seed', 'lr', 'state', 'outcome', 'validation_loss']
  rows = r.rows.reindex(columns=columns)
  return rows.assign(kind='run', budget=r.budget).to_dict('records')


def rate_sensitivity(s: Study) -> Drawing | str | None:
  """Per arm a line for each size, and the sensitivity of every arm against N."""
  if not grids.rates(s):
    return None
  if not s.rates:
    return f'Sensitivity to the learning rate: {ABSENT}'
  style, rows = looks(s.arms), []
  arms = list(dict.fromkeys(r.arm for r in _by_plan(s, s.rates)))
  tried = list(dict.fromkeys((r.size, r.budget) for r in s.rates))
  cues = {
    at: {'marker': 'os^Dv<>p'[k % 8], 'linestyle': DASHES[k % len(DASHES)]} for k, at in enumerate(tried)
  }
  with panels(len(arms) + 1) as (fig, axes):
    for ax, arm in zip(axes, arms, strict=False):
      own, colour = [r for r in s.rates if r.arm == arm], style[arm]['color']
      for r in own:
        rows += _draw(ax, r, cues[r.size, r.budget] | {'color': colour}, None)
      ax.set_title(arm, color=colour)
      log_axis(ax, 'learning rate')
      known = sorted((r.params, r.sensitivity) for r in own if r.sensitivity is not None)
      if known:
        axes[-1].plot(*zip(*known, strict=True), **style[arm], ms=3.5, label=arm)
      rows += [
        {'kind': 'sensitivity', 'arm': arm, 'size': r.size, 'budget': r.budget, 'params': r.params}
        | {
          'sensitivity': r.sensitivity,
          'lowest_lr': r.losses.index.min(),
          'highest_lr': r.losses.index.max(),
        }
        for r in own
      ]
    for size, cue in cues.items():  # the sizes look alike in every panel
      axes[0].plot([], [], **cue, ms=3.5, color='#555555', label=', '.join(filter(None, size)))
    log_axis(axes[-1], PARAMS[s.params].split(' (')[0])
    _share_y(axes[:-1])
    _explain_marks(axes[0], s)
    axes[-1].set_ylabel('sensitivity (nats)')
    axes[0].set_ylabel('validation loss')
    legend(fig, axes[0], axes[-1])
  low, high = min(r.losses.index.min() for r in s.rates), max(r.losses.index.max() for r in s.rates)
  caption = (
    'Final loss against learning rate, a line per width x depth, and learning-rate sensitivity: mean of '
    'min(loss, loss at the start) - best loss over rates drawn log-uniformly from the range of the grid, '
    f'{low:g} to {high:g} (2309.14322); a diverged run counts as the loss at the start.'
  )
  return Drawing(fig, caption, pd.DataFrame(rows))
