"""What a table of runs tells and what it cannot, by the command line: numbers or the design's own words."""

import contextlib
import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from synthetic_runs import write_sweep

from analysis import fit
from analysis.fitting.models import matched
from analysis.runs import read_sweep
from analysis.study import study

TRUTH = {'E': 1.6, 'A': 300.0, 'B': 900.0, 'alpha': 0.33, 'beta': 0.36}
ND = 'N=n,D=d,loss=loss'


def loss_of(n, d):
  return TRUTH['E'] + TRUTH['A'] * n ** -TRUTH['alpha'] + TRUTH['B'] * d ** -TRUTH['beta']


def table(sizes=6, tokens=(4e8, 4e9, 4e10), arms=('a',), seeds=1):
  """Rows of every arm, size, token count and seed, without losses."""
  n = np.geomspace(2e7, 2e9, sizes)
  rows = [(arm, size, d, seed) for arm in arms for size in n for d in tokens for seed in range(seeds)]
  return pd.DataFrame(rows, columns=['arm', 'n', 'd', 'seed'])


def with_loss(rows, loss, noise=0.003, seed=0):
  draws = np.random.default_rng(seed).standard_normal(len(rows))
  return rows.assign(loss=loss * np.exp(noise * draws))


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """The JSON of `mhc fit` on a table; without the fits of rollout and, unless asked for, nested models."""
  path = tmp_path_factory.mktemp('points') / 'p.csv'

  def run(rows, columns, *options, gains=False):
    rows.to_csv(path, index=False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.MonkeyPatch.context() as patch:
      patch.setattr('analysis.compare.rollout', lambda *_: [])
      patch.setattr('analysis.compare.Candidate.as_json', lambda _: {})
      if not gains:
        patch.setattr('analysis.compare.nested', lambda *_: [])
      assert fit.main([str(path), '--columns', columns, '--resamples', '0', '--out', '-', *options]) == 0
    return json.loads(out.getvalue())

  return run


def holds(doc, name, value):
  """Whether a printed interval holds a value."""
  low, high = doc['intervals'][name]
  return low < value < high


def ranked(rank):
  """Two arms, m = 1.5 between them, at ranks given by the arm."""
  rows = table(arms=('a', 'b'))
  m = np.where(rows['arm'] == 'b', 1.5**0.5, 1.0)
  return with_loss(rows, loss_of(rows['n'] * m, rows['d'] * m)).assign(rank=rows['arm'].map(rank))


def test_a_rank_that_goes_with_the_arm_leaves_one_known_product(fitted):
  doc = fitted(ranked({'a': 1, 'b': 16}), f'{ND},arm=arm,axis:rank=rank')
  optimum = doc['optimum']
  product = optimum['m[b]'] * 16 ** optimum['phi[rank]']
  assert product == pytest.approx(1.5, rel=0.05)
  for name in ('m[b]', 'phi[rank]'):
    assert doc[name] is None is doc['intervals'][name]
    assert doc['verdicts'][name].endswith(
      f'the rank and the arm move together; only m[b] 16^phi[rank] = {product:.3g} is known'
    )
  assert all(holds(doc, name, TRUTH[name]) for name in TRUTH) and set(doc['verdicts']) == {
    'm[b]',
    'phi[rank]',
  }


def test_a_rank_that_never_varies_is_part_of_the_coefficients(fitted):
  doc = fitted(ranked({'a': 4, 'b': 4}), f'{ND},arm=arm,axis:rank=rank')
  assert {k: v.split(': ')[1] for k, v in doc['verdicts'].items()} == dict.fromkeys(
    ('A', 'B', 'phi[rank]'), 'the rank never varies'
  )
  assert holds(doc, 'm[b]', 1.5) and holds(doc, 'E', TRUTH['E']) and holds(doc, 'alpha', TRUTH['alpha'])


def test_one_run_of_an_arm_cannot_tell_two_multipliers(fitted):
  rows = ranked({'a': 1, 'b': 1})
  rows = rows[(rows['arm'] == 'a') | (rows.index == rows.index[-8])]
  doc = fitted(rows, f'{ND},arm=arm', '--arms', 'both')
  assert set(doc['verdicts']) == {'rho_N[b]', 'rho_D[b]'}
  assert all('one run cannot tell rho_N from rho_D' in reason for reason in doc['verdicts'].values())
  assert holds(doc, 'E', TRUTH['E']) and holds(doc, 'beta', TRUTH['beta'])


@pytest.mark.parametrize('tokens', [1e10, 12345678901.0])
def test_tokens_that_never_vary_are_part_of_the_floor(fitted, tokens):
  """Alpha is printed; beta, which no run sees, is a number of the optimiser's."""
  rows = table(sizes=8, tokens=(tokens,), seeds=3)
  doc = fitted(with_loss(rows, loss_of(rows['n'], rows['d'])), ND)
  for name in ('E', 'B', 'beta'):
    assert doc['verdicts'][name] == 'not identified: D never varies: its term is part of E'
    assert doc[name] is None is doc['intervals'][name]
  assert doc['verdicts']['a'] == 'not identified: beta is not'
  assert holds(doc, 'alpha', TRUTH['alpha']) and holds(doc, 'A', TRUTH['A'])


@pytest.mark.parametrize('scatter', [0.0, 0.03])
def test_sizes_and_tokens_that_move_together_tell_neither(fitted, scatter):
  rows = table(sizes=10, tokens=(1,), seeds=2)
  tokens = 20 * rows['n'] * np.exp(scatter * np.random.default_rng(1).standard_normal(20))
  rows = rows.assign(d=tokens)
  doc = fitted(with_loss(rows, loss_of(rows['n'], rows['d'])), ND)
  assert all(doc[name] is None for name in (*TRUTH, 'a'))
  assert all('N and D move together (log correlation' in reason for reason in doc['verdicts'].values())


def test_two_token_counts_tell_no_floor(fitted):
  rows = table(sizes=8, tokens=(1e9, 1e11))
  doc = fitted(with_loss(rows, loss_of(rows['n'], rows['d'])), ND)
  for name in ('E', 'B', 'beta'):
    assert doc['verdicts'][name] == 'not identified: D has 2 values; a constant and a power need 3'
  assert holds(doc, 'alpha', TRUTH['alpha'])


def test_a_term_that_shows_at_one_value_has_no_exponent(fitted):
  """The shortest training is worse, all others alike: any steep power does that."""
  rows = table(tokens=(1e8, 1e10, 1e11, 1e12))
  only = np.where(rows['d'] < 2e8, 0.3, 0.0)
  doc = fitted(with_loss(rows, TRUTH['E'] + TRUTH['A'] * rows['n'] ** -0.33 + only, 0.002, seed=2), ND)
  for name in ('B', 'beta'):
    assert doc['verdicts'][name] == 'not identified: the term of D shows at one of its values only'
  assert holds(doc, 'E', TRUTH['E']) and holds(doc, 'alpha', 0.33)


def test_a_steep_exponent_is_printed_where_the_runs_tell_it(fitted):
  n, d = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 2e7, 6), np.geomspace(1e9, 1e11, 5)))
  rows = with_loss(pd.DataFrame({'n': n, 'd': d}), 1.6 + 0.8 * (n / 1e7) ** -5 + 900 * d**-0.36, 0.002)
  doc = fitted(rows, ND)
  low, high = doc['intervals']['alpha']
  assert low < 5 < high < low + 0.4 and holds(doc, 'beta', 0.36) and doc['verdicts'] == {}


def test_a_floor_at_its_boundary_takes_the_exponents_with_it(fitted):
  rows = table(sizes=7)
  doc = fitted(
    with_loss(rows, loss_of(rows['n'], rows['d']) - TRUTH['E'] - 0.03), ND, '--predict', 'N=1e11,D=1e12'
  )
  assert doc['flags'] == ['E at its boundary: E -> 0'] and doc['verdicts']['E'] == 'not identified: E -> 0'
  for name in ('A', 'B', 'alpha', 'beta', 'a'):
    assert doc[name] is None is doc['intervals'][name] is doc['intervals_by_method']['delta'][name]
    assert 'E is at its boundary (E -> 0), and the exponents take its place' in doc['verdicts'][name]
  (beyond,) = doc['predictions']
  assert (
    beyond['loss'] is None and 'the floor E decides, and it is not identified: E -> 0' in beyond['problem']
  )


def test_arms_without_a_common_size_are_said(fitted):
  rows = table(sizes=8, tokens=(1,), arms=('a', 'b'))
  small = rows['n'] < 1e8
  rows = rows[small == (rows['arm'] == 'a')].assign(d=lambda t: 20 * t['n'])
  m = np.where(rows['arm'] == 'b', 1.3**0.5, 1.0)
  rows = with_loss(rows, loss_of(m * rows['n'], m * rows['d']), 0.001).assign(c=6 * rows['n'] * rows['d'])
  doc = fitted(rows, 'N=n,C=c,loss=loss,arm=arm', '--law', 'compute', gains=True)
  assert (
    'a shares no model size with the other arms: nothing is paired, and m rests on the law' in doc['notes']
  )
  assert doc['gains'][0]['trend'] is None and 'no model size in common' in doc['gains'][0]['problem']


def two_counts(sizes, dearer=1.03):
  """Arm b has 3 % more parameters than a at every size; arms of a size and seed share most of their noise."""
  rows = table(sizes=sizes, tokens=(2e9, 2e10), arms=('a', 'b'), seeds=2)
  index = rows.groupby('n').ngroup()
  rows = rows.assign(index=index, n=rows['n'] * np.where(rows['arm'] == 'b', dearer, 1.0))
  shared = np.random.default_rng(2).standard_normal((sizes, 2))[index, rows['seed']]
  m = np.where(rows['arm'] == 'b', 1.16**0.5, 1.0)
  loss = loss_of(m * rows['n'], m * rows['d']) * np.exp(0.006 * shared)
  return with_loss(rows, loss, 0.001)


def test_two_models_are_two_sizes_however_many_arms_count_them(fitted):
  doc = fitted(two_counts(2), f'{ND},arm=arm,seed=seed')
  assert any('only 2 model sizes (at least 4 are needed)' in doubt for doubt in doc['doubts'])
  assert doc['alpha'] is doc['m[b]'] is None


def test_sizes_matched_by_order_are_those_of_a_size_column(fitted):
  rows = two_counts(6)
  found = [fitted(rows, f'{ND},arm=arm,seed=seed{more}') for more in ('', ',size=index')]
  assert 'arms differ in N by up to 3.0% at what is taken for one model size' in found[0]['notes'][0]
  assert not any('arms differ' in note for note in found[1]['notes'])
  for name in ('m[b]', 'E', 'alpha', 'beta'):
    np.testing.assert_allclose(found[0]['intervals'][name], found[1]['intervals'][name], rtol=1e-9)
  low, high = found[0]['intervals']['m[b]']
  assert low < 1.16 < high < 1.1 * low and found[0]['within_group_correlation'] > 0.5, 'pairs are seen'


@pytest.mark.parametrize('dearer', [1.0, 1.05, 1.3, 1 / 1.3])
def test_arms_that_cost_more_at_every_size_are_matched_in_order(dearer):
  """By 30 % at sizes that are 60 % apart the nearest size would be another model."""
  log_n = np.log(1e6 * 1.6 ** np.tile(np.arange(5), 2) * np.repeat([1, dearer], 5))
  label, notes = matched(log_n, np.repeat(['a', 'b'], 5), 0.0, 'N')
  assert label[:5].tolist() == label[5:].tolist() and len(set(label.tolist())) == 5
  assert len(notes) == (dearer != 1)
  far, notes = matched(log_n + np.repeat([0, np.log(30)], 5), np.repeat(['a', 'b'], 5), 0.0, 'N')
  assert len(set(far.tolist())) == 10 and 'b shares no model size' in notes[-1]


def test_twelve_shapes_in_three_widths_are_twelve_models(fitted):
  w, h, d = (v.ravel() for v in np.meshgrid([128, 384, 1152], [4, 8, 16, 32], [1e8, 1e9, 1e10]))
  rows = pd.DataFrame({'w': w, 'h': h, 'd': d})
  rows = with_loss(rows, 1.4 + 25 * w**-0.65 + 1.8 * h**-0.75 + 70 * d**-0.3, 0.001)
  doc = fitted(rows, 'W=w,H=h,D=d,loss=loss', '--law', 'width_depth')
  assert doc['doubts'] == [] and doc['verdicts'] == {}
  assert all(holds(doc, name, v) for name, v in {'alpha': 0.65, 'beta': 0.75, 'gamma': 0.3}.items())


def test_one_seed_everywhere_tells_nothing_of_shared_noise(fitted):
  """25 sizes with seed 0: runs of different sizes share none."""
  rows = table(sizes=25, tokens=(2e9,)).assign(d=lambda t: t['d'] * np.tile([1, 3, 9, 27, 81], 5))
  rows = with_loss(rows, loss_of(rows['n'], rows['d']))
  found = [fitted(rows, f'{ND}{more}') for more in ('', ',seed=seed')]
  assert found[0]['intervals'] == found[1]['intervals'] and found[0]['noise'] == found[1]['noise']
  assert [s['shared_by'] for s in found[1]['noise']] == ['run']


def test_columns_that_contradict_each_other_are_noted(fitted):
  rows = table()
  rows = with_loss(rows, loss_of(rows['n'], rows['d'])).assign(c=6 * rows['n'] * rows['d'])
  for factor, noted in ((1.4, False), (1 / 1.4, False), (1e-3, True), (6, True)):
    notes = fitted(rows.assign(c=factor * rows['c']), f'{ND},C=c')['notes']
    wanted = f'C is {factor:.3g} times 6 N D: are the units of C, N and D the same?'
    assert (wanted in notes) == noted and any('6 N D' in note for note in notes) == noted


def test_rows_that_are_there_twice_are_noted_and_narrow_nothing(fitted):
  rows = table(tokens=tuple(np.geomspace(4e8, 4e10, 5)))
  rows = with_loss(rows, loss_of(rows['n'], rows['d']), seed=1)
  once, some, twice = (
    fitted(v, ND) for v in (rows, pd.concat([rows, rows.iloc[:3]]), pd.concat([rows, rows]))
  )
  assert not any('repeat' in note for note in once['notes'])
  assert '3 rows repeat another row, loss and all: they count as one measurement' in some['notes']
  assert any(note.startswith('30 rows repeat another row') for note in twice['notes'])
  width = [np.diff(doc['intervals']['alpha'])[0] for doc in (once, twice)]
  assert 0.85 < width[1] / width[0] < 1.3


def test_the_command_line_and_the_report_agree(tmp_path, fitted):
  """Runs of four arms as the trainer writes them: one inference, whichever front door."""
  write_sweep(tmp_path, ranks=False)
  s = study(read_sweep(tmp_path), resamples=0)
  inside = s.table[s.table['excluded'].isna()]
  names = ['flops', 'validation_loss', 'arm', 'seed', 'size']
  doc = fitted(
    inside[names], 'C=flops,loss=validation_loss,arm=arm,seed=seed,size=size', '--law', 'compute', gains=True
  )
  arms = [m.arm for m in s.multipliers]
  assert len(arms) == 3 and doc['reference'] == s.reference == 'residual'
  for label in ('E', 'A', 'alpha', *(f'm[{arm}]' for arm in arms)):
    assert doc[label] == pytest.approx(s.document[label], rel=1e-9)
    np.testing.assert_allclose(doc['intervals'][label], s.document['intervals'][label], rtol=1e-9)
  assert [g['trend'] for g in doc['gains']] == [m.trend for m in s.multipliers]
  ours, theirs = (pd.DataFrame(noise).set_index('shared_by') for noise in (doc['noise'], s.document['noise']))
  pd.testing.assert_frame_equal(ours, theirs, rtol=1e-9)


ROWS = two_counts(5)


@settings(derandomize=True, deadline=None, database=None, max_examples=6, phases=(Phase.generate,))
@given(st.permutations(range(len(ROWS))), st.permutations(['x', 'y']), st.floats(1e-4, 1e4))
def test_neither_order_nor_names_nor_the_unit_of_compute_matter(fitted, order, names, unit):
  """m, alpha and E with their intervals; also which runs are one model."""
  rows = ROWS.assign(c=6 * ROWS['n'] * ROWS['d'])
  columns, options = 'C=c,loss=loss,arm=arm,seed=seed', ('--law', 'compute', '--reference')
  plain = fitted(rows, columns, *options, 'a')
  moved = rows.iloc[list(order)].assign(c=unit * rows['c'])
  moved = moved.assign(arm=moved['arm'].map(dict(zip('ab', names, strict=True))))
  other = fitted(moved, columns, *options, names[0])
  for label, new in (('E', 'E'), ('alpha', 'alpha'), ('m[b]', f'm[{names[1]}]')):
    assert (plain[label] is None) == (other[new] is None)
    if plain[label] is not None:
      np.testing.assert_allclose(other['intervals'][new], plain['intervals'][label], rtol=1e-4)
