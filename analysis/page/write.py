"""results.csv, fits.json, the figures and one self-contained HTML page.

Where: the end of the main path; Study -> index.html. Only words and layout here: every number comes from
study.py. page.html is the frame; <key>.html has the words and tables of that section of figures/catalogue.py.
"""

import base64
import json
import re
from pathlib import Path

import jinja2
import markupsafe

from ..conventions import PARAMS
from ..figures.catalogue import SECTIONS, draw_all
from ..figures.draw import SUFFIXES, Panel, by_arm, looks
from ..fitting.identify import RULES
from ..needs import shown
from ..output import csv_text, staged, write_file
from ..runs import curve, flat
from ..study import Study, fits_json
from . import words

HERE = Path(__file__).parent
METRICS = {
  'train/loss': 'training loss',
  'validation/loss': 'validation loss',
  'train/grad_norm': 'gradient norm',
}
LEADS = ('loss_vs_flops', 'paper_gap_flops')
MOST_POINTS = 150  # per curve in the page; the files of the run hold all of them
DASH = {'-': [], '--': [7, 4], '-.': [7, 3, 2, 3], ':': [2, 3]}  # pixels on and off
INTERNAL = [
  'cluster',
  'paired',
  'best_rate',
  'rates',
  'rate_seeds',
  'on_grid',
  'variant',
]  # columns that results.csv does without


def write_report(s: Study, folder: Path, command: str) -> tuple[int, list[str]]:
  """Writes results.csv into the sweep's folder and the rest into `folder`.

  command: what makes this report again. Returns the number of figures, and why others are absent.
  """

  def ours(path: Path) -> bool:  # nothing of an earlier report may outlive the runs that it shows
    return path.suffix[1:] in (*SUFFIXES, 'json', 'html')

  with staged(folder, ours, 'report:') as new:
    (new / 'fits.json').write_text(json.dumps(fits_json(s), indent=1) + '\n', 'utf-8')
    if len(s.diagnostics.by_arm):
      (new / 'diagnostics.csv').write_text(csv_text(s.diagnostics.by_arm), 'utf-8')
    panels, absent = draw_all(s, new)
    (new / 'index.html').write_text(page(s, panels, absent, new, command), 'utf-8')
    write_file(s.sweep.folder / 'results.csv', csv_text(s.table.drop(columns=INTERNAL)), 'report:')
  return sum(map(len, panels.values())), absent


def page(s: Study, panels: dict[str, list[Panel]], absent: list[str], folder: Path, command: str) -> str:
  """All drawn figures, each once, and what the templates say; a section of neither is left out."""
  templates = _templates()
  templates.globals |= {'s': s, 'absent': absent, 'command': command}
  templates.globals |= {'curves': _curves(s)} | _fields(s)
  lead, sections = _lead(s, panels), []
  for section in SECTIONS:
    drawn = [panel for panel in panels.get(section.key, []) if panel != lead]
    body = ''
    if (HERE / f'{section.key}.html').is_file():
      body = markupsafe.Markup(templates.get_template(f'{section.key}.html').render().strip())
    if drawn or body:
      title = section.title.format(reference=s.reference or 'the reference')
      sections.append(vars(section) | {'title': title, 'panels': drawn, 'body': body})
  images = {panel.name: _image(folder / f'{panel.name}.svg') for drawn in panels.values() for panel in drawn}
  first = {'question': words.question(s), 'evidence': words.evidence(s), 'lead': lead}
  return templates.get_template('page.html').render(sections=sections, images=images, **first) + '\n'


def _lead(s: Study, panels: dict[str, list[Panel]]) -> Panel | None:
  """The figure of the first screen, which answers the question: the law, or the gap where there is none."""
  drawn = {panel.name: panel for some in panels.values() for panel in some}
  names = LEADS if s.fit else LEADS[::-1]
  return next((drawn[name] for name in names if name in drawn), None)


def _templates() -> jinja2.Environment:
  """The templates of this folder, which escape every text, with the words and filters that they use."""
  out = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  out.policies['json.dumps_kwargs'] = {}  # keeps the order of keys
  filters = (words.number, words.loss, words.big, words.whole, words.percent, words.known)
  out.filters |= {function.__name__: function for function in filters}
  out.globals |= {'words': words, 'shown': shown, 'PARAMS': PARAMS, 'RULES': RULES}
  out.globals['asset'] = _asset
  return out


def _asset(name: str) -> markupsafe.Markup:
  """A file of this folder for a script or style element, which its text cannot end."""
  return markupsafe.Markup(re.sub(r'</(?=script|style)', r'<\\/', (HERE / name).read_text(), flags=re.I))


def _image(path: Path) -> str:
  return base64.b64encode(path.read_bytes()).decode()


def _fields(s: Study) -> dict[str, dict]:
  """Fields of the configuration as JSON: those that all runs share, and the values of those that vary."""
  configs = [flat(run.config) for run in s.sweep.runs.values() if run.config is not None]
  texts = [{name: json.dumps(value) for name, value in config.items()} for config in configs]
  names = dict.fromkeys(name for one in texts for name in one)
  values = {name: list(dict.fromkeys(one.get(name, 'absent') for one in texts)) for name in names}
  return {
    'shared': {name: only[0] for name, only in values.items() if len(only) == 1},
    'varied': {name: several for name, several in values.items() if len(several) > 1},
  }


def _curves(s: Study) -> dict[str, object]:
  """What curves.js draws: every run that logged curves, thinned; shown first: the largest size."""
  runs = []
  inside = s.table[s.table['axis'].isna()]
  # By arm, so that thinner lines come later.
  for row in (row for _, own in by_arm(inside, s.arms) for _, row in own.iterrows()):
    run = s.sweep.runs[row['run_id']]
    x, flops = curve(run, 'tokens')[0], curve(run, 'flops', 'tokens')[1]
    if len(x) < 2 or len(x) != len(flops):
      continue
    step = max(1, len(x) // MOST_POINTS)
    keep = sorted({*range(0, len(x), step), len(x) - 1})
    one = {
      'id': run.run_id,
      'arm': row['arm'],
      'size': words.known(row['size']),
      'seed': words.whole(row['seed']),
    }
    one |= {'state': row['state'], 'tokens': [x[k] for k in keep]}
    one['flops'] = [float(f'{flops[k]:.5g}') for k in keep]
    for metric in METRICS:
      y = dict(zip(*curve(run, metric), strict=True))
      one[metric] = [float(f'{y[x[k]]:.5g}') if x[k] in y else None for k in keep]
    runs.append(one)
  arms = {
    arm: (look['color'], DASH[look['linestyle']], look['linewidth']) for arm, look in looks(s.arms).items()
  }
  sizes = {'all': 'all'} | {run['size']: run['size'] for run in runs}
  largest = s.largest['size'].iloc[0] if len(s.largest) else 'all'
  return {'metrics': METRICS, 'arms': arms, 'sizes': sizes, 'size': largest, 'runs': runs}
