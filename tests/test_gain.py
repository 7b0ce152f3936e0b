"""Multipliers as functions of compute, spreads of paired gaps, learning rates chosen on other seeds."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fit import COMPUTE

from analysis.compare import nested
from analysis.fitting.document import document
from analysis.fitting.estimate import fit
from analysis.fitting.intervals import delta_method
from analysis.fitting.laws import ArmModel, Points
from analysis.gain import gains, refused
from analysis.gaps import Pairs, gaps, spreads
from analysis.selection import classify, rate_notes, rate_problems
from mhc_jax import presets

SPAN = 400.0  # of compute
fixed = settings(derandomize=True, deadline=None, database=None)


def reference_loss(c, floor=1.5):
  return floor + 1.2 * c**-0.25


def multiplier(loss, c, floor=1.5):
  """How much more compute the reference needs for a loss at c."""
  return ((loss - floor) / 1.2) ** -4 / c


def fading(c, first, last):
  """Loss of an arm whose m goes from `first` to `last` over the sizes."""
  return reference_loss(c * first * (last / first) ** (np.log(c) / np.log(SPAN)))


CHANGING = {
  'fades': lambda c: fading(c, 1.5, 1.04),
  'grows': lambda c: fading(c, 1.05, 1.6),
  'own E': lambda c: reference_loss(c) - 0.03,
  'own exponent': lambda c: 1.5 + 1.2 * c**-0.275,
}


def two_arms(loss_of, seed=0, noise=0.003, floor=1.5, kept=range(7)):
  """Seven sizes, two seeds; the arms of a size and seed share half of the noise; arm b at sizes `kept`."""
  rng = np.random.default_rng(seed)
  arm, size, k = (v.ravel() for v in np.meshgrid(range(2), range(7), range(2), indexing='ij'))
  c = np.geomspace(1, SPAN, 7)[size]
  shared, own = rng.standard_normal((7, 2))[size, k], rng.standard_normal(len(c))
  loss = np.where(arm, loss_of(c), reference_loss(c, floor)) * np.exp(noise * np.sqrt(0.5) * (shared + own))
  points = Points({'C': np.log(c)}, loss, np.array(['a', 'b'])[arm], size * 2 + k, size, np.arange(len(c)))
  return points.take((arm == 0) | np.isin(size, kept))


def judged(points):
  """The joint fit and the gain of arm b."""
  whole = fit(points, COMPUTE, ArmModel('common', 'a'), width='auto', start_count=0)
  (one,) = gains(whole, nested(whole, 'auto', start_count=0))
  return whole, one


def test_a_gain_that_holds_is_one_number():
  whole, one = judged(two_arms(lambda c: reference_loss(1.3 * c)))
  assert one.trend == 'holds' and one.one and one.reason is None and refused([one]) == {}
  low, high = delta_method(whole)['m[b]']
  assert low < 1.3 < high and min(one.p_exponent, one.p_floor) > 0.05
  for at, c in ((one.smallest, 1.0), (one.largest, SPAN)):
    assert at.flops == pytest.approx(c) and at.interval[0] < 1.3 < at.interval[1]
  assert one.change_interval[0] < 1 < one.change_interval[1]


@pytest.mark.parametrize('name', CHANGING)
def test_of_a_gain_that_changes_both_ends_are_given(name):
  """One m would be that of the middle; the ends hold the truth, whichever model made it."""
  loss_of = CHANGING[name]
  whole, one = judged(two_arms(loss_of))
  truth = [multiplier(loss_of(c), c) for c in (1.0, SPAN)]
  assert one.trend == ('grows' if truth[1] > truth[0] else 'fades') and not one.one
  for at, c, m in ((one.smallest, 1.0, truth[0]), (one.largest, SPAN, truth[1])):
    assert at.interval[0] < m < at.interval[1] and at.flops == pytest.approx(c)
  low, high = one.change_interval
  assert low < truth[1] / truth[0] < high and not low < 1 < high
  last = one.largest
  reason = refused([one])['m[b]']
  assert f'it {one.trend} from {one.smallest.value:.2f}' in reason
  assert f'to {last.value:.2f} [{last.interval[0]:.2f}, {last.interval[1]:.2f}] at the largest size' in reason
  written = document(whole, refused=refused([one]))
  assert written['m[b]'] is None is written['intervals']['m[b]'] and written['verdicts']['m[b]'] == reason


def test_the_largest_size_is_covered_over_draws():
  """15 draws of a nominal 95 % interval: fewer than 12 have a probability of 0.5 %."""
  hits = []
  for seed in range(15):
    _, one = judged(two_arms(CHANGING['fades'], seed))
    truth = multiplier(CHANGING['fades'](SPAN), SPAN)
    hits.append(one.trend == 'fades' and one.largest.interval[0] < truth < one.largest.interval[1])
  assert sum(hits) >= 12


@pytest.mark.parametrize(
  ('kept', 'words'),
  [((0, 6), '2 model sizes in common with a; 3 are needed'), ((), 'no model size in common')],
)
def test_few_common_sizes_are_said(kept, words):
  points = two_arms(CHANGING['fades'], kept=kept or range(7))
  if not kept:
    points = dataclasses.replace(points, size=np.where(points.arm == 'b', points.size + 100, points.size))
  _, one = judged(points)
  assert one.trend is None and words in one.problem and one.one and one.largest is None


def test_a_loss_below_the_floor_of_the_reference_has_no_multiplier():
  """The reference never gets there: that is said, and one m refused."""
  _, one = judged(two_arms(lambda c: reference_loss(c) - 0.3))
  assert one.trend is None and one.largest is None and not one.one
  assert 'no compute of the reference is enough' in refused([one])['m[b]']


def test_a_floor_at_zero_needs_no_floor_of_its_own():
  whole, one = judged(two_arms(lambda c: reference_loss(1.3 * c, 0.0), floor=0.0))
  assert whole.boundaries == {'E': 'E -> 0'} and one.p_floor is None
  assert one.trend == 'holds' and one.one and one.largest.interval[0] < 1.3 < one.largest.interval[1]


def test_gains_of_one_arm_or_other_multipliers_are_none():
  points = two_arms(lambda c: reference_loss(1.3 * c))
  assert gains(None, []) == []
  alone = fit(points.take(points.arm == 'a'), COMPUTE, start_count=9)
  assert gains(alone, nested(alone)) == []
  none = fit(points, COMPUTE, ArmModel('none', 'a'), start_count=9)
  assert gains(none, []) == []


def groups_of(deviation, seed=0, arms='abcd', sizes=6, seeds=3):
  """Pairs of every arm and size whose difference has a standard deviation deviation(arm, size)."""
  rng, out = np.random.default_rng(seed), []
  for arm in arms:
    for size in range(sizes):
      difference = deviation(arm, size) * rng.standard_normal(seeds)
      out.append(Pairs(arm, float(size), (3 + difference, np.full(seeds, 3.0))))
  return out, [g.losses[0] - g.losses[1] for g in out]


def test_equal_spreads_are_pooled():
  groups, values = groups_of(lambda arm, size: 0.01)
  deviation, freedom = np.array(spreads(groups, values)).T
  pooled = np.sqrt(np.mean([v.var(ddof=1) for v in values]))
  np.testing.assert_allclose(deviation, pooled, rtol=1e-6)
  np.testing.assert_allclose(freedom, 48, rtol=1e-6)


def test_an_arm_with_ten_times_the_noise_has_a_spread_of_its_own():
  groups, values = groups_of(lambda arm, size: 0.05 if arm == 'a' else 0.005)
  found = dict(zip([g.arm for g in groups], spreads(groups, values), strict=True))
  own = [v for g, v in zip(groups, values, strict=True) if g.arm == 'a']
  assert found['a'][0] == pytest.approx(np.sqrt(np.mean([v.var(ddof=1) for v in own])), rel=1e-3)
  # Twelve degrees of freedom to an arm: a deviation known to a fifth, 2.6 such errors.
  assert all(0.0025 < found[arm][0] < 0.0075 for arm in 'bcd')
  assert all(found[arm][1] == pytest.approx(12, rel=1e-3) for arm in 'abcd')


def test_a_spread_that_falls_with_compute_is_followed():
  groups, values = groups_of(lambda arm, size: 0.02 * 20 ** (-size / 5))
  deviation = np.array([sd for sd, _ in spreads(groups, values)]).reshape(4, 6)
  np.testing.assert_allclose(deviation, deviation[:1].repeat(4, 0), rtol=1e-9)
  assert np.log(deviation[0, 0] / deviation[0, 5]) == pytest.approx(np.log(20), rel=0.3)
  freedom = np.array([f for _, f in spreads(groups, values)]).reshape(4, 6)[0]
  assert freedom[0] < 0.7 * freedom[2], 'the ends of a trend are known less well than its middle'


def test_losses_equal_to_all_digits_are_not_exact():
  """Two seeds of a size that agree by luck: their gap has an interval all the same."""
  groups, values = groups_of(lambda arm, size: 0.0 if (arm, size) == ('b', 2) else 0.01)
  same = [spread for g, spread in zip(groups, spreads(groups, values), strict=True) if g.arm == 'b']
  assert all(sd > 1e-3 for sd, _ in same)
  groups, values = groups_of(lambda arm, size: 0.01 * (arm != 'a'))
  assert all(sd > 5e-5 for sd, _ in spreads(groups, values)), 'a hundredth of the spread of all at least'


@settings(fixed, max_examples=20)
@given(st.floats(1e-4, 1e4), st.permutations(range(24)))
def test_spreads_have_the_unit_of_the_values_and_no_order(unit, order):
  groups, values = groups_of(lambda arm, size: 0.03 if arm == 'c' else 0.01)
  plain = spreads(groups, values)
  moved = spreads([groups[k] for k in order], [unit * values[k] for k in order])
  for at, k in enumerate(order):
    assert moved[at][0] == pytest.approx(unit * plain[k][0], rel=1e-4)
    assert moved[at][1] == pytest.approx(plain[k][1], rel=1e-4)


def table(losses):
  """Runs of a sweep: {(arm, seed, learning rate): loss, or None for a diverged run} at one size."""
  rows = []
  for (arm, seed, lr), loss in losses.items():
    row = dict.fromkeys(('connection_rank', 'weights_rank', 'projected_rank', 'connection_streams'))
    row |= {'run_id': f'{arm}{seed}{lr}', 'arm': arm, 'variant': arm, 'connection_name': arm, 'seed': seed}
    row |= {'state': 'finished' if loss else 'diverged', 'diverged_at': 5.0, 'lr': lr}
    row |= {'validation_loss': loss or np.nan, 'width': 64, 'depth': 4, 'duration': 'd', 'data_digest': 'x'}
    row |= {'params_matmul': 1e5, 'flops': 1e12, 'tokens': 1e6, 'error': None}
    rows.append(row)
  return classify(pd.DataFrame(rows))


def test_streams_that_the_depth_decides_are_no_axis_of_a_sweep():
  arms = ('mhc', *presets.BY_DEPTH)
  runs = table({(arm, seed, 0.1): 2.0 for arm in arms for seed in (0, 1)})
  runs = classify(runs.assign(depth=2 + 2 * runs['seed'], connection_streams=5.0 + 4 * runs['seed']))
  assert set(runs.loc[runs['axis'].notna(), 'arm']) == {'mhc'}


def kept(runs, arm='b'):
  """Seed -> learning rates of an arm that stay."""
  stay = runs[runs['excluded'].isna() & (runs['arm'] == arm)]
  return {seed: own['lr'].tolist() for seed, own in stay.groupby('seed')}


def test_a_rate_is_chosen_for_each_seed_on_the_others():
  # Seed 0 alone likes 0.1: its own low loss must not choose for it, but it does for the others' mean.
  runs = table(
    {('b', 0, 0.1): 1.0, ('b', 0, 0.2): 3.0}
    | {('b', 1, 0.1): 3.2, ('b', 1, 0.2): 3.0}
    | {('b', 2, 0.1): 3.2, ('b', 2, 0.2): 3.0}
  )
  assert kept(runs) == {0: [0.2], 1: [0.1], 2: [0.1]}
  (reason,) = runs.loc[runs['run_id'] == 'b00.1', 'excluded']
  assert reason == 'learning-rate sweep: lr = 0.2 is better at this size by its other seeds'
  assert rate_notes(runs) == ['learning rates were chosen for each seed on the other seeds; tried: b 2']


def test_no_rate_wins_by_the_seeds_that_survived_it():
  losses = {('b', seed, lr): 3.0 + lr for seed in range(3) for lr in (0.1, 0.2)}
  losses |= {('b', 0, 0.4): 2.0, ('b', 1, 0.4): 2.0, ('b', 2, 0.4): None}
  # Seeds 0 and 1 see that it diverged; seed 2, whose run diverged, would take it, and is without a run.
  assert kept(table(losses)) == {0: [0.1], 1: [0.1]}
  losses[('b', 1, 0.4)] = None
  assert kept(table(losses)) == {0: [0.1], 1: [0.1], 2: [0.1]}


def two_rates(seeds, ours, theirs):
  rng = np.random.default_rng(0)
  return table(
    {
      (arm, seed, 0.1 * 2**k): 3 + 0.01 * rng.standard_normal()
      for arm, count in (('residual', theirs), ('b', ours))
      for seed in range(seeds)
      for k in range(count)
    }
  )


def test_the_best_of_more_rates_on_one_seed_is_not_compared():
  runs = two_rates(1, 5, 1)
  (reason,) = rate_problems(runs, 'residual').values()
  assert 'its learning rate is the best of 5 on the one seed compared, that of residual of 1' in reason
  assert 'give both as many, or choose on other seeds' in reason
  assert 'on the compared runs themselves, which flatters; tried: b 5' in rate_notes(runs)[0]
  # Beside an arm whose spread is known, from two seeds: its gap has an interval, that of b has none.
  both = {(arm, seed, 0.1): 3 + 0.01 * seed for arm in ('residual', 'c') for seed in range(2)}
  both |= {('c', 1, 0.1): 2.9} | {('b', 0, 0.1 * 2**k): 3 - 0.01 * k for k in range(5)}
  more = table(both)
  problems = rate_problems(more, 'residual')
  assert set(problems) == {'b'}
  found = {gap.arm: gap for gap in gaps(more, 'residual', problems)}
  assert found['c'].low < found['c'].difference < found['c'].high and found['b'].low is None
  assert found['b'].difference == pytest.approx(-0.04) and gaps(more, 'residual')[0].low is not None


def test_equal_grids_or_other_seeds_are_compared_and_said():
  equal = two_rates(1, 4, 4)
  assert rate_problems(equal, 'residual') == {} and 'tried: residual 4, b 4' in rate_notes(equal)[0]
  more = two_rates(3, 5, 1)
  assert rate_problems(more, 'residual') == {}
  assert rate_notes(more) == ['learning rates were chosen for each seed on the other seeds; tried: b 5']
  single = two_rates(2, 1, 1)
  assert rate_problems(single, 'residual') == {} and rate_notes(single) == []
