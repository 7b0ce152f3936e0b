"""Finished sweeps into docs/results/NAME: figures, tables, and the plan by which they can be made again.

  python -m analysis.publish runs/quick runs/rank-small
  python -m analysis.publish runs/muon/learning_rate --name learning_rate_muon
  python -m analysis.results_page > docs/results.md

A folder holds results.csv (every planned run), plan.json (`mhc verify` retrains from it), headlines.csv (what
the report says of each arm), gaps.csv, multipliers.csv, final_losses.csv, and the figures of FIGURES as PNG
with their numbers as CSV.
"""

import argparse
import dataclasses
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import require
from mhc_jax.run_folder import ENDED, load_options, load_plan
from mhc_jax.storage import write_json

from . import clusters
from .figures import adaptation, coordinates
from .figures.catalogue import SECTIONS
from .figures.clusters import loss_over_bytes
from .figures.draw import Drawing, save
from .output import csv_text, staged
from .page.words import headlines
from .page.write import INTERNAL
from .runs import read_sweep
from .study import Study, study

RESULTS = Path(__file__).parent.parent / 'docs' / 'results'
FIGURES: dict[str, tuple[str, ...]] = {
  'quick': (
    *('loss_vs_flops', 'paper_compute', 'paper_gap_flops', 'rollout', 'paper_residuals'),
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
  'fp8': (),
  'mtp': (),
  'clusters': ('clusters_loss',),
  'study': ('loss_vs_flops', 'paper_gap_flops', 'rollout'),  # with seven arms the others cannot be read
  'rates': ('learning_rate',),  # this and the next three: parts of the study
  'transfer': ('learning_rate',),
  'muon': ('paper_gap_flops',),
  'ranks': ('loss_vs_connection_rank', 'loss_vs_connection_streams', 'loss_vs_weights_rank'),
}
DRAWN = {stem: draw for section in SECTIONS for stem, draw in section.figures.items()}
REFERENCES = {'identity_or_mixing': 'identity'}  # residual elsewhere
# Folders that are no sweep's: what draws the one CSV in them.
ALONE = {
  'coordinates': (coordinates.read, coordinates.coordinates),
  'adaptation': (adaptation.read, adaptation.changes),
}
TABLES = (
  'results',
  'headlines',
  'gaps',
  'multipliers',
  'final_losses',
  'ablation',
  'diagnostics',
  'clusters',
)
LOCAL = re.compile(r'(?:^|[=:])(?:/|~|[a-z0-9]+://)')  # an option with a folder of one machine, or a bucket
# Folders of a path in a message, without its last name.
FOLDERS = re.compile(r'(?<!\w)(?:[a-z0-9]+:/)?/(?:[^\s/\'"]+/)+')


def publish(runs: Path, out: Path, resamples: int = 500, name: str | None = None) -> Path:
  """Writes the folder of a finished sweep below `out`; returns it. Tables and figures of an earlier call go.

  name: of the folder, where it is not the experiment's. Raises ConfigError for a plan that names a folder of
  this machine: nobody else could run it.
  """
  for stem, (read, draw) in ALONE.items():
    if (runs / f'{stem}.csv').is_file() and not (runs / 'plan.json').is_file():
      with _published(out / (name or runs.name)) as new:
        draw_png(draw(read(runs)), new, stem)
      return out / (name or runs.name)
  sweep, options = read_sweep(runs), load_options(str(runs))
  local = next((option for option in options if LOCAL.search(option)), None)
  require(local is None, f'{runs}: {local} names a folder that others do not have')
  experiment, _, scale = sweep.name.partition(':')
  usual = f'{experiment}-{scale}' if scale not in ('', 'small') else runs.name.removesuffix('-small')
  s = study(sweep, resamples, reference=REFERENCES.get(experiment))
  with _published(out / (name or usual)) as new:
    _write(s, kind(f'{experiment}-{scale}'), new)
    planned, arms = load_plan(str(runs))
    kept = [{'run_id': run_id, 'arm': arm} for run_id, arm in arms.items()]
    write_json(str(new / 'plan.json'), {'sweep': planned, 'options': options, 'runs': kept})
  left = s.table.loc[~s.table['state'].isin(ENDED), 'state']
  if len(left):
    print(f'warning: {len(left)} of {len(s.table)} runs have not ended: {left.value_counts().to_dict()}')
  return out / (name or usual)


def kind(name: str) -> str:
  """The key of FIGURES of a folder: learning_rate of learning_rate_muon, rates of study-cpu-muon-rates."""
  part = name.rpartition('-')[2]
  if name.startswith('study-') and part in FIGURES:
    return part
  return next((k for k in FIGURES if re.match(rf'{k}\b|{k}_', name)), name)


def _write(s: Study, experiment: str, folder: Path) -> None:
  """Figures and tables of a sweep; prints why a figure of its experiment is not there."""
  drawn, found = {stem: DRAWN[stem](s) for stem in FIGURES.get(experiment, ()) if stem in DRAWN}, tables(s)
  if experiment == 'clusters':
    curves = clusters.curves(s.sweep.runs)
    found['clusters'], drawn['clusters_loss'] = clusters.summary(curves), loss_over_bytes(curves)
  for stem, drawing in drawn.items():
    if isinstance(drawing, Drawing):
      draw_png(drawing, folder, stem)
    else:
      print(f'absent: {drawing or stem}')
  for stem, table in found.items():
    if len(table):
      (folder / f'{stem}.csv').write_text(csv_text(table), 'utf-8')


def _published(folder: Path) -> AbstractContextManager[Path]:
  """A new folder that takes the place of what publishing wrote there; of other files nothing goes."""
  names = {*TABLES, *DRAWN, *ALONE, *(stem for stems in FIGURES.values() for stem in stems), 'plan'}
  kinds = ('.png', '.csv', '.json')
  return staged(folder, lambda path: path.stem in names and path.suffix in kinds, 'publish:')


def draw_png(drawing: Drawing, folder: Path, stem: str) -> None:
  """Saves its PNG and CSV, and nothing else."""
  save(drawing, folder, stem)
  for suffix in ('svg', 'pdf'):
    (folder / f'{stem}.{suffix}').unlink()


def tables(s: Study) -> dict[str, pd.DataFrame]:
  """The tables of a sweep's folder, by name."""
  results = s.table.drop(columns=INTERNAL)
  results['error'] = [FOLDERS.sub('', e) if isinstance(e, str) else e for e in results['error']]
  gaps = pd.DataFrame([dataclasses.asdict(g) | {'flops': g.flops} for g in s.gaps])
  return {
    'results': results,
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
  parser.add_argument('--name', help="of the folder, where it is not the experiment's: learning_rate_muon")
  a = parser.parse_args(argv)
  require(a.name is None or len(a.runs) == 1, '--name names one folder: give one sweep')
  for runs in a.runs:
    print(publish(runs, a.out, name=a.name))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
