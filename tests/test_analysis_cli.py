"""The command lines on CSVs: analysis.fit and analysis.reproduce, their output and their errors."""

import json

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import command

from analysis import fit, reproduce
from analysis.fitting.points import parse_columns, read_points
from analysis.fitting.table import read_table
from mhc_jax.errors import ConfigError

TRUE = {'E': 1.8172, 'A': 477.83, 'B': 2143.4, 'alpha': 0.3473, 'beta': 0.3672}


def loss_of(n, d):
  return TRUE['E'] + TRUE['A'] * n ** -TRUE['alpha'] + TRUE['B'] * d ** -TRUE['beta']


def write_points(path, arms=(('one', 1.0),), noise=0.003, sizes=6, ratios=(5, 10, 20, 40, 80)):
  """A CSV like somebody's own: sizes over two decades, ratios of tokens to parameters."""
  rng, rows = np.random.default_rng(0), []
  for arm, m in arms:
    for n in np.geomspace(5e7, 5e9, sizes):
      for ratio in ratios:
        loss = loss_of(n * m**0.5, n * ratio * m**0.5) * np.exp(noise * rng.standard_normal())
        rows.append({'params': n, 'tokens': n * ratio, 'loss': loss, 'model': arm, 'seed': 0})
  pd.DataFrame(rows).assign(flops=lambda t: 6 * t['params'] * t['tokens']).to_csv(path, index=False)
  return path


COLUMNS = 'N=params,D=tokens,loss=loss'


def test_fit_writes_the_documented_json(tmp_path):
  points, out = write_points(tmp_path / 'points.csv'), tmp_path / 'new' / 'fits.json'
  argv = [str(points), '--law', 'chinchilla', '--columns', COLUMNS, '--out', str(out)]
  assert fit.main([*argv, '--resamples', '30']) == 0
  found = json.loads(out.read_text())
  for name, value in TRUE.items():
    low, high = found['intervals'][name]
    assert low < found[name] < high
    # 30 runs with noise 0.003: a few standard errors.
    assert found[name] == pytest.approx(value, rel=0.6 if name in 'AB' else 0.1), name
  assert found['n_points'] == 30 and found['flags'] == [] and found['objective'] > 0
  assert set(found['intervals_by_method']) == {'delta', 'case_bootstrap'}
  assert found['interval_method'] == 'delta' and 'fewer than 40 runs' in found['caveat']
  assert [s['sizes_fitted'] for s in found['rollout'] if s['problem'] is None] == [3, 4, 5]
  assert found['a'] == pytest.approx(found['beta'] / (found['alpha'] + found['beta']))


def test_forty_runs_quote_the_bootstrap(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', sizes=8)
  assert fit.main([str(points), '--columns', COLUMNS, '--resamples', '30', '--out', '-']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['n_points'] == 40 and found['caveat'] is None
  assert found['interval_method'] == 'case_bootstrap'
  assert found['intervals'] == found['intervals_by_method']['case_bootstrap']


def test_arms_get_a_multiplier_and_nested_tests(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', (('base', 1.0), ('new', 1.2)), sizes=5, ratios=(5, 20, 80))
  columns = f'{COLUMNS},arm=model,seed=seed'
  assert fit.main([str(points), '--columns', columns, '--resamples', '5', '--out', '-']) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['n_points'] == 30 and found['reference'] == 'base'
  low, high = found['intervals']['m[new]']
  assert low < 1.2 < high and high / low < 1.2
  assert [c['name'] for c in found['nested']] == [
    'no effect',
    'one multiplier m per arm',
    'rho_N and rho_D per arm',
    'm and own exponents per arm',
    'm and own E per arm',
  ]
  assert found['nested'][1]['p_value'] < 0.05
  assert set(found['intervals_by_method']) == {'delta', 'case_bootstrap'}, 'these runs share no noise'


def test_predictions_have_bands_or_a_reason(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', (('base', 1.0), ('new', 1.2)))
  columns = ['--columns', f'{COLUMNS},arm=model', '--resamples', '0', '--out', '-']
  far = ['--predict', 'N=2e10,D=4e11', '--predict', 'N=2e10,C=4.8e22,arm=new']
  assert fit.main([str(points), *columns, *far]) == 0
  one, two = json.loads(capsys.readouterr().out)['predictions']
  for found, m in ((one, 1.0), (two, 1.2)):
    wanted = loss_of(2e10 * m**0.5, 4e11 * m**0.5)
    assert found['new_run_low'] < found['low'] < wanted < found['high'] < found['new_run_high']
    assert found['problem'] is None and found['high'] - found['low'] < 0.1
  table = pd.read_csv(points).query('params < 1.5e8')
  table.to_csv(points, index=False)  # two sizes: nothing may be read off this fit
  assert fit.main([str(points), *columns, *far[:2]]) == 0
  (none,) = json.loads(capsys.readouterr().out)['predictions']
  assert none['loss'] is None and 'model sizes' in none['problem']


def test_what_arms_share_can_be_freed(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', (('base', 1.0), ('new', 1.2)))
  argv = [str(points), '--columns', f'{COLUMNS},arm=model', '--resamples', '0', '--out', '-']
  assert fit.main([*argv, '--free', 'E,exponents']) == 0
  found = json.loads(capsys.readouterr().out)
  names = set(found['optimum'])
  assert {'E[base]', 'E[new]', 'alpha[base]', 'alpha[new]', 'beta[new]', 'm[new]'} <= names


def test_an_axis_has_its_exponent_and_its_test(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', (('base', 1.0), ('r2', 2**0.5), ('r8', 8**0.5)), sizes=5)
  table = pd.read_csv(points)
  rank = {'base': np.nan, 'r2': 2, 'r8': 8}  # an empty cell stands at r = 1
  table.assign(r=table['model'].map(rank)).to_csv(points, index=False)
  columns = f'{COLUMNS},axis:rank=r'
  ahead = ['--predict', 'N=1e9,D=2e10,axis:rank=4']
  assert fit.main([str(points), '--columns', columns, '--resamples', '0', '--out', '-', *ahead]) == 0
  found = json.loads(capsys.readouterr().out)
  low, high = found['intervals']['phi[rank]']
  assert low < 0.5 < high < low + 0.2
  assert [c['name'] for c in found['nested'][-2:]] == ['m = r^phi along rank', 'm free at every rank']
  (at,) = found['predictions']
  assert at['low'] < loss_of(1e9 * 4**0.25, 2e10 * 4**0.25) < at['high']


def test_missing_columns_are_derived(tmp_path):
  points = write_points(tmp_path / 'p.csv')
  given = read_points(points, parse_columns(COLUMNS))
  derived = read_points(points, parse_columns('N=params,C=flops,loss=loss'))
  np.testing.assert_allclose(derived.log_x['D'], given.log_x['D'], rtol=1e-12)
  np.testing.assert_allclose(given.log_x['C'], derived.log_x['C'], rtol=1e-12)
  assert len(set(given.size)) == 6


def test_highest_losses_are_dropped_with_a_sentence(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  argv = [str(points), '--columns', COLUMNS, '--resamples', '0', '--drop-highest', '2', '--out', '-']
  assert fit.main(argv) == 0
  found = json.loads(capsys.readouterr().out)
  assert found['n_points'] == 28 and len(found['excluded']) == 2
  assert 'line 2: loss' in ''.join(found['excluded'])


@pytest.mark.parametrize(
  ('change', 'options', 'words'),
  [
    ({}, ['--columns', 'N=parms,D=tokens,loss=loss'], "no column 'parms' for N; the nearest"),
    ({'loss': [np.nan]}, [], 'line 2: loss'),
    ({'tokens': [-5.0]}, [], 'line 2: D'),
    ({'params': ['many']}, [], "line 2: N (column 'params') is many"),
    ({}, ['--columns', 'N=params,D=tokens'], 'which column is the loss'),
    ({}, ['--columns', 'N=params,X=tokens,loss=loss'], "unknown role 'X'"),
    ({}, ['--columns', 'N,loss=loss'], 'is not ROLE=COLUMN'),
    ({}, ['--columns', 'loss=loss'], 'at least one of'),
    ({}, ['--law', 'width_depth'], 'needs column W'),
    ({}, ['--delta', '-1'], '--delta -1'),
    ({}, ['--drop-highest', '99'], 'the file has 30 rows'),
    ({}, ['--drop-highest', '27'], 'cannot fit the 5 parameters'),
    ({}, ['--resamples', '-1'], 'neither may be negative'),
    ({'seed': [np.nan]}, ['--columns', f'{COLUMNS},seed=seed'], "line 2: seed (column 'seed') is empty"),
    ({}, ['--reference', 'x', '--columns', f'{COLUMNS},arm=model'], 'the arms are one'),
    ({}, ['--free', 'A'], '--free A: choose from E, exponents'),
    ({}, ['--predict', 'N=1e9'], 'law chinchilla needs D'),
    ({}, ['--predict', 'N=1e9,D=-1'], "'D=-1' must be a positive number"),
    ({}, ['--predict', 'N=1e9,X=1'], "'X=1' is not one of"),
    ({}, ['--predict', 'N=1e9,D=1e9,arm=x'], "no arm 'x'"),
    ({}, ['--predict', 'N=1e9,D=1e9,axis:rank=2'], 'axis:rank is not a column'),
  ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, change, options, words):
  path = write_points(tmp_path / 'p.csv')
  table = pd.read_csv(path).astype(object)
  for column, values in change.items():
    table.loc[: len(values) - 1, column] = values
  table.to_csv(path, index=False)
  defaults = [] if '--columns' in options else ['--columns', COLUMNS]
  assert command(fit.main, str(path), *defaults, *options, '--out', str(tmp_path / 'o' / 'x.json')) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1 and words in error
  assert not (tmp_path / 'o').exists()


def test_one_model_size_prints_no_number(tmp_path, capsys):
  path = write_points(tmp_path / 'p.csv')
  pd.read_csv(path).assign(params=1e8, tokens=1e9).to_csv(path, index=False)
  assert fit.main([str(path), '--columns', COLUMNS, '--resamples', '0', '--out', '-']) == 0
  found = json.loads(capsys.readouterr().out)
  assert all(found[name] is None and name in found['verdicts'] for name in (*TRUE, 'a'))
  assert 'only 1 model size (at least 4' in found['doubts'][0]


def test_bad_files(tmp_path, capsys):
  for name, content in (('empty.csv', ''), ('head.csv', 'params,tokens,loss\n')):
    (tmp_path / name).write_text(content)
    assert command(fit.main, str(tmp_path / name), '--columns', COLUMNS) == 2
  assert command(fit.main, str(tmp_path / 'absent.csv')) == 2
  (tmp_path / 'comma.csv').write_text('params,tokens,loss\n1e8,1e9,3.0,\n2e8,1e9,2.9,\n')
  assert read_table(tmp_path / 'comma.csv')['params'].tolist() == ['1e8', '2e8'], 'not one column to the left'
  (tmp_path / 'long.csv').write_text('params,tokens,loss\n1e8,1e9,3.0,7\n2e8,1e9,2.9,7\n')
  assert command(fit.main, str(tmp_path / 'long.csv'), '--columns', COLUMNS) == 2
  good = str(write_points(tmp_path / 'good.csv'))
  assert command(fit.main, good, '--columns', COLUMNS, '--out', str(tmp_path / 'good.csv' / 'x.json')) == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 5 and 'no such file' in errors[2] and 'line 2 has 4 cells' in errors[3]
  assert 'not a folder' in errors[4]
  with pytest.raises(ConfigError, match='needs column'):
    fit.run(
      fit._parser().parse_args(
        [str(write_points(tmp_path / 'p.csv')), '--law', 'compute', '--columns', 'N=params,loss=loss']
      )
    )


def expectation(path, **change):
  spec = {'method': 'law', 'law': 'chinchilla', 'columns': COLUMNS, 'resamples': 30}
  spec |= {'expect': {'E': {'value': 1.8172, 'within': 0.1}, 'objective': {'at_most': 1.0}}}
  path.write_text(json.dumps(spec | change))
  return str(path)


def test_reproduce_meets_and_misses(tmp_path, capsys):
  points, file = str(write_points(tmp_path / 'p.csv')), tmp_path / 'e.json'
  wide = {'alpha': {'value': [0.33, 0.37], 'within': 0.1}}
  assert reproduce.main([points, '--expect', expectation(file, intervals=wide)]) == 0
  out = capsys.readouterr().out
  assert '4 of 4 met' in out and 'MISSED' not in out
  wrong = {'E': {'value': 1.9, 'within': 0.001}, 'objective': {'at_most': 1e-9}}
  assert reproduce.main([points, '--expect', expectation(file, expect=wrong)]) == 1
  assert '0 of 2 met' in capsys.readouterr().out


def test_reproduce_isoflop_exponents(tmp_path, capsys):
  rows = []
  for group, share in (('x', 0.1), ('y', 0.05)):
    for c in np.geomspace(1e18, 1e21, 5):
      for n in share * c**0.5 * np.geomspace(0.2, 5, 9):
        loss = 1.5 + 0.1 * np.log(n / (share * c**0.5)) ** 2 + 50 * c**-0.1
        rows.append({'set': group, 'n': n, 'flops': c, 'loss': loss})
  points, file = tmp_path / 'iso.csv', tmp_path / 'e.json'
  pd.DataFrame(rows).to_csv(points, index=False)
  spec = {'method': 'isoflop', 'columns': 'N=n,C=flops,loss=loss', 'group_by': ['set']}
  spec |= {'within': 0.004, 'interpolation': 'akima'}
  wanted = [{'group': [g], 'n_exponent': 0.5} for g in 'xy']
  file.write_text(json.dumps(spec | {'expect': wanted}))
  assert reproduce.main([str(points), '--expect', str(file)]) == 0
  assert '2 of 2 met' in capsys.readouterr().out
  file.write_text(json.dumps(spec | {'expect': [wanted[0] | {'n_exponent': 0.51}]}))
  assert reproduce.main([str(points), '--expect', str(file)]) == 1


def test_reproduce_refuses_bad_expectations(tmp_path, capsys):
  points, file = str(write_points(tmp_path / 'p.csv')), tmp_path / 'e.json'
  for text in ('{', '[]', '{"method": "magic"}', '{"method": "law", "law": "chinchilla"}'):
    file.write_text(text)
    assert command(reproduce.main, points, '--expect', str(file)) == 2
  assert command(reproduce.main, points, '--expect', str(tmp_path / 'absent.json')) == 2
  isoflop = {'method': 'isoflop', 'group_by': ['set'], 'expect': [{'group': [], 'n_exponent': 0.5}]}
  for change in (
    {'law': 'magic'},
    {'expect': {'gamma': {'value': 1, 'within': 1}}},
    {'expect': {}},
    {'expect': {'E': {'value': 1.8}}},
    {'interpolation': 'magic'},
    {'intervals': {'alpha': {'value': 0.35, 'within': 0.1}}},
    {'intervals': {'alpha': {'at_most': 0.35}}},
    {'expect': {'E': 1.8}},
    isoflop,
  ):
    assert command(reproduce.main, points, '--expect', expectation(file, **change)) == 2
  errors = capsys.readouterr().err.splitlines()
  assert len(errors) == 14 and all(line.startswith('error: ') for line in errors)
