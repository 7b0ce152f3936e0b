"""`mhc report RUNS`: results.csv, fits.json, figures and one HTML page of a sweep.

Where: the end of the main path. RUNS/results.csv has every planned run; RUNS/report/ the rest.
"""

import argparse
import shlex
import sys

from mhc_jax.command import end_with_message
from mhc_jax.errors import require
from mhc_jax.paths import user_path
from mhc_jax.run_folder import load_options

from .conventions import PARAMS

EXAMPLES = """examples:
  mhc report runs/quick
  mhc report runs/quick --resamples 4000 --params total
"""


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code. Raises ConfigError for a folder without a plan."""
  parser = argparse.ArgumentParser(
    'mhc report',
    description='Fit, plot and report a sweep from its run folders (complete or not).',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('runs', type=user_path, help='folder of a sweep, like runs/quick')
  parser.add_argument('--resamples', type=int, default=500, help='bootstrap draws (default %(default)s)')
  parser.add_argument(
    '--params', choices=tuple(PARAMS), default='matmul', help='what N counts (default %(default)s)'
  )
  parser.add_argument('--reference', help='arm that the others are compared with (default: residual)')
  a = parser.parse_args(argv)
  require(a.resamples >= 2, f'--resamples {a.resamples}: at least 2 are needed')
  # scipy, pandas and matplotlib take longer to import than --help may take.
  from .page.words import headlines
  from .page.write import write_report
  from .runs import clean, read_sweep
  from .study import study

  s = study(read_sweep(a.runs), a.resamples, progress=True, params=a.params, reference=a.reference)
  options = ''.join(f' {shlex.quote(clean(option))}' for option in load_options(str(a.runs)))
  command = f'mhc sweep {s.sweep.name}{options}\nmhc report {a.runs}'
  for name in ('resamples', 'params', 'reference'):
    if getattr(a, name) != parser.get_default(name):
      command += f' --{name} {getattr(a, name)}'
  folder = a.runs / 'report'
  drawn, absent = write_report(s, folder, command)
  for line in (*headlines(s), *(f'warning: {w}' for w in s.sweep.warnings), *absent):
    print(line)
  print(f'wrote {a.runs / "results.csv"}, {folder / "fits.json"}, {drawn} figures, {folder / "index.html"}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
