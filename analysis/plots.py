"""`python -m analysis.plots paper RUNS`: every figure of the papers from a sweep's folder.

Where: beside report.py, which draws the single panels; this adds the composite figures and the table of
final losses. Every figure is written as PNG, SVG and CSV.
"""

import argparse
import sys
from pathlib import Path

from analysis import paper_figures
from analysis.draw import Panel
from analysis.figures import draw_all
from analysis.runs import read_sweep
from analysis.study import study
from mhc_jax.config import ConfigError

EXAMPLES = """examples:
  python -m analysis.plots paper runs/quick
  python -m analysis.plots paper runs/quick --out docs/figures
"""

COMPOSITES = (
  paper_figures.compute_arrows,
  paper_figures.gap_and_ratio,
  paper_figures.over_training,
  paper_figures.token_scaling,
  paper_figures.gains,
  paper_figures.heat_maps,
  paper_figures.isoflop_panels,
  paper_figures.residual_panels,
)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints one line per figure, and why others are absent."""
  parser = argparse.ArgumentParser(
    'python -m analysis.plots',
    description='Draw the figures of the hyper-connection papers from a sweep.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('what', choices=('paper',), help='the set of figures')
  parser.add_argument('runs', type=Path, help='folder of a sweep, like runs/quick')
  parser.add_argument('--out', type=Path, help='folder for the figures (default: RUNS/paper)')
  a = parser.parse_args(argv)
  try:
    sweep = read_sweep(a.runs)
  except ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  s = study(sweep, resamples=0)
  out = a.out or a.runs / 'paper'
  panels, absent = draw_all(s, out)
  for make in COMPOSITES:
    made = make(s, out)
    (panels if isinstance(made, Panel) else absent).append(made)
  out.mkdir(parents=True, exist_ok=True)
  table = paper_figures.final_losses(s)
  table.to_csv(out / 'final_losses.csv', index=False)
  for panel in panels:
    print(f'{out / panel.name}.png: {panel.caption}')
  for sentence in absent:
    print(f'absent: {sentence}')
  print(f'{out / "final_losses.csv"}: {len(table)} rows')
  return 0


if __name__ == '__main__':
  sys.exit(main())
