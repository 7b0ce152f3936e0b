"""`mhc plots paper RUNS`: the papers' figures from a sweep's folder.

Where: beside report.py, which puts the same figures and tables on one page; three experiments have figures of
their own, `coordinates`, `adaptation` and `router`. Every figure is written as PNG, SVG, PDF and CSV.
"""

import argparse
import sys
from pathlib import Path

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError
from mhc_jax.paths import check_folder, user_path

from .conventions import PARAMS

EXAMPLES = """examples:
  mhc plots paper runs/quick
  mhc plots paper runs/quick --out docs/figures --params total
  mhc plots paper runs/identity_or_mixing-small --reference identity
  mhc plots coordinates runs/coordinate_check
  mhc plots adaptation runs/adaptation
  mhc plots router runs/router
"""


def main(argv: list[str] | None = None) -> int:
  """Command line; prints one line per figure, and why others are absent."""
  parser = argparse.ArgumentParser(
    'mhc plots',
    description='Draw the figures of the hyper-connection papers from a sweep.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'what', choices=('paper', 'coordinates', 'adaptation', 'router'), help='the set of figures'
  )
  parser.add_argument(
    'runs', help='folder of a sweep, like runs/quick, gs:// or s3://, or of a coordinate check or adaptation'
  )
  parser.add_argument(
    '--out', type=user_path, help='folder for the figures (default: RUNS/paper, RUNS/figures)'
  )
  parser.add_argument(
    '--params', choices=tuple(PARAMS), default='matmul', help='what N counts (default %(default)s)'
  )
  parser.add_argument('--reference', help='arm that the others are compared with (default: residual)')
  a = parser.parse_args(argv)
  if a.out is not None:
    check_folder(a.out, '--out')
  from .stores import here

  a.runs = here(a.runs)
  out = a.out or a.runs / ('paper' if a.what == 'paper' else 'figures')
  if a.what == 'coordinates':
    _coordinates(a.runs, out)
  elif a.what == 'adaptation':
    _adaptation(a.runs, out)
  else:
    _sweep(a.what, a.runs, out, a.params, a.reference)
  return 0


# The parts import scipy, pandas and matplotlib, which take longer than --help may take.


def _sweep(what: str, runs: Path, out: Path, params: str, reference: str | None) -> None:
  from .figures.catalogue import SECTIONS, draw_all
  from .figures.draw import SUFFIXES, save
  from .figures.router import expert_loads
  from .output import csv_text, staged
  from .router import METRIC
  from .runs import read_sweep
  from .study import study

  s = study(read_sweep(runs), resamples=0, params=params, reference=reference)
  if what == 'router':
    drawn = expert_loads(s)
    if drawn is None or isinstance(drawn, str):
      raise ConfigError(f'{runs}: no run has logged {METRIC}; those of experiments/router.py do')
    with staged(out, lambda _: False, '--out') as new:
      panel = save(drawn, new, 'router_loads')
    _say(out, [panel])
    return
  tables = {'final_losses': s.final_losses, 'ablation': s.ablation, 'diagnostics': s.diagnostics.by_arm}
  tables = {name: table for name, table in tables.items() if len(table)}
  stems = {'final_losses', 'ablation', 'diagnostics'} | {name for one in SECTIONS for name in one.figures}
  # Figures of an earlier call must not outlive the runs that they show.
  with staged(out, lambda path: path.stem in stems and path.suffix[1:] in SUFFIXES, '--out') as new:
    panels, absent = draw_all(s, new)
    for name, table in tables.items():
      (new / f'{name}.csv').write_text(csv_text(table), 'utf-8')
  _say(out, [panel for drawn in panels.values() for panel in drawn])
  for sentence in absent:
    print(f'absent: {sentence}')
  for name, table in tables.items():
    print(f'{out / name}.csv: {len(table)} rows')


def _coordinates(folder: Path, out: Path) -> None:
  from .figures.coordinates import coordinates, read
  from .figures.draw import save
  from .output import staged

  drawing = coordinates(read(folder))
  with staged(out, lambda _: False, '--out') as new:
    panel = save(drawing, new, 'coordinates')
  _say(out, [panel])


def _adaptation(folder: Path, out: Path) -> None:
  from .figures.adaptation import changes, read
  from .figures.draw import save
  from .output import staged

  drawing = changes(read(folder))
  with staged(out, lambda _: False, '--out') as new:
    panel = save(drawing, new, 'adaptation')
  _say(out, [panel])
  print(drawing.table.drop(columns='rates').round(4).to_string(index=False))


def _say(out: Path, panels: list) -> None:
  for panel in panels:
    print(f'{out / panel.name}.png: {panel.caption}')


if __name__ == '__main__':
  sys.exit(end_with_message(main))
