"""Does the law hold: its residuals, and the rollout."""

import numpy as np
import pandas as pd
from scipy import stats

from ..conventions import PARAMS
from ..study import Study
from .draw import WIDE, Drawing, figure, legend, log_axis, looks


def residual_panels(s: Study) -> Drawing | str:
  """Log residuals of the joint fit against N, D and C, and their normal quantiles."""
  if s.residuals.empty:
    return 'Residual panels: no law was fitted.'
  style, residual = looks(s.arms), s.residuals['residual_percent']
  with figure(WIDE, 5.0, nrows=2, ncols=2) as (fig, axes):
    labels = {'N': PARAMS[s.params], 'D': 'training tokens', 'C': 'training FLOPs'}
    for ax, (name, label) in zip(axes.flat, labels.items(), strict=False):
      for arm, own in s.residuals.groupby('arm', sort=False):
        look = style[arm]
        ax.plot(own[name], own['residual_percent'], look['marker'], color=look['color'], label=arm, ms=4)
      ax.axhline(0, color='#000000', lw=0.8)
      log_axis(ax, label)
      ax.set_ylabel('measured - fitted (%)')
    quantile, ordered = stats.probplot(residual, fit=False)
    axes.flat[3].plot(quantile, ordered, 'k.')
    axes.flat[3].axline((0, 0), slope=float(np.std(residual.to_numpy())), color='#7F7F7F', lw=0.8)
    axes.flat[3].set(xlabel='normal quantile', ylabel='measured - fitted (%)')
    legend(fig, axes.flat[0])
  caption = (
    'Residuals of the joint fit, and their normal quantiles. A trend along an axis means that the law does '
    'not hold.'
  )
  return Drawing(fig, caption, s.residuals)


def rollout_plot(s: Study) -> Drawing | str:
  """Held-out error of fits to the k smallest sizes."""
  done = [step for step in s.rollout if step.problem is None]
  if not done:
    return 'Rollout: too few sizes to fit the small ones and predict the large ones.'
  with figure() as (fig, ax):
    k = [step.sizes_fitted for step in done]
    ax.plot(k, [100 * step.held_out_error for step in done], 'o-', label='held-out sizes')
    ax.plot(k, [100 * step.in_sample_error for step in done], 's--', label='fitted sizes')
    ax.set_xticks(k)
    ax.set_ylim(bottom=0)
    ax.set(xlabel='sizes fitted (smallest first)', ylabel='mean |error| (% of loss)')
    legend(fig, ax)
  caption = 'Rollout: the law fitted to the k smallest sizes predicts the larger ones.'
  left = [str(step.sizes_fitted) for step in s.rollout if step.problem is not None]
  if left:
    caption += f' No fit: k = {", ".join(left)} (the reasons are in the table).'
  return Drawing(fig, caption, pd.DataFrame([vars(step) for step in s.rollout]))
