"""Paired differences of arms, ranks and sweeps: intervals by simulation, means by hand, what is refused."""

import itertools

import numpy as np
import pandas as pd
import pytest

from analysis import rank_verdicts, verdicts
from mhc_jax.errors import ConfigError


@pytest.mark.parametrize('what', ['mean', 'slope'])
def test_p_values_are_corrected_by_holm(what):
  found = verdicts.verdicts(simulated(np.random.default_rng(0)))
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
