"""docs/results.md, docs/study.md and README say what the CSVs of docs/results do."""

import json
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis import results_page, results_tables

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'docs' / 'results'
PAGE, STUDY = ((ROOT / 'docs' / name).read_text() for name in ('results.md', 'study.md'))


def words(text):
  """Without its line breaks."""
  return re.sub(r'\s+', ' ', text)


README = words((ROOT / 'README.md').read_text())


def read(name):
  return pd.read_csv(RESULTS / f'{name}.csv')


def rows_of(section, page=PAGE):
  """Cells of the first table below a heading that begins so, by the first cell."""
  (text,) = re.findall(rf'^## {section}\b(?!_).*?$(.*?)(?=^## |\Z)', page, re.MULTILINE | re.DOTALL)[:1] or [
    ''
  ]
  first = next((block for block in text.split('\n\n') if re.search(r'^\| ', block, re.MULTILINE)), '')
  lines = [line.strip('| ').split(' | ') for line in first.splitlines() if line.startswith('| ')]
  return {cells[0]: cells[1:] for cells in lines[1:]}


def published(*names):
  """Folders of results that have these CSVs; what is not run anew may lack them."""
  every = sorted(path.parent.name for path in RESULTS.glob('*/results.csv'))
  return [f for f in every if all((RESULTS / f / f'{name}.csv').is_file() for name in names)]


def test_the_page_and_the_sentence_are_those_of_the_csvs():
  assert results_page.page() == PAGE, 'python -m analysis.results_page > docs/results.md'
  assert words(results_page.sentence()) in README, 'python -m analysis.results_page --sentence'


def without_numbers(path, table):
  """Refused numbers: an empty cell each, but for what says which run it is."""
  keys = {'seed', 'step', 'depth', 'width', 'lr', 'rank', 'transfer', 'pairs', 'seeds'}
  numbers = [c for c in table.select_dtypes('number') if c not in keys and not c.startswith('params')]
  return table if path.stem == 'results' else table.assign(**dict.fromkeys(numbers))


def without_an_arm(_, table):
  return table[table['arm'] != table['arm'].iloc[-1]] if 'arm' in table else table


def without_rows(_, table):
  return table.head(0)


@pytest.mark.parametrize('change', [without_numbers, without_an_arm, without_rows])
def test_other_results_have_a_page_and_a_sentence(tmp_path, change):
  copy = tmp_path / 'results'
  shutil.copytree(RESULTS, copy, ignore=shutil.ignore_patterns('paper_*_maps*', 'mixing_*', 'rollout*'))
  for path in copy.glob('*/*.csv'):
    change(path, pd.read_csv(path)).to_csv(path, index=False)
  page, sentence = results_page.page(copy), results_page.sentence(copy)
  assert page != PAGE and 'nan' not in page and 'None' not in page
  assert sentence.startswith('One `make sweep`, ') and 'nan' not in sentence


def test_results_that_are_gone_leave_their_place(tmp_path):
  """Of tables nothing is left but the runs; a plan and a law that are missing are said to be."""
  copy = tmp_path / 'results'
  for name in published():
    (copy / name).mkdir(parents=True)
    shutil.copy(RESULTS / name / 'results.csv', copy / name)
  (copy / 'quick').mkdir(exist_ok=True)
  (copy / 'quick' / 'headlines.csv').write_text("sentence\nNo law: why.\nhc's is so.\nmhc's is so.\n")
  (copy / 'new_one').mkdir()
  pd.DataFrame({'state': ['finished'], 'git_revision': ['0123456789ab-dirty']}).to_csv(
    copy / 'new_one' / 'results.csv', index=False
  )
  page = results_page.page(copy)
  assert 'older code: no plan' in page and '## new_one' in page and '0123456789ab-dirty' in page
  assert results_page.sentence(copy).endswith(" runs: No law: why. mhc's is so.")


def test_every_figure_is_there_with_its_numbers():
  for page in (PAGE, STUDY):
    for name in re.findall(r'!\[[^]]*\]\(([^)]+)\)', page):
      assert (ROOT / 'docs' / name).read_bytes()[:4] == b'\x89PNG' and len(read(name[8:-4])), name
  for path in RESULTS.rglob('*.png'):
    assert path.with_suffix('.csv').is_file(), path
    assert f'](results/{path.parent.name}/{path.name})' in PAGE, path


def test_nothing_of_the_machine_is_published():
  for path in (*RESULTS.rglob('*.csv'), *RESULTS.rglob('*.json')):
    assert not re.search(r'/(home|root|work|tmp|Users)/', path.read_text()), path


def test_growth_is_that_of_gradients_made_by_hand(tmp_path):
  rows = [
    {
      'arm': 'a',
      'seed': seed,
      'update': update,
      'sublayer': k,
      'gradient': g * update,
      'mean': 0.5,
      'mean_least': 0.1,
    }
    for update in (0, 3)
    for seed, factor in ((0, 2.0), (1, 4.0))
    for k, g in enumerate((factor**4, factor**3, np.inf, factor, 1.0))
  ]
  pd.DataFrame(rows).to_csv(tmp_path / 'gradients.csv', index=False)
  assert '| a | 2.00, 4.00 | 5e+01, 8e+02 | 0.50 (0.10), 0.50 (0.10) |' in results_tables.growth(tmp_path)
  assert results_tables.growth(tmp_path / 'none') == []


# What follows is arithmetic on the CSVs alone, by nothing of analysis/.


@pytest.mark.parametrize('name', published())
def test_runs_are_counted(name):
  states = pd.read_csv(RESULTS / name / 'results.csv')['state']
  row = re.search(rf'^\| {name} \|.*', PAGE, re.MULTILINE)[0]
  for state in set(states):
    assert f'{(states == state).sum()} {state}' in row


def test_words_say_what_the_intervals_do():
  found = re.findall(r'([+-]\d+\.\d+) to ([+-]\d+\.\d+) \S (undecided|lower|higher)', PAGE)
  for low, high, word in found:
    low, high = float(low), float(high)
    assert low <= high
    assert {'undecided': low <= 0 <= high, 'lower': high <= 0, 'higher': low >= 0}[word], (low, high, word)
  for low, high, word in re.findall(r'\((\d+\.\d+) to (\d+\.\d+)\) \| (\w+)', PAGE):
    if word in ('undecided', 'saves', 'costs'):
      good = {
        'undecided': float(low) <= 1 <= float(high),
        'saves': float(high) <= 1,
        'costs': float(low) >= 1,
      }
      assert good[word], (low, high, word)


def once(name):
  """Losses of finished runs by arm, size and seed; None where rates, budgets or ranks are several.

  Full rank, and an arm's usual number of streams at its size (those of attention residuals follow the depth).
  """
  runs = read(f'{name}/results')
  runs = runs[runs['state'] == 'finished']
  usual = runs.groupby(['arm', 'width', 'depth'])['connection_streams'].transform(lambda v: v.mode().iloc[0])
  runs = runs[runs['connection_streams'] == usual]
  for column in ('connection_rank', 'weights_rank', 'projected_rank'):
    runs = runs[runs[column].isna()]
  sizes = [f'{w:.0f}x{d:.0f}' for w, d in zip(runs['width'], runs['depth'], strict=True)]
  losses = pd.Series(runs['validation_loss'].to_numpy(), [runs['arm'], sizes, runs['seed']])
  return None if losses.index.has_duplicates else losses.sort_index()


@pytest.mark.parametrize('name', published('gaps'))
def test_gaps_are_means_of_paired_runs(name):
  losses, gaps = once(name), read(f'{name}/gaps')
  if losses is None:  # a question of rates or budgets
    return
  others = set(losses.index.get_level_values(0)) - set(gaps['arm'])
  reference = 'residual' if 'residual' in others else min(others)
  for _, gap in gaps.iterrows():
    pairs = (losses[gap['arm'], gap['size']] - losses[reference, gap['size']]).dropna()
    assert len(pairs) == gap['pairs'] and pairs.mean() == pytest.approx(gap['difference'], abs=1e-6)
    assert np.isnan(gap['low']) or gap['low'] + gap['high'] == pytest.approx(2 * gap['difference'])


@pytest.mark.parametrize('name', published('multipliers'))
def test_multipliers_agree_with_a_straight_line(name):
  """ln loss = a + b ln C + c[arm], by least squares: compute needed is exp(c / -b).

  Within twice the interval: a line has no floor, which bends the law.
  """
  runs, multipliers = read(f'{name}/results'), read(f'{name}/multipliers')
  runs = runs[runs['excluded'].isna()]
  known = multipliers.dropna(subset='flops')
  arms = [arm for arm in dict.fromkeys(runs['arm']) if arm in set(multipliers['arm'])]
  columns = [np.ones(len(runs)), np.log(runs['flops']), *(runs['arm'] == arm for arm in arms)]
  solved, *_ = np.linalg.lstsq(
    np.stack(columns, 1).astype(float), np.log(runs['validation_loss']), rcond=None
  )
  for _, row in known.iterrows():
    needed = solved[2 + arms.index(row['arm'])] / -solved[1]
    low, high = (-np.log(v) for v in json.loads(row['flops_interval']))
    assert abs(needed + np.log(row['flops'])) < abs(high - low), (row['arm'], needed)
    assert rows_of(name)[row['arm']][0].startswith(f'{1 / row["flops"]:.2f} (')


def test_readmes_multiplier_is_one_over_the_csvs():
  """At all sizes, or at the smallest where it changes; else README says of no compute that mhc needs."""
  table = read('quick/multipliers') if published('multipliers').count('quick') else pd.DataFrame({'arm': []})
  rows = table[table['arm'] == 'mhc'].iloc[0].to_dict() if (table['arm'] == 'mhc').any() else {}
  if rows.get('flops', np.nan) > 0:
    assert f'mhc needs {1 / rows["flops"]:.2f} times' in README
  elif rows.get('trend') in ('fades', 'grows'):
    assert f'mhc needs {1 / rows["smallest.value"]:.2f} (' in README
  else:
    assert 'mhc needs' not in README


def test_best_rates_are_the_lowest_means():
  for name in published():
    runs = read(f'{name}/results')
    if not name.startswith('learning_rate') or runs['validation_loss'].isna().any():
      continue
    means = runs.groupby(['arm', 'width', 'depth', 'lr'])['validation_loss'].mean()
    for arm, cells in rows_of(name).items():
      best = [own.min() for _, own in means.loc[arm].groupby(['width', 'depth'])]
      assert [f'{loss:.3f}' for loss in sorted(best)] == sorted(cell.split()[0] for cell in cells)


def test_loads_of_the_routers():
  table = read('router/router_loads')
  layers = [name for name in table if name.startswith('layer_')]
  for arm, runs in table.groupby('arm'):
    worst = [own.nlargest(20, 'step')[layers].mean().max() for _, own in runs.groupby('seed')]
    assert f'{arm} {", ".join(f"{v:.2f}" for v in worst)}' in PAGE


def test_diverged_runs_are_counted():
  for name in published('paper_stability'):
    runs = read(f'{name}/results')
    for arm, cells in rows_of(name).items():
      states = runs.loc[runs['arm'] == arm, 'state']
      assert cells[0] == f'{(states == "diverged").sum()} of {len(states)}', (name, arm)


def test_slopes_are_those_of_the_coordinates():
  table = read('coordinate_check/coordinates')
  largest = {}
  for (arm, axis, rules, _), own in table.groupby(['arm', 'axis', 'transfer', 'coordinate']):
    slope = np.polyfit(np.log(own[axis]), np.log(own['value']), 1)[0]
    assert own['slope'].to_numpy() == pytest.approx(slope, abs=1e-6)
    largest[arm, axis, rules] = max(abs(slope), largest.get((arm, axis, rules), 0))
  for arm, cells in rows_of('coordinate_check').items():
    assert sorted(cells) == sorted(f'{v:.2f}' for (own, *_), v in largest.items() if own == arm)


def test_what_multi_token_prediction_changes():
  runs = read('mtp/results').set_index(['arm', 'seed'])['validation_loss']
  arms = [arm for arm in dict.fromkeys(runs.index.get_level_values(0)) if f'{arm}, mtp' in runs]
  differences = [(runs[f'{arm}, mtp'] - runs[arm]).mean() for arm in arms]
  assert [cell.strip('*').split()[0] for cell in rows_of('mtp')['mtp']] == [f'{d:+.3f}' for d in differences]


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
