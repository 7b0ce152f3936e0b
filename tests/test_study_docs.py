"""docs/study.md and docs/study_tables.md say what the CSVs of docs/results do."""

import itertools
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from analysis import costs, rank_verdicts, study_tables, verdicts
from mhc_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / 'docs' / 'results'
STUDY = (ROOT / 'docs' / 'study.md').read_text()
WORDS = re.sub(r'\s+', ' ', STUDY)  # without line breaks
TABLES = (ROOT / 'docs' / 'study_tables.md').read_text()


def read(name):
  return pd.read_csv(RESULTS / f'{name}.csv')


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
  assert said in WORDS, said


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
    assert ends in WORDS, (arm, ends)


def test_the_commands_print_what_the_pages_have(tmp_path, capsys):
  folders = {
    name: str(RESULTS / name) for name in ('study-cpu', 'study-cpu-muon', 'study-cpu-ranks', 'quick')
  }
  muon, cpu = (read(f'{name}/results') for name in ('study-cpu-muon', 'study-cpu'))
  assert verdicts.main([folders['study-cpu-muon'], '--against', folders['study-cpu']]) == 0
  tables = verdicts.markdown(muon), verdicts.markdown_of_sizes(muon), verdicts.markdown_of_changes(muon, cpu)
  assert capsys.readouterr().out == '\n\n'.join(tables) + '\n'
  assert rank_verdicts.main([folders['study-cpu-ranks']]) == 0
  assert capsys.readouterr().out == f'{rank_verdicts.markdown(read("study-cpu-ranks/results"))}\n'
  with pytest.raises(ConfigError, match='two seeds beside a full model'):
    rank_verdicts.main([folders['quick']])
  shutil.copytree(folders['study-cpu'], tmp_path / 'study-cpu')
  assert costs.main([str(tmp_path / 'study-cpu')]) == 0
  costly = costs.equal_loss(read('study-cpu/costs'), read('study-cpu/multipliers'))
  assert capsys.readouterr().out == f'{costs.markdown(costly)}\n'
  drawn = tmp_path / 'study-cpu' / 'loss_vs_costs.csv'
  assert drawn.read_text() == (RESULTS / 'study-cpu' / 'loss_vs_costs.csv').read_text()


def test_the_studys_tables_are_those_of_the_csvs():
  assert f'{study_tables.page()}\n' == TABLES, 'python -m analysis.study_tables > docs/study_tables.md'
  prediction = read('study/prediction_gpu')
  ends = f'({prediction["low"].min():.2f} to {prediction["high"].max():.2f} on the GPU)'
  assert set(prediction['size']) == {'112x6'} and ends in WORDS


def test_the_studys_words_of_ranks_and_costs():
  ranks = rank_verdicts.by_rank(read('study-cpu-ranks/results'))
  for _, r in ranks[ranks['axis'] == 'weights_rank'].iterrows():
    assert f'{r["value"]:.0f} {r["mean"]:+.3f} ± {r["half"]:.3f}' in WORDS, r
  costly = costs.equal_loss(read('study-cpu/costs'), read('study-cpu/multipliers')).set_index('arm')
  r = costly.loc['mhc']
  said = [f'{r[f"need_{u}"]:.2f} ({r[f"low_{u}"]:.2f} to {r[f"high_{u}"]:.2f})' for u in costs.UNITS]
  assert "mhc takes {} times residual's FLOPs, {} its bytes and {} its seconds".format(*said) in WORDS


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
  (by, largest, mean, least), text = zip(*said['rotations'], strict=True), WORDS
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
