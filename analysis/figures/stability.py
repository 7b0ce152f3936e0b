"""Stability over depth and learning rate: diverged share, final loss, gradient norm, composite gain.

Where: Study -> here -> catalogue.py, for sweeps like experiments/stability.py.
"""

from ..study import Study
from . import grids
from .draw import WIDE, Drawing, by_arm, figure, legend, log_axis, looks

LABELS = {
  'diverged': 'share diverged',
  'validation_loss': 'validation loss',
  'gradient_norm': 'largest gradient norm',
  'composite_gain': 'composite gain',
}


def stability_panels(s: Study) -> Drawing | str | None:
  """Each measure (rows) against learning rate at each depth (columns); mean over seeds."""
  mean = s.stability.means
  if not (grids.several(s, 'depth', ('arm',)) and grids.several(s, 'lr', ('arm', 'depth'))):
    return None
  if mean.empty:
    return 'Stability: no arm has ended at two depths and two learning rates.'
  depths, style = sorted(mean['depth'].unique()), looks(s.arms)
  shown = {name: label for name, label in LABELS.items() if mean[name].notna().any()}
  size = {'nrows': len(shown), 'ncols': len(depths), 'squeeze': False, 'sharex': True, 'sharey': 'row'}
  with figure(WIDE, 1.7 * len(shown) + 0.4, **size) as (fig, axes):
    for row, (name, label) in zip(axes, shown.items(), strict=True):
      for ax, depth in zip(row, depths, strict=True):
        for arm, own in by_arm(mean[mean['depth'] == depth], s.arms):
          own = own.sort_values('lr')
          ax.plot(own['lr'], own[name], **style[arm], markerfacecolor='none', label=arm)
        ax.set_xscale('log')
      row[0].set_ylabel(label)
      if name in ('gradient_norm', 'composite_gain'):
        log_axis(row[0], label, 'y')
    for ax, depth in zip(axes[0], depths, strict=True):
      ax.set_title(f'depth {depth:.0f}')
      ax.set_ylim(-0.05, 1.05)
    for ax in axes[-1]:
      log_axis(ax, 'learning rate')
    legend(fig, axes[0][0])
  caption = (
    'Stability over depth and learning rate (of the base size), mean over seeds: share of diverged runs, '
    'final loss of the others, largest gradient norm after a tenth of the updates, composite gain at the end.'
  )
  return Drawing(fig, caption, s.stability.runs)
