"""docs/results.md and README's sentence, from the CSVs of docs/results: no number is written by hand.

Where: publish.py -> CSVs -> results_tables.py -> here.

  python -m analysis.results_page > docs/results.md
  python -m analysis.results_page --sentence     # README's, of the quick sweep
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.run_folder import load_options, load_plan

from .publish import FIGURES, RESULTS, kind
from .results_tables import TABLES, big, read, table

HEAD = """# Results

Written by `python -m analysis.results_page` from the CSVs beside the figures. What was learned, and what was
found before: `experiments/LOG.md`. Losses are nats per token on the validation split; differences are paired
by seed, and to residual where nothing else is said; intervals are 95 %, and undecided is what holds 0 (a
ratio: 1); bold: what does not. A folder of `results/` has its runs (`results.csv`) and its plan. It is

- made by the command below, `python -m analysis.publish runs/NAME`, and this page's command;
- checked by `mhc verify` with that folder, which trains the cheapest runs again and compares.{study}
"""
TITLES = {
  'study-gpu': 'study-gpu: seven arms on a GPU',
  'study-gpu-small': 'study-gpu-small: seven arms on a GPU, all but the largest size',
  'study-cpu': 'study-cpu: seven arms on two cores',
  'study-cpu-muon': 'study-cpu-muon: the same by Muon, at two sizes',
  'study-cpu-ranks': 'study-cpu-ranks: of the generator, of the streams, of the weights',
  'study-cpu-rates': 'study-cpu-rates: the choice of the rates, on seeds of its own',
  'study-cpu-muon-rates': "study-cpu-muon-rates: of Muon's",
  'study-cpu-transfer': 'study-cpu-transfer: half and twice the chosen rate at a larger size',
  'study-cpu-muon-transfer': 'study-cpu-muon-transfer: the same of Muon',
  'quick': 'quick: four arms over width, depth and manifold rank',
  'learning_rate': 'learning_rate: sensitivity and transfer of the rate',
  'learning_rate_muon': 'learning_rate_muon: the same by Muon',
  'attention_residual': 'attention_residual: reads by attention over earlier outputs',
  'identity_or_mixing': 'identity_or_mixing: does mixing beat H_res = I? (differences to identity)',
  'ablation': 'ablation: H_res, H_pre, H_post one by one (mHC Table 1)',
  'stability': 'stability: depth and learning rate',
  'rotations': 'rotations: why they diverge',
  'rank': 'rank: of the generator, of the depth matrix (streams n), of the weights',
  'isoflop': 'isoflop: loss against size at equal compute, and the best size',
  'router': 'router: loads of experts',
  'fractions': 'fractions: streams in parts, dense reads',
  'sparse': 'sparse: sparse attention',
  'clusters': 'clusters: that average now and then',
  'fp8': 'fp8: products in eight bits',
  'mtp': 'mtp: multi-token prediction',
  'coordinate_check': 'coordinate_check: what training changes keeps its size over width and depth',
  'adaptation': 'adaptation: of maps while reading, bits per byte',
}
FACTS = {'seed': 'seeds', 'data_digest': 'corpus', 'git_revision': 'code', 'jax_version': 'JAX'}
FACTS |= {'device_kind': 'device'}
COMMANDS = {
  name: f'`python -m experiments.{name}`' for name in ('coordinate_check', 'adaptation')
}  # no sweeps
CAPTIONS = {
  'loss_vs_flops': 'Loss against compute',
  'loss_vs_costs': 'Loss over FLOPs, tokens, seconds and bytes',
  'paper_compute': 'Compute to equal loss',
  'paper_gap_flops': 'Gap and ratio against FLOPs (mHC Fig. 6a)',
  'paper_gap_tokens': 'Gap and ratio along tokens (Fig. 6b)',
  'paper_over_training': 'Loss gap and gradient norm (Fig. 2, 5)',
  'paper_gains': 'Gains by sublayer (Fig. 3, 7)',
  'paper_heat_maps': 'Token-mean H_res (Fig. 8)',
  'paper_stability': 'Diverged runs, loss, gradient norm, gain',
  'paper_residuals': 'Residuals of the law',
  'rollout': 'Fitted to small sizes, held against large ones',
  'mixing_by_layer': 'Distances of H_res from the identity and the average',
  'rank_by_layer': 'How much of streams and depth is used',
  'paper_isoflop': 'IsoFLOP panels',
  'paper_optimal_sizes': 'Best size and tokens',
  'router_loads': 'Load of the fullest expert',
  'published_gaps': 'Published gaps and ours',
  'sparse_attention': 'Sparse attention',
  'clusters_loss': 'Loss over bytes between clusters',
  'coordinates': 'Coordinate check',
  'adaptation': 'Adaptation while reading',
}


def _span(runs: pd.DataFrame, column: str) -> str:
  """Smallest to largest."""
  values = runs[column].dropna() if column in runs else []
  ends = dict.fromkeys(map(big, (min(values), max(values)))) if len(values) else {}
  return ' to '.join(ends)


def _values(runs: pd.DataFrame, column: str) -> str:
  """All different ones; of digests and revisions what tells them apart, and whether code was changed."""
  if column not in runs:
    return ''
  found = {f'{v:.0f}' if isinstance(v, float) else str(v) for v in runs[column].dropna()}
  return ', '.join(sorted({re.sub(r'\b([0-9a-f]{12})[0-9a-f]+', r'\1', value) for value in found}))


def _command(folder: Path) -> str:
  """What makes the folder's runs; nothing without a plan."""
  if folder.name in COMMANDS:
    return COMMANDS[folder.name]
  if not (folder / 'plan.json').is_file():
    return 'older code: no plan'
  name, options = load_plan(str(folder))[0] or folder.name, load_options(str(folder))
  return f'`{shlex.join(["mhc", "sweep", name, *options])}`'


def overview(folders: Sequence[Path]) -> list[str]:
  """What was run: a row for each folder."""
  rows = []
  for folder in folders:
    runs = read(folder / 'results.csv', 'state')
    states = ', '.join(f'{count} {state}' for state, count in runs['state'].value_counts().items())
    sizes = (_span(runs, column) for column in ('params_matmul', 'tokens'))
    facts = (_values(runs, column) for column in FACTS)
    rows.append((folder.name, _command(folder), states, *sizes, *facts))
  return table(('folder', 'made by', 'runs', 'matmul parameters', 'tokens', *FACTS.values()), rows)


def section(folder: Path) -> list[str]:
  """One folder: what was found, its figures."""
  name = folder.name
  lines = [f'## {TITLES.get(name, name)}']
  if part := TABLES.get(kind(name)):
    lines += part(folder)
  drawn = {path.stem for path in folder.glob('*.png')}
  order = [stem for stem in FIGURES.get(kind(name), ()) if stem in drawn]
  shown = [
    f'![{CAPTIONS.get(stem, stem.replace("_", " ").capitalize())}](results/{name}/{stem}.png)'
    for stem in (*order, *sorted(drawn - set(order)))
  ]
  return [*lines, ' '.join(shown), ''] if shown else lines


def coverage(results: Path) -> list[str]:
  """How often the intervals hold, by simulation."""
  path = results / 'coverage.json'
  if not path.is_file():
    return []
  rows = pd.DataFrame(json.loads(path.read_text())['rows'])
  judged = rows['met'].dropna().astype(bool)
  auto = rows[rows['delta'] == 'auto']

  def span(kept: pd.DataFrame) -> str:
    ends = (f'{100 * value:.1f}' for value in (kept['value'].min(), kept['value'].max()))
    return ' to '.join(ends) + ' %' if len(kept) else 'not simulated'

  multiples = auto['quantity'].str.contains(r'm\[')
  kinds = {
    'E, alpha, beta and the loss at 10x compute, 25 runs': auto['design'] == 'single',
    'the same with trunks that share their noise': auto['design'] == 'trunks',
    'multipliers of paired arms': (auto['design'] == 'paired') & multiples,
    'm at either end of the sizes': (auto['design'] == 'gain') & auto['quantity'].str.contains('size'),
    'paired gaps': auto['design'] == 'gap',
    'IsoFLOP exponents': auto['design'] == 'isoflop',
    'false "saves compute" (nominal 2.5 %)': auto['quantity'].str.startswith('false'),
  }
  return [
    '## Coverage of the intervals',
    '`mhc coverage --simulations 1000` over the designs that a referee would try (`results/coverage.json`).',
    f'Nominal 95 % intervals hold as follows; {judged.sum()} of {len(judged)} targets (92 to 98 %, false at '
    'most 3 %) are met.',
    '',
    *table(
      ('of', 'hold in'), [(what, span(auto[which & auto['value'].notna()])) for what, which in kinds.items()]
    ),
  ]


def page(results: Path = RESULTS) -> str:
  """The page as Markdown."""
  there = {path.name for path in results.iterdir() if any(path.glob('*.csv'))}
  names = [name for name in TITLES if name in there]
  names += sorted(name for name in there - set(TITLES) if (results / name / 'results.csv').is_file())
  folders = [results / name for name in names]
  study = (results / 'study').is_dir() or any(name.startswith('study-') for name in names)
  lines = [HEAD.format(study='\n\nAll of it together: [The study](study.md).' if study else '')]
  lines += overview(folders)
  for folder in folders:
    lines += section(folder)
  return '\n'.join(lines + coverage(results)).rstrip() + '\n'


def sentence(results: Path = RESULTS) -> str:
  """README's: what the quick sweep found of mhc, or why there is no answer."""
  folder = results / 'quick'
  runs = read(folder / 'results.csv', 'excluded')
  found = read(folder / 'headlines.csv', 'sentence')['sentence']
  said = [line for line in found if re.match(r"mhc('s|:| needs| has)", line)]
  start = f'One `make sweep`, {len(runs)} runs: '
  if read(folder / 'multipliers.csv', 'arm').empty:  # then the first line says why there is no law
    return start + ' '.join(dict.fromkeys([*found.head(1), *said]) or ['nothing to compare.'])
  law = f'{runs["excluded"].isna().sum()} enter one joint law. At this scale '
  return start + law + (said[0] if said else 'it says nothing of mhc.')


def main(argv: list[str] | None = None) -> int:
  """Prints the page, or README's sentence."""
  parser = argparse.ArgumentParser('python -m analysis.results_page', description=__doc__.splitlines()[0])
  parser.add_argument('--sentence', action='store_true', help="README's sentence")
  a = parser.parse_args(argv)
  print(sentence() if a.sentence else page(), end='\n' if a.sentence else '')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
