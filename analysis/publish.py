"""Finished sweeps into docs/results/NAME: figures, tables, and the plan by which they can be made again.

  python -m analysis.publish runs/quick runs/rank-small
  python -m analysis.results_page > docs/results.md

A folder holds results.csv (every planned run), plan.json (`mhc verify` retrains from it), headlines.csv (what
the report says of each arm), gaps.csv, multipliers.csv, final_losses.csv, and the figures of FIGURES as PNG
with their numbers as CSV.
"""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message

from .figures.catalogue import draw_all
from .output import csv_text, staged
from .page.words import headlines
from .page.write import INTERNAL
from .runs import read_sweep
from .study import Study, study

RESULTS = Path(__file__).parent.parent / 'docs' / 'results'
LAW = ('loss_vs_flops', 'paper_compute', 'paper_gap_flops', 'rollout', 'paper_residuals')
FIGURES: dict[str, tuple[str, ...]] = {
  'quick': (
    *LAW,
    *('paper_gap_tokens', 'paper_over_training', 'paper_gains', 'paper_heat_maps', 'mixing_by_layer'),
    *('rank_by_layer', 'loss_vs_width', 'loss_vs_depth', 'loss_vs_connection_rank'),
    *('loss_vs_connection_streams', 'loss_vs_weights_rank'),
  ),
  'learning_rate': ('learning_rate', 'learning_rate_sensitivity'),
  'identity_or_mixing': ('paper_gap_flops', 'learning_rate', 'paper_gains', 'paper_heat_maps'),
  'ablation': ('paper_over_training',),
  'stability': ('paper_stability', 'paper_gains'),
  'rank': (
    *('loss_vs_connection_rank', 'loss_vs_connection_streams', 'loss_vs_weights_rank'),
    'loss_vs_projected_rank',
  ),
  'isoflop': ('paper_isoflop', 'paper_optimal_sizes'),
  'router': ('router_loads',),
  'rotations': ('paper_stability',),
  'attention_residual': ('learning_rate', 'published_gaps'),
  'fractions': ('published_gaps',),
  'sparse': ('sparse_attention',),
  'study': ('loss_vs_flops', 'paper_gap_flops', 'rollout'),
}
REFERENCES = {'identity_or_mixing': 'identity'}  # residual elsewhere


def publish(runs: Path, out: Path, resamples: int = 500) -> Path:
  """Writes the folder of a finished sweep below `out`; returns it. Figures of an earlier call go."""
  sweep = read_sweep(runs)
  experiment, _, scale = sweep.name.partition(':')
  folder = out / (f'{experiment}-{scale}' if scale not in ('', 'small') else runs.name.removesuffix('-small'))
  s = study(sweep, resamples, reference=REFERENCES.get(experiment))
  wanted = FIGURES.get(experiment, ())
  with staged(folder, lambda path: path.suffix in ('.png', '.csv', '.json'), 'publish:') as new:
    with tempfile.TemporaryDirectory() as drawn:
      draw_all(s, Path(drawn))
      for name in wanted:
        for suffix in ('png', 'csv'):
          if (Path(drawn) / f'{name}.{suffix}').is_file():
            shutil.copy(Path(drawn) / f'{name}.{suffix}', new)
    for name, table in tables(s).items():
      if len(table):
        (new / f'{name}.csv').write_text(csv_text(table), 'utf-8')
    shutil.copy(runs / 'plan.json', new)
  return folder


def tables(s: Study) -> dict[str, pd.DataFrame]:
  """The tables of a sweep's folder, by name."""
  gaps = pd.DataFrame([dataclasses.asdict(g) | {'flops': g.flops} for g in s.gaps])
  return {
    'results': s.table.drop(columns=INTERNAL),
    'headlines': pd.DataFrame({'sentence': headlines(s)}),
    'gaps': gaps.drop(columns='log_flops', errors='ignore'),
    'multipliers': pd.json_normalize([dataclasses.asdict(m) for m in s.multipliers]),
    'final_losses': s.final_losses,
    'ablation': s.ablation if s.sweep.name.startswith('ablation') else pd.DataFrame(),
    'diagnostics': s.diagnostics.by_arm,
  }


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the folders."""
  parser = argparse.ArgumentParser('python -m analysis.publish', description=publish.__doc__)
  parser.add_argument('runs', nargs='+', type=Path, help='folders of finished sweeps')
  parser.add_argument('--out', type=Path, default=RESULTS, help='folder above (default: docs/results)')
  a = parser.parse_args(argv)
  for runs in a.runs:
    print(publish(runs, a.out))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
