"""analysis/publish.py: a finished sweep becomes a folder of results that needs nothing of the machine."""

import json

import pandas as pd
import pytest
from synthetic_runs import blank, command, write_sweep

from analysis import publish, results_page


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Called like an experiment, with a run that failed with a path in its message."""
  folder = tmp_path_factory.mktemp('runs') / 'quick'
  arms, sizes = ('residual', 'mhc', 'identity'), ((16, 2), (24, 2), (32, 3), (48, 3))
  folder.mkdir()
  write_sweep(folder, arms, sizes, ranks=False, states={('identity', (16, 2), 1): 'failed'})
  for path in folder.glob('*/status.json'):
    status = json.loads(path.read_text())
    if status['state'] == 'failed':
      path.write_text(json.dumps(status | {'error': 'disk full: /home/me/runs/x.json of gs://mine/y/z, 1/4'}))
  return folder


def test_a_sweep_is_published(runs, tmp_path, monkeypatch, capsys):
  blank(monkeypatch)
  old, other = tmp_path / 'quick' / 'paper_compute.svg', tmp_path / 'quick' / 'power.csv'
  old.parent.mkdir()
  for path in (old.with_suffix('.png'), other, old.parent / 'rollout.csv'):
    path.write_text('x\n')
  folder = publish.publish(runs, tmp_path, resamples=4)
  said = capsys.readouterr().out
  assert folder == tmp_path / 'quick' and 'warning: 1 of ' in said and 'absent: ' in said
  names = {path.name for path in folder.iterdir()}
  assert {'results.csv', 'plan.json', 'gaps.csv', 'multipliers.csv', 'headlines.csv', 'power.csv'} <= names
  assert not any(name.endswith(('.svg', '.pdf')) or name.startswith('.') for name in names)
  for path in folder.glob('*.png'):
    assert path.with_suffix('.csv').is_file()
  planned = json.loads((runs / 'plan.json').read_text())
  assert json.loads((folder / 'plan.json').read_text()) == planned | {'options': []}
  table = pd.read_csv(folder / 'results.csv')
  assert table['run_id'].tolist() == [run['run_id'] for run in planned['runs']]
  assert table['error'].dropna().tolist() == ['disk full: x.json of z, 1/4']
  assert table['jax_version'].notna().all() and not set(table) & {'variant', 'paired'}
  page = results_page.page(tmp_path)
  assert '`mhc sweep quick`' in page and '## quick' in page and '| mhc | ' in page
  assert results_page.sentence(tmp_path).startswith(f'One `make sweep`, {len(table)} runs: ')


def test_a_folder_has_the_tables_of_its_experiment_or_part_of_the_study():
  expected = {'quick': 'quick', 'rank-small': 'rank', 'learning_rate_muon': 'learning_rate'}
  expected |= {'study-gpu-small': 'study', 'study-cpu': 'study', 'study-cpu-muon-rates': 'rates'}
  expected |= {'study-cpu-muon': 'muon', 'study-cpu-ranks': 'ranks', 'router': 'router', 'new_one': 'new_one'}
  assert {name: publish.kind(name) for name in expected} == expected


def test_a_folder_of_one_machine_is_not_published(runs, tmp_path, capsys):
  plan = runs / 'plan.json'
  before = plan.read_text()
  for option in ('--config.data.name=jsonl:/home/me/texts', '--config.data.name=parquet:gs://mine/texts'):
    plan.write_text(json.dumps(json.loads(before) | {'options': [option]}))
    assert command(publish.main, runs, '--out', tmp_path) == 2
    assert option in capsys.readouterr().err
  plan.write_text(before)
  assert not any(tmp_path.iterdir())
  assert command(publish.main, runs, runs, '--name', 'x') == 2
