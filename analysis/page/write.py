"""The report as one self-contained HTML file: summary, law, figures, comparisons, exclusions.

Where: the end of the main path; Study and the drawn panels -> index.html. Only words and layout
here: every number comes from study.py.
"""

import math
from pathlib import Path

from ..figures.draw import Panel
from ..fitting.intervals import residual_variance
from ..multipliers import Multiplier
from ..selection import AXIS_LABEL
from ..study import Study
from .html import Raw, bullets, figures, loss, number, paragraph, span, table, text, warning
from .record import excluded, interactive, method, run_table, setting
from .results import checks, gain_words, gap_table, rates, result_tables

HERE = Path(__file__).parent


METHODS = {
  'delta': 'delta method',
  'case_bootstrap': 'bootstrap of runs',
  'cluster_bootstrap': 'bootstrap of paired groups',
}


def write_page(s: Study, panels: list[Panel], absent: list[str], folder: Path, command: str) -> Path:
  """Writes folder/index.html and returns its path."""
  by_name = {panel.name: panel for panel in panels}

  def shown(*names: str) -> Raw:
    return figures([by_name[name] for name in names if name in by_name], folder)

  ranks = [f'loss_vs_{axis}' for axis in AXIS_LABEL]
  compute = ('loss_vs_flops', 'loss_at_equal_flops', 'compute_multiplier', 'paper_compute')
  rate_names = ('learning_rate', 'learning_rate_sensitivity')
  layers = shown('paper_gains', 'paper_heat_maps')
  sections = [
    ('summary', 'Summary', summary(s)),
    ('compute', 'Loss against compute', shown(*compute) + law(s)),
    (
      'gap',
      f'Gap to {s.reference or "the reference"}',
      shown('paper_gap_flops', 'paper_gap_tokens') + gap_table(s),
    ),
    ('tables', 'Final losses', result_tables(s)),
    ('shape', 'Width and depth', shown('loss_vs_width', 'loss_vs_depth')),
    ('isoflop', 'Best size at a budget', shown('paper_isoflop', 'paper_optimal_sizes')),
    ('rank', 'Manifold rank', shown(*ranks)),
    ('rates', 'Learning rates', shown(*rate_names) + rates(s)),
    ('stability', 'Stability', shown('paper_stability')),
    ('gains', 'Gains by layer', layers and gain_words(s) + layers),
    ('training', 'Training curves', shown('training_loss', 'paper_over_training') + interactive(s)),
    ('checks', 'Does the law hold?', shown('paper_residuals', 'rollout') + checks(s)),
    ('excluded', 'Runs left out', excluded(s)),
    ('missing', 'Figures left out', bullets(absent) if absent else ''),
    ('runs', 'All runs', run_table(s)),
    ('setting', 'Configuration and versions', setting(s)),
    ('method', 'Method', method(s, command)),
  ]
  sections = [item for item in sections if item[2]]
  contents = ''.join(f'<li><a href="#{key}">{text(title)}</a></li>' for key, title, _ in sections)
  body = ''.join(
    f'<section id={key}><h2>{text(title)}</h2>{inside}</section>' for key, title, inside in sections
  )
  counted = ', '.join(f'{count} {state}' for state, count in s.table['state'].value_counts().items())
  page = (
    '<!doctype html><html lang=en><head><meta charset=utf-8>'
    '<meta name=viewport content="width=device-width, initial-scale=1">'
    f'<title>Scaling report: {text(s.sweep.name)}</title>'
    f'<style>{(HERE / "page.css").read_text()}</style></head><body><main>'
    f'<h1>Scaling report: {text(s.sweep.name)}</h1>'
    f'<p class=sub>{len(s.table)} planned runs: {text(counted)}.</p>'
    f'{bullets(headline_text(s))}{warning(s.sweep.warnings, "Warnings")}'
    f'<nav aria-label=Contents><ol>{contents}</ol></nav>{body}</main></body></html>\n'
  )
  (folder / 'index.html').write_text(page)
  return folder / 'index.html'


def multiplier_words(m: Multiplier) -> str:
  """m with its interval, or the reason why there is none."""
  if m.flops is None:
    return m.problem or ''
  return f'{m.flops:.3f} [{m.flops_interval[0]:.3f}, {m.flops_interval[1]:.3f}]'


def headline_text(s: Study) -> list[str]:
  """What the sweep found, in one sentence per arm."""
  shown = [m for m in s.multipliers if m.flops is not None]
  if not shown:
    return [s.choice.reason if s.fit is None else _no_multiplier(s)]
  words = []
  for m in shown:
    low, high = m.flops_interval
    verdict = 'saves compute' if low > 1 else 'costs compute' if high < 1 else 'undecided'
    words.append(
      f'{m.arm}: {s.reference} needs {m.flops:.2f} times the compute for equal loss '
      f'(95 % {low:.2f} to {high:.2f}; {verdict})'
      + ('.' if m.equal_tokens is None else f'; at equal size and tokens {_with_ends(m, "equal_tokens", 2)}.')
    )
  return words


def _with_ends(m: Multiplier, name: str, digits: int) -> str:
  value, ends = getattr(m, name), getattr(m, f'{name}_interval')
  if value is None:
    return getattr(m, f'{name}_problem')
  return f'{value:.{digits}f} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})'


def _no_multiplier(s: Study) -> str:
  if s.multipliers:
    return f'Compute multipliers: {s.multipliers[0].problem}.'
  return f'One arm ({s.reference}) has finished runs, so there is nothing to compare it with.'


def summary(s: Study) -> Raw:
  """One row per arm."""
  m_of = {m.arm: m for m in s.multipliers}
  rows = []
  for arm, own in s.table.groupby('arm', sort=False):
    grid = own[own['paired']]
    row = [arm, _multiplier_cell(s, arm, m_of.get(arm))]
    if len(grid):
      largest = grid[grid['size'] == grid.loc[grid['flops'].idxmax(), 'size']]
      largest = largest[largest['flops'] > 0.9 * largest['flops'].max()]
      row += [loss(largest['validation_loss'].mean()), number(largest['flops'].mean(), 3)]
      row += [largest['size'].iloc[0], largest['seed'].nunique()]
    else:
      row += ['–', '–', '–', 0]
    done, planned = int((own['state'] == 'finished').sum()), len(own)
    row += [f'{done} of {planned}', int((own['state'] == 'diverged').sum())]
    rows.append(row)
  head = ['arm', 'compute multiplier m [95 %]', 'loss at largest compute', 'FLOPs there']
  head += ['size (width x depth)', 'seeds there', 'finished', 'diverged']
  return table(head, rows, left=(0, 1)) + paragraph(
    'Loss: validation, nats per token, mean over seeds. m: FLOPs that the reference needs, over '
    'those of the arm, for equal loss; above 1 the arm saves compute.',
    '' if s.seed_spread is None else f'Spread between seeds: {s.seed_spread:.3f} nats (standard deviation).',
  )


def _multiplier_cell(s: Study, arm: str, m: Multiplier | None) -> str:
  if m is not None:
    return multiplier_words(m) if m.flops is not None else f'none: {m.problem}'
  if s.fit is None:
    return 'none: no law fitted'
  return '1 (reference)' if arm == s.reference else 'none: not in the law'


def law(s: Study) -> Raw:
  """The fitted law with its numbers, or why there is none."""
  out = paragraph(s.choice.reason)
  if s.document is None:
    return out
  doc = s.document
  names = list(doc['intervals'])
  methods = list(doc['intervals_by_method'])
  rows = []
  for name in names:
    if name in doc['verdicts']:
      rows.append([name, doc['verdicts'][name]] + [''] * len(methods))
      continue
    ends = [span(doc['intervals_by_method'][method][name]) for method in methods]
    rows.append([name, number(doc[name]), *ends])
  head = ['parameter', 'value', *(f'95 %, {METHODS[method]}' for method in methods)]
  out += paragraph(
    f'Joint fit of all arms: {doc["formula"]}, where an arm multiplies '
    + ('C by m' if doc['law'] == 'compute' else 'N and D by the square root of m each')
    + f' and shares everything else. {doc["n_points"]} runs, {len(names)} parameters.',
    f'Quoted intervals: {METHODS[doc["interval_method"]]}. Scores of paired runs '
    f'correlate by {doc["within_cluster_correlation"]:.2f}.',
    f'Caveat: {doc["caveat"]}.' if doc['caveat'] else '',
  )
  out += paragraph(lack_of_fit(s))
  out += table(head, rows, left=(0,))
  if 'E' in doc['verdicts']:
    out += paragraph(
      'E is not identified: inside the measured range the curve is as good as a law without a floor, so it '
      'is not drawn or used beyond it, and the exponent is that of this range.'
    )
  out += warning([*doc['flags'], *doc['doubts']], 'The fit itself warns')
  out += currencies(s)
  return out


def lack_of_fit(s: Study) -> str:
  """How far the law misses the runs, against how far seeds differ."""
  missed = math.sqrt(residual_variance(s.fit))
  if s.seed_spread is None:
    return (
      f'Runs scatter about the fit by {100 * missed:.2f} % of the loss; no size has two seeds to compare.'
    )
  seeds = s.seed_spread / float(s.fit.points.loss.mean())
  out = f'Runs scatter about the fit by {100 * missed:.2f} % of the loss, seeds by {100 * seeds:.2f} %.'
  if missed > 1.5 * seeds:
    out += ' The law misses more than seeds explain: sizes differ by more than their compute.'
  return out


def currencies(s: Study) -> Raw:
  """The multipliers in FLOPs, equal tokens, and seconds."""
  shown = [m for m in s.multipliers if m.flops is not None]
  if not shown:
    return Raw('')
  names = ('flops', 'equal_tokens', 'seconds')
  rows = [[m.arm, *(_with_ends(m, name, 3) for name in names)] for m in shown]
  return (
    Raw('<h3>The multiplier in three currencies</h3>')
    + table(['arm', 'equal FLOPs', 'equal size and tokens', 'equal seconds'], rows, wide=(2, 3))
    + paragraph(
      'FLOPs count the hyper-connection terms. Equal size and tokens ignores their cost; equal '
      'seconds uses the training speeds measured on this hardware, by arm and size. Each is a fit of its own '
      '(of L(N, D), the costs at the largest common size convert). In brackets: 95 %.'
    )
  )
