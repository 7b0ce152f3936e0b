"""The report over synthetic run folders: partial, diverged, single-arm, mixed, broken."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import (
  MULTIPLIER,
  SIZES,
  blank,
  command,
  config_of,
  derived_of,
  report,
  words,
  write_plan,
  write_run,
  write_sweep,
)

from analysis.report import main


@pytest.fixture
def blank_images(monkeypatch):
  blank(monkeypatch)


@pytest.fixture
def no_figures(monkeypatch):
  """Only numbers and the page, for tests that say nothing about figures."""
  monkeypatch.setattr('analysis.page.write.draw_all', lambda *_: ({}, []))


def test_partial_sweep_says_what_is_missing(tmp_path, blank_images):
  states = {('hc', (128, 4), 1): 'diverged', ('identity', (64, 4), 0): None}
  states |= {('hc', (64, 2), 0): 'failed', ('residual', (32, 4), 0): 'running'}
  write_sweep(tmp_path, states=states, ranks=False)
  fits, results, page = report(tmp_path)
  reasons = {e['arm']: e['reason'] for e in fits['excluded']}
  assert sorted(e['reason'].split(':')[0] for e in fits['excluded']) == [
    'diverged at step 40',
    'failed',
    'missing',
    'not finished',
  ]
  assert len(results) == 28 and results['validation_loss'].notna().sum() == 24
  text = words(page)
  for sentence in (*reasons.values(), '24 finished', '1 diverged', '1 missing'):
    assert sentence in text
  assert fits['fit']['n_points'] == 24 and fits['multipliers'][0]['flops'] is not None


def test_one_arm_has_a_law_but_no_multiplier(tmp_path, blank_images):
  write_sweep(tmp_path, arms=('mhc',), ranks=False)
  fits, _, page = report(tmp_path)
  assert fits['reference'] == 'mhc' and fits['multipliers'] == [] and fits['gaps'] == []
  assert fits['fit']['alpha'] == pytest.approx(0.2, abs=0.05)
  assert 'nothing to compare it with' in words(page)
  assert 'How does the loss of mhc fall with compute?' in words(page)
  assert 'Gap to' not in words(page), 'a sweep of one arm has no figures of gaps to miss'


def test_an_arm_at_one_size_is_left_out_of_the_law_but_keeps_its_gap(tmp_path, no_figures):
  planned = write_sweep(tmp_path, arms=('residual', 'mhc'), ranks=False)
  planned += [write_run(tmp_path, config_of('hc', 32, 2, seed)) for seed in (0, 1)]
  write_plan(tmp_path, planned)
  fits, results, page = report(tmp_path)
  reason = 'arm hc finished at one size only: no multiplier can be checked there'
  assert [(e['arm'], e['reason']) for e in fits['excluded']] == [('hc', reason)] * 2
  assert (results['excluded'] == reason).sum() == 2 and reason in words(page)
  assert {m['arm'] for m in fits['multipliers']} == {'mhc'} and 'none: not in the law' in words(page)
  assert {g['arm'] for g in fits['gaps']} == {'mhc', 'hc'} and fits['fit']['n_points'] == 14


def test_the_reference_is_the_arm_asked_for(tmp_path, no_figures):
  write_sweep(tmp_path, arms=('residual', 'mhc'), ranks=False)
  ends = {}
  for options in ((), ('--reference', 'mhc')):
    assert command(main, tmp_path, '--resamples', 4, *options) == 0
    fits = json.loads((tmp_path / 'report' / 'fits.json').read_text())
    (ends[fits['reference']],) = fits['multipliers']
  page = words((tmp_path / 'report' / 'index.html').read_text())
  assert 'Gap to mhc' in page and f'mhc report {tmp_path} --resamples 4 --reference mhc' in page
  # The same fit, read from the other side: m becomes 1 / m, and its interval.
  one, other = ends['residual'], ends['mhc']
  assert (one['arm'], other['arm']) == ('mhc', 'residual')
  assert one['flops'] * other['flops'] == pytest.approx(1, rel=1e-3)
  assert one['flops_interval'][0] * other['flops_interval'][1] == pytest.approx(1, rel=1e-2)


def test_a_reference_without_runs_ends_in_one_line(tmp_path, capsys):
  write_sweep(tmp_path, arms=('mhc',), sizes=SIZES[:1], ranks=False)
  assert command(main, tmp_path, '--reference', 'hc') == 2
  error = capsys.readouterr().err
  assert error == 'error: --reference hc: no finished run of that arm; there are mhc\n'


def test_too_few_sizes_print_no_numbers(tmp_path, blank_images):
  write_sweep(tmp_path, sizes=SIZES[:3], ranks=False)
  fits, _, page = report(tmp_path)
  assert fits['law'] is None and fits['fit'] is None and fits['multipliers'] == []
  assert 'cover 3 model sizes' in fits['choice'] and fits['choice'] in words(page)
  assert fits['gaps'] and 'none: no law fitted' in words(page)


def test_one_size_says_so_and_its_ranks_have_their_own_law(tmp_path, blank_images):
  """L = 2 + 0.5 r^-0.8 over four ranks; the projected form is an axis of the arm that it was made from."""
  planned = []
  for seed in (0, 1, 2):
    for arm in ('residual', 'mhc'):
      planned.append(write_run(tmp_path, config_of(arm, 32, 4, seed), noise=0.001))
    planned.append(write_run(tmp_path, config_of('mhc', 32, 4, seed, streams=1)))
    for n in (1, 2, 4, 8):
      config = config_of('mhc', 32, 4, seed, rank=n)
      planned.append(write_run(tmp_path, config, noise=0.001, wanted=2 + 0.5 * n**-0.8))
    for r in (2, 4, 8):
      config = config_of('mhc', 32, 4, seed, projected=r) | {'arm': f'mhc, W projected to rank {r}'}
      planned.append(write_run(tmp_path, config, bonus=r / 16))
  for lr in (0.002, 0.008):  # another rate of one rank: worse, and better, on one seed
    config = config_of('mhc', 32, 4, 0, rank=8, lr=lr)
    planned.append(write_run(tmp_path, config, noise=0.0, wanted=2 + 0.5 * 8**-0.8 + 0.004 - lr))
  write_plan(tmp_path, planned)
  fits, results, page = report(tmp_path)
  assert 'cover 1 model size,' in fits['choice'] and fits['choice'] in words(page)
  # Four streams, at which the ranks are, are mhc's own, not the one that has as many runs at full rank.
  kept = results[(results['arm'] == 'mhc') & results['excluded'].isna()]
  assert set(kept['connection_streams']) == {4}
  assert len(fits['excluded']) == 26 and set(results['arm']) == {'residual', 'mhc'}
  ranks = {r['axis']: r for r in fits['rank_sweeps']}
  low, high = ranks['connection_rank']['phi_interval']
  assert low < 0.8 < high < 1.2 and ranks['connection_rank']['form'] == 'L = a + b r^-phi'
  best = results[results['connection_rank'] == 8].set_index('lr')
  reason = 'lr = 0.004 is better at this size by its other seeds'
  assert best.loc[[0.002, 0.008], 'excluded'].str.contains(reason).all()
  assert len(ranks['connection_rank']['runs']) == 12, 'every rank at the rate of its other seeds'
  projected = ranks['projected_rank']
  assert projected['arm'] == 'mhc' and len(projected['runs']) == 9 == 3 * len(projected['full_rank_runs'])
  assert projected['phi'] is None and '3 values cannot test' in projected['problem']
  table = pd.read_csv(tmp_path / 'report' / 'loss_vs_connection_rank.csv')
  assert set(table['kind']) == {'run', 'mean', 'full', 'reference', 'exponent'}
  assert table[table['kind'] == 'mean']['standard_error'].notna().all()
  assert table.set_index('kind').loc['exponent', 'phi'] == pytest.approx(ranks['connection_rank']['phi'])


def test_runs_of_one_size_and_seed_are_one_group_at_any_budget(tmp_path, no_figures):
  planned = []
  for budget in (1e11, 2e11, 4e11, 8e11):
    for width in (16, 32, 48, 64, 96):
      for arm in ('residual', 'mhc'):
        for seed in (0, 1):
          planned.append(write_run(tmp_path, config_of(arm, width, 2, seed, flops=budget)))
  write_plan(tmp_path, planned)
  fits, _, page = report(tmp_path)
  # 80 runs, but ten starts and orders of the data.
  assert fits['fit']['n_points'] == 80 and fits['fit']['interval_method'] == 'delta'
  assert 'fewer than 40 runs or groups' in fits['fit']['caveat'] and fits['fit']['caveat'] in words(page)


def test_parameters_that_are_not_identified_are_words(tmp_path, no_figures):
  sizes = ((32, 2), (32, 3), (48, 2), (48, 3))  # 12-fold compute: E cannot be seen in the noise
  write_sweep(tmp_path, sizes=sizes, ranks=False, noise=0.02)
  fits, _, page = report(tmp_path)
  assert fits['fit']['alpha'] is None and fits['fit']['intervals']['alpha'] is None
  assert fits['fit']['verdicts']['alpha'].startswith('not identified: its 95 % interval is -')
  assert fits['fit']['verdicts']['alpha'] in words(page)
  low, high = fits['fit']['intervals']['E']
  assert low < 1.2 < high and f'known only as {low:.3g} to {high:.3g}' in words(page)


def test_nothing_finished(tmp_path, blank_images):
  states = {(arm, size, seed): 'running' for arm in MULTIPLIER for size in SIZES for seed in (0, 1)}
  write_sweep(tmp_path, states=states, ranks=False)
  fits, results, page = report(tmp_path)
  assert fits['choice'] == 'There is no finished run.' and len(results) == 28
  assert 'no run has finished' in words(page)
  (tmp_path / 'never').mkdir()
  write_sweep(tmp_path / 'never', states=dict.fromkeys(states), ranks=False)
  _, results, page = report(tmp_path / 'never')
  assert (results['state'] == 'missing').all() and 'No run has started' in words(page)


def test_grid_of_sizes_and_tokens_gets_the_law_of_both(tmp_path, blank_images):
  planned = []
  for size in ((32, 2), (64, 2), (64, 4), (128, 4), (128, 8)):
    for ratio in (5.0, 20.0, 80.0):
      for arm in ('residual', 'mhc'):
        config = config_of(arm, *size, 0, ratio)
        counts = derived_of(config)
        n, d = counts['params']['matmul'], counts['tokens']
        gain = 1.25**0.5 if arm == 'mhc' else 1.0
        wanted = 1.2 + 60 * (gain * n) ** -0.4 + 200 * (gain * d) ** -0.35
        bonus = ((wanted - 1.2) / 1.6) ** -5 * 1e12 / counts['flops'] / MULTIPLIER[arm]
        planned.append(write_run(tmp_path, config, noise=0.001, bonus=bonus))
  write_plan(tmp_path, planned)
  fits, _, page = report(tmp_path)
  assert fits['law'] == 'chinchilla' and 'L(N, D) is fitted' in words(page)
  assert fits['fit']['alpha'] == pytest.approx(0.4, abs=0.06)
  assert fits['fit']['m[mhc]'] == pytest.approx(1.25, abs=0.05)
  # At equal sizes and tokens m is 1.25; at equal FLOPs the arm pays for its hyper-connections.
  (m,) = fits['multipliers']
  assert m['equal_tokens'] == pytest.approx(fits['fit']['m[mhc]'])
  assert m['flops'] < 0.97 * m['equal_tokens']


def test_arms_of_equal_losses_are_equal_at_equal_size_and_tokens(tmp_path, no_figures):
  """mhc costs more FLOPs, by a factor that falls with width, for the losses that residual has."""
  planned = []
  for size in SIZES:
    plain = derived_of(config_of('residual', *size, 0))['flops']
    for arm in ('residual', 'mhc'):
      config = config_of(arm, *size, 0)
      bonus = plain / derived_of(config)['flops'] / MULTIPLIER[arm]
      planned.append(write_run(tmp_path, config, noise=0.0, bonus=bonus))
  write_plan(tmp_path, planned)
  fits, _, page = report(tmp_path)
  (m,) = fits['multipliers']
  # Over 500-fold compute the overhead is no one number of FLOPs, and none at all at equal tokens.
  assert fits['law'] == 'compute' and m['flops'] is None and m['trend'] == 'grows'
  assert m['smallest']['value'] < 0.9 < m['largest']['value']
  assert m['equal_tokens'] == pytest.approx(1, abs=1e-3)
  # The synthetic trainer's speed is the same for every run.
  assert m['seconds'] == pytest.approx(1, abs=1e-3)
  assert '1.000 (1.000 to 1.000)' in words(page)


def test_mixtures_and_learning_rates(tmp_path, no_figures):
  planned = write_sweep(tmp_path, ranks=False)
  more = write_run(tmp_path, config_of('mhc', 32, 4, 0, lr=0.032), bonus=0.5, revision='r2')
  other = write_run(tmp_path, config_of('mhc', 64, 2, 1, digest='xyz'))
  stray = write_run(tmp_path, config_of('mhc', 64, 2, 7))
  plan = {'sweep': 'quick', 'runs': [*planned, more, other]}
  (tmp_path / 'plan.json').write_text(json.dumps(plan))
  fits, results, page = report(tmp_path)
  reason = results.set_index('run_id')['excluded']
  assert 'lr = 0.004 is better' in reason[more['run_id']]
  assert 'other data digest' in reason[other['run_id']]
  assert fits['fit']['n_points'] == 28
  for start in (
    'mixed git revision: r1',
    'mixed data digest: abc',
    '1 run folders are not in plan',
  ):
    assert any(w.startswith(start) for w in fits['warnings']) and start in words(page)
  assert stray['run_id'] not in set(results['run_id'])


def test_text_from_files_is_escaped(tmp_path, no_figures):
  write_sweep(tmp_path, arms=('a<b>&', '</script><b>'), sizes=SIZES[:1], ranks=False)
  _, _, page = report(tmp_path)
  assert page.count('</script>') == page.count('<script') == 4, 'an arm does not end one'
  assert 'a&lt;b&gt;&amp;' in page and '<b>' not in re.sub(r'<script.*?</script>', '', page, flags=re.S)


def test_learning_rate_sweep(tmp_path, blank_images):
  planned = []
  for arm, best in (('residual', 0.008), ('mhc', 0.03)):
    for lr in (0.002, 0.004, 0.008, 0.016, 0.032):
      config = config_of(arm, 32, 2, 0, lr=lr)
      state = 'diverged' if (arm, lr) == ('residual', 0.032) else 'finished'
      bonus = np.exp(-(np.log(lr / best) ** 2))
      planned.append(write_run(tmp_path, config, state, noise=0.0, bonus=bonus))
  write_plan(tmp_path, planned)
  fits, results, page = report(tmp_path)
  found = {r['arm']: r for r in fits['learning_rates']}
  assert found['residual']['best'] == pytest.approx(0.008, rel=0.2)
  assert found['mhc']['best'] is None or found['mhc']['best'] > 0.025
  assert results['excluded'].str.contains('learning-rate sweep').sum() == 7
  table = pd.read_csv(tmp_path / 'report' / 'learning_rate.csv')
  assert (table['kind'] == 'run').sum() == 10 and (table['state'] == 'diverged').sum() == 1
  drawn = table[table['kind'] == 'optimum'].set_index('arm')['lr']
  assert drawn['residual'] == pytest.approx(found['residual']['best'])
  # Linear between the rates of the grid; the diverged one counts as the loss before the first update.
  runs = table[(table['kind'] == 'run') & (table['arm'] == 'residual')].sort_values('lr')
  capped = runs['validation_loss'].fillna(results['initial_loss'].iloc[0]).to_numpy()
  by_hand = np.mean((capped[1:] + capped[:-1]) / 2) - capped.min()
  assert found['residual']['sensitivity'] == pytest.approx(by_hand)
  assert found['residual']['lr_range'] == [0.002, 0.032] and '0.002 to 0.032' in words(page)
  assert 'Learning rates' in words(page)


def test_a_rate_does_not_win_by_the_seeds_that_survived_it(tmp_path, no_figures):
  planned = []
  for lr, bonus in ((0.004, 1.0), (0.008, 1.2), (0.016, 1.1), (0.032, 2.0)):
    for seed in (0, 1, 2):
      state = 'diverged' if lr == 0.032 and seed else 'finished'
      config = config_of('mhc', 32, 2, seed, lr=lr)
      planned.append(write_run(tmp_path, config, state, noise=0.0, bonus=bonus))
  write_plan(tmp_path, planned)
  fits, results, _ = report(tmp_path)
  (found,) = fits['learning_rates']
  assert 0.006 < found['best'] < 0.016
  kept = results[results['excluded'].isna()]
  assert set(kept['lr']) == {0.008}


def test_broken_files_are_rows_not_errors(tmp_path, blank_images):
  planned = [p['run_id'] for p in write_sweep(tmp_path, ranks=False)]
  (tmp_path / planned[0] / 'status.json').write_text('{"state": "fin')
  with (tmp_path / planned[5] / 'metrics.jsonl').open('a') as f:
    f.write('{"step": 12')
  rows = [json.loads(s) for s in (tmp_path / planned[6] / 'metrics.jsonl').read_text().splitlines()]
  for row in rows:
    row |= {'train/loss': None, 'diagnostics/gain_forward': [None, None]}
  (tmp_path / planned[6] / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / planned[7] / 'config.json').unlink()
  status = json.loads((tmp_path / planned[8] / 'status.json').read_text())
  (tmp_path / planned[8] / 'status.json').write_text(json.dumps(status | {'final': None}))
  fits, results, _ = report(tmp_path)
  reason = results.set_index('run_id')['excluded']
  assert reason[planned[0]] == 'failed: status.json is not JSON'
  assert 'missing' in reason[planned[7]] and 'without validation_loss' in reason[planned[8]]
  assert any('breaks off at line 22' in w for w in fits['warnings'])
  assert fits['fit']['n_points'] == 25


def test_a_second_report_replaces_the_first(tmp_path, blank_images):
  write_sweep(tmp_path, sizes=SIZES[:3], ranks=False)
  report(tmp_path)
  stale = tmp_path / 'report' / 'loss_vs_weights_rank.png'
  stale.write_text('old')
  (tmp_path / 'report' / 'notes.txt').write_text('mine')
  first = (tmp_path / 'report' / 'fits.json').read_text()
  report(tmp_path)
  assert not stale.exists() and (tmp_path / 'report' / 'notes.txt').exists()
  assert (tmp_path / 'report' / 'fits.json').read_text() == first
