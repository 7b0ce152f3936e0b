"""docs/results.md, docs/study.md and README say what the CSVs of docs/results do."""

import json
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis import results_page, verdicts

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'docs' / 'results'
PAGE, STUDY = ((ROOT / 'docs' / name).read_text() for name in ('results.md', 'study.md'))


def words(text):
  """Without its line breaks."""
  return re.sub(r'\s+', ' ', text)


README = words((ROOT / 'README.md').read_text())


def read(name):
  return pd.read_csv(RESULTS / f'{name}.csv')


def test_the_page_and_the_sentence_are_those_of_the_csvs():
  assert results_page.page() == PAGE, 'python -m analysis.results_page > docs/results.md'
  assert words(results_page.sentence()) in README, 'python -m analysis.results_page --sentence'


def test_a_changed_csv_changes_the_page(tmp_path):
  copy = tmp_path / 'results'
  shutil.copytree(RESULTS, copy)
  table = pd.read_csv(copy / 'stability' / 'paper_stability.csv')
  table.assign(diverged=1.0).to_csv(copy / 'stability' / 'paper_stability.csv', index=False)
  (copy / 'ablation' / 'plan.json').unlink(missing_ok=True)
  changed = results_page.page(copy)
  assert '3 of 3 | 3 of 3' in changed and 'Of older code, not made again since.' in changed


def test_every_figure_is_there_with_its_numbers():
  for page in (PAGE, STUDY):
    for name in re.findall(r'!\[[^]]*\]\(([^)]+)\)', page):
      assert (ROOT / 'docs' / name).read_bytes()[:4] == b'\x89PNG' and len(read(name[8:-4])), name
  assert len(re.findall(r'!\[', PAGE)) >= 25
  for path in RESULTS.rglob('*.png'):
    assert path.with_suffix('.csv').is_file(), path


def test_nothing_of_the_machine_is_published():
  for path in (*RESULTS.rglob('*.csv'), *RESULTS.rglob('*.json')):
    assert not re.search(r'/(home|root|work|tmp|Users)/', path.read_text()), path


def test_gaps_of_the_study_by_hand():
  """Paired by size, tokens and seed, straight from the runs."""
  table = read('study-gpu-small/results')
  wide = table.pivot_table(
    index=['width', 'depth', 'tokens', 'seed'], columns='arm', values='validation_loss'
  )
  by_size = verdicts.by_size(table).set_index(['width', 'depth', 'tokens'])
  for arm in ('mhc', 'hc', 'gated_residual'):
    expected = (wide[arm] - wide['residual']).groupby(['width', 'depth', 'tokens']).mean()
    assert by_size[arm].to_numpy() == pytest.approx(expected[by_size.index].to_numpy())
  assert verdicts.markdown(table) in STUDY, 'python -m analysis.verdicts docs/results/study-gpu-small'


def test_the_studys_numbers_that_are_written_in_words():
  found = verdicts.verdicts(read('study-gpu-small/results')).set_index(['arm', 'other'])
  for arm, other in (('identity', 'residual'), ('hc', 'residual'), ('gated_residual', 'residual')):
    r = found.loc[(arm, other)]
    ends = f'{r["mean"]:+.4f} ({r["mean"] - r["mean_half"]:+.4f} to {r["mean"] + r["mean_half"]:+.4f})'
    assert ends in words(STUDY), (arm, ends)


def test_p_values_are_corrected_by_holm():
  found = verdicts.verdicts(read('study-gpu-small/results'))
  p = found['p_value'].to_numpy()
  for own, corrected in zip(p, found['holm'], strict=True):
    smaller = [min(1.0, q * (len(p) - (p < q).sum())) for q in p[p <= own]]
    assert corrected == pytest.approx(max(smaller))


def test_weighted_means_hold_their_truth():
  """Pairs whose noise falls a hundredfold with compute; 95 % intervals of mean and slope, 400 times."""
  rng, cells = np.random.default_rng(0), [(w, 2, w * 1e4) for w in (16, 32, 48, 64, 96, 128)]
  held = []
  for _ in range(400):
    rows = []
    for k, (width, depth, tokens) in enumerate(cells):
      for seed in range(3):
        noise = 0.05 * 10 ** (-0.3 * k) * rng.standard_normal()
        same = {'width': width, 'depth': depth, 'tokens': tokens, 'seed': seed, 'state': 'finished'}
        rows.append(same | {'arm': 'b', 'validation_loss': 2.0, 'flops': 10.0**k})
        rows.append(same | {'arm': 'a', 'validation_loss': 2.01 + 0.002 * k + noise, 'flops': 10.0**k})
    found = verdicts.line(verdicts.differences(pd.DataFrame(rows), 'a', 'b'))
    held.append(abs(found['slope'] - 0.002) < found['slope_half'])
  assert 0.92 <= np.mean(held) <= 0.98


def test_the_prediction_was_made_of_the_smaller_sizes():
  table = read('study/prediction_gpu')
  assert set(table['size']) == {'112x6'} and (table['low'] < table['law']).all()
  assert table['law'].tolist() == pytest.approx(
    [float(v) for v in re.findall(r'\| 112x6 \| (\d\.\d{3}) \|', STUDY)], abs=6e-4
  )


def test_loads_of_the_routers():
  table = read('router/router_loads')
  layers = [name for name in table if name.startswith('layer_')]
  last = table.sort_values('step').groupby(['arm', 'seed']).tail(20)
  worst = last.groupby(['arm', 'seed'])[layers].mean().max(axis=1)
  assert worst.drop('no balancing', level='arm').max() <= 1.4 < 3.8 < worst['no balancing'].min()


def test_coverage_of_the_intervals():
  record = json.loads((RESULTS / 'coverage.json').read_text())
  judged = [row['met'] for row in record['rows'] if row['met'] is not None]
  assert f'{sum(judged)} of {len(judged)} targets' in PAGE
  pairs = [
    row['value']
    for row in record['rows']
    if row['design'] == 'paired' and row['delta'] == 'auto' and row['quantity'].startswith('m[')
  ]
  assert f'| multipliers of paired arms | {100 * min(pairs):.1f} to {100 * max(pairs):.1f} % |' in PAGE
