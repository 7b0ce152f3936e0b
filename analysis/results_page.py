"""docs/results.md and README's sentence, from the CSVs of docs/results: no number is written by hand.

  python -m analysis.results_page > docs/results.md
  python -m analysis.results_page --sentence     # README's, of the quick sweep

A sweep comes there by analysis/publish.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message

from .publish import FIGURES, RESULTS

HEAD = """# Results

Written by `python -m analysis.results_page` from the CSVs beside the figures. What was learned, and what was
found before: `experiments/LOG.md`; all of it together: [The study](study.md). Losses are nats per token on
the validation split, intervals 95 %. A folder of `results/` has its runs (`results.csv`) and its plan. It is

- made by `mhc sweep NAME`, `python -m analysis.publish runs/NAME`, and this page's command;
- checked by `mhc verify` with that folder, which trains the cheapest runs again and compares.
"""
TITLES = {
  'study-gpu': 'study: seven arms on a GPU',
  'study-gpu-small': 'study: seven arms on a GPU, all but the largest size',
  'study-cpu': 'study: seven arms on two cores',
  'quick': 'quick: four arms over width, depth and manifold rank',
  'learning_rate': 'learning_rate: sensitivity and transfer of the rate',
  'learning_rate_muon': 'learning_rate by Muon',
  'attention_residual': 'attention_residual: reads by attention over earlier outputs',
  'identity_or_mixing': 'identity_or_mixing: does mixing beat H_res = I?',
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
}
CAPTIONS = {
  'loss_vs_flops': 'Loss against compute',
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
}


def _table(columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
  lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
  return [*lines, *('| ' + ' | '.join(map(str, row)) + ' |' for row in rows), '']


def _interval(low: float, high: float, digits: int = 3) -> str:
  return '' if pd.isna(low) else f'{low:+.{digits}f} to {high:+.{digits}f}'


def _verdict(low: float, high: float) -> str:
  if pd.isna(low):
    return 'one seed, or a rate chosen among more: no interval'
  return 'undecided' if low <= 0 <= high else 'lower loss' if high < 0 else 'higher loss'


def _what(table: pd.DataFrame) -> str:
  """The runs of a folder in a sentence."""
  words = [', '.join(f'{count} {state}' for state, count in table['state'].value_counts().items())]
  for name, unit, what in (
    ('params_matmul', 1e3, 'k matmul parameters'),
    ('tokens', 1e6, 'M tokens'),
  ):
    if name in table:
      low, high = (f'{v / unit:.3g}' for v in (table[name].min(), table[name].max()))
      words.append(f'{low} to {high}{what}' if low != high else f'{low}{what}')
  for name, what in (('seed', 'seeds'), ('data_digest', 'corpus'), ('git_revision', 'code')):
    if name in table:
      values = sorted({f'{v:.0f}' if isinstance(v, float) else str(v)[:12] for v in table[name].dropna()})
      words.append(f'{what} {", ".join(values)}')
  return f'{len(table)} runs: {"; ".join(words)}.'


def gaps(folder: Path) -> list[str]:
  """Paired differences to the reference at the largest size."""
  table = pd.read_csv(folder / 'gaps.csv')
  if table.empty:
    return []
  largest = table.groupby('size')['flops'].mean().idxmax()
  rows = [
    (
      *(g['arm'], largest, f'{g["flops"]:.1e}', f'{g["pairs"]:.0f}', f'{g["difference"]:+.4f}'),
      *(_interval(g['low'], g['high']), _verdict(g['low'], g['high'])),
    )
    for _, g in table[table['size'] == largest].sort_values('difference').iterrows()
  ]
  return _table(('arm', 'size', 'FLOPs', 'seeds', 'difference', 'interval', ''), rows)


def sentences(folder: Path) -> list[str]:
  """What the report says, a line for each arm."""
  path = folder / 'headlines.csv'
  return [f'- {line}' for line in pd.read_csv(path)['sentence']] + [''] if path.is_file() else []


def best_rates(folder: Path) -> list[str]:
  """Each arm's best rate at each size, with its mean loss over seeds."""
  table = pd.read_csv(folder / 'results.csv')
  table['size'] = [f'{w:.0f}x{d:.0f}' for w, d in zip(table['width'], table['depth'], strict=True)]
  means = table.groupby(['arm', 'size', 'lr'], sort=False)['validation_loss'].mean().dropna()
  best = means.loc[means.groupby(['arm', 'size'], sort=False).idxmin()].reset_index()
  cells = {(r['arm'], r['size']): f'{r["validation_loss"]:.3f} ({r["lr"]:g})' for _, r in best.iterrows()}
  sizes = dict.fromkeys(table['size'])
  rows = [(arm, *(cells.get((arm, size), '') for size in sizes)) for arm in dict.fromkeys(table['arm'])]
  return _table(('arm', *(f'{size}: loss (rate)' for size in sizes)), rows)


def finals(folder: Path) -> list[str]:
  """Mean final loss of every arm at every size."""
  table = pd.read_csv(folder / 'results.csv')
  keys = ['arm', 'width', 'depth', 'lr']
  means = table.groupby(keys, sort=False)['validation_loss'].agg(['mean', 'std', 'count']).reset_index()
  return _table(
    ('arm', 'size', 'rate', 'runs', 'loss', 'sd'),
    [
      (
        *(r['arm'], f'{r["width"]:.0f}x{r["depth"]:.0f}', f'{r["lr"]:g}', f'{r["count"]:.0f}'),
        *(f'{r["mean"]:.3f}', '' if pd.isna(r['std']) else f'{r["std"]:.3f}'),
      )
      for _, r in means.iterrows()
    ],
  )


def diverged(folder: Path) -> list[str]:
  """Diverged runs by depth and rate, and the largest composite gain."""
  table = pd.read_csv(folder / 'paper_stability.csv')
  cells = [(depth, lr) for depth in sorted(table['depth'].unique()) for lr in sorted(table['lr'].unique())]
  rows = []
  for arm, own in table.groupby('arm', sort=False):
    counts = []
    for depth, lr in cells:
      cell = own[(own['depth'] == depth) & (own['lr'] == lr)]['diverged']
      counts.append(f'{cell.sum():.0f} of {len(cell)}' if cell.sum() else '')
    largest = own[['gradient_norm', 'composite_gain']].max()
    rows.append((arm, *counts, *(f'{v:.2g}' for v in largest)))
  names = tuple(f'{depth:.0f} layers, {lr:g}' for depth, lr in cells)
  return _table(('arm', *names, 'largest gradient norm', 'largest gain'), rows)


def ranks(folder: Path) -> list[str]:
  """Mean loss by rank, of each figure of ranks."""
  rows = []
  for path in sorted(folder.glob('loss_vs_*.csv')):
    table = pd.read_csv(path)
    if 'rank' in table:
      means = table[table['kind'] == 'mean']
      cells = [f'{r["rank"]:g}: {r["validation_loss"]:.3f}' for _, r in means.iterrows()]
      rows.append((path.stem.removeprefix('loss_vs_').replace('_', ' '), ', '.join(cells)))
  return _table(('rank of', 'rank: loss'), rows)


def optimal_sizes(folder: Path) -> list[str]:
  """Exponents of the best size and tokens over compute."""
  table = pd.read_csv(folder / 'paper_optimal_sizes.csv').drop_duplicates(['arm', 'optimum', 'method'])
  rows = [
    (r['arm'], r['optimum'], r['method'], f'{r["exponent"]:.2f}', f'{r["low"]:.2f} to {r["high"]:.2f}')
    for _, r in table.dropna(subset='exponent').iterrows()
  ]
  return _table(('arm', 'of', 'by', 'exponent over FLOPs', 'interval'), rows)


def loads(folder: Path) -> list[str]:
  """The fullest expert over the mean, of the worst layer over the last 20 batches."""
  table = pd.read_csv(folder / 'router_loads.csv')
  layers = [name for name in table if name.startswith('layer_')]
  last = table.sort_values('step').groupby(['arm', 'seed']).tail(20)
  worst = last.groupby(['arm', 'seed'])[layers].mean().max(axis=1)
  rows = [(arm, ', '.join(f'{v:.2f}' for v in own)) for arm, own in worst.groupby('arm')]
  return _table(('router', 'fullest expert over the mean, worst layer, by seed'), rows)


def ablation(folder: Path) -> list[str]:
  """mHC's Table 1."""
  rows = [
    (
      *(r['arm'], r['H_res'], r['H_pre'], r['H_post'], f'{r["validation_loss"]:.3f}'),
      *('' if pd.isna(r['difference']) else f'{r["difference"]:+.3f}', _interval(r['low'], r['high'])),
    )
    for _, r in pd.read_csv(folder / 'ablation.csv').iterrows()
  ]
  return _table(('arm', 'H_res', 'H_pre', 'H_post', 'loss', 'difference', 'interval'), rows)


TABLES: dict[str, tuple[Callable[[Path], list[str]], ...]] = {
  'quick': (sentences,),
  'study': (sentences, gaps),
  'learning_rate': (best_rates,),
  'attention_residual': (best_rates,),
  'identity_or_mixing': (gaps,),
  'ablation': (ablation,),
  'stability': (diverged,),
  'rotations': (diverged,),
  'rank': (ranks,),
  'isoflop': (optimal_sizes,),
  'router': (loads,),
  'mtp': (finals,),
}


def section(folder: Path) -> list[str]:
  """One folder: what was run, what was found, its figures."""
  name, lines = folder.name, [f'## {TITLES.get(folder.name, folder.name)}', '']
  experiment = next((k for k in FIGURES if name == k or name.startswith((f'{k}-', f'{k}_'))), name)
  table = pd.read_csv(folder / 'results.csv')
  anew = (folder / 'plan.json').is_file()
  lines += [_what(table) + ' Of older code, not made again since.' * (not anew), '']
  for part in TABLES.get(experiment, ()) if anew else ():
    lines += part(folder)
  figures = FIGURES.get(experiment) or sorted(path.stem for path in folder.glob('*.png'))
  shown = [
    f'![{CAPTIONS.get(stem, stem.replace("_", " ").capitalize())}](results/{name}/{stem}.png)'
    for stem in figures
    if (folder / f'{stem}.png').is_file()
  ]
  pairs = [' '.join(shown[k : k + 2]) for k in range(0, len(shown), 2)]
  return [*lines, *pairs, ''] if shown else lines


def coordinates(folder: Path) -> list[str]:
  """The coordinate check: the largest slope of each arm with the rules of transfer."""
  table = pd.read_csv(folder / 'coordinates.csv')
  worst = table[table['transfer']].groupby('arm', sort=False)['slope'].apply(lambda v: v.abs().max())
  words = ', '.join(f'{value:.2f} ({arm})' for arm, value in worst.items())
  return [
    '## coordinate_check: what training changes keeps its size over width and depth',
    '',
    f'`python -m experiments.coordinate_check`. Largest slope in log-log with the rules: {words}.',
    '',
    f'![Coordinate check](results/{folder.name}/coordinates.png)',
    '',
  ]


def adaptation(folder: Path) -> list[str]:
  """Adaptation while reading: bits per byte by subset of parameters."""
  table = pd.read_csv(folder / 'adaptation.csv')
  rows = [
    (r['arm'], r['subset'], r['scalars'], f'{r["change"]:+.4f}', _interval(r['low'], r['high'], 4))
    for _, r in table[~table['subset'].str.contains('connection')].iterrows()
  ]
  return [
    '## adaptation: of maps while reading',
    '',
    '`python -m experiments.adaptation`; bits per byte.',
    '',
    *_table(('arm', 'what adapts', 'scalars', 'change', 'interval'), rows),
    f'![Adaptation while reading](results/{folder.name}/adaptation.png)',
    '',
  ]


def coverage(results: Path) -> list[str]:
  """How often the intervals hold, by simulation."""
  rows = pd.DataFrame(json.loads((results / 'coverage.json').read_text())['rows'])
  judged = rows['met'].dropna().astype(bool)
  auto = rows[rows['delta'] == 'auto']

  def span(kept: pd.DataFrame) -> str:
    return f'{100 * kept["value"].min():.1f} to {100 * kept["value"].max():.1f} %'

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
    '',
    '`mhc coverage --simulations 1000` over the designs that a referee would try (`results/coverage.json`).',
    f'Nominal 95 % intervals hold as follows; {judged.sum()} of {len(judged)} targets (92 to 98 %, false at '
    'most 3 %) are met.',
    '',
    *_table(
      ('of', 'hold in'), [(what, span(auto[which & auto['value'].notna()])) for what, which in kinds.items()]
    ),
  ]


def page(results: Path = RESULTS) -> str:
  """The page as Markdown."""
  names = [name for name in TITLES if (results / name / 'results.csv').is_file()]
  names += sorted(p.parent.name for p in results.glob('*/results.csv') if p.parent.name not in TITLES)
  lines = [HEAD]
  for name in names:
    lines += section(results / name)
  for name, part in (('coordinate_check', coordinates), ('adaptation', adaptation)):
    if (results / name).is_dir():
      lines += part(results / name)
  return '\n'.join(lines + coverage(results)).rstrip() + '\n'


def sentence(results: Path = RESULTS) -> str:
  """README's sentence: what the quick sweep found of mhc."""
  table = pd.read_csv(results / 'quick' / 'results.csv')
  found = pd.read_csv(results / 'quick' / 'headlines.csv')['sentence']
  of_mhc = [line for line in found if line.startswith('mhc ')] or [found.iloc[0]]
  used = int(table['excluded'].isna().sum())
  return f'One `make sweep`: {used} of its {len(table)} runs enter one joint law. At this scale {of_mhc[0]}'


def main(argv: list[str] | None = None) -> int:
  """Prints the page, or README's sentence."""
  parser = argparse.ArgumentParser('python -m analysis.results_page', description=__doc__.splitlines()[0])
  parser.add_argument('--sentence', action='store_true', help="README's sentence")
  a = parser.parse_args(argv)
  print(sentence() if a.sentence else page(), end='\n' if a.sentence else '')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
