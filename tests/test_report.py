"""The report over synthetic run folders: complete, partial, diverged, single-arm, mixed, broken."""

import hashlib
import json
import re

import numpy as np
import pandas as pd
import pytest

from analysis.report import main
from analysis.runs import read_sweep
from analysis.selection import classify, drop_small_arms, pair_up

VERSIONS = {'jax': '0.10.2', 'flax': '0.12.8'}
MULTIPLIER = {'residual': 1.0, 'hc': 1.08, 'mhc': 1.2, 'identity': 1.15}
SIZES = ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4))
DATA = {'name': 'python_stdlib', 'seq_len': 128, 'batch_size': 16, 'digest': 'abc'}


def law_loss(flops):
  """Nats per token after `flops` of training: E 1.2, A 1.6 at 1e12 FLOPs, exponent 0.2."""
  return 1.2 + 1.6 * (flops / 1e12) ** -0.2


def config_of(arm, width, depth, seed, tokens_per_param=20.0, **change):
  """A resolved configuration; change: streams, rank, weights_rank, lr, digest, tokens."""
  streams = change.get('streams', 1 if arm == 'residual' else 4)
  connection = {'name': arm, 'preset': None, 'constraint': 'identity', 'streams': streams}
  return {
    'arm': arm,
    'seed': seed,
    'data': DATA | {'digest': change.get('digest', 'abc')},
    'model': {
      **{'width': width, 'depth': depth, 'heads': 4, 'kv_heads': 4, 'ffn_width': 3 * width},
      'dtype': 'float32',
      'connection': connection | {'rank': change.get('rank')},
      'weights': {'rank': change.get('weights_rank')},
    },
    'optimizer': {'lr': change.get('lr', 0.004), 'schedule': 'wsd'},
    'duration': {
      'tokens': change.get('tokens'),
      'tokens_per_param': None if 'tokens' in change else tokens_per_param,
    },
  }


def derived_of(config):
  """Counts of one run, roughly as cost.py makes them."""
  m = config['model']
  width, depth, n = m['width'], m['depth'], m['connection']['streams']
  attention, ffn = 4 * depth * width**2, 9 * depth * width**2
  dynamic = 0 if n == 1 else 2 * depth * n * width * (n * n + 2 * n)
  params = {'embedding': 257 * width, 'unembedding': 257 * width, 'attention': attention}
  params |= {'feed_forward': ffn, 'hc_dynamic': dynamic}
  total = sum(params.values())
  matmul = attention + ffn + 257 * width
  params |= {'total': total, 'matmul': matmul, 'non_embedding': total - 514 * width}
  tokens = int(config['duration']['tokens'] or config['duration']['tokens_per_param'] * matmul)
  per_token = 6.0 * (matmul + dynamic) + 12.0 * depth * width * 128
  return {
    **{'params': params, 'flops_per_token': per_token, 'tokens': tokens},
    **{'flops': tokens * per_token, 'num_steps': tokens // 2048, 'tokens_per_step': 2048},
    'data_digest': config['data']['digest'],
  }


def metrics_of(config, derived, final, rng, upto=1.0):
  """Logged rows: loss falling from log 257 to its final value, gains over the sublayers."""
  rows, steps = [], derived['num_steps']
  sublayers = np.arange(1, 2 * config['model']['depth'] + 1)
  gain = {'hc': 1.3}.get(config['arm'], 1.0)
  for part in np.linspace(0, upto, 21):
    step = int(part * steps)
    loss = final + (5.5 - final) * np.exp(-6 * part) * (1 + 0.01 * rng.standard_normal())
    row = {'step': step, 'tokens': step * 2048, 'flops': step * 2048 * derived['flops_per_token']}
    if part:
      row |= {'train/loss': loss, 'train/grad_norm': float(np.exp(-part) + 0.1)}
      row |= {'train/lr': 0.004, 'time/seconds': 0.1, 'time/tokens_per_second': 20000.0}
    row |= {'validation/loss': loss, 'validation/bits_per_byte': loss / np.log(2)}
    for name in ('gain_forward', 'gain_backward'):
      row[f'diagnostics/{name}'] = (gain + 0.01 * rng.standard_normal(len(sublayers))).tolist()
      row[f'diagnostics/composite_{name}'] = (gain**sublayers).tolist()
    rows.append(row)
  return rows


def write_run(folder, config, state='finished', revision='r1', noise=0.003, bonus=1.0, shared=None):
  """Writes one run folder; returns its plan entry. bonus multiplies the arm's compute."""
  text = json.dumps(config, sort_keys=True)
  run_id = hashlib.sha256(text.encode()).hexdigest()[:12]
  rng = np.random.default_rng(int(run_id, 16))
  derived = derived_of(config)
  loss = law_loss(MULTIPLIER.get(config['arm'], 1.0) * bonus * derived['flops'])
  loss *= np.exp(noise * (0.6 * rng.standard_normal() + 0.8 * (shared or 0.0)))
  finished = state == 'finished'
  final = {'validation/loss': loss, 'validation/bits_per_byte': loss / np.log(2)}
  status = {
    **{'state': state, 'step': derived['num_steps'] if finished else 40, 'error': None},
    **{'num_steps': derived['num_steps'], 'diverged_at': 40 if state == 'diverged' else None},
    **{'git_revision': revision, 'versions': VERSIONS, 'device_kind': 'cpu', 'device_count': 1},
    **{'seconds': derived['tokens'] / 2e4, 'derived': derived},
    'final': final | {'train/loss': loss} if finished else None,
  }
  if state == 'failed':
    status['error'] = 'RuntimeError: out of memory'
  path = folder / run_id
  path.mkdir(parents=True)
  (path / 'config.json').write_text(json.dumps(config))
  (path / 'status.json').write_text(json.dumps(status))
  rows = metrics_of(config, derived, loss, rng, 1.0 if finished else 0.4)
  (path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return {'run_id': run_id, 'arm': config['arm']}


def write_sweep(folder, arms=tuple(MULTIPLIER), sizes=SIZES, ranks=True, states=(), **kwargs):
  """A sweep like experiments/quick.py: two seeds at the ends, ranks at one size.

  states: {(arm, size, seed): state}; state None leaves the run out of the folder (missing).
  """
  states, planned = dict(states), []
  for size in sizes:
    for seed in (0, 1) if size in (sizes[0], sizes[-1]) else (0,):
      shared = np.random.default_rng([*size, seed]).standard_normal()
      for arm in arms:
        config = config_of(arm, *size, seed)
        state = states.get((arm, size, seed), 'finished')
        if state is None:
          planned.append({'run_id': f'missing{len(planned):05d}', 'arm': arm})
        else:
          planned.append(write_run(folder, config, state, shared=shared, **kwargs))
  if ranks:
    size = sizes[-2]
    budget = {'tokens': derived_of(config_of('mhc', *size, 0))['tokens'] * 1.0}
    for rank in (1, 2, 4, 8):
      config = config_of('mhc', *size, 0, rank=rank)
      planned.append(write_run(folder, config, bonus=(rank / 16) ** 0.05))
      config = config_of('mhc', *size, 0, weights_rank=rank, **budget)
      planned.append(write_run(folder, config, bonus=(rank / 16) ** 0.5))
    for streams in (2, 8):
      planned.append(write_run(folder, config_of('mhc', *size, 0, streams=streams)))
  (folder / 'plan.json').write_text(json.dumps({'sweep': folder.name, 'runs': planned}))
  return planned


@pytest.fixture
def blank_images(monkeypatch):
  """Figures are built but not rendered: most of a report's time, and none of its logic."""
  monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda self, path, **_: path.write_text('<svg/>'))


@pytest.fixture
def no_figures(monkeypatch):
  """Only numbers and the page, for tests that say nothing about figures."""
  monkeypatch.setattr('analysis.report.draw_all', lambda *_: ([], []))


def report(folder, resamples=4):
  """Runs the command; returns fits.json, results.csv and the page's text."""
  assert main([str(folder), '--resamples', str(resamples)]) == 0
  page = (folder / 'report' / 'index.html').read_text()
  fits = json.loads((folder / 'report' / 'fits.json').read_text())
  return fits, pd.read_csv(folder / 'results.csv'), page


def words(page):
  """The page's text without tags, scripts, styles and images."""
  page = re.sub(r'<(script|style)\b.*?</\1>', ' ', page, flags=re.S)
  return re.sub(r'\s+', ' ', re.sub(r'<[^>]*>', ' ', page)).replace('&#x27;', "'")


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'quick'
  planned = write_sweep(folder)
  return folder, planned, report(folder, 40)


def test_complete_sweep(complete):
  folder, planned, (fits, results, _) = complete
  assert results['run_id'].tolist() == [p['run_id'] for p in planned]
  assert (results['state'] == 'finished').all()
  assert fits['law'] == 'compute' and 'L(C) is fitted' in fits['choice']
  assert fits['fit']['E'] == pytest.approx(1.2, abs=0.06)
  for m in fits['multipliers']:
    low, high = m['flops_interval']
    assert low < MULTIPLIER[m['arm']] < high and high / low < 1.2
  # 28 grid runs are in the law; 10 rank runs are not, each with its reason.
  assert fits['fit']['n_points'] == 28 and len(fits['excluded']) == 10
  assert all('rank figures only' in e['reason'] for e in fits['excluded'])
  ranks = {r['axis']: r for r in fits['rank_sweeps']}
  low, high = ranks['weights_rank']['phi_interval']
  assert low < 0.5 < high and len(ranks['connection_streams']['runs']) == 3
  # The weight ranks are given the full-rank run's tokens in another field of the configuration.
  assert len(ranks['weights_rank']['full_rank_runs']) == 1 == len(ranks['connection_rank']['full_rank_runs'])
  assert len(fits['rollout']) == 2 and len(fits['nested']) == 3
  assert sorted(r['run'] for r in fits['fit']['influence']) == sorted(
    results[results['excluded'].isna()]['run_id']
  )
  assert (folder / 'report' / 'fits.json').read_text().find('NaN') < 0


def test_gaps_pair_equal_seeds(complete):
  folder, _, _ = complete
  table = drop_small_arms(classify(read_sweep(folder).table)).set_index('run_id')
  pairs = pair_up(table.reset_index(), 'residual')
  assert set(pairs) == {'hc', 'mhc', 'identity'}
  for arm, rows in pairs.items():
    own, other = table.loc[rows['run_id_own']], table.loc[rows['run_id_ref']]
    assert len(rows) == 7 and (own['arm'] == arm).all() and (other['arm'] == 'residual').all()
    for name in ('seed', 'size', 'tokens'):
      assert own[name].tolist() == other[name].tolist()


def test_figures_have_numbers_and_render(complete):
  folder, _, _ = complete
  names = {p.stem for p in (folder / 'report').glob('*.png')}
  wanted = {'loss_vs_flops', 'loss_at_equal_flops', 'gap_absolute', 'gap_relative', 'loss_vs_width'}
  wanted |= {'loss_vs_depth', 'loss_vs_connection_rank', 'loss_vs_weights_rank', 'gain_forward'}
  wanted |= {'loss_vs_connection_streams', 'composite_gain_backward', 'compute_multiplier'}
  assert wanted <= names
  for name in names:
    assert (folder / 'report' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
    assert (folder / 'report' / f'{name}.png').stat().st_size < 200_000
    assert '<svg' in (folder / 'report' / f'{name}.svg').read_text()
    assert len(pd.read_csv(folder / 'report' / f'{name}.csv'))
  points = pd.read_csv(folder / 'report' / 'loss_vs_flops.csv')
  assert (points['kind'] == 'run').sum() == 28
  fit = points[points['kind'] == 'fit']
  assert (fit['new_run_low'] < fit['low']).all() and (fit['low'] < fit['loss']).all()
  gaps = pd.read_csv(folder / 'report' / 'gap_absolute.csv')
  assert (gaps[gaps['arm'] == 'mhc']['difference'] < 0).all() and gaps['low'].notna().all()


def test_page_is_self_contained_and_linked(complete):
  folder, _, (_, _, page) = complete
  assert 'http' not in re.sub(r'data:image[^"]*', '', page)
  assert set(re.findall(r'src="(.{10})', page)) == {'data:image'}
  anchors = re.findall(r'href="#(\w+)"', page)
  assert len(anchors) >= 10 and all(f'id={a}' in page for a in anchors)
  for link in re.findall(r'href="([^#"]+)"', page):
    assert (folder / 'report' / link).exists(), link
  text = words(page)
  assert 'python -m analysis.report' in text and '0.10.2' in text
  assert 'residual needs' in text and '1 (reference)' in text
  assert 'fewer than 40 runs' in text
  curves = json.loads(re.search(r'id=curve-data>(.*?)</script>', page, re.S).group(1))
  assert len(curves['runs']) == 28 and len(curves['runs'][0]['validation/loss']) == 21


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
  assert 'Gap to mhc: no finished run of another arm' in words(page)


def test_too_few_sizes_print_no_numbers(tmp_path, blank_images):
  write_sweep(tmp_path, sizes=SIZES[:3], ranks=False)
  fits, _, page = report(tmp_path)
  assert fits['law'] is None and fits['fit'] is None and fits['multipliers'] == []
  assert 'cover 3 model sizes' in fits['choice'] and fits['choice'] in words(page)
  assert fits['gaps'] and 'none: no law fitted' in words(page)
  # Nor does a rank sweep turn into an exponent without a law.
  assert all(r['phi'] is None for r in fits['rank_sweeps'])


def test_parameters_that_are_not_identified_are_words(tmp_path, no_figures):
  sizes = ((32, 2), (32, 3), (48, 2), (48, 3))  # 12-fold compute: E cannot be seen in the noise
  write_sweep(tmp_path, sizes=sizes, ranks=False, noise=0.02)
  fits, _, page = report(tmp_path)
  assert fits['fit']['E'] is None and fits['fit']['intervals']['E'] is None
  assert fits['fit']['verdicts']['E'].startswith('not identified')
  assert fits['fit']['verdicts']['E'] in words(page)


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
  (tmp_path / 'plan.json').write_text(json.dumps({'sweep': 'grid', 'runs': planned}))
  fits, _, page = report(tmp_path)
  assert fits['law'] == 'chinchilla' and 'L(N, D) is fitted' in words(page)
  assert fits['fit']['alpha'] == pytest.approx(0.4, abs=0.06)
  assert fits['fit']['m[mhc]'] == pytest.approx(1.25, abs=0.05)
  # At equal sizes and tokens m is 1.25; at equal FLOPs the arm pays for its hyper-connections.
  (m,) = fits['multipliers']
  assert m['equal_tokens'] == pytest.approx(fits['fit']['m[mhc]'])
  assert m['flops'] < 0.97 * m['equal_tokens']


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
  write_sweep(tmp_path, arms=('a<b>&',), sizes=SIZES[:1], ranks=False)
  _, _, page = report(tmp_path)
  assert 'a&lt;b&gt;&amp;' in page and '<b>' not in re.sub(r'<script.*?</script>', '', page, flags=re.S)


def test_learning_rate_sweep(tmp_path, blank_images):
  planned = []
  for arm, best in (('residual', 0.008), ('mhc', 0.03)):
    for lr in (0.002, 0.004, 0.008, 0.016, 0.032):
      config = config_of(arm, 32, 2, 0, lr=lr)
      state = 'diverged' if (arm, lr) == ('residual', 0.032) else 'finished'
      bonus = np.exp(-(np.log(lr / best) ** 2))
      planned.append(write_run(tmp_path, config, state, noise=0.0, bonus=bonus))
  (tmp_path / 'plan.json').write_text(json.dumps({'sweep': 'learning_rate', 'runs': planned}))
  fits, results, page = report(tmp_path)
  found = {r['arm']: r for r in fits['learning_rates']}
  assert found['residual']['best'] == pytest.approx(0.008, rel=0.2)
  assert found['mhc']['best'] is None or found['mhc']['best'] > 0.025
  assert results['excluded'].str.contains('learning-rate sweep').sum() == 7
  table = pd.read_csv(tmp_path / 'report' / 'learning_rate_32x2.csv')
  assert len(table) == 10 and (table['state'] == 'diverged').sum() == 1
  assert 'Learning rates' in words(page)


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


def test_bad_folders_end_in_one_line(tmp_path, capsys):
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'plan.json').write_text('{')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'plan.json').write_text('{"sweep": "x", "runs": []}')
  for name in ('absent', 'broken', 'empty', '.'):
    assert main([str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
  assert not list(tmp_path.rglob('results.csv')) and not list(tmp_path.rglob('report'))
  with pytest.raises(SystemExit) as stop:
    main(['--help'])
  assert stop.value.code == 0 and 'examples:' in capsys.readouterr().out
