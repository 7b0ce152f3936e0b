"""`mhc verify`: published losses against runs trained again, and what two machines' rounding allows."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments import planning, quick, rounding, verify
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from mhc_jax.run_folder import load_plan
from mhc_jax.workdir import read_config, read_status


def tiny(text):
  """Two arms of two updates."""
  configs = []
  for seed, name in ((0, 'residual'), (0, 'identity'), (1, 'residual')):
    c = quick.config(name, 16, 1, seed)
    c.data.update({'name': f'text_files:{text}', 'dir': str(text.parent), 'batch_size': 2, 'seq_len': 16})
    c.duration.steps = c.evaluation.every_steps = 2
    c.evaluation.update({'sequences': 8, 'batch_size': 8})
    c.log.update({'diagnostics_every_steps': None, 'tensorboard': False})
    configs.append(c)
  return configs


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The folder of a finished sweep of `tiny`, as analysis/publish.py leaves one."""
  folder = tmp_path_factory.mktemp('published') / 'tiny'
  text = folder.parent / 'text'
  text.mkdir()
  for k in range(40):
    (text / f'{k}.txt').write_text(f'Once upon a time there were {k} bears. ' * 50)
  planning.EXPERIMENTS['tiny'] = lambda _: tiny(text)
  configs, planned = planning.plan('tiny')
  runs = folder.parent / 'runs'
  verify.execute(configs, planned, str(runs), workers=1)
  folder.mkdir()
  planning.keep(str(folder), 'tiny', [], planned)
  rows = []
  for run_id, arm in load_plan(str(folder))[1].items():
    config, status = read_config(str(runs / run_id)), read_status(str(runs / run_id))
    derived = status['derived']
    rows.append(
      {'run_id': run_id, 'arm': arm, 'state': status['state'], 'flops': derived['flops']}
      | {'validation_loss': status['final']['validation/loss'], 'data_digest': derived['data_digest']}
      | {'seed': config['seed'], 'device_kind': status['device_kind']}
    )
  pd.DataFrame(rows).to_csv(folder / 'results.csv', index=False)
  yield folder
  del planning.EXPERIMENTS['tiny']


def changed(published, tmp_path, **columns):
  """A copy whose results.csv has other columns."""
  folder = tmp_path / 'tiny'
  shutil.copytree(published, folder)
  pd.read_csv(folder / 'results.csv').assign(**columns).to_csv(folder / 'results.csv', index=False)
  return folder


def test_the_same_code_agrees_and_takes_each_arm_first(published, capsys):
  assert verify.main([str(published), '--runs', '2']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[2] for line in lines[:2]] == ['residual', 'identity']
  assert all(line.endswith('ok') for line in lines[:2]) and lines[2] == '1 folder: all agree'


def test_a_loss_that_this_code_does_not_reach_is_stale(published, tmp_path, capsys):
  table = pd.read_csv(published / 'results.csv')
  folder = changed(published, tmp_path, validation_loss=table['validation_loss'] + 0.5)
  assert verify.main([str(folder), '--runs', '1']) == 1
  assert 'difference -0.5' in capsys.readouterr().out


def test_runs_that_are_no_longer_planned_are_stale(published, tmp_path, capsys):
  table = pd.read_csv(published / 'results.csv')
  ids = ['0' * 12, *table['run_id'][1:]]
  assert verify.main([str(changed(published, tmp_path, run_id=ids)), '--runs', '1']) == 1
  assert 'STALE: 1 of 3 runs are not those that `mhc sweep tiny` plans now' in capsys.readouterr().out


def test_overrides_and_seeds_are_those_of_the_published_sweep(published, tmp_path, capsys):
  folder = changed(published, tmp_path)
  planned = planning.plan('tiny', ['--config.optimizer.lr=0.5'], 2)[1]
  planning.keep(str(folder), 'tiny', ['--config.optimizer.lr=0.5', '--seeds', '2'], planned)
  assert verify.main([str(folder), '--runs', '1']) == 1
  told = capsys.readouterr().out
  assert '3 of 3 runs are not those that `mhc sweep tiny --config.optimizer.lr=0.5 --seeds 2` plans' in told
  table = pd.read_csv(folder / 'results.csv')
  table['run_id'] = [run.run_id for run in planned[: len(table)]]
  table.to_csv(folder / 'results.csv', index=False)
  assert verify.main([str(folder), '--runs', '1']) == 1  # planned, but of another rate
  assert 'are not those' not in capsys.readouterr().out


def test_what_cannot_be_verified_says_so_in_a_line(published, tmp_path, capsys):
  other = changed(published, tmp_path, data_digest='other')
  with pytest.raises(ConfigError, match='made of the corpus other'):
    verify.main([str(other)])
  (tmp_path / 'bare').mkdir()
  with pytest.raises(ConfigError, match=r'bare has no results.csv: no runs to train'):
    verify.main([str(tmp_path / 'bare')])
  with pytest.raises(ConfigError, match='no such folder'):
    verify.main([str(tmp_path / 'none')])
  (other / 'results.csv').write_text('run_id,state\n')
  with pytest.raises(ConfigError, match='has no column arm, flops'):
    verify.main([str(other)])
  (other / 'results.csv').write_text('')
  with pytest.raises(ConfigError, match='cannot be read'):
    verify.main([str(other)])
  (other / 'plan.json').unlink()
  with pytest.raises(ConfigError, match=r'has no plan.json'):
    verify.main([str(other)])


def test_of_several_folders_those_without_runs_are_passed_over_and_those_refused_are_not(
  published, tmp_path, capsys
):
  (tmp_path / 'bare').mkdir()
  assert verify.main([str(tmp_path / 'bare'), str(published), '--runs', '1']) == 0
  told = capsys.readouterr()
  assert told.out.endswith('1 folder: all agree\n') and 'bare: no runs to train again' in told.err
  assert verify.main([str(tmp_path / 'none'), str(published), '--runs', '1']) == 2
  assert capsys.readouterr().out.endswith('1 folder: all agree, 1 not verified\n')


def test_runs_that_are_kept_are_not_taken_for_trained_again(published, tmp_path, monkeypatch):
  """Those of the same clean revision go on; others are refused."""
  arguments = [str(published), '--runs', '1', '--out', str(tmp_path)]
  monkeypatch.setattr('mhc_jax.recorder.revision', lambda: 'a')
  monkeypatch.setattr(verify, 'revision', lambda: 'a')
  assert verify.main(arguments) == verify.main(arguments) == 0
  for now in ('b', 'a-dirty'):
    monkeypatch.setattr(verify, 'revision', lambda now=now: now)
    with pytest.raises(ConfigError, match='of revision a and not surely of this code'):
      verify.main(arguments)


def test_a_stop_or_a_failure_is_no_verdict(published, monkeypatch, capsys):
  monkeypatch.setattr(verify, 'execute', lambda configs, planned, *_, **__: [(planned[0].run_id, state)])
  state = 'interrupted'
  assert verify.main([str(published)]) == 130
  assert 'STALE' not in capsys.readouterr().out
  state = 'failed'
  with pytest.raises(ConfigError, match='could not be trained again'):
    verify.main([str(published)])


def test_diverged_runs_are_compared_by_that(published):
  table = pd.read_csv(published / 'results.csv').assign(state=['diverged', 'finished', 'finished'])
  assert verify.cheapest(table, 2)['run_id'].tolist() == table['run_id'][[2, 1]].tolist()
  alone = verify.cheapest(table.assign(state=['diverged', 'finished', 'missing']), 3)
  assert alone['state'].tolist() == ['diverged', 'finished']
  row = pd.Series({'state': 'diverged', 'validation_loss': np.nan})
  assert verify.compared(row, None, {'state': 'diverged'}, None) == (
    'published diverged, now diverged: ok',
    True,
  )
  for before, now in (('diverged', 'finished'), ('finished', 'diverged')):
    assert not verify.compared(pd.Series({'state': before}), None, {'state': now}, None)[1]


def made_up():
  """rounding.csv with deviations 0.1 and 0.3 of mhc over three roundings, which pool to the root of 0.05."""
  rows = [
    (name, updates, seed, k, 2 + scale * sd * value)
    for name, scale in (('mhc', 1.0), ('hc', 10.0))
    for updates, sds in ((100, (0.01, 0.01)), (400, (0.1, 0.3)))
    for seed, sd in enumerate(sds)
    for k, value in enumerate((-1.0, 0.0, 1.0))
  ]
  return pd.DataFrame(rows, columns=['connection', 'updates', 'seed', 'rounding', 'validation_loss'])


def test_the_tolerance_by_hand():
  """With 4 degrees of freedom."""
  table = made_up()
  expected = np.sqrt(2 * 0.05) * stats.t.ppf(0.995, 4)
  assert verify.tolerance('mhc', 50, table) == verify.tolerance('mhc', 400, table) == pytest.approx(expected)
  grown = expected * (np.sqrt(0.05) / 0.01) ** (30 / 300)
  assert verify.tolerance('mhc', 430, table) == pytest.approx(grown)
  for name, updates in (('mhc', 10_000), ('gated_residual', 50), (None, 50)):
    assert verify.tolerance(name, updates, table) == pytest.approx(10 * expected)


def test_a_rounding_that_changes_no_bit_is_no_further_one():
  table = made_up()
  twice = pd.concat([table, table[table['rounding'] == 0].assign(rounding=3)])
  pd.testing.assert_frame_equal(verify.deviations(twice), verify.deviations(table))
  same = table.assign(validation_loss=2.0)  # of all: what float32 can tell remains
  assert 1e-7 < verify.tolerance('mhc', 400, same) < 1e-3


def test_each_measured_connection_is_known_and_higher_rates_are_louder():
  measured = pd.read_csv(verify.ROUNDING)
  assert set(measured['connection']) == set(rounding.CONNECTIONS)
  assert (measured.groupby(['connection', 'updates', 'seed']).size() >= 2).all()
  assert not measured.duplicated(['connection', 'updates', 'seed', 'rounding']).any()
  for name in rounding.CONNECTIONS:
    c = rounding.config(name, 100, 0)
    assert verify.measured_as(resolve(c, 'x').resolved) == name
    c.optimizer.lr *= 2
    assert verify.measured_as(resolve(c, 'x').resolved) is None


def test_every_published_sweep_has_a_plan_of_its_runs():
  """plan.json names the runs of results.csv, and nothing of the machine that made them."""
  folders = [path.parent for path in (verify.ROUNDING.parent.parent / 'docs/results').glob('*/plan.json')]
  assert folders
  for folder in folders:
    assert set(load_plan(str(folder))[1]) == set(pd.read_csv(folder / 'results.csv')['run_id']), folder
    assert json.loads((folder / 'plan.json').read_text()).keys() == {'sweep', 'options', 'runs'}
