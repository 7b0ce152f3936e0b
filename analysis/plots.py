"""`python -m analysis.plots paper RUNS`: the papers' figures from a sweep's folder.

Where: beside report.py, which puts the same figures and tables on one page; two experiments have figures of
their own, `coordinates` and `router`. Every figure is written as PNG, SVG and CSV.
"""

import argparse
import sys
from pathlib import Path

from mhc_jax.command import check_folder
from mhc_jax.errors import ConfigError

from .figures import coordinates as coordinate_figure
from .figures import router as router_figure
from .figures.catalogue import draw_all
from .figures.draw import Panel
from .runs import Sweep, read_sweep
from .selection import PARAMS
from .study import study
from .tables import ablation, final_losses

EXAMPLES = """examples:
  python -m analysis.plots paper runs/quick
  python -m analysis.plots paper runs/quick --out docs/figures --params total
  python -m analysis.plots paper runs/identity_or_mixing-small --reference identity
  python -m analysis.plots coordinates runs/coordinate_check
  python -m analysis.plots router runs/router
"""


def main(argv: list[str] | None = None) -> int:
  """Command line; prints one line per figure, and why others are absent."""
  parser = argparse.ArgumentParser(
    'python -m analysis.plots',
    description='Draw the figures of the hyper-connection papers from a sweep.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('what', choices=('paper', 'coordinates', 'router'), help='the set of figures')
  parser.add_argument('runs', type=Path, help='folder of a sweep, like runs/quick, or of a coordinate check')
  parser.add_argument('--out', type=Path, help='folder for the figures (default: RUNS/paper, RUNS/figures)')
  parser.add_argument(
    '--params', choices=tuple(PARAMS), default='matmul', help='what N counts (default %(default)s)'
  )
  parser.add_argument('--reference', help='arm that the others are compared with (default: residual)')
  a = parser.parse_args(argv)
  try:
    if a.out is not None:
      check_folder(a.out, '--out')
    out = a.out or a.runs / ('paper' if a.what == 'paper' else 'figures')
    if a.what == 'paper':
      _paper(read_sweep(a.runs), out, a.params, a.reference)
    elif a.what == 'router':
      _say(out, [router_figure.load_figure(read_sweep(a.runs), out)])
    else:
      _say(out, [coordinate_figure.coordinates(coordinate_figure.read(a.runs), out)])
  except ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return 0


def _paper(sweep: Sweep, out: Path, params: str, reference: str | None) -> None:
  s = study(sweep, resamples=0, params=params, reference=reference)
  panels, absent = draw_all(s, out)
  _say(out, panels)
  for sentence in absent:
    print(f'absent: {sentence}')
  out.mkdir(parents=True, exist_ok=True)
  for name, table in (('final_losses', final_losses(s)), ('ablation', ablation(s))):
    path = out / f'{name}.csv'
    path.unlink(missing_ok=True)
    if len(table):
      table.to_csv(path, index=False)
      print(f'{path}: {len(table)} rows')


def _say(out: Path, panels: list[Panel]) -> None:
  for panel in panels:
    print(f'{out / panel.name}.png: {panel.caption}')


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
