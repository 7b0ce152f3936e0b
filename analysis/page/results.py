"""The result sections of the report page: gaps, tables of losses, ranks, learning rates, checks of the law.

Where: beside page.py, which puts them in order. Only words and layout: every number comes from study.py.
"""

import math

import pandas as pd

from ..alternatives import Alternative
from ..study import Study
from ..tables import ablation, final_losses
from .html import Raw, big, folded, loss, number, paragraph, span, table, text


def gap_table(s: Study) -> Raw:
  """Paired gaps by size."""
  if not s.gaps:
    return Raw('')
  rows = [
    [
      g.arm,
      g.size,
      number(math.exp(g.log_flops), 3),
      g.pairs,
      f'{g.difference:+.4f}',
      '–' if g.low is None else f'[{g.low:+.4f}, {g.high:+.4f}]',
      f'{100 * g.ratio:.2f} %',
      f'{g.tokens_ratio:.3f}',
      f'{g.flops_ratio:.3f}',
    ]
    for g in s.gaps
  ]
  head = ['arm', 'size', 'FLOPs', 'pairs', 'gap (nats)', '95 %', 'ratio']
  head += ['tokens / reference', 'FLOPs / reference']
  return folded('Gaps as a table', table(head, rows, left=(0, 1)))


def rates(s: Study) -> Raw:
  """Optimal learning rates and sensitivities."""
  if not s.rates:
    return Raw('')
  rows = []
  for r in s.rates:
    span_of = f'{r.losses.index.min():g} to {r.losses.index.max():g}'
    found = (number(r.best, 3), loss(r.sensitivity), r.problem or 'inside the grid')
    rows.append([r.arm, r.size, r.budget or '–', span_of, len(r.losses), *found])
  head = [
    'arm',
    'size',
    'budget',
    'range',
    'rates tried',
    'best rate',
    'sensitivity (nats)',
    'the optimum is',
  ]
  return table(head, rows, left=(0, 1, 2, 3, 7)) + paragraph(
    'Best rate: interpolated in log rate; an optimum at the edge of the grid is not one: widen the grid. '
    'Sensitivity: mean of min(loss, loss at the start) - best loss over rates drawn log-uniformly from the '
    'range.'
  )


def result_tables(s: Study) -> Raw:
  """What each map is worth at one size (mHC's Table 1), and all final losses."""
  out, found = Raw(''), ablation(s)
  if len(found):
    head = ['arm', 'H_res', 'H_pre', 'H_post', 'gap to ' + s.reference, '95 %', 'loss', 'bits per byte']
    rows = []
    for _, r in found.iterrows():
      ends = (loss(r['validation_loss']), loss(r['bits_per_byte']))
      rows.append([r['arm'], *(r[k] or '–' for k in ('H_res', 'H_pre', 'H_post')), *_gap_cells(r), *ends])
    out += Raw(f'<h3>What each map is worth, at {text(found["size"].iloc[0])}</h3>')
    out += table(head, rows, left=(0, 1, 2, 3))
  rows = []
  for _, r in final_losses(s).iterrows():
    ends = [loss(r[k]) for k in ('validation_loss', 'standard_deviation', 'bits_per_byte')]
    costs = (big(r['tokens']), number(r['flops'], 3), r['seeds'], r['diverged'])
    rows.append([r['arm'], r['size'], *costs, *ends, *_gap_cells(r)])
  if not rows:
    return out
  head = ['arm', 'size', 'tokens', 'FLOPs', 'seeds', 'diverged', 'loss', 'deviation', 'bits per byte']
  head += ['gap', '95 %']
  return out + Raw('<h3>By arm and size</h3>') + table(head, rows, left=(0, 1))


def _gap_cells(row: pd.Series) -> list[str]:
  """The paired gap and its interval."""
  if pd.isna(row['difference']):
    return ['diverged' if row['diverged'] and not row['seeds'] else '–', '–']
  ends = '–' if pd.isna(row['low']) else f'[{row["low"]:+.4f}, {row["high"]:+.4f}]'
  return [f'{row["difference"]:+.4f}', ends]


def gain_words(s: Study) -> Raw:
  """What the gains mean."""
  return paragraph(
    'Amax gain of the residual maps H_res, last logged value on one fixed validation sequence: 1 '
    'keeps the size of the streams; the product over sublayers shows whether they blow up.'
  )


def checks(s: Study) -> Raw:
  """Nested models, rollout and other choices as tables."""
  out = Raw('')
  if s.nested:
    rows = [
      [
        c.name,
        c.parameters,
        _percent(c.in_sample_error),
        _percent(c.held_out_error),
        _percent(c.left_out_error),
        '–' if c.f_statistic is None else f'{c.f_statistic:.2f} {c.degrees}',
        '–' if c.p_value is None else number(c.p_value, 2),
      ]
      for c in s.nested
    ]
    head = ['arm model', 'parameters', 'fitted error', 'largest size held out']
    head += ['each size held out', 'clustered F (degrees)', 'p against the simpler']
    out += Raw('<h3>Do arms differ, and only by a multiplier?</h3>') + table(head, rows)
  if s.rollout:
    rows = [
      [
        f'{r.sizes_fitted} smallest',
        number(r.extrapolation, 2),
        _percent(r.in_sample_error),
        _percent(r.held_out_error),
        _percent(r.bias, '+'),
        f'{100 * r.coverage:.0f} % of {r.runs_held_out}' if r.problem is None else f'no fit: {r.problem}',
      ]
      for r in s.rollout
    ]
    head = ['fitted sizes', 'extrapolation by', 'fitted error', 'held-out error', 'bias']
    head += ['inside the 95 % band of a new run']
    out += Raw('<h3>Rollout</h3>') + table(head, rows)
  if s.alternatives:
    rows = []
    for a in s.alternatives:
      errors = map(_percent, (a.in_sample_error, a.held_out_error, a.left_out_error))
      rows.append([a.law, a.parameters or '–', *errors, _exponents(a)])
    head = ['law', 'parameters', 'fitted error', 'largest size held out', 'each size held out', 'exponents']
    out += Raw('<h3>Other laws</h3>') + table(head, rows, left=(0,), wide=(5,))
  if s.sensitivity:
    names = [k for k in s.sensitivity[0] if k != 'choice']
    rows = [[r['choice'], *(number(r[k]) for k in names)] for r in s.sensitivity]
    out += Raw('<h3>Other losses and conventions</h3>') + table(['choice', *names], rows)
  return out


def _exponents(a: Alternative) -> str:
  """The formula with its exponents, or why the grid cannot carry the law."""
  if a.problem:
    return f'{a.formula}: {a.problem}'
  return f'{a.formula}: ' + ', '.join(
    f'{name} {found}' if isinstance(found, str) else f'{name} = {found[0]:.2f} {span(found[1], 2)}'
    for name, found in a.exponents.items()
  )


def _percent(value: float | None, sign: str = '') -> str:
  return '–' if value is None else f'{100 * value:{sign}.2f} %'
