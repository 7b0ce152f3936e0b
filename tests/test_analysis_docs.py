"""docs/results.md, docs/study.md and README say what the CSVs of docs/results do."""

import itertools
import json
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis import costs, rank_verdicts, results_page, results_tables, study_tables, verdicts
from mhc_jax.errors import ConfigError

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
  for name in ('study-gpu-small', 'study-cpu'):
    assert verdicts.markdown(read(f'{name}/results')) in STUDY, (
      f'python -m analysis.verdicts docs/results/{name}'
    )


def test_the_study_has_what_muon_changes():
  muon, adamw = read('study-cpu-muon/results'), read('study-cpu/results')
  lower = adamw.merge(muon, on=[*verdicts.CELL, 'arm', 'seed'], suffixes=('', '_muon'))
  lower = lower.assign(by=lower['validation_loss'] - lower['validation_loss_muon'])
  means = lower.groupby(['width', 'arm'])['by'].mean()
  ends = [f'{f(means[width]):.2f}' for width in (32, 48) for f in (min, max)]
  said = 'by {} to {} nats at 32x2 and {} to {} at 48x3'.format(*ends)
  assert said in words(STUDY), said


@pytest.mark.parametrize(
  ('name', 'arms'),
  [
    ('study-gpu-small', ('identity', 'hc', 'gated_residual', 'attention_residual')),
    ('study-cpu', ('mhc', 'identity', 'gated_residual', 'attention_residual')),
  ],
)
def test_the_studys_numbers_that_are_written_in_words(name, arms):
  found = verdicts.verdicts(read(f'{name}/results')).set_index(['arm', 'other'])
  for arm in arms:
    r = found.loc[(arm, 'residual')]
    ends = f'{r["mean"]:+.4f} ({r["mean"] - r["mean_half"]:+.4f} to {r["mean"] + r["mean_half"]:+.4f})'
    assert ends in words(STUDY), (arm, ends)


@pytest.mark.parametrize('what', ['mean', 'slope'])
def test_p_values_are_corrected_by_holm(what):
  found = verdicts.verdicts(read('study-gpu-small/results'))
  p = found[f'{what}_p'].to_numpy()
  for own, corrected in zip(p, found[f'{what}_holm'], strict=True):
    smaller = [min(1.0, q * (len(p) - (p < q).sum())) for q in p[p <= own]]
    assert corrected == pytest.approx(max(smaller))


ENDED = {'state': 'finished', 'axis': None, 'data_digest': 'd'}


def simulated(rng, odd=0.0):
  """The study's arms at six cells, three paired seeds; noise falls thirtyfold over five decades.

  All are equal but mhc, lower by 0.01, and by `odd` more in the last cell.
  """
  rows, arms = [], dict.fromkeys(itertools.chain(*verdicts.CONTRASTS))
  for k, seed in itertools.product(range(6), range(3)):
    same = {'width': 16 * (k + 1), 'depth': 2, 'tokens': 1e5, 'seed': seed} | ENDED
    for arm in arms:
      loss = 2.0 - (0.01 + odd * (k == 5)) * (arm == 'mhc') + 0.03 * 10 ** (-0.3 * k) * rng.standard_normal()
      rows.append(same | {'arm': arm, 'flops': 10.0**k, 'validation_loss': loss})
  return pd.DataFrame(rows)


def test_intervals_of_means_and_slopes_hold_their_truth():
  """95 % intervals of all contrasts over 200 sweeps: weights of each contrast's own hold in 90 %."""
  rng, held = np.random.default_rng(0), {'mean': [], 'slope': [], 'cells': []}
  for _ in range(200):
    found = verdicts.verdicts(simulated(rng))
    truth = 0.01 * ((found['other'] == 'mhc').astype(float) - (found['arm'] == 'mhc'))
    held['mean'] += list((found['mean'] - truth).abs() < found['mean_half'])
    held['slope'] += list(found['slope'].abs() < found['slope_half'])
    held['cells'] += list(found['cells_p'] > 0.05)
  shares = {what: float(np.mean(each)) for what, each in held.items()}
  assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def test_a_cell_that_differs_is_told():
  [odd, even] = (verdicts.verdicts(simulated(np.random.default_rng(0), by)).iloc[0] for by in (0.01, 0.0))
  assert odd['cells_p'] < 1e-3 < 0.05 < even['cells_p']


def test_one_seed_has_no_intervals():
  table = simulated(np.random.default_rng(0))
  with pytest.raises(ConfigError, match='two seeds'):
    verdicts.verdicts(table[table['seed'] == 0])
  with pytest.raises(ConfigError, match='mhc - residual'):
    verdicts.verdicts(table[table['arm'] == 'mhc'])


def test_several_runs_of_one_cell_are_no_contrast():
  """Two rates of an arm; and its runs at a rank, which are not the arm."""
  table = simulated(np.random.default_rng(0))
  other = table[table['arm'] == 'mhc'].assign(validation_loss=9.0)
  with pytest.raises(ConfigError, match='runs of mhc differ'):
    verdicts.verdicts(pd.concat([table, other]))
  elsewhere = table.assign(data_digest=table['data_digest'].mask(table['arm'] == 'mhc', 'e'))
  with pytest.raises(ConfigError, match='different corpora'):
    verdicts.verdicts(elsewhere)
  with pytest.raises(ConfigError, match='different corpora'):
    verdicts.changes(table, table.assign(data_digest='e'))
  ranks = pd.concat([table, other.assign(axis='weights_rank')])
  pd.testing.assert_frame_equal(verdicts.verdicts(ranks), verdicts.verdicts(table))


def ranked(rng, lost=0.0):
  """Full model and ranks 1, 2 and 4, of which 1 is worse by `lost`; two rates of ranks, the second worse."""
  rows = []
  starts = 0.5 * rng.standard_normal(3)  # of seeds, which pairs do without
  for (seed, start), rank in itertools.product(enumerate(starts), (None, 1, 2, 4)):
    for lr in (0.1, 0.2)[: 1 if rank is None else 2]:
      loss = start + lost * (rank == 1) + (lr > 0.1) + 0.02 * rng.standard_normal()
      rows.append({'arm': 'mhc', 'seed': seed, 'weights_rank': rank, 'lr': lr, 'validation_loss': loss})
  same = {'width': 32, 'depth': 2, 'tokens': 1e5, 'state': 'finished', 'flops': 1e9}
  table = pd.DataFrame(rows).assign(**same)
  return table.assign(axis=np.where(table['weights_rank'].isna(), None, 'weights_rank'))


def test_intervals_of_ranks_hold_their_truth():
  """95 % intervals over 100 sweeps, and Holm's p: a true difference is found, a false one in 5 %."""
  rng, held, false = np.random.default_rng(0), [], []
  for _ in range(100):
    found = rank_verdicts.by_rank(ranked(rng, 0.2)).set_index('value')
    held += list((found['mean'] - [0.2, 0, 0]).abs() < found['half'])
    assert found.loc[1, 'holm'] < 0.05 and (found['flops'] == 6e9).all()
    false.append((rank_verdicts.by_rank(ranked(rng))['holm'] < 0.05).any())
  assert 0.93 <= np.mean(held) <= 0.97 and np.mean(false) <= 0.07, (np.mean(held), np.mean(false))


def test_ranks_are_at_the_rate_that_other_seeds_choose():
  table = ranked(np.random.default_rng(0), 0.5)
  lucky = (table['seed'] == 0) & (table['weights_rank'] == 2) & (table['lr'] == 0.2)
  table.loc[lucky, 'validation_loss'] -= 1.5
  slow = table[table['lr'] == 0.1].pivot(index='seed', columns='weights_rank', values='validation_loss')
  expected = slow.sub(slow[np.nan], axis=0).mean().drop(np.nan)
  assert rank_verdicts.by_rank(table).set_index('value')['mean'].to_dict() == pytest.approx(
    expected.to_dict()
  )
  ended = table['state'].mask((table['seed'] == 1) & (table['weights_rank'] == 4), 'diverged')
  assert rank_verdicts.by_rank(table.assign(state=ended))['value'].tolist() == [1, 2]
  assert rank_verdicts.by_rank(table[table['seed'] == 0]).empty
  with pytest.raises(ConfigError, match='mhc has no run of the full model'):
    rank_verdicts.by_rank(table[table['axis'].notna()])
  with pytest.raises(ConfigError, match='differ by more than size, budget, seed and weights_rank'):
    rank_verdicts.by_rank(pd.concat([table, table]))


def test_ranks_of_two_sizes_are_compared_at_each_and_a_seed_may_lack_a_rate():
  """Ranks 1, 2, 4 at one size, doubled at another; seed 0 of rank 4 has the worse rate alone."""
  small, large = ranked(np.random.default_rng(0)), ranked(np.random.default_rng(1))
  large['weights_rank'] *= 2
  table = pd.concat([small, large.assign(width=64)], ignore_index=True)
  found = rank_verdicts.by_rank(table)
  assert found[['width', 'value']].to_numpy().tolist() == [
    [w, w / 32 * k] for w in (32, 64) for k in (1, 2, 4)
  ]
  lacks = (table['seed'] == 0) & (table['weights_rank'] == 4) & (table['lr'] == 0.1) & (table['width'] == 32)
  fewer = rank_verdicts.by_rank(table[~lacks])
  assert len(fewer) == 6 and fewer['mean'].iloc[2] == pytest.approx(found['mean'].iloc[2] + 1 / 3, abs=0.05)


def test_one_size_has_no_slope_and_an_arm_may_lack_a_size():
  table = simulated(np.random.default_rng(0))
  table['flops'] *= 1 + 1e-15 * table['seed']
  assert verdicts.verdicts(table[table['width'] == 16])['slope'].isna().all()
  assert '| mhc - residual | ' in verdicts.markdown(
    table[table['width'] == 16]
  ) and 'nan' not in verdicts.markdown(table[table['width'] == 16])
  absent = table[(table['arm'] != 'hc') | (table['width'] > 16)]
  assert 'nan' not in verdicts.markdown_of_sizes(absent)


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


def test_a_change_between_sweeps_is_of_the_seeds_that_both_have():
  rng, tables = np.random.default_rng(0), []
  for gain, seeds in ((-0.02, range(3)), (-0.05, range(1, 5))):
    rows = []
    for width, seed in itertools.product((16, 32), seeds):
      same = {'width': width, 'depth': 2, 'tokens': 1e4 * width, 'seed': seed} | ENDED
      for arm, loss in (('residual', 2 + seed), ('mhc', 2 + seed + gain)):
        own = {'arm': arm, 'flops': 1e9, 'validation_loss': loss + 0.001 * rng.standard_normal()}
        rows.append(same | own)
    tables.append(pd.DataFrame(rows))
  found = verdicts.changes(*tables)
  assert found[['arm', 'other']].to_numpy().tolist() == [['mhc', 'residual']]
  expected = []
  for width, seed in itertools.product((16, 32), (1, 2)):
    cells = [t[(t['width'] == width) & (t['seed'] == seed)].set_index('arm') for t in tables]
    gaps = [c.loc['mhc', 'validation_loss'] - c.loc['residual', 'validation_loss'] for c in cells]
    expected.append(gaps[0] - gaps[1])
  row = found.iloc[0]
  assert row['mean'] == pytest.approx(np.mean(expected)) and row['mean'] == pytest.approx(0.03, abs=0.003)
  assert row['now_mean'] - row['before_mean'] == pytest.approx(row['mean'])
  assert row['mean_holm'] == row['mean_p'] < 0.01
  assert '| mhc - residual | -0.0' in verdicts.markdown_of_changes(*tables)


def test_the_commands_print_what_the_pages_have(tmp_path, capsys):
  folders = {
    name: str(RESULTS / name) for name in ('study-cpu', 'study-cpu-muon', 'study-cpu-ranks', 'quick')
  }
  muon, cpu = (read(f'{name}/results') for name in ('study-cpu-muon', 'study-cpu'))
  assert verdicts.main([folders['study-cpu-muon'], '--against', folders['study-cpu']]) == 0
  tables = verdicts.markdown(muon), verdicts.markdown_of_sizes(muon), verdicts.markdown_of_changes(muon, cpu)
  assert capsys.readouterr().out == '\n\n'.join(tables) + '\n'
  assert rank_verdicts.main([folders['study-cpu-ranks']]) == 0
  assert capsys.readouterr().out.strip() in (ROOT / 'docs' / 'study_tables.md').read_text()
  with pytest.raises(ConfigError, match='two seeds beside a full model'):
    rank_verdicts.main([folders['quick']])
  shutil.copytree(folders['study-cpu'], tmp_path / 'study-cpu')
  assert costs.main([str(tmp_path / 'study-cpu')]) == 0
  assert capsys.readouterr().out.strip() in (ROOT / 'docs' / 'study_tables.md').read_text()
  drawn = tmp_path / 'study-cpu' / 'loss_vs_costs.csv'
  assert drawn.read_text() == (RESULTS / 'study-cpu' / 'loss_vs_costs.csv').read_text()


def test_the_studys_tables_are_those_of_the_csvs():
  assert f'{study_tables.page()}\n' == (ROOT / 'docs' / 'study_tables.md').read_text(), (
    'python -m analysis.study_tables > docs/study_tables.md'
  )
  prediction = read('study/prediction_gpu')
  ends = f'({prediction["low"].min():.2f} to {prediction["high"].max():.2f} on the GPU)'
  assert set(prediction['size']) == {'112x6'} and ends in words(STUDY)


def test_the_studys_words_of_ranks_and_costs():
  ranks = rank_verdicts.by_rank(read('study-cpu-ranks/results'))
  for _, r in ranks[ranks['axis'] == 'weights_rank'].iterrows():
    assert f'{r["value"]:.0f} {r["mean"]:+.3f} ± {r["half"]:.3f}' in words(STUDY), r
  costly = costs.equal_loss(read('study-cpu/costs'), read('study-cpu/multipliers')).set_index('arm')
  r = costly.loc['mhc']
  said = [f'{r[f"need_{u}"]:.2f} ({r[f"low_{u}"]:.2f} to {r[f"high_{u}"]:.2f})' for u in costs.UNITS]
  assert "mhc takes {} times residual's FLOPs, {} its bytes and {} its seconds".format(*said) in words(STUDY)


def test_the_study_says_how_gradients_of_rotations_grow():
  """The median over pairs of sublayers, by hand, after the last update; norms of the streams' mean."""
  found, said = read('rotations/gradients'), {}
  assert found['lr'].unique().tolist() == [0.256] and found['depth'].unique().tolist() == [16]
  for (arm, _), own in found[found['update'] == found['update'].max()].groupby(['arm', 'seed']):
    logs = [(row['sublayer'], np.log(row['gradient'])) for _, row in own.iterrows() if row['gradient']]
    by = np.exp(np.median([(a - b) / (t - s) for (s, a), (t, b) in itertools.combinations(logs, 2)]))
    numbers = by, own['gradient'].max(), own['mean'].mean(), own['mean_least'].min()
    said.setdefault(arm, []).append(
      [f'{v:{f}}' for v, f in zip(numbers, ('.2f', '.0e', '.2f', '.2f'), strict=True)]
    )
  (by, largest, mean, least), text = zip(*said['rotations'], strict=True), words(STUDY)
  ends = [' and '.join(v).replace('e+0', 'e').replace('e+', 'e') for v in (by, largest)]
  assert 'by {} times a sublayer, to {}'.format(*ends) in text
  assert f'has {" and ".join(mean)} of their size (the least token {min(least)})' in text
  static, doubly = said['rotations, static'], said['doubly stochastic']
  assert f'by {" and ".join(v[0] for v in static)} with one matrix' in text
  assert f'by {" and ".join(v[0] for v in doubly)}: they' in text
  assert f'the mean has {" and ".join(v[2] for v in doubly)}' in text


def test_the_score_is_of_the_runs_that_were_predicted():
  """Means and paired gaps from the runs, by hand; what was predicted is what the earlier file says."""
  before, scored = (read(f'study/{name}').set_index('arm') for name in ('prediction_cpu', 'score_cpu'))
  runs = read('study-cpu/results')
  runs = runs[(runs['width'] == 80) & (runs['state'] == 'finished')]
  wide = runs.pivot(index='seed', columns='arm', values='validation_loss')
  assert set(scored.index) == set(before.index) and (scored['runs'] >= 1).all()
  for arm, row in scored.iterrows():
    assert row['law'] == before.loc[arm, 'law'] and row['runs'] == wide[arm].count()
    assert row['measured'] == pytest.approx(wide[arm].mean())
    assert row['law error'] == pytest.approx(row['law'] - row['measured'])
    expected = before.loc[arm, 'gap carried'] - before.loc['residual', 'gap carried']
    assert row['gap'] == pytest.approx(expected, abs=1e-12)
    assert row['measured gap'] == pytest.approx((wide[arm] - wide['residual']).mean(), abs=1e-12)


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
