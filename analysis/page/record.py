"""The record part of the report page: runs, exclusions, configuration, method, zoomable curves.

Where: beside page.py, which puts these sections below the results.
"""

import json
from pathlib import Path

import pandas as pd

from ..figures.draw import looks
from ..fitting.identify import RULES
from ..runs import curve
from ..selection import PARAMS
from ..study import Study
from .html import Raw, big, bullets, folded, loss, number, paragraph, table, text

HERE = Path(__file__).parent
METRICS = {
  'train/loss': 'training loss',
  'validation/loss': 'validation loss',
  'train/grad_norm': 'gradient norm',
}
MOST_REASONS = 30  # beyond, the list of runs left out is folded
MOST_POINTS = 150  # per curve in the page; the files of the run hold all of them
DASH = {'-': [], '--': [7, 4], '-.': [7, 3, 2, 3], ':': [2, 3]}  # pixels on and off


def excluded(s: Study) -> Raw:
  """Every run that is not in the law, with its reason."""
  out = s.table[s.table['excluded'].notna()]
  if not len(out):
    return paragraph('None: every planned run ' + ('is in the law.' if s.fit else 'could be in a law.'))
  rows = [[r['run_id'], r['arm'], _size(r), _seed(r), r['excluded']] for _, r in out.iterrows()]
  are = 'are not in the scaling law' if s.fit else 'could not be in a scaling law'
  reasons = table(['run', 'arm', 'size', 'seed', 'reason'], rows, left=(0, 1, 2), wide=(4,))
  said = paragraph(f'{len(out)} of {len(s.table)} planned runs {are}:')
  return said + (reasons if len(rows) <= MOST_REASONS else folded('Runs with their reasons', reasons))


def _size(row: pd.Series) -> str:
  return row['size'] if isinstance(row['size'], str) else '–'


def _seed(row: pd.Series) -> str:
  return '–' if pd.isna(row['seed']) else f'{row["seed"]:.0f}'


def run_table(s: Study) -> Raw:
  """All planned runs, folded."""
  rows = []
  for _, r in s.table.iterrows():
    ranks = [
      '–' if pd.isna(r[k]) else f'{r[k]:.0f}'
      for k in ('connection_streams', 'connection_rank', 'weights_rank', 'projected_rank')
    ]
    sizes = [big(r[k]) for k in ('params_matmul', 'params_total', 'tokens', 'flops')]
    losses = [loss(r['validation_loss']), loss(r['validation_bits_per_byte'])]
    name = [r['run_id'], r['arm'], r['state'], _size(r), *ranks, _seed(r), number(r['lr'], 3)]
    rows.append([*name, *sizes, *losses, number(r['seconds'], 3)])
  head = [
    'run',
    'arm',
    'state',
    'size',
    'streams',
    'connection rank',
    'weights rank',
    'projected rank',
    'seed',
  ]
  head += ['lr', 'N (matmul)', 'N (all)', 'tokens', 'FLOPs', 'loss', 'bits per byte', 'seconds']
  return folded(f'{len(rows)} planned runs', table(head, rows, left=(0, 1, 2))) + Raw(
    '<p>The same with every column: <a href="../results.csv">results.csv</a>; every fitted '
    'number: <a href="fits.json">fits.json</a>.</p>'
  )


def _flat(tree: dict, prefix: str = '') -> dict[str, str]:
  out = {}
  for key, value in tree.items():
    if isinstance(value, dict) and value:
      out |= _flat(value, f'{prefix}{key}.')
    else:
      out[prefix + key] = json.dumps(value)
  return out


def setting(s: Study) -> Raw:
  """What all runs share, what varies, and the versions."""
  flat = [_flat(run.config) for run in s.sweep.runs.values() if run.config is not None]
  if not flat:
    return paragraph('No run has started.')
  keys = list(dict.fromkeys(key for one in flat for key in one))
  values = {key: list(dict.fromkeys(one.get(key, 'absent') for one in flat)) for key in keys}
  varied = [
    [key, ', '.join(v[:8]) + (f', ... ({len(v)} values)' if len(v) > 8 else '')]
    for key, v in values.items()
    if len(v) > 1
  ]
  common = [[key, v[0]] for key, v in values.items() if len(v) == 1]
  facts: dict[str, dict[str, int]] = {}
  for run in s.sweep.runs.values():
    found = {
      'git revision': run.status.get('git_revision'),
      'device': run.status.get('device_kind'),
    }
    for name, value in (found | (run.status.get('versions') or {})).items():
      if value is not None:
        counts = facts.setdefault(name, {})
        counts[str(value)] = counts.get(str(value), 0) + 1
  versions = [
    [name, '; '.join(v if len(counts) == 1 else f'{v} ({n} runs)' for v, n in counts.items())]
    for name, counts in facts.items()
  ]
  seconds = s.table['seconds'].sum()
  return (
    paragraph(f'Training time of all runs together: {seconds / 60:.1f} minutes.')
    + Raw('<h3>What varies</h3>')
    + table(['field', 'values'], varied, left=(0,), wide=(1,))
    + Raw('<h3>Versions</h3>')
    + table(['what', 'version'], versions, left=(0, 1))
    + folded(f'What all runs share ({len(common)} fields)', table(['field', 'value'], common, left=(0, 1)))
  )


def method(s: Study, command: str) -> Raw:
  """The reporting checklist and the command."""
  doc = s.document
  lines = [
    f'N: {PARAMS[s.params]} (results.csv holds all conventions, --params chooses). C: '
    'training FLOPs, three times the forward pass, hyper-connection terms included. D: training '
    'tokens. L: final validation loss, the same batches for every run.'
  ]
  if doc is not None:
    o = doc['optimiser']
    lines += [
      f'Loss of the fit: sum of Huber losses of log loss with delta = {doc["delta"]:.2g} (1.345 '
      'times the robust residual scale, at least 0.001), covariates centred, objective divided by '
      f'delta squared, BFGS with analytic gradients; {o["starts_at_optimum"]} of {o["starts"]} '
      f'starts reached the optimum; condition number {doc["condition_number"]:.1e}.',
      'Delta intervals: Student t. Runs of equal size and seed share part of their noise (its '
      'variance is estimated); degrees of freedom after Satterthwaite, so that the curve is known only from '
      'as many pieces of information as there are such groups. Bootstraps: '
      f'{doc["resamples"]} resamples of runs, and of such groups, percentile intervals.',
      'Every run has its influence on the fit in fits.json.',
    ]
  return (
    bullets(lines)
    + Raw('<h3>When a number is printed</h3>')
    + bullets(RULES)
    + Raw('<h3>Make this report again</h3>')
    + Raw(f'<pre>{text(command)}</pre>')
  )


def interactive(s: Study) -> Raw:
  """Zoomable curves of every run that logged some; the data are in the page."""
  runs, arms = [], list(dict.fromkeys(s.table['arm']))
  line = {arm: (look['color'], DASH[look['linestyle']]) for arm, look in looks(arms).items()}
  for _, row in s.table[s.table['axis'].isna()].iterrows():
    run = s.sweep.runs[row['run_id']]
    x, flops = curve(run, 'tokens')[0], curve(run, 'flops', 'tokens')[1]
    if len(x) < 2 or len(x) != len(flops):
      continue
    step = max(1, len(x) // MOST_POINTS)
    keep = sorted({*range(0, len(x), step), len(x) - 1})
    one = {'id': run.run_id, 'arm': row['arm'], 'size': _size(row), 'seed': _seed(row)}
    one |= {'state': row['state'], 'tokens': [x[k] for k in keep]}
    one['flops'] = [float(f'{flops[k]:.5g}') for k in keep]
    for metric in METRICS:
      y = dict(zip(*curve(run, metric), strict=True))
      one[metric] = [float(f'{y[x[k]]:.5g}') if x[k] in y else None for k in keep]
    runs.append(one)
  if not runs:
    return Raw('')
  data = json.dumps({'metrics': METRICS, 'arms': line, 'runs': runs}).replace('</', '<\\/')
  sizes = list(dict.fromkeys(run['size'] for run in runs))

  def options(pairs: list[tuple[str, str]]) -> str:
    return ''.join(f'<option value="{text(v)}">{text(label)}</option>' for v, label in pairs)

  keys = ''.join(
    f'<button class=key data-arm="{text(arm)}" aria-pressed=true><svg width=26 height=8>'
    f'<line x1=0 x2=26 y1=4 y2=4 stroke="{line[arm][0]}" stroke-width=3 '
    f'stroke-dasharray="{" ".join(map(str, line[arm][1]))}"/></svg> {text(arm)}</button>'
    for arm in dict.fromkeys(run['arm'] for run in runs)
  )
  return Raw(
    '<h3>Every run, zoomable</h3><div id=curves><div class=bar>'
    f'<label>show <select name=metric>{options(list(METRICS.items()))}</select></label>'
    f'<label>against <select name=x>{options([("tokens", "tokens"), ("flops", "FLOPs")])}</select>'
    f'</label><label>size <select name=size>{options([("all", "all")] + [(v, v) for v in sizes])}'
    f'</select></label><button class=reset>reset zoom</button></div><div class=bar>{keys}</div>'
    '<canvas></canvas><div class=at></div></div>'
    '<p class=sub>Drag to zoom, double click to reset, click an arm to hide it.</p>'
    f'<script type="application/json" id=curve-data>{data}</script>'
    f'<script>{(HERE / "curves.js").read_text()}</script>'
  )
