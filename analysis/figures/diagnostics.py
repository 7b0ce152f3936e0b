"""Mixing or identity, and how much rank: a figure by sublayer and one over training for each question.

Where: Study -> here -> catalogue.py. Which quantities, and what they are read against: ../diagnostics.py.
"""

import math
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from ..diagnostics import FULL, IDENTITY, QUESTIONS, RESIDUAL, UNIFORM, Quantity, averaged
from ..study import Study
from ..training import mean_curve
from .draw import Drawing, legend, looks, mark_ends, panels, power_of_ten
from .training import place

REFERENCES = {IDENTITY: '--', UNIFORM: ':', FULL: '--', RESIDUAL: ':'}
WORDS = {
  'mixing': '‖ ‖: Frobenius norm, H: H_res. H = I has ‖H - I‖ = 0 and |λ₂| = σ_min = 1; uniform mixing, '
  'H = J/n, has ‖H - J/n‖ = 0 and |λ₂| = σ_min = 0; the two are √(n - 1) apart. Product: of H_res of all '
  'sublayers up to this one. No line at 0 where a log axis ends above.',
  'constraint': 'A doubly stochastic H_res has errors 0 (largest |sum - 1| of the token mean of H_res). '
  "Defect: largest violation at any token of the arm's own set, always 0 for an arm without a constraint. At "
  'bounds: share of weights within 1 % of them.',
  'rank': 'Effective rank: exp of the entropy of the singular values. Streams: 1 if all are copies of one '
  '(cosine 1). Depth: of the matrix of what each sublayer reads of each earlier one.',
}
MOST_MARKERS = 15


def by_layer(s: Study, question: str) -> Drawing | str:
  """Last logged values by sublayer, seeds thin and their mean; one number per model as points by arm."""
  shown = s.diagnostics.logged(question)
  if not shown:
    return _absent(question)
  table = s.diagnostics.by_layer
  table = table[table['quantity'].isin([q.name for q in shown])]
  with panels(len(shown), height=1.75) as (fig, axes):
    for ax, q in zip(axes, shown, strict=True):
      own = table[table['quantity'] == q.name]
      ends = (_profiles if own['sublayer'].notna().all() else _points)(ax, q, own, looks(s.arms))
      _finish(ax, q, own, ['value'], _references(ax, s, q), ends)
    legend(fig, *axes)
  caption = (
    f'{QUESTIONS[question]} By sublayer (attention, feed-forward, ...), last logged value, '
    f'{_caption(s, question, shown)}'
  )
  return Drawing(fig, caption, table)


def over_training(s: Study, question: str) -> Drawing | str:
  """Means over sublayers by tokens, seeds thin and their mean, in a band to the extreme sublayer."""
  shown = s.diagnostics.logged(question)
  table = s.diagnostics.over_training
  if not shown or table['tokens'].nunique() < 2:
    return _absent(question)
  table = table[table['quantity'].isin([q.name for q in shown])]
  with panels(len(shown), height=1.75) as (fig, axes):
    for ax, q in zip(axes, shown, strict=True):
      own = table[table['quantity'] == q.name]
      ends = [end for arm, runs in own.groupby('arm', sort=False) for end in _curves(ax, q, arm, runs, s)]
      _finish(ax, q, own, ['value', 'worst'], _references(ax, s, q), ends)
      ax.xaxis.set_major_formatter(EngFormatter(sep=''))
      ax.set_xlabel('training tokens')
    legend(fig, *axes)
  banded = set(table.loc[table['worst'].notna(), 'quantity'])
  lowest = ', '.join(q.label for q in shown if q.worst == 'min' and q.name in banded)
  caption = (
    f'{QUESTIONS[question]} Mean over sublayers (of the product: that of all of them) in a band '
    f'to the sublayer with the largest value{f" (smallest: {lowest})" if lowest else ""}; '
    f'{_caption(s, question, shown)}'
  )
  return Drawing(fig, caption, table)


def _absent(question: str) -> str:
  return f'{QUESTIONS[question]} No run of several streams logged it.'


def _caption(s: Study, question: str, shown: list[Quantity]) -> str:
  log = ' ≤: 0, and what is smaller still, is drawn there.' if any(q.floor for q in shown) else ''
  return (
    f'mean over tokens; seeds thin, thick: mean of those that did not diverge. {WORDS[question]}{log} '
    f'Arms of one stream have no H_res; {place(s)}.'
  )


def _shown(q: Quantity, values: pd.Series | pd.DataFrame | list[float]) -> np.ndarray:
  """Values as a log axis can hold them."""
  values = np.asarray(values, float)
  return values if q.floor is None else np.where(np.isfinite(values), np.maximum(values, q.floor), np.nan)


def _references(ax: Axes, s: Study, q: Quantity) -> list[float]:
  """Draws what the quantity is read against; returns the heights."""
  heights = []
  for word, values in s.diagnostics.references(q).items():
    for y in _shown(q, values):
      ax.axhline(y, color='#7F7F7F', lw=0.9, ls=REFERENCES[word], label=word, zorder=1)
      heights.append(float(y))
  return heights


def _profiles(
  ax: Axes, q: Quantity, table: pd.DataFrame, style: dict[str, dict]
) -> list[tuple[float, float]]:
  """Lines by sublayer; returns the ends of diverged runs."""
  ends = []
  for arm, own in table.groupby('arm', sort=False):
    line = {name: style[arm][name] for name in ('color', 'linestyle')}
    for _, run in own.groupby('run_id') if own['run_id'].nunique() > 1 else ():
      ax.plot(run['sublayer'], _shown(q, run['value']), **line, lw=0.5, alpha=0.4)
    mean = averaged(own).groupby('sublayer')['value'].mean()
    ax.plot(mean.index, _shown(q, mean), **{'linewidth': 1.1} | style[arm], ms=3, label=arm)
    ends += _ends(q, own, 'sublayer')
  ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
  ax.set_xlabel('sublayer')
  return ends


def _ends(q: Quantity, own: pd.DataFrame, against: str) -> list[tuple[float, float]]:
  """Where each diverged run of an arm was last known."""
  known = own[(own['state'] == 'diverged') & own['value'].notna()].sort_values(against)
  last = known.groupby('run_id').tail(1)
  return list(zip(last[against], _shown(q, last['value']), strict=True))


def _points(ax: Axes, q: Quantity, table: pd.DataFrame, style: dict[str, dict]) -> list[tuple[float, float]]:
  """A value per run at its arm; returns those of diverged runs."""
  ends = []
  for k, (arm, own) in enumerate(table.groupby('arm', sort=False)):
    look = style[arm] | {'linestyle': 'none'}
    if len(own) > 1:
      ax.plot([k] * len(own), _shown(q, own['value']), **look, ms=2.5, alpha=0.4)
    ax.plot(k, _shown(q, [averaged(own)['value'].mean()])[0], **look, ms=5, label=arm)
    ends += _ends(q, own.assign(at=k), 'at')
  ax.set(xticks=[], xlim=(-0.6, table['arm'].nunique() - 0.4), xlabel='arm, in order of legend')
  return ends


def _curves(ax: Axes, q: Quantity, arm: str, table: pd.DataFrame, s: Study) -> list[tuple[float, float]]:
  """One arm's curves by tokens; returns the ends of diverged runs."""
  look = looks(s.arms)[arm]
  line = {name: look[name] for name in ('color', 'linestyle')}
  several = table['run_id'].nunique() > 1
  for _, run in table.groupby('run_id') if several else ():
    ax.plot(run['tokens'], _shown(q, run['value']), **line, lw=0.5, alpha=0.4)
  runs = [run for _, run in averaged(table).groupby('run_id')]
  x, mean = mean_curve([(run['tokens'].to_numpy(), run['value'].to_numpy()) for run in runs])
  marker = {'markersize': 3} if len(x) <= MOST_MARKERS else {'marker': ''}
  ax.plot(x, _shown(q, mean), **{'linewidth': 1.1} | look | marker, label=arm)
  if table['worst'].notna().any():
    _, worst = mean_curve([(run['tokens'].to_numpy(), run['worst'].to_numpy()) for run in runs])
    ax.fill_between(x, _shown(q, mean), _shown(q, worst), color=look['color'], alpha=0.12, lw=0)
  return _ends(q, table, 'tokens')


def _finish(ax: Axes, q: Quantity, own: pd.DataFrame, columns: list[str], heights: list, ends: list) -> None:
  """Title, scale by the values of runs that did not diverge, crosses at the ends of the others.

  heights: of the lines, which a linear axis shows too.
  """
  ax.set_title(q.label, fontsize=7.5)
  ax.xaxis.label.set_size(7.5)
  ax.tick_params(labelsize=7)
  drawn = _shown(q, averaged(own)[columns])
  drawn = drawn[np.isfinite(drawn)]
  if not len(drawn):  # products of a run that diverged at once
    return
  if q.floor is not None and drawn.max() > 10 * drawn.min():
    _log(ax, q.floor, drawn.min(), drawn.max())
  else:
    low, high = min([drawn.min(), *heights]), max([drawn.max(), *heights])
    more = 0.08 * (high - low) if high - low > 1e-3 else 0.05
    ax.set_ylim(low - more, high + more)
  mark_ends(ax, ends)


def _log(ax: Axes, floor: float, low: float, high: float) -> None:
  """A log axis with at most five ticks at whole powers of ten; that of the floor says so."""
  ax.set_yscale('log')
  first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
  powers = range(first, last + 1, max(1, math.ceil((last - first) / 4)))
  ax.yaxis.set_major_locator(FixedLocator([10.0**k for k in powers]))
  ax.yaxis.set_minor_locator(NullLocator())
  ax.yaxis.set_major_formatter(
    FuncFormatter(lambda y, _: ('≤ ' if y <= floor * 1.001 else '') + power_of_ten(y))
  )
  ax.set_ylim(10.0 ** (first - 0.15), max(10.0**0.15 * high, 10.0 ** (last - 0.5)))


FIGURES = {
  f'{question}_{kind}': partial(draw, question=question)
  for question in QUESTIONS
  for kind, draw in (('by_layer', by_layer), ('over_training', over_training))
}
