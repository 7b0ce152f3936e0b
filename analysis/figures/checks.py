"""Does the law hold: its residuals, and the rollout."""

import numpy as np
import pandas as pd
from scipy import stats

from ..conventions import PARAMS
from ..study import Study
from . import grids
from .draw import WIDE, Drawing, by_arm, explain, figure, hollow, legend, log_axis, looks


def residual_panels(s: Study) -> Drawing | str | None:
  """Log residuals of the joint fit against N, D and C, and their normal quantiles."""
  if not grids.sizes(s):
    return None
  if s.residuals.empty:
    return 'Residual panels: no law was fitted.'
  style, residual = looks(s.arms), s.residuals['residual_percent']
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    labels = {'N': PARAMS[s.params], 'D': 'training tokens', 'C': 'training FLOPs'}
    for ax, (name, label) in zip(axes.flat, labels.items(), strict=False):
      for arm, own in by_arm(s.residuals, s.arms):
        ax.plot(own[name], own['residual_percent'], **hollow(style[arm]), label=arm)
      ax.axhline(0, color='#000000', lw=0.8)
      log_axis(ax, label)
      ax.set_ylabel('measured - fitted (%)')
    quantile, ordered = stats.probplot(residual, fit=False)
    normal = {'color': '#7F7F7F', 'linestyle': '-', 'linewidth': 0.8}
    axes.flat[3].plot(quantile, ordered, 'k.')
    axes.flat[3].axline((0, 0), slope=float(np.std(residual.to_numpy())), **normal)
    explain(axes.flat[0], 'all arms', marker='.', color='#000000')
    explain(axes.flat[0], 'a normal distribution', **normal)
    axes.flat[3].set(xlabel='normal quantile', ylabel='measured - fitted (%)')
    legend(fig, axes.flat[0])
  caption = (
    'Residuals of the joint fit, and their normal quantiles. A trend along an axis means that the law does '
    'not hold.'
  )
  return Drawing(fig, caption, s.residuals)


def rollout_plot(s: Study) -> Drawing | str | None:
  """Held-out error of fits to the k smallest sizes."""
  if not grids.sizes(s):
    return None
  done = [step for step in s.rollout if step.problem is None]
  if not done:
    return 'Rollout: too few sizes to fit the small ones and predict the large ones.'
  with figure() as (fig, ax):
    k = [step.sizes_fitted for step in done]
    joined = len(k) > 2  # a line through two points would say how the error goes on
    for errors, mark, dash, label in (
      ([step.held_out_error for step in done], 'o', '-', 'held-out sizes'),
      ([step.in_sample_error for step in done], 's', '--', 'fitted sizes'),
    ):
      look = {'marker': mark, 'linestyle': dash if joined else 'none', 'color': '#333333'}
      face = look['color'] if mark == 'o' else 'none'
      ax.plot(k, 100 * np.array(errors), **look, markerfacecolor=face, label=label)
    ax.set_xlim(k[0] - 0.5, k[-1] + 0.5)
    ax.set_xticks(k)
    ax.set_ylim(bottom=0)
    ax.set(xlabel='sizes fitted (smallest first)', ylabel='mean |error| (% of loss)')
    legend(fig, ax)
  caption = 'Rollout: the law fitted to the k smallest sizes predicts the larger ones.'
  left = [str(step.sizes_fitted) for step in s.rollout if step.problem is not None]
  if left:
    caption += f' No fit: k = {", ".join(left)} (the reasons are in the table).'
  return Drawing(fig, caption, pd.DataFrame([vars(step) for step in s.rollout]))
