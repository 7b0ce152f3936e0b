"""Figures over training at the largest size that all arms share: loss, gaps to the reference, gradient norm.

Where: Study -> here -> catalogue.py. A diverged run is drawn as far as it came, with a cross at its end.
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from ..study import Study
from ..training import mean_curve
from . import grids
from .draw import (
  DIVERGED,
  WIDE,
  Drawing,
  by_arm,
  explain,
  figure,
  hollow,
  legend,
  line,
  log_axis,
  looks,
  mark_ends,
)

SEEDS = 'seeds thin, their mean as far as all of them came'


def place(s: Study) -> str:
  """Where and what the largest runs are: size, and every arm that is absent, diverged or unfinished."""
  rows = s.largest
  out = [f'width x depth {rows["size"].iloc[0]}']
  absent = [arm for arm in s.arms if arm not in set(rows['arm'])]
  if absent:
    out.append(f'no run there: {", ".join(absent)}')
  for words, inside in (
    ('diverged (x)', rows['state'] == 'diverged'),
    ('not finished', ~rows['state'].isin(['finished', 'diverged'])),
  ):
    seeds = (
      rows[inside].groupby('arm', sort=False)['seed'].apply(lambda v: ' and '.join(f'{k:.0f}' for k in v))
    )
    if len(seeds):
      out.append(f'{words}: ' + ', '.join(f'{arm} seed {which}' for arm, which in seeds.items()))
  return '; '.join(out)


Curve = tuple[str, np.ndarray, np.ndarray]  # state, x, y


def _curves(s: Study, table: pd.DataFrame, metric: str, against: str) -> dict[str, list[Curve]]:
  """Arm -> the curves of its runs."""
  return {
    arm: [
      (state, run[against].to_numpy(), run['value'].to_numpy())
      for (_, state), run in own.groupby(['run_id', 'state'], sort=False)
    ]
    for arm, own in by_arm(table[table['metric'] == metric], s.arms)
  }


def _draw_seeds(ax: Axes, look: dict[str, str], arm: str, curves: list[Curve]) -> list[tuple[float, float]]:
  """An arm's curves, thin, their mean as far as all go; returns the ends of diverged ones."""
  several = len(curves) > 1
  for _, x, y in curves:
    ax.plot(x, y, **line(look) | ({'linewidth': 0.5, 'alpha': 0.35} if several else {'label': arm}))
  if several:
    ax.plot(*mean_curve([(x, y) for _, x, y in curves]), **line(look), label=arm)
  return [(x[-1], y[-1]) for state, x, y in curves if state == 'diverged']


def _explain(ax: Axes, arms: dict[str, list[Curve]]) -> None:
  """Entries of the legend for seeds and crosses."""
  curves = [one for own in arms.values() for one in own]
  if len(curves) > len(arms):
    explain(ax, 'one seed', linestyle='-', linewidth=0.5)
  if any(state == 'diverged' for state, *_ in curves):
    explain(ax, 'diverged', **DIVERGED | {'markersize': 7})


def _finish(ax: Axes, arms: dict[str, list[Curve]], ends: list) -> None:
  """Limits of y by the runs that did not diverge, with half their range beyond; crosses at the ends given."""
  curves = [one for own in arms.values() for one in own]
  sound = [y for state, _, y in curves if state != 'diverged']
  if sound and len(sound) < len(curves):
    to, back = (np.log, np.exp) if ax.get_yscale() == 'log' else (np.asarray, np.asarray)
    values = to(np.concatenate(sound))
    more = 0.5 * float(np.ptp(values))
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, back(values.min() - more)), min(high, back(values.max() + more)))
  mark_ends(ax, ends)


def training_loss(s: Study) -> Drawing | str:
  """Training loss (running mean) with the validation loss as markers, at the largest size."""
  if s.training_losses.empty:
    return 'Loss over training: no run logged train/loss.'
  style, ends = looks(s.arms), []
  arms = _curves(s, s.training_losses, 'train/loss', 'tokens')
  measured = _curves(s, s.training_losses, 'validation/loss', 'tokens')
  with figure() as (fig, ax):
    for arm, curves in arms.items():
      for _, x, y in measured.get(arm, ()):
        ax.plot(x, y, **hollow(style[arm]), ms=3)
      ends += _draw_seeds(ax, style[arm], arm, curves)
    # The first steps would squeeze the rest.
    ax.set_ylim(top=max(np.interp(0.04 * x[-1], x, y) for curves in arms.values() for _, x, y in curves))
    mark_ends(ax, ends)
    ax.xaxis.set_major_formatter(EngFormatter(sep=''))
    ax.set(xlabel='training tokens', ylabel='loss (nats per token)')
    _explain(ax, arms)
    if measured:
      explain(ax, 'validation loss', marker='o', markerfacecolor='none', markersize=3)
    legend(fig, ax)
  caption = (
    f'Training loss (running mean over 5 % of the run; markers: validation loss), {SEEDS}; '
    f'{place(s)}. The first 4 % may lie above the axis.'
  )
  return Drawing(fig, caption, s.training_losses)


def over_training(s: Study) -> Drawing | str | None:
  """mHC Fig. 2 and 5: training-loss gap to the reference and gradient norm over the updates."""
  if not grids.arms(s):
    return None
  if s.gaps_over_updates.empty:
    return 'Gap over training: no paired runs logged train/loss.'
  style = looks(s.arms)
  gaps, norms = (_curves(s, s.gaps_over_updates, name, 'step') for name in ('loss_gap', 'grad_norm'))
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    labels = (f'training loss minus {s.reference}', 'gradient norm')
    for ax, arms, label in zip(axes, (gaps, norms), labels, strict=True):
      ends = [end for arm, own in arms.items() for end in _draw_seeds(ax, style[arm], arm, own)]
      ax.set(xlabel='update', ylabel=label)
      if arms is norms:
        ax.set_yscale('log')
      else:
        ax.axhline(0, color='#000000', lw=0.8)
      _finish(ax, arms, ends)
    log_axis(axes[1], 'gradient norm', 'y')
    _explain(axes[1], norms)
    explain(axes[0], f'equal to {s.reference}', linestyle='-', linewidth=0.8, color='#000000')
    legend(fig, *axes[::-1])  # the norms have all arms
  caption = f'Training-loss gap (running mean over 5 % of the run) and gradient norm, {SEEDS}; {place(s)}.'
  return Drawing(fig, caption, s.gaps_over_updates)


def token_scaling(s: Study) -> Drawing | str | None:
  """mHC Fig. 6b: validation gap and ratio along the tokens of the largest runs."""
  if not grids.arms(s):
    return None
  if s.gaps_over_tokens.empty:
    return 'Gap along tokens: no paired runs logged validation/loss twice.'
  style = looks(s.arms)
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, name, unit, zero in zip(axes, ('gap', 'ratio'), (1, 100), (0, 100), strict=True):
      arms, ends = {}, []
      for arm, own in by_arm(s.gaps_over_tokens, s.arms):
        at = own.groupby('tokens')[name]
        mean = unit * at.mean()[at.size() == own['run_id'].nunique()]
        if len(mean):
          ax.plot(mean.index, mean, **style[arm], markerfacecolor='none', label=arm)
          state = 'diverged' if (own['state'] == 'diverged').any() else 'finished'
          arms[arm] = [(state, mean.index.to_numpy(), mean.to_numpy())]
          ends += [(mean.index[-1], mean.iloc[-1])] if state == 'diverged' else []
      ax.axhline(zero, color='#000000', lw=0.8)
      log_axis(ax, 'training tokens')
      _finish(ax, arms, ends)
    axes[0].set_ylabel(f'validation loss minus {s.reference}')
    axes[1].set_ylabel(f'validation loss, % of {s.reference}')
    _explain(axes[0], arms)
    explain(axes[0], s.reference, linestyle='-', linewidth=0.8, color='#000000')
    legend(fig, axes[0])
  caption = (
    'Gap and ratio along the runs of one size (mHC Fig. 6b), mean over seeds as far as all of them came; '
    f'{place(s)}. The learning-rate schedule is part of these curves: points before its end are not '
    'finished runs.'
  )
  return Drawing(fig, caption, s.gaps_over_tokens)
