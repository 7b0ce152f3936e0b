"""evaluate reports what training reported, from the files of the run alone."""

import itertools
import json
import random
import types

import pytest

from mhc_jax import evaluate, train
from mhc_jax.config_file import parse
from mhc_jax.data import BYTES, load_corpus
from mhc_jax.errors import ConfigError
from mhc_jax.model_config import build_model
from mhc_jax.plan import rebuild_model, resolve


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A finished run of two updates on a small corpus of its own: (workdir, status)."""
  folder = tmp_path_factory.mktemp('evaluate')
  text = folder / 'text'
  text.mkdir()
  words = random.Random(0)
  for index in range(40):
    (text / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(300)))
  overrides = [f'--config.data.name=text_files:{text}', f'--config.data.dir={folder}']
  overrides += ['--config.duration.steps=2', '--config.evaluation.sequences=4']
  overrides += ['--config.evaluation.batch_size=4', '--config.log.diagnostics_every_steps=None']
  overrides += ['--config.model.connection.preset=deepseek_v4', '--config.model.vocab_size=300']
  overrides += ['--config.model.mla.kv_rank=8', '--config.model.moe.experts=4', '--config.model.moe.active=2']
  config = parse('configs/laptop.py:smoke', overrides)
  status = train.run(config, str(folder / 'run'), quiet=True)
  return folder / 'run', status


@pytest.mark.parametrize(
  'option', ['--bytes -5', '--bytes 9999999999', '--temperature nan', '--temperature inf', '--temperature -1']
)
def test_options_out_of_their_bounds_are_refused(option):
  with pytest.raises(ConfigError, match=f'^{option}.*: must lie between 0 and'):
    evaluate.main(['no such folder', *option.split()])


@pytest.mark.parametrize('seed', ['-1', '99999999999999999999'])
def test_seeds_out_of_their_bounds_are_refused(seed):
  with pytest.raises(ConfigError, match=f'^--seed {seed}: must lie between 0 and'):
    evaluate.main(['no such folder', '--seed', seed])


def test_same_loss_as_training(trained, monkeypatch, capsys):
  """The same parameters on the same batches through the same function: equal to rounding (rel 1e-6)."""
  workdir, status = trained
  resolved, model, step, params = evaluate.load(str(workdir))
  corpus = load_corpus(resolved['data']['name'], resolved['data']['dir'])
  found = evaluate.validation(resolved, model, params, corpus)
  assert step == 2
  for name in ('validation/loss', 'validation/bits_per_byte'):
    assert found[name] == pytest.approx(status['final'][name], rel=1e-6)
  clock = itertools.count(0, 31)
  monkeypatch.setattr(evaluate, 'time', types.SimpleNamespace(monotonic=lambda: next(clock)))
  assert evaluate.main([str(workdir), '--bytes', '3', '--prompt', 'abc\udcff\ud800']) == 0
  out, said = capsys.readouterr()
  assert out.startswith('step 2: validation/loss') and 'abc' in out
  assert 'sample: 2 of 3 tokens, about 31 s left' in said
  assert evaluate.main([str(workdir), '--bytes', '0', '--prompt', 'abc']) == 0
  assert capsys.readouterr().out.endswith('\nabc\n')


@pytest.mark.slow
def test_greedy_samples_are_equal_of_the_asked_length_and_of_tokens_alone(trained):
  """Whatever the seed, and however likely a row of the vocabulary that is no token's."""
  _, model, _, params = evaluate.load(str(trained[0]))
  likely_DV = params['unembedding'].at[:, 290].multiply(1e6)
  likely_DV = likely_DV.at[:, 291].set(-likely_DV[:, 290])  # one of the two is the largest
  changed = {**params, 'unembedding': likely_DV}
  texts = [
    evaluate.sample(model, p, BYTES, 'ab', 4, 16, 0.0, seed) for p, seed in ((params, 0), (changed, 1))
  ]
  assert texts[0] == texts[1] and texts[0].startswith('ab')


def test_every_update_logs_the_loads_of_the_experts(trained):
  rows = [json.loads(line) for line in (trained[0] / 'metrics.jsonl').read_text().splitlines()]
  loads = [row['train/load_max_over_mean'] for row in rows if row['step']]
  assert len(loads) == 2 and all(len(load) == 1 and 1 <= load[0] <= 2 for load in loads)


def test_model_is_rebuilt_from_config_json_alone(trained):
  """config.json -> the ModelConfig that training built, through JSON."""
  config = parse('configs/laptop.py:smoke', ['--config.model.connection.name=hc'])
  plan = resolve(config, 'digest')
  assert rebuild_model(json.loads(json.dumps(plan.resolved))) == build_model(config)


@pytest.mark.parametrize('what', ['nothing', 'empty'])
def test_no_run_or_no_checkpoint_is_one_clear_line(trained, tmp_path, what):
  if what == 'empty':
    (tmp_path / 'config.json').write_text((trained[0] / 'config.json').read_text())
  with pytest.raises(ConfigError, match='no run' if what == 'nothing' else 'no checkpoint'):
    evaluate.load(str(tmp_path))
