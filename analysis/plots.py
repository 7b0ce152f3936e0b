"""`mhc plots paper RUNS`: the papers' figures from a sweep's folder.

Where: beside report.py, which puts the same figures and tables on one page; two experiments have figures of
their own, `coordinates` and `router`. Every figure is written as PNG, SVG, PDF and CSV.
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
  parser.add_argument('what', choices=('paper', 'coordinates', 'router'), help='the set of figures')
  parser.add_argument(
    'runs', type=user_path, help='folder of a sweep, like runs/quick, or of a coordinate check'
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
  out = a.out or a.runs / ('paper' if a.what == 'paper' else 'figures')
  if a.what == 'coordinates':
    _coordinates(a.runs, out)
  else:
    _sweep(a.what, a.runs, out, a.params, a.reference)
  return 0


# The parts import scipy, pandas and matplotlib, which take longer than --help may take.


def _sweep(what: str, runs: Path, out: Path, params: str, reference: str | None) -> None:
  from .figures.catalogue import draw_all
  from .figures.draw import save
  from .figures.router import expert_loads
  from .router import METRIC
  from .runs import read_sweep
  from .study import study

  s = study(read_sweep(runs), resamples=0, params=params, reference=reference)
  if what == 'router':
    drawn = expert_loads(s)
    if drawn is None or isinstance(drawn, str):
      raise ConfigError(f'{runs}: no run has logged {METRIC}; those of experiments/router.py do')
    _say(out, [save(drawn, out, 'router_loads')])
    return
  panels, absent = draw_all(s, out)
  _say(out, [panel for drawn in panels.values() for panel in drawn])
  for sentence in absent:
    print(f'absent: {sentence}')
  out.mkdir(parents=True, exist_ok=True)
  tables = {'final_losses': s.final_losses, 'ablation': s.ablation, 'diagnostics': s.diagnostics.by_arm}
  for name, table in tables.items():
    path = out / f'{name}.csv'
    path.unlink(missing_ok=True)
    if len(table):
      table.to_csv(path, index=False)
      print(f'{path}: {len(table)} rows')


def _coordinates(folder: Path, out: Path) -> None:
  from .figures.coordinates import coordinates, read
  from .figures.draw import save

  _say(out, [save(coordinates(read(folder)), out, 'coordinates')])


def _say(out: Path, panels: list) -> None:
  for panel in panels:
    print(f'{out / panel.name}.png: {panel.caption}')


if __name__ == '__main__':
  sys.exit(end_with_message(main))
