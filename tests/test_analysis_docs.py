"""The numbers of README, docs/results.md and experiments/LOG.md are those of the CSVs in docs/results/."""

import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'docs' / 'results'


def text(name):
  """A file without its line breaks."""
  return re.sub(r'\s+', ' ', (ROOT / name).read_text())


README, PAGE, LOG = text('README.md'), text('docs/results.md'), text('experiments/LOG.md')


def read(name):
  return pd.read_csv(RESULTS / f'{name}.csv')


def test_every_figure_is_there_with_its_numbers():
  shown = re.findall(r'!\[[^]]*\]\(([^)]+)\)', (ROOT / 'docs' / 'results.md').read_text())
  assert len(shown) >= 25
  for name in shown:
    assert (ROOT / 'docs' / name).read_bytes()[:4] == b'\x89PNG' and len(read(name[8:-4])), name
  for path in RESULTS.rglob('*.png'):
    assert path.with_suffix('.csv').is_file(), path


def test_multipliers_of_the_quick_sweep():
  arrows = read('quick/paper_compute').query("kind == 'arrow'").set_index('arm')
  needs = {
    arm: (f'{row["needed"]:.2f}', f'{row["needed_low"]:.2f} to {row["needed_high"]:.2f}')
    for arm, row in arrows.iterrows()
  }
  value, ends = needs['mhc']
  assert f"mhc needs {value} times residual's compute for the same loss (95 %: {ends})" in README
  assert (
    f"hc needs {needs['hc'][0]} times residual's compute (95 % {needs['hc'][1]}), mhc {value} ({ends}), "
    f'identity {needs["identity"][0]} ({needs["identity"][1]}).'
  ) in LOG
  losses = read('quick/final_losses').query("size == '64x4'").set_index('arm')['validation_loss']
  words = ', '.join(f'{arm} {losses[arm]:.3f}' for arm in ('residual', 'identity', 'hc', 'mhc'))
  assert f'At the largest size, 64x4, one seed: {words}' in LOG


def test_sizes_and_updates_of_all_runs():
  """Parameters of matrix products, in thousands; the most updates, in hundreds."""
  tables = [pd.read_csv(path) for path in RESULTS.glob('*/results.csv')]
  sizes, steps = (
    pd.concat([t[name] for t in tables if name in t]) for name in ('params_matmul', 'num_steps')
  )
  low, high = (f'{size / 1e3:.0f}k' for size in (sizes.min(), sizes.max()))
  assert f'{low} to {high} parameters, 80 to {round(steps.max(), -2):.0f} updates' in PAGE


def test_exponents_and_optima_of_the_isoflop_runs():
  best = read('isoflop/paper_optimal_sizes').query("method == 'parabola'")

  def law(arm, name):
    row = best[(best['arm'] == arm) & (best['optimum'] == name)].iloc[0]
    return f'{row["exponent"]:.2f}', f'{row["low"]:.2f} to {row["high"]:.2f}'

  (n, n_ends), (m, m_ends) = law('residual', 'N*'), law('mhc', 'N*')
  assert f'N* ~ C^{n} (residual; 95 % {n_ends}) and C^{m} (mhc; {m_ends}), from parabolas' in PAGE
  assert f'Exponents of N*: {n} (95 % {n_ends}) and {m} ({m_ends}); of D*: ' in LOG
  minima = read('isoflop/paper_isoflop').query("kind == 'minimum' and method == 'parabola'")
  for k, budget in enumerate(('2e11', '3.2e11', '5e11', '8e11')):
    cells = []
    for name, scale, unit in (('N*', 1e3, 'k'), ('D*', 1e6, 'M')):
      values = [
        best[(best['arm'] == a) & (best['optimum'] == name)]['value'].iloc[k] for a in ('residual', 'mhc')
      ]
      digits = 0 if name == 'N*' else 2
      cells.append(', '.join(f'{v / scale:.{digits}f}{unit}' for v in values))
    cells.append(', '.join(f'{minima[minima["arm"] == a]["loss"].iloc[k]:.3f}' for a in ('residual', 'mhc')))
    assert f'| {budget} | {" | ".join(cells)} |' in LOG


def test_loads_of_the_routers():
  table = read('router/router_loads')
  layers = [name for name in table if name.startswith('layer_')]
  last = table.sort_values('step').groupby(['arm', 'seed']).tail(20)
  worst = last.groupby(['arm', 'seed'])[layers].mean().max(axis=1)
  balanced = worst.drop('no balancing', level='arm')
  assert balanced.max() <= 1.4 and f'{worst["no balancing"].max():.1f}' == '4.0'
  assert 'No expert above 1.4 times the mean load' in PAGE and 'with loss-free balancing; 4.0 without' in PAGE
  for arm in dict.fromkeys(table['arm']):
    assert ', '.join(f'{v:.2f}' for v in worst[arm]) in LOG, arm


def test_slopes_of_the_coordinate_check():
  table = read('coordinate_check/coordinates')
  worst = table[table['transfer']].groupby('arm')['slope'].apply(lambda v: v.abs().max())
  words = ', '.join(
    f'{worst[arm]:.2f} ({arm}' + ')' * (arm != 'hc') for arm in ('residual', 'mhc', 'identity', 'hc')
  )
  assert f'with the rules: {words}, whose' in PAGE


def test_coverage_of_the_intervals():
  rows = pd.DataFrame(json.loads((RESULTS / 'coverage.json').read_text())['rows'])
  auto = rows[rows['delta'] == 'auto']

  def span(values):
    return f'{100 * values.min():.1f} to {100 * values.max():.1f} %'

  falling = rows['case'].str.contains('falling') & (rows['design'] == 'single')
  equal = (rows['delta'] == 'auto') & (rows['design'] == 'single') & ~falling
  assert f'in {span(rows[equal]["value"])} of simulations' in PAGE
  assert f'falls twentyfold in {span(rows[falling]["value"])}' in PAGE
  assert f'cluster column, in {span(rows.loc[rows["design"] == "trunks", "value"])}' in PAGE
  pairs = auto[(auto['design'] == 'paired') & auto['quantity'].str.contains(r'm\[')]['value']
  assert f'multipliers of paired arms in {span(pairs)}' in PAGE
  ends = auto[(auto['design'] == 'gain') & auto['quantity'].str.contains('size')]['value']
  assert f'an E or an exponent of its own, in {span(ends)}' in PAGE
  false = auto[auto['quantity'].str.startswith('false')]['value'].dropna()
  assert f'False "saves compute": {span(false)}' in PAGE
  judged = rows['met'].dropna()
  assert f'{int(judged.astype(bool).sum())} of {len(judged)} targets' in PAGE
  spread, mean = (auto[auto['quantity'] == name]['value'].item() for name in ('sd(log m)', 'exp(mean log m)'))
  assert f'mean {mean:.4f}, sd(log m) {spread:.3f}' in PAGE


@pytest.mark.parametrize('arm', ['residual', 'birkhoff_sinkhorn', 'birkhoff_dual', 'birkhoff_permutations'])
def test_identity_or_mixing(arm):
  row = read('identity_or_mixing/final_losses').set_index('arm').loc[arm]
  assert f'| {arm} | {row["difference"]:+.4f} | {row["low"]:.4f} to {row["high"]:.4f} |' in LOG


def test_ablation():
  gap = read('ablation/ablation').set_index('arm')['difference']
  for maps in ('res', 'res + pre', 'res + post', 'pre + post', 'res + pre + post'):
    name = maps.replace(' + ', ' ')
    for base in ('hc', 'mhc'):
      value = gap.get(f'{base} {name}', gap.get(base) if maps.count('+') == 2 else None)
      if value is not None:
        assert re.search(rf'\| {re.escape(maps)} \|[^|]*\|[^|]*\|', LOG), maps
        assert f'{value:+.3f}' in re.search(rf'\| {re.escape(maps)} \|[^|]*\|[^|]*\|', LOG)[0], (base, maps)


def test_ranks():
  def means(name, axis):
    table = read(f'rank/{name}')
    return table[table['kind'] == 'mean'].set_index('rank')['validation_loss']

  generator, streams = means('loss_vs_connection_rank', 'rank'), means('loss_vs_connection_streams', 'n')
  weights, projected = means('loss_vs_weights_rank', 'rank'), means('loss_vs_projected_rank', 'rank')
  assert '| generator phi (of 24) | ' + ' | '.join(f'{generator[k]:.3f}' for k in (1, 2, 4, 8)) in LOG
  assert f'| streams n | {streams[1]:.3f} | {streams[2]:.3f} |' in LOG and f'| {streams[8]:.3f} |' in LOG
  for words, values in (('weights W = U V', weights), ('W projected to rank r', projected)):
    line = re.search(rf'\| {re.escape(words)}[^|]*\|([^|]*\|){{4}}', LOG)[0]
    said = [float(cell) for cell in re.findall(r'\d\.\d{3}', line)]
    assert said == pytest.approx(values.tolist(), abs=6e-4)  # three digits, once rounded twice


def test_stability():
  table = read('stability/paper_stability')
  cells = table.groupby(['arm', 'depth', 'lr'])['diverged'].sum()
  for arm in ('hc', 'orthogonal_cayley', 'mhc'):
    counts = [', '.join(f'{cells[arm, depth, lr]:.0f}' for lr in (0.064, 0.256)) for depth in (8, 16)]
    assert f'| {arm} | {counts[0]} | {counts[1]} |' in LOG
  assert int(table[table['arm'] == 'orthogonal_cayley']['diverged'].sum()) == 8
  assert 'diverge in 8 of 27 runs' in LOG and np.isclose(table['depth'].max(), 16)
  first = (
    table[(table['depth'] == 16) & (table['lr'] == table['lr'].min())]
    .groupby('arm')['validation_loss']
    .mean()
  )
  assert f'smallest rate: {first["hc"]:.3f} against {first["identity"]:.3f} (identity)' in LOG
