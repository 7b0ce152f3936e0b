"""Plans: overrides and seeds enter every run, a folder keeps one plan, what cannot be is one line."""

import json
import shlex

import pytest

from experiments import planning, sweep
from mhc_jax import plan
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.run_folder import load_options, load_plan


def runs(arg):
  """Two arms: one at two seeds, one at one."""
  configs = []
  for arm, seed in (('residual', 0), ('residual', 1), ('mhc', 5)):
    overrides = [f'--config.model.connection.name={arm}', f'--config.seed={seed}']
    overrides.append('--config.data.name=python_stdlib')  # nothing is fetched
    configs.append(parse('laptop:smoke', overrides))
  return configs


@pytest.fixture
def experiment(monkeypatch):
  monkeypatch.setitem(sweep.EXPERIMENTS, 'pair', runs)
  return 'pair'


def train_nothing(monkeypatch):
  monkeypatch.setattr(sweep, 'execute', lambda *_: [])


def test_overrides_reach_every_run_and_its_id(experiment):
  _, plain = planning.plan(experiment)
  configs, changed = planning.plan(experiment, ['--config.optimizer.lr=2e-2', '--config.data.batch_size=4'])
  assert [c.optimizer.lr for c in configs] == [2e-2] * 3 and configs[0].is_locked
  assert {run.resolved['data']['batch_size'] for run in changed} == {4}
  assert not {run.run_id for run in plain} & {run.run_id for run in changed}
  _, elsewhere = planning.plan(experiment, ['--config.checkpoint.keep=3'])
  assert [run.run_id for run in elsewhere] == [run.run_id for run in plain], 'what is not in the id'


def test_seeds_replace_those_of_the_plan(experiment):
  """Each distinct configuration once per seed, in the plan's order, whatever seeds the plan had."""
  configs, planned = planning.plan(experiment, seeds=3)
  assert [(run.resolved['arm'], run.resolved['seed']) for run in planned] == [
    *(('residual', seed) for seed in range(3)),
    *(('mhc', seed) for seed in range(3)),
  ]
  ids = {run.run_id for run in planned}
  _, [first, second, other] = planning.plan(experiment)
  assert {first.run_id, second.run_id} <= ids and other.run_id not in ids  # seed 5
  assert all(config.is_locked for config in configs)
  assert planned == [
    plan.resolve(config, run.resolved['data']['digest']) for config, run in zip(configs, planned, strict=True)
  ]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['--config.optimizer.rate=1'], r'unknown config field optimizer\.rate; did you mean'),
    (['--config.optimizer.lr=fast'], 'optimizer.lr takes float'),
    (['--config.model.width=-8'], 'width'),
    (['--learning-rate=3'], 'cannot read .--learning-rate=3.: write --config'),
    (['--config.seed=3'], r'twice: it varies what an override holds fast'),
    (['--config.seed=3', '--seeds', '2'], 'leave --config.seed out'),
    (['--seeds', '0'], '--seeds must be at least 1'),
  ],
)
def test_mistakes_are_one_line(experiment, arguments, message, tmp_path):
  with pytest.raises(ConfigError, match=message) as error:
    sweep.main([experiment, *arguments, '--out', str(tmp_path / 'out')])
  assert '\n' not in str(error.value) and not (tmp_path / 'out').exists()


def test_a_folder_keeps_the_options_of_its_plan(experiment, tmp_path, monkeypatch, capsys):
  """Without options the folder's hold; others may add runs, and never drop one."""
  train_nothing(monkeypatch)
  out, folder = ['--out', str(tmp_path)], tmp_path / 'pair'
  first = ['--config.optimizer.lr=2e-2', '--seeds', '1']
  sweep.main([experiment, *first, *out])
  planned = load_plan(str(folder))[1]
  assert load_options(str(folder)) == first and len(planned) == 2
  capsys.readouterr()
  sweep.main([experiment, *out])
  assert load_plan(str(folder))[1] == planned
  assert f'goes on with {shlex.join(first)}' in capsys.readouterr().err
  more = ['--config.optimizer.lr=2e-2', '--seeds', '2']
  sweep.main([experiment, *more, *out])
  assert load_options(str(folder)) == more and load_plan(str(folder))[1].keys() > planned.keys()
  for others in (first, ['--config.optimizer.lr=1e-2'], ['--config.optimizer.lr=1e-2', '--seeds', '2']):
    with pytest.raises(ConfigError, match=r'--config.optimizer.lr=2e-2 --seeds 2`.*another --out'):
      sweep.main([experiment, *others, *out])
  assert load_options(str(folder)) == more


def test_overrides_do_not_enter_a_folder_that_was_made_without(experiment, tmp_path, monkeypatch):
  train_nothing(monkeypatch)
  sweep.main([experiment, '--out', str(tmp_path)])
  before = (tmp_path / 'pair' / 'plan.json').read_text()
  with pytest.raises(ConfigError, match=r'holds the runs of `mhc sweep pair`, and 3 of them'):
    sweep.main([experiment, '--config.optimizer.lr=1e-2', '--out', str(tmp_path)])
  assert (tmp_path / 'pair' / 'plan.json').read_text() == before


def test_options_that_are_no_texts_are_refused(tmp_path):
  (tmp_path / 'plan.json').write_text(json.dumps({'sweep': 'x', 'options': [1], 'runs': []}))
  with pytest.raises(ConfigError, match=r'plan\.json is broken'):
    load_options(str(tmp_path))


def test_the_list_names_every_experiment_its_arguments_and_counts(capsys):
  assert sweep.main(['--list']) == 0
  text = capsys.readouterr().out
  assert all(name in text for name in sweep.EXPERIMENTS)
  assert 'isoflop:large (80 runs)' in text and 'quick:small' not in text
  assert max(map(len, text.splitlines())) <= 100


def test_runs_of_equal_shapes_are_traced_once(monkeypatch):
  """What a manifold fits depends on shapes: seeds and learning rates do not trace the model again."""
  traced, real = [], plan.check_matches
  monkeypatch.setattr(plan, 'check_matches', lambda *rest: traced.append(rest) or real(*rest))
  held = ['--config.optimizer.manifold=stiefel', '--config.optimizer.manifold_pattern=layers/attention/.*/w']
  for lr in ('1e-2', '2e-2', '3e-2'):
    config = parse('laptop:smoke', [*held, f'--config.optimizer.lr={lr}', '--config.model.width=48'])
    for _ in range(2):
      plan.resolve(config, 'digest')
  assert len(traced) == 1
