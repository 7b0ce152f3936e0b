"""Figures of the loss against model width, depth and each manifold rank, with the fitted exponents.

Where: Study -> here -> catalogue.py. A figure whose data are absent is the sentence that says so.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from ..conventions import AXIS_LABEL
from ..fitting.laws import LAWS
from ..ranks import RankSweep, exponent_words
from ..study import Study
from . import grids
from .draw import Drawing, by_arm, explain, figure, legend, looks, variant


def _plain_log2(ax: Axes, values: list) -> None:
  """A log axis whose ticks are the values that occur."""
  ax.set_xscale('log', base=2)
  ax.set_xticks(sorted(set(values)))
  ax.xaxis.set_major_formatter(ScalarFormatter())
  ax.xaxis.set_minor_locator(LogLocator(subs=()))
  ax.xaxis.set_minor_formatter(NullFormatter())


def _shape_plot(s: Study, name: str, other: str) -> Drawing | str | None:
  runs = s.grid
  if not grids.several(s, name):
    return None
  if not len(runs) or runs[name].nunique() < 2:
    return f'Loss against {name}: the finished runs have one {name}.'
  style, rows = looks(s.arms), []
  with figure() as (fig, ax):
    for arm, own in by_arm(runs, s.arms):
      for (fixed, _), line in own.groupby([other, 'duration']):
        mean = line.groupby(name)['validation_loss'].mean()
        ax.plot(mean.index, mean, **style[arm], markerfacecolor='none', label=arm)
        if arm == s.reference and runs[other].nunique() > 1:
          at = (mean.index[-1], mean.iloc[-1])
          small = {'xytext': (5, 2), 'textcoords': 'offset points', 'fontsize': 7, 'color': '#444444'}
          ax.annotate(f'{other} {fixed:.0f}', at, **small)
      rows += own[['arm', 'run_id', 'seed', name, other, 'flops', 'validation_loss']].to_dict('records')
    _plain_log2(ax, runs[name])
    ax.margins(x=0.12)
    ax.set(xlabel=f'{name} of the model', ylabel='validation loss (nats per token)')
    legend(fig, ax)
  exponent, words = _exponent(s, {'width': 'W', 'depth': 'H'}[name])
  caption = f'Loss against {name}, mean over seeds; lines join runs of equal {other} and budget. {words}'
  table = pd.concat([pd.DataFrame(rows).assign(kind='run'), pd.DataFrame([{'kind': 'exponent'} | exponent])])
  return Drawing(fig, caption, table)


def _exponent(s: Study, covariate: str) -> tuple[dict[str, object], str]:
  """The exponent of width or depth in L = E + A W^-alpha + ..., as numbers and as a sentence."""
  shape = next((a for a in s.alternatives if a.law == 'width_depth'), None)
  problem = s.choice.reason if shape is None else shape.problem
  term = next(t for t in LAWS['width_depth'].terms if t.covariates[0][0] == covariate)
  exponent = (shape.exponents if shape and not problem else {}).get(term.exponent, problem)
  if isinstance(exponent, tuple):
    value, (low, high) = exponent
    words = (
      f'Fitted over all runs: {shape.formula} {term.exponent} = {value:.2f} (95 % {low:.2f} to {high:.2f}).'
    )
    return {'exponent': value, 'low': low, 'high': high, 'law': shape.formula}, words
  reason = (exponent or 'the grid cannot tell its term').removeprefix('not identified: ').rstrip('.')
  tried = f' ({shape.formula})' if shape and not problem else ''
  return {'problem': reason}, f'No exponent{tried}: {reason[:1].lower()}{reason[1:]}.'


def loss_vs_width(s: Study) -> Drawing | str | None:
  """Loss against model width, lines at equal depth."""
  return _shape_plot(s, 'width', 'depth')


def loss_vs_depth(s: Study) -> Drawing | str | None:
  """Loss against model depth, lines at equal width."""
  return _shape_plot(s, 'depth', 'width')


def rank_plot(s: Study, axis: str) -> Drawing | str | None:
  """Loss against one manifold rank, with the full-rank and residual models as levels."""
  if not grids.axis(s, axis):
    return None
  sweeps = [r for r in s.ranks if r.axis == axis]
  if not sweeps:
    return f'Loss against the {AXIS_LABEL[axis]}: fewer than two values have finished.'
  style, rows, seen = looks(s.arms), [], []
  with figure() as (fig, ax):
    for r in sweeps:
      look = variant(style[r.arm], seen.count(r.arm))
      seen.append(r.arm)
      rows += _draw_rank(ax, s, r, look)
    if s.seed_spread is not None:
      explain(ax, 'one standard error', marker='|', markersize=9)
    _plain_log2(ax, [v for r in sweeps for v in r.rows['rank']])
    ax.set(xlabel=AXIS_LABEL[axis], ylabel='validation loss (nats per token)')
    legend(fig, ax)
  caption = f'Loss against the {AXIS_LABEL[axis]}, each line at one size, mean over seeds.'
  if s.seed_spread is not None:
    caption += f' Bars: one standard error, from the spread between seeds ({s.seed_spread:.3f} nats).'
  for r in sweeps:
    caption += f' {r.arm}, {r.size}: {exponent_words(r.exponent)}'
  return Drawing(fig, caption, pd.DataFrame(rows))


def _draw_rank(ax: Axes, s: Study, r: RankSweep, look: dict[str, str]) -> list[dict]:
  """One line with its levels; returns the numbers of both, and of the exponent."""
  mean = r.means
  ax.plot(mean['rank'], mean['validation_loss'], **look, label=f'{r.arm}, {r.size}')
  if s.seed_spread is not None:
    bar = {'yerr': mean['standard_error'], 'fmt': 'none', 'color': look['color'], 'lw': 0.9}
    ax.errorbar(mean['rank'], mean['validation_loss'], **bar)
  levels = [('full', f'{r.arm}, full rank', r.full, look['color'])]
  levels.append(('reference', s.reference, r.reference, '#000000'))
  columns = ['run_id', 'seed', 'rank', 'tokens', 'flops', 'validation_loss']
  rows = [{'kind': 'run'} | row for row in r.rows.reindex(columns=columns).to_dict('records')]
  rows += [{'kind': 'mean'} | row for row in mean.to_dict('records')]
  for (kind, label, level, colour), dash in zip(levels, (':', (0, (5, 1))), strict=True):
    if len(level):
      ax.axhline(level['validation_loss'].mean(), color=colour, ls=dash, lw=1.1, label=label)
      own = level.reindex(columns=columns).assign(rank=None)
      rows += [{'kind': kind} | row for row in own.to_dict('records')]
  e = r.exponent
  low, high = e.interval or (None, None)
  rows.append(
    {'kind': 'exponent', 'form': e.form, 'phi': e.phi, 'low': low, 'high': high, 'problem': e.problem}
  )
  return [{'arm': r.arm, 'size': r.size} | row for row in rows]
