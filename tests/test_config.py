"""Configuration: overrides, durations, run ids; and that every mistake ends in one line and exit code 2."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import pytest

from mhc_jax import train
from mhc_jax.command import end_with_message
from mhc_jax.config import base_config
from mhc_jax.config_file import check_fields, parse
from mhc_jax.cost import parameters, train_flops_per_token
from mhc_jax.errors import ConfigError
from mhc_jax.model_config import build_model
from mhc_jax.plan import configuration_of, rebuild_model, resolve
from mhc_jax.plan import run_id as run_ids
from mhc_jax.presets import INITS, PRESETS

ROOT = pathlib.Path(__file__).parent.parent
SMOKE = f'{ROOT / "configs" / "laptop.py"}:smoke'


def changed(*overrides):
  return parse(SMOKE, [f'--config.{override}' for override in overrides])


def run_id(*overrides, digest='d'):
  return resolve(changed(*overrides), digest).run_id


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
  """Overrides that name a small corpus, prepared once."""
  folder = tmp_path_factory.mktemp('corpus')
  (folder / 'text').mkdir()
  for i in range(4):
    (folder / 'text' / f'{i}.txt').write_text(f'line {i} of a text that is long enough for a run\n' * 400)
  (folder / 'empty').mkdir()
  (folder / 'tiny').mkdir()
  (folder / 'tiny' / 'a.txt').write_text('hello')
  return folder


def test_overrides_take_the_type_of_the_field():
  c = changed(
    'model.width=48',
    'optimizer.lr=1',
    'data.repeat=True',
    'data.name=text_files:7',
    'arm=12',
    'model.kv_heads=1',
    'optimizer.clip_norm=None',
    'duration.steps=None',
    'duration.tokens=1e6',
    'model.connection.constraint_params.iterations=5',
  )
  assert (c.model.width, c.optimizer.lr, c.data.repeat) == (48, 1.0, True)
  assert (c.data.name, c.arm, c.model.kv_heads) == ('text_files:7', '12', 1)
  assert c.optimizer.clip_norm is None and c.duration.tokens == 1e6
  assert c.model.connection.constraint_params.to_dict() == {'iterations': 5}
  assert isinstance(c.optimizer.lr, float)


WRONG = {
  'model.widht=32': 'did you mean model.width?',
  'modle.width=32': 'did you mean model?',
  'model.weights.rnk=3': 'did you mean model.weights.rank?',
  'model.connection.constraint_params.a.b=1': 'unknown config field',
  'model=3': 'is a section',
  'model.width': 'write --config.section.field=value',
  'model.width=wide': 'takes int',
  'model.width=1.5': 'takes int',
  'model.width=True': 'takes int',
  'model.width=None': 'model.width must have a value',
  'data.name=None': 'data.name must have a value',
  'log.every_steps=None': 'must have a value',
  'model.scan=maybe': 'takes bool',
  'seed=-1': 'seed must lie between',
  'model.width=0': 'at least 1',
  'model.depth=0': 'at least 1',
  'model.heads=3': 'does not divide',
  'model.heads=32': 'must be even',
  'model.kv_heads=3': 'does not divide',
  'model.ffn_width=0': 'at least 1',
  'model.dtype=float16': 'must be one of float32',
  'model.rope_theta=0': 'positive',
  'model.norm_eps=-1': 'not be negative',
  'model.weights.rank=33': 'between 1 and 32',
  'model.weights.rank=0': 'between 1 and 32',
  'model.vocab_size=256': 'below 257',
  'model.mla.head_dim=8': 'model.mla.head_dim needs model.mla.kv_rank',
  'model.mla.kv_rank=0': 'at least 1',
  'model.mla.kv_rank=8 model.mla.rope_dim=3': 'must be even',
  'model.mla.kv_rank=8 model.kv_heads=1': 'does not go with model.mla.kv_rank',
  'model.mla.kv_rank=8 model.weights.rank=9': 'between 1 and 8',
  'model.mla.kv_rank=8 model.mla.q_rank=0': 'model.mla.q_rank must be at least 1',
  'model.sparse.topk=4': 'model.sparse.topk needs model.sparse.kind',
  'model.sparse.kind=top': 'must be one of window, topk',
  'model.sparse.kind=topk': 'needs model.sparse.topk, a number',
  'model.sparse.kind=topk model.sparse.topk=0': 'at least 1',
  'model.sparse.kind=window': 'needs model.sparse.window, a number',
  'model.sparse.kind=window model.sparse.window=4 model.sparse.stage=warmup': 'needs model.sparse.kind=topk',
  'model.sparse.kind=topk model.sparse.topk=4 model.sparse.window=5': 'is over model.sparse.topk=4',
  'model.sparse.kind=topk model.sparse.topk=4 model.sparse.stage=dense': 'must be warmup or None',
  'model.sparse.kind=topk model.sparse.topk=4 model.sparse.index_rope_dim=3': 'must be even',
  'model.moe.active=2': 'model.moe.active needs model.moe.experts',
  'model.moe.experts=4 model.moe.active=5': 'between 1 and model.moe.experts=4',
  'model.moe.experts=0': 'between 1 and',
  'model.moe.experts=4 model.moe.shared=-1': 'not be negative',
  'model.moe.experts=4 model.moe.ffn_width=0': 'at least 1',
  'model.moe.experts=4 model.moe.scale=0': 'positive',
  'model.moe.experts=4 model.moe.bias_rate=-1': 'not be negative',
  'model.moe.experts=4 model.moe.router=top': 'must be one of sigmoid',
  'model.moe.experts=4 model.moe.router=sinkhorn': 'below model.moe.experts=4',
  'model.moe.experts=4 model.weights.rank=2': 'does not go with model.moe.experts',
  'model.dense_layers=1': 'needs model.moe.experts',
  'model.moe.experts=4 model.dense_layers=2': 'between 0 and model.depth - 1 = 1',
  'model.connection.rank=25': 'between 1 and 24',
  'model.connection.streams=0': 'at least 1',
  'model.connection.name=mhcc': 'must be one of residual',
  'model.connection.preset=papr': 'must be one of paper',
  'model.connection.constraint=ball': 'must be one of',
  'model.connection.constraint_params.depth=3': 'unknown parameters',
  'model.connection.norm_eps=-1': 'not be negative',
  'model.connection.collapse=max': 'must be one of mean, sum, learned',
  'model.connection.activation=relu': 'must be one of none, tanh',
  'model.connection.init=ones': 'must be one of',
  'model.connection.mixing=-1': 'mixing',
  'model.connection.mixing=2': 'mixing',
  'transfer.base_width=0': 'at least 1',
  'transfer.base_rank=2': 'needs model.weights.rank',
  'model.weights.rank=2 transfer.base_rank=0': 'must be a rank or None',
  'optimizer.lr=-1': 'not be negative',
  'optimizer.eps=0': 'positive',
  'optimizer.beta2=1': '[0, 1)',
  'optimizer.schedule=linear': 'must be one of wsd',
  'optimizer.warmup_steps=5': 'exactly one of optimizer.warmup_steps',
  'optimizer.warmup_fraction=None': 'exactly one of optimizer.warmup_steps',
  'optimizer.warmup_fraction=2': '[0, 1]',
  'optimizer.clip_norm=0': 'positive or None',
  'duration.steps=None': 'exactly one of duration',
  'duration.tokens=1e5': 'exactly one of duration',
  'duration.steps=0': 'positive',
  'data.seq_len=0': 'at least 1',
  'data.batch_size=0': 'at least 1',
  'evaluation.sequences=15': 'multiple of evaluation.batch_size',
  'checkpoint.keep=0': 'at least 1',
  'divergence.patience=0': 'at least 1',
  'mesh.data=3': 'must be a multiple of mesh.data',
  'mesh.data=0': 'at least 1',
  'mesh.expert=3': 'must be a multiple of mesh.data * mesh.fsdp * mesh.expert = 3',
  'mesh.tensor=3': 'mesh.tensor=3 does not divide model.heads',
  'optimizer.microbatches=0': 'at least 1',
  'optimizer.microbatches=3': 'times optimizer.microbatches=3',
  'model.remat=blocks': 'must be one of none, layer, products, block',
  'model.remat=block model.scan=False': 'needs model.scan=True',
  # From here on the mistake shows only with the corpus or the devices at hand.
  'mesh.data=16 data.batch_size=16': '8 cpu device(s) are here',
  'duration.steps=100000': 'data.repeat=True',
  'data.seq_len=5000': 'tokens',
  'evaluation.sequences=1600': 'validation split',
  'data.name=no_such_set': 'no such dataset',
  'data.name=text_files:FOLDER/absent': 'no such file or folder',
  'data.name=text_files:FOLDER/empty': 'too little text',
  'data.name=text_files:FOLDER/tiny': 'too little text',
  'data.name=text_files:': 'after the colon',
}


def attempt(capsys, folder, workdir, overrides, config=SMOKE):
  """(exit code, stderr) of the training command, in this process."""
  name = f'--config.data.name=text_files:{folder / "text"}'
  args = ['--config', config, '--workdir', str(workdir), f'--config.data.dir={folder}', name]
  args += [f'--config.{override.replace("FOLDER", str(folder))}' for override in overrides.split()]
  code = end_with_message(lambda: train.main(args))
  return code, capsys.readouterr().err


@pytest.mark.parametrize('overrides', WRONG)
def test_a_mistake_ends_in_one_line_and_leaves_nothing(overrides, corpus, tmp_path, capsys):
  code, said = attempt(capsys, corpus, tmp_path / 'run', overrides)
  assert code == 2 and WRONG[overrides] in said
  assert said.startswith('error: ') and said.count('\n') == 1 and said.endswith('\n')
  assert not (tmp_path / 'run').exists()


FILES = {
  'syntax error': ('def get_config(:\n', 'SyntaxError'),
  'no get_config': ('x = 1\n', 'get_config'),
  'no config': ('def get_config(arg=None):\n  return None\n', 'must return a ConfigDict'),
  'mistyped field': (
    'from mhc_jax.config import base_config\n\n'
    'def get_config(arg=None):\n  c = base_config()\n  c.model.widht = 3\n  return c\n',
    'did you mean model.width?',
  ),
  'mistyped section': (
    'from mhc_jax.config import base_config\n\n'
    'def get_config(arg=None):\n  c = base_config()\n  c.modle.width = 3\n  return c\n',
    'modle',
  ),
  'wrong type': (
    'from mhc_jax.config import base_config\n\n'
    "def get_config(arg=None):\n  c = base_config()\n  c.model.width = 'wide'\n  return c\n",
    'width',
  ),
}


@pytest.mark.parametrize('kind', FILES)
def test_a_broken_config_file_ends_in_one_line(kind, corpus, tmp_path, capsys):
  text, wanted = FILES[kind]
  (tmp_path / 'broken.py').write_text(text)
  code, said = attempt(capsys, corpus, tmp_path / 'run', '', str(tmp_path / 'broken.py'))
  assert code == 2 and wanted in said and said.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def test_missing_files_and_arguments_are_named():
  for path, message in (('configs/none.py', 'no config file'), (f'{SMOKE}st', 'takes no argument')):
    with pytest.raises(ConfigError, match=message):
      parse(path, [])
  c = base_config()
  del c.log.every_steps
  with pytest.raises(ConfigError, match=r'log.every_steps is missing'):
    check_fields(c)


def test_a_workdir_of_another_run_is_refused_and_kept(corpus, tmp_path, capsys):
  (tmp_path / 'config.json').write_text(json.dumps(resolve(changed('optimizer.lr=0.5'), 'd').resolved))
  before = (tmp_path / 'config.json').read_bytes()
  code, said = attempt(capsys, corpus, tmp_path, 'optimizer.lr=0.25')
  assert code == 2 and said.count('\n') == 1 and 'choose another --workdir' in said
  assert [path.name for path in tmp_path.iterdir()] == ['config.json']
  assert (tmp_path / 'config.json').read_bytes() == before
  (tmp_path / 'config.json').write_text('{"model": 1}')
  code, said = attempt(capsys, corpus, tmp_path, 'optimizer.lr=0.25')
  assert code == 2 and said.count('\n') == 1 and 'not the configuration of a run' in said


def test_the_command_itself_ends_with_code_2(tmp_path):
  command = [sys.executable, '-m', 'mhc_jax.train', '--config', SMOKE, '--config.model.heads=3']
  done = subprocess.run(
    [*command, '--workdir', tmp_path / 'run'], capture_output=True, text=True, timeout=120, cwd=ROOT
  )
  assert done.returncode == 2 and not done.stdout and not (tmp_path / 'run').exists()
  assert done.stderr == 'error: model.heads=3 does not divide model.width=32\n'


def test_durations_in_four_units():
  """8 sequences of 64 tokens per update."""
  run = resolve(changed(), 'd')
  model = build_model(changed())
  per_step = run.derived['tokens_per_step']
  assert (run.num_steps, per_step) == (20, 512)
  units = {
    'tokens': 7 * 512 + 255.0,  # to the nearest update
    'flops': 7 * 512 * train_flops_per_token(model, 64),
    'tokens_per_param': 7 * 512 / parameters(model)['matmul'],
  }
  for unit, value in units.items():
    run = resolve(changed('duration.steps=None', f'duration.{unit}={value!r}'), 'd')
    assert (run.num_steps, run.derived['tokens']) == (7, 7 * 512), unit
    assert run.derived['flops'] == 7 * 512 * train_flops_per_token(model, 64)
  assert resolve(changed('duration.steps=None', 'duration.tokens=1.0'), 'd').num_steps == 1


def test_the_run_id_covers_what_changes_the_numbers_and_nothing_else():
  base = run_id()
  same = (
    'arm=x',
    'mesh.data=2',
    'mesh.expert=2',
    'data.dir=/x',
    'log.tensorboard=False',
    'checkpoint.every_steps=3',
  )
  for override in (*same, 'checkpoint.keep=5', 'model.connection.preset=paper', 'topology=v5p:4x4x4'):
    assert run_id(override) == base, override
  other = ('seed=1', 'optimizer.lr=0.1', 'model.connection.rank=3', 'model.weights.rank=3', 'data.seq_len=32')
  ids = [base, run_id(digest='e'), *(run_id(override) for override in other)]
  assert len(set(ids)) == len(ids)
  texts = [run_id(f'data.name=text_files:{place}/*.txt') for place in ('/a', '/b')]
  assert texts[0] == texts[1] != base, 'where a text lies is no matter, its digest is'
  assert resolve(changed(), 'd').resolved['data']['digest'] == 'd'


def test_fields_that_are_off_leave_the_ids_of_older_runs():
  """Those of the runs in docs/results, from before latent attention and experts."""
  resolved = resolve(changed(), 'd').resolved
  older = json.loads(json.dumps(resolved))
  del older['model']['mla'], older['model']['moe'], older['topology']
  for section in ('data', 'model', 'optimizer'):  # nor is any newer field that is off in their config.json
    older[section] = {name: value for name, value in older[section].items() if value is not None}
  assert run_ids(older) == run_ids(resolved) == run_id()
  assert rebuild_model(older) == rebuild_model(resolved)


SECTIONS = {
  'latent attention': 'model.mla.kv_rank=8',
  'experts': 'model.moe.experts=4 model.moe.router=sinkhorn model.moe.active=2 model.vocab_size=300',
  'factored': 'model.weights.rank=3',
  'sparse attention': 'model.mla.kv_rank=8 model.mla.q_rank=6 model.sparse.kind=topk model.sparse.topk=3',
}


@pytest.mark.parametrize('name', SECTIONS)
def test_config_json_rebuilds_latent_attention_experts_and_factors(name):
  run = resolve(changed(*SECTIONS[name].split()), 'd')
  assert rebuild_model(json.loads(json.dumps(run.resolved))) == run.model
  assert run.run_id != run_id()
  if name == 'experts':
    assert (run.model.vocab_size, run.model.dense_layers, run.model.moe.ffn_width) == (300, 1, 24)
    assert run.model.ffn_width == 4 * 24  # 2 active and 2 shared ones
  if name == 'latent attention':
    assert dataclasses.astuple(run.model.mla) == (8, 16, 8, 16, None) and run.model.head_dim == 24


@pytest.mark.parametrize('name', PRESETS)
def test_config_json_alone_rebuilds_the_model(name):
  for preset in PRESETS[name]:
    run = resolve(changed(f'model.connection.name={name}', f'model.connection.preset={preset}'), 'd')
    assert rebuild_model(json.loads(json.dumps(run.resolved))) == run.model


def test_eps_of_the_connection_are_its_own():
  """Of its norm, its reads and its writes, each alone; the model's norms keep theirs."""
  fields = ('norm_eps=0.001', 'norm_eps_outside=True', 'read_eps=0.01', 'write_eps=0.1')
  model = build_model(changed(*(f'model.connection.{field}' for field in fields)))
  spec = model.connection
  assert (spec.norm_eps, spec.norm_eps_outside) == (0.001, True)
  assert (spec.read_gate.eps, spec.write_gate.eps) == (0.01, 0.1)
  assert model.norm_eps == 1e-6


@pytest.mark.parametrize('streams', (1, 2, 4))
@pytest.mark.parametrize('init', INITS)
def test_start_values_come_back_under_the_same_id(init, streams):
  """Of two streams near the identity they are -0.0, which equals 0 and is another id."""
  c = changed(f'model.connection.streams={streams}', f'model.connection.init={init}')
  run = resolve(c, 'd')
  assert resolve(configuration_of(json.loads(json.dumps(run.resolved))), 'd').run_id == run.run_id


@pytest.mark.parametrize(
  'overrides',
  [
    *((f'model.connection.name={name}',) for name in PRESETS),
    ('model.connection.preset=kromhc', 'model.connection.mixing=0.02', 'model.connection.init=zero'),
    ('model.connection.name=hc', 'model.connection.read_gate=softmax', 'model.connection.read_scale=2'),
    (
      'model.connection.rank=3',
      'model.connection.generator=cp',
      'model.mla.kv_rank=8',
      'model.moe.experts=4',
    ),
    ('model.connection.constraint_params.iterations=5', 'optimizer.name=muon', 'arm=mine'),
  ],
  ids=' '.join,
)
def test_a_run_goes_on_from_its_config_json_alone(overrides):
  """What config.json holds, through JSON, resolves to the same run, model and label."""
  run = resolve(changed(*overrides), 'd')
  again = resolve(configuration_of(json.loads(json.dumps(run.resolved))), 'd')
  assert (again.run_id, again.model, again.resolved['arm']) == (run.run_id, run.model, run.resolved['arm'])
  stored = json.loads(json.dumps(run.resolved))
  stored['model']['connection']['init']['phi'] = 7.0
  with pytest.raises(ConfigError, match=r'model.connection.init: nothing in presets.INITS is'):
    configuration_of(stored)
