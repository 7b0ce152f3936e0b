"""`python -m analysis.report RUNS`: results.csv, fits.json, figures and one HTML page of a sweep.

Where: the end of the main path. RUNS/results.csv has every planned run; RUNS/report/ the rest.
"""

import argparse
import json
import sys
from pathlib import Path

from mhc_jax.errors import ConfigError

from .figures.catalogue import draw_all
from .page.write import headline_text, write_page
from .runs import read_sweep
from .selection import PARAMS
from .study import fits_json, study

EXAMPLES = """examples:
  python -m analysis.report runs/quick
  python -m analysis.report runs/quick --resamples 4000 --params total
"""


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code (2 and one line for a folder without a plan)."""
  parser = argparse.ArgumentParser(
    'python -m analysis.report',
    description='Fit, plot and report a sweep from its run folders (complete or not).',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', type=Path, help='folder of a sweep, like runs/quick')
  parser.add_argument('--resamples', type=int, default=500, help='bootstrap draws (default %(default)s)')
  parser.add_argument(
    '--params', choices=tuple(PARAMS), default='matmul', help='what N counts (default %(default)s)'
  )
  parser.add_argument('--reference', help='arm that the others are compared with (default: residual)')
  a = parser.parse_args(argv)
  try:
    if a.resamples < 2:
      raise ConfigError(f'--resamples {a.resamples}: at least 2 are needed')
    sweep = read_sweep(a.runs)
    s = study(sweep, a.resamples, progress=True, params=a.params, reference=a.reference)
  except ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  folder = a.runs / 'report'
  folder.mkdir(exist_ok=True)
  # Nothing of an earlier report may outlive the runs that it shows.
  for old in folder.iterdir():
    if old.suffix in ('.png', '.svg', '.csv', '.json', '.html'):
      old.unlink()
  s.table.drop(columns=['cluster', 'paired', 'best_rate', 'on_grid', 'variant']).to_csv(
    a.runs / 'results.csv', index=False
  )
  (folder / 'fits.json').write_text(json.dumps(fits_json(s), indent=1) + '\n')
  panels, absent = draw_all(s, folder)
  command = f'python -m experiments.sweep {sweep.name}\npython -m analysis.report {a.runs}'
  for name in ('resamples', 'params', 'reference'):
    if getattr(a, name) != parser.get_default(name):
      command += f' --{name} {getattr(a, name)}'
  page = write_page(s, panels, absent, folder, command)
  for line in (*headline_text(s), *(f'warning: {w}' for w in sweep.warnings), *absent):
    print(line)
  print(f'wrote {a.runs / "results.csv"}, {folder / "fits.json"}, {len(panels)} figures, {page}')
  return 0


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
