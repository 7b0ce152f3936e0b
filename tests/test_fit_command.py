"""`mhc fit`: what is printed and written, its laws, levels and predictions, and --isoflop."""

import json

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import blank, command
from test_analysis_cli import COLUMNS, TRUE, loss_of, write_points

from analysis import fit


def run(capsys, *argv):
  """The JSON of a command."""
  assert fit.main([*map(str, argv), '--out', '-']) == 0
  return json.loads(capsys.readouterr().out)


def plain(path, *more):
  return [path, '--columns', COLUMNS, '--resamples', '0', *more]


def test_the_terminal_has_a_summary_and_the_file_every_number(tmp_path, capsys):
  points, out = write_points(tmp_path / 'p.csv'), tmp_path / 'o.json'
  argv = plain(points, '--predict', 'N=2e10,D=4e11', '--out', out, '--drop-highest', '1')
  assert fit.main(list(map(str, argv))) == 0
  shown = capsys.readouterr()
  doc = json.loads(out.read_text())
  lines = shown.out.splitlines()
  assert lines[0].startswith('L = E + A N^-alpha + B D^-beta: fitted to 29 runs (Huber loss of log loss')
  low, high = doc['intervals']['alpha']
  (alpha,) = [line for line in lines if line.startswith('alpha')]
  assert alpha.split() == ['alpha', f'{doc["alpha"]:.4g}', f'{low:.4g}', 'to', f'{high:.4g}']
  assert '95 % interval (delta)' in lines[2] and lines[-1] == f'wrote {out}'
  assert any(line.startswith('- excluded: line ') for line in lines)
  assert any(f'loss {doc["predictions"][0]["loss"]:.5g} (' in line for line in lines)
  assert len(lines) < 25 and not shown.err


def test_a_fit_that_may_not_be_quoted_says_so_in_the_table(tmp_path, capsys):
  """And no warning of numpy's reaches the terminal: in tests it would be an error."""
  points = write_points(tmp_path / 'p.csv')
  table = pd.read_csv(points)
  table.assign(tokens=1e11, loss=loss_of(table['params'], 1e11)).to_csv(points, index=False)
  assert fit.main([*map(str, plain(points)), '--resamples', '20']) == 0
  shown = capsys.readouterr()
  assert 'not identified' in shown.out or 'not fitted soundly' in shown.out
  assert shown.err == ''


def test_runs_are_named_by_their_line(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  text = points.read_text().splitlines()
  points.write_text('\n'.join(['# exported', *text[:11], '', '', *text[11:]]))
  doc = run(capsys, *plain(points, '--drop-highest', '1'))
  assert [i['run'] for i in doc['influence']] == [*range(4, 13), *range(15, 35)]
  assert doc['excluded'][0].startswith('line 3: loss')


def test_levels_change_intervals_and_no_verdict(tmp_path, capsys):
  few = {'sizes': 4, 'ratios': (5, 20, 80)}
  points = write_points(tmp_path / 'p.csv', **few)
  predict = ('--predict', 'N=1e9,D=1e10')
  wide, narrow = (run(capsys, *plain(points, *predict, '--level', v)) for v in ('0.95', '0.5'))
  # t quantiles of 7 degrees of freedom
  ratio = np.diff(wide['intervals']['alpha'])[0] / np.diff(narrow['intervals']['alpha'])[0]
  assert ratio == pytest.approx(2.3646 / 0.7111, rel=1e-3) and narrow['level'] == 0.5
  assert wide['verdicts'] == narrow['verdicts'] and wide['alpha'] == narrow['alpha']
  one, two = (d['predictions'][0] for d in (wide, narrow))
  assert np.log(one['high'] / one['low']) / np.log(two['high'] / two['low']) == pytest.approx(ratio, rel=1e-6)
  loud = write_points(tmp_path / 'q.csv', (('base', 1.0), ('new', 1.2)), noise=0.1)
  argv = [loud, '--columns', f'{COLUMNS},arm=model', '--resamples', '0', '--level']
  strict = [run(capsys, *argv, v)['verdicts'] for v in ('0.95', '0.01')]
  assert strict[0] == strict[1] and 'wider than a factor' in strict[0]['m[new]']


def test_predictions_take_noise_and_what_was_measured(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  at = 'N=1B,D=20B'
  asked = [v for more in ('', ',sigma=0.02', ',loss=2.5') for v in ('--predict', at + more)]
  usual, noisy, measured = run(capsys, *plain(points, *asked))['predictions']
  assert usual['at'] == {'N': 1e9, 'D': 2e10} and usual['range'] is None
  half = (np.log(noisy['new_run_high'] / noisy['new_run_low'])) / 2
  assert noisy['low'] == usual['low'] and half == pytest.approx(2.06 * 0.02, rel=0.02)
  assert measured['relative_error'] == pytest.approx(usual['loss'] / 2.5 - 1, rel=1e-12)
  # Where the runs have sigmas, too, they are rescaled to the scatter: 0.003 here, whatever their unit.
  table = pd.read_csv(points)
  table.assign(s=7.0).to_csv(points, index=False)
  argv = [
    points,
    '--columns',
    COLUMNS + ',sigma=s',
    '--resamples',
    '0',
    '--predict',
    at,
    '--predict',
    at + ',sigma=7',
  ]
  one, same = run(capsys, *argv)['predictions']
  assert same['new_run_high'] == pytest.approx(one['new_run_high'], rel=1e-9)


def test_far_predictions_are_marked(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  below, above = run(capsys, *plain(points, '--predict', 'N=1e6,D=1e9', '--predict', 'N=1e9,D=2e12'))[
    'predictions'
  ]
  assert below['range'] == 'N lies a factor of 50 below the runs' and below['loss'] > 0
  assert above['range'] == 'D lies a factor of 5 above the runs'
  pd.read_csv(points).query('params < 1.5e8').to_csv(points, index=False)
  argv = plain(points, '--predict', 'N=1e8,D=1e9')
  (refused,), (shown,) = (run(capsys, *argv, *more)['predictions'] for more in ((), ('--anyway',)))
  assert refused['loss'] is None and refused['extrapolated'] is None
  assert shown['problem'] is None and shown['extrapolated'] == refused['problem']
  assert shown['loss'] == pytest.approx(loss_of(1e8, 1e9), rel=0.02)
  assert fit.main(list(map(str, [*argv, '--anyway']))) == 0
  assert '; extrapolated: not fitted soundly' in capsys.readouterr().out


def test_below_the_runs_an_unknown_exponent_forbids_a_prediction(tmp_path, capsys):
  """At the boundary of E the exponents are what noise makes them."""
  points = write_points(tmp_path / 'p.csv')
  table = pd.read_csv(points)
  table.assign(loss=table['loss'] - TRUE['E']).to_csv(points, index=False)
  argv = plain(points, '--predict', 'N=1e7,D=1e10', '--predict', 'N=1e8,D=1e10')
  doc = run(capsys, *argv)
  assert doc['E'] is doc['alpha'] is doc['a'] is None and 'E -> 0' in doc['verdicts']['alpha']
  below, inside = doc['predictions']
  assert below['loss'] is None and below['problem'].startswith(
    'below the smallest N alpha decides, and it is not'
  )
  wanted = loss_of(1e8, 1e10) - TRUE['E']
  assert inside['problem'] is None and inside['loss'] == pytest.approx(wanted, rel=0.05)


def test_pins_ties_and_terms(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  pinned = run(capsys, *plain(points, '--pin', f'E={TRUE["E"]}', '--pin', 'alpha=0.3473'))
  assert pinned['E'] == TRUE['E'] and pinned['pinned'] == {'E': TRUE['E'], 'alpha': 0.3473}
  assert 'E' not in pinned['intervals'] and pinned['degrees_of_freedom'] == 27
  low, high = pinned['intervals']['beta']
  assert low < TRUE['beta'] < high < low + 0.02 and pinned['formula'].endswith('E = 1.8172, alpha = 0.3473')
  assert pinned['a'] == pytest.approx(pinned['beta'] / (pinned['beta'] + 0.3473))
  assert fit.main(list(map(str, plain(points, '--pin', 'E=1.8')))) == 0
  assert 'E          1.8' in capsys.readouterr().out
  tied = run(capsys, *plain(points, '--tie', 'alpha=beta'))
  assert 'beta' not in tied['intervals'] and tied['alpha'] == pytest.approx(0.36, abs=0.02)
  terms = run(capsys, *plain(points, '--law', 'E + A*N^-alpha + B*D^-beta'))
  named = run(capsys, *plain(points))
  assert terms['optimum'] == named['optimum'] and terms['law'] == 'formula'
  raw = run(capsys, *plain(points, '--loss', 'huber_raw'))
  assert raw['loss'] == 'huber_raw' and raw['alpha'] == pytest.approx(named['alpha'], abs=0.02)


def test_the_law_that_the_grid_carries(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv')
  both = run(capsys, *plain(points, '--law', 'auto'))
  assert both['law'] == 'chinchilla' and 'L(N, D) is fitted' in both['notes'][0]
  path = write_points(tmp_path / 'q.csv', ratios=(20,))
  assert run(capsys, *plain(path, '--law', 'auto'))['law'] == 'compute'
  for role, law in (('C=flops', 'compute'), ('N=params', 'params'), ('D=tokens', 'tokens')):
    argv = [path, '--columns', f'{role},loss=loss', '--resamples', '0', '--law', 'auto']
    assert run(capsys, *argv)['law'] == law
  assert command(fit.main, *plain(write_points(tmp_path / 'r.csv', sizes=3), '--law', 'auto')) == 2
  assert '--law auto: No law is fitted' in capsys.readouterr().err


def test_rows_can_be_picked_and_units_are_checked(tmp_path, capsys):
  points = write_points(tmp_path / 'p.csv', (('base', 1.0), ('new', 1.2)))
  one = run(capsys, *plain(points, '--where', 'model=base,seed=0'))
  assert one['n_points'] == 30 and one['notes'][0] == '30 of 60 rows have model=base'
  table = pd.read_csv(points)
  table.assign(flops=1e3 * table['flops']).to_csv(points, index=False)
  doc = run(capsys, points, '--columns', f'{COLUMNS},C=flops', '--resamples', '0')
  assert doc['notes'][0] == 'C is 1e+03 times 6 N D: are the units of C, N and D the same?'


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--law', 'magic'], 'choose from compute, chinchilla'),
    (['--law', 'E + A*N'], 'not ^-exponent'),
    (['--law', 'E + A*N^-alpha + B*D^-delta'], "'delta' means something else"),
    (['--law', 'E + A*N^-alpha + loss*D^-beta'], "'loss' means something else"),
    (['--pin', 'E'], 'write it like --pin E=1.69'),
    (['--pin', 'E=low'], "'low' is no number"),
    (['--pin', 'gamma=1'], 'the parameters are E, A, B, alpha, beta'),
    (['--tie', 'alpha=gamma'], 'the exponents are alpha, beta'),
    (['--pin', 'E=1', '--free', 'E'], 'what is pinned cannot be free'),
    (['--level', '95'], 'between 0 and 1'),
    (['--figure', 'x.pdf'], 'name a .png file'),
    (['--where', 'model=other'], 'no row has it; there are one'),
    (['--where', 'Model=one'], "nearest is 'model'"),
    (['--predict', 'N=1e9,N=2e9'], 'N is given twice'),
    (['--isoflop', '--law', 'compute'], 'leave out --law'),
    (['--isoflop', '--predict', 'N=1e9'], 'write C=..'),
    (['--isoflop', '--predict', 'C=1e20,arm=x'], "no arm 'x'"),
    (['--isoflop', '--columns', 'N=params,loss=loss'], 'needs two of N=, D= and C='),
  ],
)
def test_bad_options_end_in_one_line(tmp_path, capsys, options, words):
  path = write_points(tmp_path / 'p.csv')
  columns = [] if '--columns' in options else ['--columns', COLUMNS]
  assert command(fit.main, path, *columns, *options) == 2
  shown = capsys.readouterr()
  assert shown.err.startswith('error: ') and shown.err.count('\n') == 1 and words in shown.err
  assert not shown.out


def write_isoflop(path, arms, budgets=5, sizes=7, low=0.25, high=4.0):
  """Runs at equal compute with N* = k C^a of each arm, whose loss is a parabola in log N."""
  rows = []
  for arm, (k, a) in arms.items():
    for c in np.geomspace(1e18, 1e20, budgets):
      for n in k * c**a * np.geomspace(low, high, sizes):
        loss = 2 + 40 * c**-0.1 * np.exp(0.05 * np.log(n / (k * c**a)) ** 2)
        rows.append({'arm': arm, 'flops': c, 'n': n, 'd': c / (6 * n), 'loss': loss})
  pd.DataFrame(rows).to_csv(path, index=False)
  return [path, '--isoflop', '--columns', 'N=n,C=flops,loss=loss,arm=arm']


def test_isoflop_optima_are_found(tmp_path, capsys):
  truth = {'one': (0.1, 0.5), 'two': (0.004, 0.57)}
  argv = write_isoflop(tmp_path / 'p.csv', truth)
  doc = run(capsys, *argv, '--predict', 'C=1e22')
  best = {(o['arm'], o['optimum'], o['method']): o for o in doc['optima']}
  assert len(best) == 12
  for (arm, name, method), o in best.items():
    k, a = truth[arm]
    want = {'N*': (k, a), 'D*': (1 / (6 * k), 1 - a), 'D*/N*': (1 / (6 * k**2), 1 - 2 * a)}[name]
    # A parabola of loss is none of log loss, and Akima's minimum is one of 25 points to a gap of log 1.59.
    assert o['exponent'] == pytest.approx(want[1], abs=0.01), (arm, name, method)
    assert o['coefficient_low'] <= o['coefficient'] <= o['coefficient_high']
    assert o['low'] - 1e-9 <= o['exponent'] <= o['high'] + 1e-9
    for b in o['budgets']:
      assert b['value'] == pytest.approx(want[0] * b['flops'] ** want[1], rel=0.05)
  for p in doc['predictions']:
    k, a = truth[p['arm']]
    for name, value in (
      ('N*', k * 1e22**a),
      ('D*', 1e22 ** (1 - a) / (6 * k)),
      ('D*/N*', 1e22 ** (1 - 2 * a) / (6 * k**2)),
    ):
      assert p[f'{name} low'] <= p[name] <= p[f'{name} high']
      assert p[name] == pytest.approx(value, rel=0.1)
    assert p['range'] == 'C lies a factor of 100 above the budgets'
  raw = run(capsys, *argv, '--loss', 'mse')
  assert raw['in_nats'] and 0 < abs(raw['optima'][0]['exponent'] - doc['optima'][0]['exponent']) < 0.01
  (only, _) = run(capsys, *argv, '--predict', 'C=1e19,arm=two')['predictions']
  assert only['arm'] == 'two' and only['range'] is None


def test_isoflop_guards(tmp_path, capsys):
  two = write_isoflop(tmp_path / 'p.csv', {'one': (0.1, 0.5)}, budgets=2)
  doc = run(capsys, *two, '--predict', 'C=1e19')
  assert all(o['low'] is None and o['exponent'] is not None for o in doc['optima'])
  assert doc['predictions'][0]['N*'] > 0 and doc['predictions'][0]['N* low'] is None
  edge = write_isoflop(tmp_path / 'q.csv', {'one': (0.1, 0.5)}, low=1.5, high=8)
  doc = run(capsys, *edge, '--predict', 'C=1e21')
  assert all(o['exponent'] is None for o in doc['optima'])
  assert {b['problem'] for o in doc['optima'] for b in o['budgets']} == {
    'the vertex lies outside the grid',
    'the minimum is at the edge of the grid',
  }
  assert 'fewer than two budgets' in doc['predictions'][0]['problem']
  few = write_isoflop(tmp_path / 'r.csv', {'one': (0.1, 0.5)}, sizes=2)
  doc = run(capsys, *few)
  assert doc['optima'][0]['budgets'][0]['problem'] == '2 points: parabola needs 3'
  assert fit.main(list(map(str, [*edge, '--predict', 'C=1e21']))) == 0
  assert 'the vertex lies outside the grid' in capsys.readouterr().out


def test_isoflop_without_columns_of_compute(tmp_path, capsys):
  """C = 6 N D where it is not given."""
  argv = write_isoflop(tmp_path / 'p.csv', {'one': (0.1, 0.5)})
  given = run(capsys, *argv)
  follows = run(capsys, *argv[:2], '--columns', 'N=n,D=d,loss=loss,arm=arm')
  for one, two in zip(given['optima'], follows['optima'], strict=True):
    assert one['exponent'] == pytest.approx(two['exponent'], abs=1e-9)


@pytest.mark.parametrize('law', ['chinchilla', 'params', 'isoflop'])
def test_a_figure_comes_with_its_numbers(tmp_path, capsys, monkeypatch, law):
  blank(monkeypatch)
  if law == 'isoflop':
    argv = write_isoflop(tmp_path / 'p.csv', {'one': (0.1, 0.5), 'two': (0.2, 0.5)})
  else:
    argv = plain(write_points(tmp_path / 'p.csv', (('base', 1.0), ('new', 1.2))), '--law', law)
    argv[2] += ',arm=model'
  doc = run(capsys, *argv, '--figure', tmp_path / 'f' / 'loss.png')
  assert (tmp_path / 'f' / 'loss.png').is_file()
  numbers = pd.read_csv(tmp_path / 'f' / 'loss.csv')
  assert (numbers['kind'] == 'run').sum() == doc['n_points']
  if law == 'isoflop':
    assert (numbers['kind'] == 'minimum').sum() == 10
  else:
    curve = numbers[numbers['kind'] == 'fit']
    assert ((curve['low'] < curve['loss']) & (curve['loss'] < curve['high'])).all()
