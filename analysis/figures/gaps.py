"""Absolute gap and relative ratio to the reference (mHC Fig. 6a)."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..gaps import Gap
from ..study import Study
from . import grids
from .draw import WIDE, Drawing, aside, explain, figure, legend, log_axis, looks


def gap_and_ratio(s: Study) -> Drawing | str | None:
  """mHC Fig. 6a: absolute gap and relative ratio against FLOPs, side by side."""
  if not grids.arms(s):
    return None
  if s.reference is None:
    return 'Gap to the reference: no run has finished.'
  if not s.gaps:
    return (
      f'Gap to {s.reference}: no finished run of another arm has a {s.reference} run of the same '
      'size and seed.'
    )
  with_interval = any(g.low is not None for g in s.gaps)
  with figure(WIDE, 2.8, ncols=2) as (fig, axes):
    for ax, relative in zip(axes, (False, True), strict=True):
      _draw_gap(ax, s, relative)
    if with_interval:
      explain(axes[0], '95 % interval', marker='|', markersize=9)
    explain(axes[0], s.reference, linestyle='-', linewidth=0.8, color='#000000')
    legend(fig, axes[0])
  caption = (
    f'Absolute loss gap and relative loss ratio to {s.reference} over paired seeds (mHC Fig. 6a); '
    f'{_cost_words(s)} Arms stand side by side at each size. '
  )
  caption += (
    'Intervals from the spread of paired differences, by arm and compute where the data tell them apart.'
    if with_interval
    else 'No interval: no size has two seeds.'
  )
  return Drawing(fig, caption, pd.DataFrame([vars(g) for g in s.gaps]))


def is_ladder(gaps: list[Gap]) -> bool:
  """Whether every size is at least as wide and as deep as the one before: only then a line joins them."""
  shapes = [tuple(map(float, g.size.split('x'))) for g in sorted(gaps, key=lambda g: g.log_flops)]
  return all(a[0] <= b[0] and a[1] <= b[1] and a != b for a, b in itertools.pairwise(shapes))


def _draw_gap(ax: Axes, s: Study, relative: bool) -> None:
  """Draws the gap (nats) or the loss ratio (%) of every arm with its interval."""
  style, unit = looks(s.arms), 100.0 if relative else 1.0
  arms = [arm for arm in s.arms if any(g.arm == arm for g in s.gaps)]
  x_all = np.exp([g.log_flops for g in s.gaps])
  sizes = {g.size for g in s.gaps}
  apart = 0.015 if len(sizes) > 1 else 0.8 / len(arms)
  edge = 0.03 + apart * (len(arms) - 1) / 2 if len(sizes) > 1 else 0.0  # that arms take, of the axis's length
  margin = max(1.3, (x_all.max() / x_all.min()) ** (edge / (1 - 2 * edge)))
  ax.set(xscale='log', xlim=(x_all.min() / margin, x_all.max() * margin))
  middle = float(np.sqrt(np.prod(ax.get_xlim())))
  for place, arm in enumerate(arms):
    own = [g for g in s.gaps if g.arm == arm]
    x = np.exp([g.log_flops for g in own]) if len(sizes) > 1 else np.full(len(own), middle)
    x = x * aside(ax, place, len(arms), apart)
    y = unit * np.array([g.ratio if relative else g.difference for g in own])
    low = [g.ratio_low if relative else g.low for g in own]
    ax.plot(x, y, **style[arm] | ({} if is_ladder(own) else {'linestyle': 'none'}), label=arm)
    if low[0] is not None:
      half = y - unit * np.array(low)
      ax.errorbar(x, y, yerr=half, fmt='none', color=style[arm]['color'], lw=0.9)
  ax.axhline(100 if relative else 0, color='#000000', lw=0.8)
  if len(sizes) > 1:
    log_axis(ax, 'training FLOPs')
  else:  # arms side by side at one size: there is no axis to read
    ax.set_xticks([middle], sizes)
    ax.minorticks_off()
  ax.set_ylabel(f'loss as % of {s.reference}' if relative else f'loss minus {s.reference} (nats)')


def _cost_words(s: Study) -> str:
  """What the pairs have in common: tokens, FLOPs, or neither."""
  tokens = max(abs(np.log(g.tokens_ratio)) for g in s.gaps)
  flops = [g.flops_ratio for g in s.gaps]
  if max(abs(np.log(f)) for f in flops) < 0.02:
    return 'pairs have equal FLOPs.'
  same = 'equal tokens' if tokens < 0.02 else 'neither equal tokens nor equal FLOPs'
  return f"pairs have {same} (FLOPs {min(flops):.2f} to {max(flops):.2f} times the reference's)."
