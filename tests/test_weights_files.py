"""Exports and imports as folders: what a run wrote comes back to the bit, whole or not at all."""

import json
import os
import random

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mhc_jax import __main__ as mhc
from mhc_jax import evaluate, train
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config_file import parse
from mhc_jax.data import BYTES, tokenizer_of
from mhc_jax.errors import ConfigError
from mhc_jax.plan import configuration_of, resolve
from mhc_jax.sharding import make_mesh, state_sharding
from mhc_jax.train_step import programs
from mhc_jax.weights import exporting, tokenizer_files
from mhc_jax.weights.exporting import export
from mhc_jax.weights.files import read_tensors, whole_folder
from mhc_jax.weights.importing import adopt
from mhc_jax.workdir import check_workdir, read_config

TINY = ('width=16', 'depth=2', 'heads=2')


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Overrides that name a small corpus."""
  folder = tmp_path_factory.mktemp('weights')
  (folder / 'text').mkdir()
  words = random.Random(0)
  for index in range(20):
    (folder / 'text' / f'{index}.txt').write_text(' '.join(words.choice('abcdef') * 3 for _ in range(300)))
  return [f'--config.data.name=text_files:{folder / "text"}', f'--config.data.dir={folder}']


@pytest.fixture(scope='module')
def exported(text, tmp_path_factory):
  """(run, export): two updates of mHC with transfer, whose checkpoint eight devices wrote, each its parts."""
  folder = tmp_path_factory.mktemp('run')
  overrides = [*text, '--config.duration.steps=2', '--config.log.diagnostics_every_steps=None']
  overrides += ['--config.evaluation.sequences=4', '--config.evaluation.batch_size=4']
  overrides += ['--config.data.seq_len=16', '--config.data.batch_size=4', '--config.optimizer.lr=0.02']
  overrides += [f'--config.model.{name}' for name in TINY]
  train.run(parse('laptop:smoke', overrides), str(folder / 'run'), quiet=True)
  _spread(str(folder / 'run'))
  assert mhc.main(['export', str(folder / 'run'), '--to', str(folder / 'out')]) == 0
  return folder / 'run', folder / 'out'


def _spread(workdir):
  """The newest checkpoint again, of the same numbers on a mesh of eight devices."""
  run = resolve(configuration_of(read_config(workdir)), 'd')
  mesh = make_mesh({'data': 1, 'fsdp': 4, 'tensor': 2, 'expert': 1})
  with Checkpoints(os.path.join(workdir, 'checkpoints'), keep=1) as checkpoints:
    abstract = programs(run.model, run.optimizer, make_mesh({})).abstract
    step, state, extra = checkpoints.restore_latest(abstract)
    checkpoints.save(step + 1, jax.device_put(state, state_sharding(abstract, mesh)), extra)
  with Checkpoints(os.path.join(workdir, 'checkpoints')) as checkpoints:
    assert checkpoints.steps() == [step + 1]


def test_an_exported_run_comes_back_and_trains_on(exported, tmp_path, capsys):
  """Parameters to the bit, and so the loss; then updates from there, under another run id."""
  run, out = exported
  to = str(tmp_path / 'imported')
  assert mhc.main(['import', str(out), '--to', to, '--config.duration.steps=1']) == 0
  assert f'mhc train --workdir {to}' in capsys.readouterr().out
  before, model, _, params = evaluate.load(str(run))
  after, same_model, step, same = evaluate.load(to)
  assert step == 0 and same_model == model and model.width_ratio != 1
  jax.tree.map(np.testing.assert_array_equal, params, same)
  assert before['start'] is None and len(after['start']) == 16
  assert adopt(str(out), str(tmp_path / 'again')).resolved['start'] == after['start']
  assert train.main(['--workdir', to]) == 0
  assert 'warning' not in capsys.readouterr().err
  rows = [json.loads(line) for line in (tmp_path / 'imported' / 'metrics.jsonl').read_text().splitlines()]
  final = json.loads((run / 'status.json').read_text())['final']
  assert [row['step'] for row in rows] == [0, 1]
  assert rows[0]['validation/loss'] == final['validation/loss'] != rows[1]['validation/loss']
  _, _, step, trained = evaluate.load(to)
  assert step == 1 and not np.array_equal(trained['unembedding'], same['unembedding'])


def test_the_card_says_what_the_run_was(exported):
  run, out = exported
  card, status = (out / 'README.md').read_text(), json.loads((run / 'status.json').read_text())
  resolved = read_config(str(run))
  wanted = [
    resolved['data']['digest'],
    status['git_revision'],
    '192 tokens in 3 updates',
    'Licence\n\nNot chosen',
  ]
  wanted += [f'{status["final"]["validation/bits_per_byte"]:.4f}', f'{status["derived"]["flops"] * 1.5:.3e}']
  wanted += [f'{status["derived"]["params"]["total"]:,}', 'mhc import', 'Known limits', 'Ids 0 to 255']
  for words in wanted:
    assert words in card
  assert str(run.parent) not in card and resolved['data']['name'] not in card
  assert json.loads((out / 'config.json').read_text())['architectures'] == ['MhcForCausalLM']


def test_nothing_is_overwritten_and_half_an_export_has_no_name(exported, tmp_path, monkeypatch):
  run, out = exported
  for command in (lambda: export(str(run), str(out)), lambda: adopt(str(out), str(run))):
    with pytest.raises(ConfigError, match='is there already: choose another'):
      command()
  with pytest.raises(ConfigError, match='--layout llama: the run does not fit LlamaForCausalLM'):
    export(str(run), str(tmp_path / 'llama'), 'llama')

  def interrupted(path, tensors):
    open(path, 'w').close()
    raise KeyboardInterrupt

  monkeypatch.setattr(exporting, 'write_tensors', interrupted)
  with pytest.raises(KeyboardInterrupt):
    export(str(run), str(tmp_path / 'half'))
  assert os.listdir(tmp_path) == []
  with pytest.raises(ConfigError, match='takes a local folder'), whole_folder('gs://bucket/x', '--to'):
    pass


def test_bfloat16_rounds_every_tensor(exported, tmp_path):
  run, out = exported
  export(str(run), str(tmp_path / 'half'), dtype='bfloat16')
  exact, rounded = read_tensors(str(out)), read_tensors(str(tmp_path / 'half'))
  for name, value in rounded.items():
    np.testing.assert_array_equal(value, exact[name].astype(ml_dtypes.bfloat16))
  assert 'Rounded to bfloat16' in (tmp_path / 'half' / 'README.md').read_text()
  assert json.loads((tmp_path / 'half' / 'config.json').read_text())['dtype'] == 'bfloat16'


LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'hidden_size': 16,
  'intermediate_size': 24,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'num_hidden_layers': 2,
  'max_position_embeddings': 32,
  'rms_norm_eps': 1e-5,
  'rope_theta': 5e4,
  'vocab_size': 260,
  'tie_word_embeddings': False,
}


def llama_tensors(rng):
  shapes = {'model.embed_tokens': (260, 16), 'lm_head': (260, 16), 'model.norm': (16,)}
  for layer in range(2):
    at = f'model.layers.{layer}'
    shapes |= {f'{at}.self_attn.{name}_proj': (16, 16) for name in 'qo'}
    shapes |= {f'{at}.self_attn.{name}_proj': (8, 16) for name in 'kv'}
    shapes |= {f'{at}.mlp.{name}_proj': (24, 16) for name in ('gate', 'up')} | {
      f'{at}.mlp.down_proj': (16, 24)
    }
    shapes |= {f'{at}.{name}_layernorm': (16,) for name in ('input', 'post_attention')}
  return {f'{name}.weight': rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_llama(folder, *shards, config=LLAMA):
  """A published folder; several shards have an index."""
  folder.mkdir()
  (folder / 'config.json').write_text(json.dumps(config))
  if len(shards) == 1:
    save_file(shards[0], folder / 'model.safetensors', {'format': 'pt'})
    return
  weight_map = {}
  for index, shard in enumerate(shards):
    save_file(shard, folder / f'part-{index}.safetensors')
    weight_map |= dict.fromkeys(shard, f'part-{index}.safetensors')
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))


def test_an_export_of_an_import_is_the_same_to_the_byte(rng, tmp_path):
  """One file or several, whatever the dtypes: float32 has all numbers of the shorter ones."""
  tensors = llama_tensors(rng)
  names = sorted(tensors)
  short = {
    name: tensors[name].astype(np.float16 if i % 2 else ml_dtypes.bfloat16) for i, name in enumerate(names)
  }
  first, second = ({name: short[name] for name in part} for part in (names[:9], names[9:]))
  for case, shards, expected in (('one', [tensors], tensors), ('two', [first, second], short)):
    write_llama(tmp_path / case, *shards)
    run = adopt(str(tmp_path / case), str(tmp_path / f'{case} run'))
    assert (run.model.rope_theta, run.model.norm_eps, run.model.kv_heads) == (5e4, 1e-5, 2)
    assert export(str(tmp_path / f'{case} run'), str(tmp_path / f'{case} again')) == 'llama'
    found = read_tensors(str(tmp_path / f'{case} again'))
    assert found.keys() == expected.keys()
    for name, value in found.items():
      assert value.dtype == np.float32
      assert value.tobytes() == expected[name].astype(np.float32).tobytes()
  config = json.loads((tmp_path / 'one again' / 'config.json').read_text())
  assert {name: config[name] for name in LLAMA} == LLAMA


def test_imported_weights_take_the_data_of_their_first_training(rng, tmp_path, text):
  write_llama(tmp_path / 'llama', llama_tensors(rng))
  to = str(tmp_path / 'run')
  run = adopt(str(tmp_path / 'llama'), to, 'laptop:smoke', ['--config.optimizer.lr=0.5', *text])
  assert run.resolved['data']['digest'] == '' and run.resolved['data']['seq_len'] == 32
  config = train._config(None, [], read_config(to))
  check_workdir(to, resolve(config, 'a digest'))
  config.optimizer.lr = 0.25
  with pytest.raises(ConfigError, match=r'holds a run with optimizer.lr=0.5, this one has 0.25'):
    check_workdir(to, resolve(config, 'a digest'))
  with pytest.raises(ConfigError, match=r'lacks the weights that start=\w+ names: `mhc import`'):
    train.run(config, str(tmp_path / 'other'), quiet=True)


def damage(folder, how):
  path = folder / 'model.safetensors'
  match how:
    case 'cut off':
      path.write_bytes(path.read_bytes()[:-3])
    case 'no file':
      path.unlink()
    case 'whole numbers':
      save_file({'lm_head.weight': np.zeros((260, 16), np.int32)}, path)
    case 'float64':
      save_file(
        {'lm_head.weight': np.zeros((260, 16))}
        | {n: x for n, x in read_tensors(folder).items() if n[0] == 'm'},
        path,
      )
    case 'elsewhere':
      (folder / 'model.safetensors.index.json').write_text('{"weight_map": {"a": "../x.safetensors"}}')
    case 'lost':
      index = {'weight_map': {'a': 'model.safetensors'}}
      (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    case 'no config':
      (folder / 'config.json').unlink()
    case 'rank':
      (folder / 'mhc_jax.json').write_text('{"config": {"model": 3}}')


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    ('cut off', 'cannot be read'),
    ('no file', 'has neither model.safetensors nor'),
    ('whole numbers', 'lm_head.weight is int32'),
    ('float64', 'float64: read with JAX_ENABLE_X64=1'),
    ('elsewhere', 'which is not in this folder'),
    ('lost', 'names a, which no file has'),
    ('no config', 'no folder of published weights'),
    ('rank', 'mhc_jax.json is not what|must be a section'),
  ],
)
def test_damaged_weights_are_one_line_and_leave_nothing(rng, tmp_path, capsys, how, words):
  write_llama(tmp_path / 'llama', llama_tensors(rng))
  damage(tmp_path / 'llama', how)
  assert mhc.main(['import', str(tmp_path / 'llama'), '--to', str(tmp_path / 'run')]) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert words.split('|')[0] in line or words.split('|')[-1] in line
  assert os.listdir(tmp_path) == ['llama']


def test_bytes_are_a_tokenizer_of_the_library(tmp_path):
  """The same ids as ours, behind the mark of a document."""
  library = pytest.importorskip('tokenizers')
  tokenizer_files.write(str(tmp_path), None, 32)
  made = library.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  for text in ('', 'plain\n\ttext', 'héllo 世界 \U0001f600 \x00\x7f\xad', 'a<|bo|>'):
    ids = made.encode(text).ids
    assert ids == [256, *BYTES.encode(text)]
    assert made.decode(ids, skip_special_tokens=True) == text
  assert json.loads((tmp_path / 'tokenizer_config.json').read_text())['bos_token'] == '<|bos|>'


def test_files_of_tokenizers_go_along(rng, tmp_path):
  """A tokenizer.json beside published weights becomes that of the run, and of the run's export."""
  pytest.importorskip('tokenizers')
  write_llama(tmp_path / 'llama', llama_tensors(rng))
  source = tokenizer_files.bytes_as_json()
  (tmp_path / 'llama' / 'tokenizer.json').write_text(json.dumps(source))
  run = adopt(str(tmp_path / 'llama'), str(tmp_path / 'run'))
  name = run.resolved['data']['tokenizer']
  assert name == str(tmp_path / 'run' / 'tokenizer.json') and tokenizer_of(name).bos == 256
  export(str(tmp_path / 'run'), str(tmp_path / 'again'))
  assert json.loads((tmp_path / 'again' / 'tokenizer.json').read_text()) == source
  assert 'Ids are those of tokenizer.json' in (tmp_path / 'again' / 'README.md').read_text()
