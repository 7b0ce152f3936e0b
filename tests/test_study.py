"""The study: equal tokens and paired seeds, rates by rule and from other seeds, and its prediction."""

import collections
import json

import numpy as np
import pandas as pd
import pytest

from analysis import prediction
from analysis.coverage import _run
from analysis.power import judged, sweep
from analysis.selection import classify
from experiments import study
from mhc_jax.errors import ConfigError


@pytest.fixture
def rates(tmp_path, monkeypatch):
  """study_rates.json elsewhere, with a rate of its own for each arm and optimizer."""
  chosen = {
    name: {arm: 1e-3 * (k + 1 + 10 * ('muon' in name)) for k, arm in enumerate(study.ARMS)}
    for name in ('cpu', 'cpu-muon', 'gpu', 'gpu-muon')
  }
  path = tmp_path / 'rates.json'
  path.write_text(json.dumps(chosen))
  monkeypatch.setattr(study, 'RATES', path)
  return chosen


def cell(c):
  return c.model.width, c.model.depth, c.duration.tokens_per_param


def test_arms_of_a_cell_have_equal_updates_and_paired_seeds(rates):
  for scale, sizes in study.SCALES.items():
    seeds, updates = collections.defaultdict(set), collections.defaultdict(set)
    for c in study.runs(scale):
      seeds[cell(c), c.arm].add(c.seed)
      updates[cell(c)].add((c.evaluation.every_steps, c.log.every_steps, c.data.batch_size))
    cells = {key[0] for key in seeds}
    assert len(cells) == len(sizes['sizes']) + 2 and len(seeds) == len(cells) * len(study.ARMS)
    for (key, _), found in seeds.items():
      assert found == set(study.LARGEST_SEEDS if key[:2] == sizes['sizes'][-1] else study.SEEDS)
    assert all(len(one) == 1 for one in updates.values())
    small = [cell(c) for c in study.runs(f'{scale}-small')]
    assert set(small) == {key for key in cells if key[:2] != sizes['sizes'][-1]}


def test_rates_come_from_other_seeds_and_enter_by_arm_and_optimizer(rates):
  for part in ('rates', 'muon-rates', 'transfer', 'muon-transfer'):
    assert not {c.seed for c in study.runs(f'gpu-{part}')} & {*study.SEEDS, *study.LARGEST_SEEDS}
  for c in study.runs('gpu'):
    assert c.optimizer.lr == rates['gpu'][c.arm] and c.optimizer.name is None
  for c in study.runs('cpu-muon'):
    assert c.optimizer.lr == rates['cpu-muon'][c.arm] and c.optimizer.name == 'muon'
  for chosen, part in (('gpu', 'gpu-transfer'), ('gpu-muon', 'gpu-muon-transfer')):
    runs = study.runs(part)
    tried = collections.Counter(round(c.optimizer.lr / rates[chosen][c.arm], 6) for c in runs)
    assert tried == {0.5: 7, 1.0: 7, 2.0: 7}
    assert {c.optimizer.name for c in runs} == {'muon' if 'muon' in part else None}


def test_without_rates_it_says_how_to_choose_them(tmp_path, monkeypatch):
  monkeypatch.setattr(study, 'RATES', tmp_path / 'none.json')
  with pytest.raises(ValueError, match='mhc sweep study:cpu-rates, then python -m'):
    study.runs('cpu')
  assert study.runs('cpu-rates')
  for argument in ('nonsense', 'gpu-nonsense'):
    with pytest.raises(ValueError, match=r'argument|part'):
      study.runs(argument)


def test_the_rate_is_the_lowest_mean_and_divergence_is_infinite(tmp_path, monkeypatch):
  losses = {  # arm, rate -> losses of the seeds
    ('a', 1e-3): (2.0, 2.2),
    ('a', 2e-3): (1.9, 2.1),
    ('a', 4e-3): (1.0, None),
    ('b', 1e-3): (3.0, 3.0),
  }
  runs = {f'{arm}{lr}{k}': (arm, lr, v) for (arm, lr), own in losses.items() for k, v in enumerate(own)}
  monkeypatch.setattr(study, 'load_plan', lambda _: ('x', {run_id: run[0] for run_id, run in runs.items()}))
  monkeypatch.setattr(study, 'read_config', lambda p: {'optimizer': {'lr': runs[p.split('/')[-1]][1]}})

  def status(path):
    loss = runs[path.split('/')[-1]][2]
    return {'state': 'finished' if loss else 'diverged', 'final': {'validation/loss': loss}}

  monkeypatch.setattr(study, 'read_status', status)
  assert study.choose('x') == {'a': 2e-3, 'b': 1e-3}
  monkeypatch.setattr(study, 'RATES', tmp_path / 'rates.json')
  planned = {run_id: run[0] for run_id, run in runs.items()}
  for name, key in (('study:gpu-muon-rates', 'gpu-muon'), ('study', 'cpu')):
    monkeypatch.setattr(study, 'load_plan', lambda _, name=name: (name, planned))
    assert study.main(['x']) == 0
    assert json.loads(study.RATES.read_text())[key] == {'a': 2e-3, 'b': 1e-3}
  monkeypatch.setattr(study, 'load_plan', lambda _: ('study:gpu', planned))
  with pytest.raises(ConfigError, match='is no sweep of rates'):
    study.main(['x'])
  monkeypatch.setattr(study, 'read_status', lambda _: {'state': 'running'})
  with pytest.raises(ConfigError, match='is running: finish the sweep first'):
    study.choose('x')
  monkeypatch.setattr(study, 'read_status', lambda _: {'state': 'diverged'})
  with pytest.raises(ConfigError, match='a diverged at every rate'):
    study.choose('x')


def test_prediction_and_score_of_a_known_law(rng):
  """Six sizes of two arms, m = 1.5; the seventh within its interval and a hundredth of its loss."""
  c, m = np.geomspace(1e12, 3e14, 7), {'residual': 1.0, 'b': 1.5}

  def loss(arm, size):
    return 1.5 + 1.2 * (m[arm] * c[size] / 1e12) ** -0.25

  rows = [
    _run(arm, size, c[size], seed, 0, loss(arm, size) * np.exp(0.002 * rng.standard_normal()))
    for arm in m
    for size in range(7)
    for seed in range(2)
  ]
  table = classify(pd.DataFrame(rows))
  largest = table['size'] == table['size'].iloc[12]
  found = prediction.predicted(table[~largest], table[largest]).set_index('arm')
  for arm in m:
    assert found.loc[arm, 'law'] == pytest.approx(loss(arm, 6), rel=0.01)
    assert found.loc[arm, 'low'] < loss(arm, 6) < found.loc[arm, 'high']
  gap = found['gap carried'].diff().iloc[1]
  assert gap == pytest.approx(loss('b', 5) - loss('residual', 5), abs=0.015)
  score = prediction.scored(found.reset_index(), table).set_index('arm')
  assert score['runs'].tolist() == [2, 2] and (score['inside'] >= 1).all()
  mean = table[largest & (table['arm'] == 'b')]['validation_loss'].mean()
  assert score.loc['b', 'law error'] == pytest.approx(found.loc['b', 'law'] - mean)


def test_a_large_gain_is_found_by_the_simulated_study(rng):
  found = judged(sweep(rng, (1.5, 1.5), (0.0025, 0.002)))
  assert found['saves'] and found['holds'] and not found['costs'] and not found['fades']
