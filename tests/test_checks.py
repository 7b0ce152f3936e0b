"""What cannot run is refused in one line before anything is computed or written; all else traces."""

import dataclasses
import functools
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from ml_collections import ConfigDict
from test_config import ROOT, SMOKE, changed

from mhc_jax import cost, generator, hyper_connection, model_config, sharding
from mhc_jax.config import base_config
from mhc_jax.config_file import parse
from mhc_jax.connection import READ_GATES, WRITE_GATES
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.elementary import unconstrained
from mhc_jax.errors import ConfigError
from mhc_jax.manifold_updates import MANIFOLDS
from mhc_jax.memory import check_memory
from mhc_jax.optimizer import least_moments
from mhc_jax.patterns import check_pattern
from mhc_jax.plan import rebuild_model, resolve, warnings_of
from mhc_jax.presets import INITS, PRESETS, connection_spec
from mhc_jax.train_step import gradients, init_state

TINY = (
  'model.width=4',
  'model.heads=1',
  'model.depth=1',
  'data.seq_len=2',
  'data.batch_size=1',
  'evaluation.batch_size=1',
)


def refused(overrides):
  """The one line that refuses them."""
  with pytest.raises(ConfigError) as error:
    resolve(changed(*overrides.split()), 'd')
  said = str(error.value)
  assert said and '\n' not in said and len(said) < 500
  return said


OPTIONS = {
  'constraint': (None, *CONSTRAINTS),
  'streams': (1, 2, 3, 4, 5, 6),
  'scope': (None, None, 'joint', 'per_stream'),
  'rank': (None, None, 1, 3),
  'generator': (None, None, 'cp'),
  'read_gate': (None, None, *READ_GATES),
  'write_gate': (None, None, *WRITE_GATES),
  'norm_scope': (None, 'joint', 'per_stream'),
  'norm_weight': (None, True),
  'init': (None, None, *INITS),
  'dynamic': (None, None, False),
  'expansion': (None, None, 'one_hot', 'learned'),
  'collapse': (None, None, 'sum', 'learned', 'weights', 'read'),
  'single_pass': (None, None, True),
}


def traces(fields):
  """Whether resolve takes the connection; then the gradient of the loss must trace."""
  try:
    run = resolve(
      changed(*TINY, *(f'model.connection.{name}={value}' for name, value in fields.items())), 'd'
    )
  except ConfigError as error:
    assert '\n' not in str(error)
    return False
  kinds = {'inputs': jnp.int32, 'targets': jnp.int32, 'segments': jnp.int32, 'weights': jnp.float32}
  batch = {name: jax.ShapeDtypeStruct((1, 2), kind) for name, kind in kinds.items()}
  state = jax.eval_shape(lambda: init_state(jax.random.key(0), run.model, run.optimizer))
  jax.eval_shape(lambda params, batch: gradients(params, batch, run.model), state.params, batch)
  return True


def connections(seed, count):
  """Presets with one to four other options each, as a seeded choice of the whole product."""
  pick = random.Random(seed)
  presets = [(name, preset) for name in PRESETS for preset in PRESETS[name]]
  for _ in range(count):
    name, preset = pick.choice(presets)
    options = pick.sample(sorted(OPTIONS), pick.randint(1, 4))
    yield {'name': name, 'preset': preset, **{option: pick.choice(OPTIONS[option]) for option in options}}


def test_connections_are_refused_or_train():
  assert {traces(fields) for fields in connections(0, 9)} == {False, True}


@pytest.mark.slow
def test_more_connections_are_refused_or_train():
  """Every per-stream preset with every constraint, where streams divide the coordinates or not; and more."""
  for constraint in CONSTRAINTS:
    assert traces({'name': 'hc', 'constraint': constraint, 'streams': 4})
  for fields in connections(1, 5):
    traces(fields)


@pytest.mark.parametrize('constraint', ('orthogonal_cayley', 'spectral_sphere', 'birkhoff_transport'))
def test_a_stream_yields_every_nth_coordinate(constraint, x64, rng):
  """With one map per stream, and as many as there are where n does not divide them."""
  n, width = 4, 3
  spec = connection_spec('hc', constraint=constraint, streams=n)
  start = jax.eval_shape(lambda key: hyper_connection.init_params(key, spec, width, 0), jax.random.key(0))
  params = {'phi': rng.normal(size=start['phi'].shape)}
  x_NBTD = rng.normal(size=(n, 2, 5, width))
  found = generator.dynamic_coordinates(params, jnp.asarray(x_NBTD), spec)
  size, first = spec.constraint.num_coordinates(n), 2  # of the columns of phi, after those of the gates
  normed = x_NBTD / np.sqrt(np.mean(x_NBTD**2, -1, keepdims=True) + spec.norm_eps)
  wanted = [normed[k % n] @ params['phi'][0, :, first + k // n] for k in range(size)]
  assert size % n and found['res'].shape == (size, 2, 5)
  np.testing.assert_allclose(found['res'], wanted, rtol=1e-10, atol=1e-12)


def endless(c, n):
  return jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x - 1, c).reshape(n, n, 1, 1)


def own(**changes):
  return dataclasses.replace(unconstrained(), name='own', **changes)


BROKEN = {
  'coordinates that do not fit': (own(num_coordinates=lambda n: n), 'own does not work'),
  'an error of any kind': (own(matrix=lambda c, n: {}['x']), "KeyError: 'x'"),
  'no gradient': (own(matrix=endless), 'Reverse-mode'),
  'no square matrices': (own(matrix=lambda c, n: c.reshape(1, n * n, 1, 1)), 'matrices are (1, 16, 1, 1)'),
  'another start': (own(identity=lambda n, mixing=0.01: np.zeros(1)), 'coordinates at the start are (1,)'),
  'no number': (own(num_coordinates=lambda n: 'many'), 'coordinates of connection.constraint=own'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_constraints_of_ones_own_are_traced(name):
  constraint, message = BROKEN[name]
  with pytest.raises(ConfigError) as error:
    resolve(changed(), 'd', constraint)
  assert message in str(error.value) and '\n' not in str(error.value)


def test_a_sweep_traces_each_connection_once():
  """At whatever width, seed and rate: planning thousands of runs takes milliseconds for each."""
  model_config._check_trace.cache_clear()
  for width, seed in ((32, 0), (64, 0), (64, 1)):
    resolve(changed(f'model.width={width}', f'seed={seed}'), 'd')
  assert model_config._check_trace.cache_info().misses == 1


PARAMS = {
  'birkhoff_sinkhorn iterations=True': 'iterations takes int',
  'birkhoff_sinkhorn iterations=2.0': 'iterations takes int',
  'birkhoff_sinkhorn iterations=[3]': 'iterations takes int',
  'birkhoff_sinkhorn iterations=1000000000': 'between 1 and 10000',
  'birkhoff_sinkhorn eps=-5': 'between 0 and 1',
  'birkhoff_sinkhorn eps=1e400': 'must be finite',
  'birkhoff_sinkhorn eps=nan': 'eps takes float',
  'birkhoff_sinkhorn transpose=1': 'transpose takes bool',
  'birkhoff_sinkhorn order=diagonals': 'columns or rows',
  'birkhoff_sinkhorn depth=3': 'it takes iterations, preset, order',
  'identity depth=3': 'it takes none',
  'birkhoff_permutations count=1000000 12': 'has 1000000 coordinates',
  'birkhoff_permutations count=None 12': '479001600 permutations',
  'birkhoff_permutations count=10000000000': 'at most 2147483647',
  'birkhoff_kronecker factors=2': 'takes a list',
  'birkhoff_kronecker factors=[2.0,2.0]': 'factors takes int',
  'birkhoff_kronecker factors=[2]': 'do not multiply to n = 4',
  'birkhoff_orthostochastic s=1000': 'between 1 and 64',
  'birkhoff_orthostochastic s=64': 'coordinates',
  'birkhoff_dual max_iterations=1000000': 'between 1 and 10000',
  'circulant gamma=0': 'between 1e-06 and 1',
  'circulant gamma=True': 'takes float',
  'spectral_sphere gamma=[]': 'takes float',
  'orthogonal_quaternion eps=-1': 'between',
  'unconstrained None 100000': 'at most 2048',
  'unconstrained None 65': '4225 sums',
}


@pytest.mark.parametrize('case', PARAMS)
def test_parameters_of_constraints_are_checked_by_their_signatures(case):
  constraint, param, streams = (*case.split(), '4')[:3]
  overrides = f'model.connection.constraint={constraint} model.connection.streams={streams}'
  if param != 'None':
    overrides += f' model.connection.constraint_params.{param}'
  assert PARAMS[case] in refused(overrides)


def test_an_int_does_for_a_float_parameter():
  fields = ('model.connection.constraint=circulant', 'model.connection.constraint_params.gamma=1')
  run = resolve(changed(*fields), 'd')
  assert run.run_id == resolve(changed(*fields[:1]), 'd').run_id
  assert isinstance(run.model.connection.constraint.params['gamma'], float)


TOO_LARGE = {
  'duration.steps=3000000000': 'duration.steps=3000000000: at most 2147483647',
  'duration.steps=None duration.tokens=1e30': 'duration.tokens=1e+30 means',
  'duration.steps=None duration.flops=1e38': 'duration.flops=1e+38 means',
  'duration.steps=None duration.flops=1e308': 'duration.flops must be finite',
  'duration.steps=None duration.tokens_per_param=1e30': 'updates; at most 2147483647',
  'optimizer.warmup_fraction=None optimizer.warmup_steps=99999999999': '99999999999: at most',
  'evaluation.every_steps=9999999999': 'evaluation.every_steps',
  'evaluation.sequences=1000000000000': 'evaluation.sequences',
  'data.batch_size=1000000000': 'data.batch_size * data.seq_len = 64000000000',
  'data.seq_len=1000000000': 'data.batch_size * data.seq_len',
  'mesh.tensor=1000000': 'does not divide',
  'mesh.data=10000000000': 'mesh.data=10000000000',
  'optimizer.microbatches=1000000000': 'times optimizer.microbatches',
  'model.width=1000000000': 'streams * width = 4000000000',
  'model.width=500000000': 'TiB',
  'model.depth=1000000000': 'at most 10000',
  'model.depth=1000 model.scan=False': 'write out 1000 layers',
  'model.depth=1000 model.scan_unroll=1000': 'write out 1000 layers',
  'model.ffn_width=2000000000 model.width=100000': 'TiB',
  'model.vocab_size=1000000000000': 'model.vocab_size=1000000000000: at most',
  'model.heads=1000000000': 'does not divide',
  'model.moe.experts=1000000000 model.width=10000': 'TiB',
  'model.mla.kv_rank=8 model.mla.head_dim=2000000000': 'heads * (head_dim + value_dim)',
  'model.connection.streams=100000': 'at most 2048',
  'model.connection.read_eps=1e39': 'must be finite',
  'optimizer.lr=1e39': 'must be finite',
}


@pytest.mark.parametrize('overrides', TOO_LARGE)
def test_what_is_too_large_is_refused_with_the_number(overrides):
  assert TOO_LARGE[overrides] in refused(overrides)


LEAST = (
  'optimizer.name=muon',
  'optimizer.manifold=manifold_muon optimizer.manifold_pattern=layers/.*/w',
  'optimizer.manifold=stiefel optimizer.manifold_pattern=layers/.*/w',
  'optimizer.manifold=loro optimizer.manifold_pattern=.*/[uv] optimizer.manifold_value=2 '
  'model.weights.rank=4',
  'model.sparse.kind=topk model.sparse.topk=3 model.sparse.stage=warmup',
  'model.mtp.depth=1 cluster.workers=2 cluster.sync_every=2 cluster.overlap=1',
)


@pytest.mark.parametrize('fields', LEAST)
def test_no_run_holds_less_than_what_is_refused_by(fields):
  run = resolve(changed(*fields.split()), 'd')
  init = functools.partial(init_state, model=run.model, optimizer=run.optimizer, cluster=run.loose)
  state = jax.eval_shape(init, jax.random.key(0))

  def size(tree):
    return sum(4 * leaf.size for leaf in jax.tree.leaves(tree))

  copies = run.loose.workers if run.loose else 1
  learning = state.params['layers']['attention']['index'] if run.model.warms_up else state.params
  moments = least_moments(run.optimizer)
  least = cost.least_bytes(run.model, 0, moments=moments, copies=copies)
  assert size(state.params) < least <= size(state) + copies * size(learning)


def test_what_this_machine_cannot_hold_is_refused_and_nothing_else(monkeypatch):
  run = resolve(changed('model.width=100000', 'model.heads=2'), 'd')  # a laptop plans it, but does not run it
  with pytest.raises(ConfigError, match=r'GiB at the least \(240,\d\d\d,\d\d\d,\d\d\d parameters\)'):
    check_memory(run)
  small, memory = resolve(changed(), 'd'), psutil.virtual_memory()
  needed = cost.least_bytes(small.model, small.derived['tokens_per_step'])
  assert needed > 16 * small.derived['params']['total']
  muon = cost.least_bytes(small.model, small.derived['tokens_per_step'], moments=1)
  assert needed - muon == 4 * small.derived['params']['total']  # of a matrix Muon keeps one moment
  monkeypatch.setattr(psutil, 'swap_memory', lambda: memory._replace(total=1))
  for total in (needed - 1, needed - 2):
    monkeypatch.setattr(psutil, 'virtual_memory', lambda total=total: memory._replace(total=total))
    if total == needed - 1:
      check_memory(small)
    else:
      with pytest.raises(ConfigError, match='this machine has'):
        check_memory(small)


PATTERNS = dict(zip(MANIFOLDS, ('.*', '.*alpha.*', '.*norm') * 3, strict=False))


@pytest.mark.parametrize('manifold,pattern', PATTERNS.items())
def test_patterns_that_match_no_matrix_name_the_parameter(manifold, pattern):
  said = refused(
    f'optimizer.manifold={manifold} optimizer.manifold_pattern={pattern} optimizer.manifold_value=2'
  )
  assert f'optimizer.manifold={manifold}' in said and (
    'alpha' in said or 'norm' in said or 'embedding' in said
  )


def test_a_vector_of_n_squared_may_be_doubly_stochastic():
  of_res = 'layers/.*_connection/b_res'
  resolve(changed('optimizer.manifold=doubly_stochastic', f'optimizer.manifold_pattern={of_res}'), 'd')


def test_patterns_whose_matching_does_not_end_are_refused():
  for pattern in (
    '(a+)+$',
    '(a|a)*$',
    '(.*)*x',
    '(?:(a*)b?)+',
    'a?' * 30 + 'a' * 30,
    '.*' * 9,
    '(((a*)*)*)*',
  ):
    with pytest.raises(ConfigError, match=r'can match in 10\^'):
      check_pattern('pattern', pattern)
  for pattern in ('(', 'a{99999999999}', '(' * 5000, '*'):
    with pytest.raises(ConfigError, match='not a regular expression'):
      check_pattern('pattern', pattern)
  for pattern in (
    'layers/(attention|feed_forward)/.*/w',
    '.*w',
    '[^/]+/.*/(query|key|value)/[uv]',
    '(ab){3}',
  ):
    check_pattern('pattern', pattern)


FILES = {
  'c.optimizer.lr = True': 'lr takes float, got True',
  'c.model.width = True': 'width takes int, got True',
  "c.optimizer.lr = '4e-3'": 'lr',
  'c.model.width = 64.0': 'width',
  "c.optimizer = {**c.optimizer.to_dict(), 'lr': True}": 'lr takes float, got True',
  'c.optimizer = c.optimizer.to_dict(); c.model = ConfigDict({})': 'is missing',
  'c.model = 3': 'model',
  'with c.ignore_type(): c.optimizer.lr = np.float32(4e-3)': 'optimizer.lr takes float',
  "with c.ignore_type(): c.data.name = ['a']": 'data.name takes str',
  "c.optimizer.lr = float('nan')": 'optimizer.lr must be finite',
  'c.unlock(); c.model.connection.constraint_params.x = [[1]]': 'takes numbers, texts and lists',
  'c.seed = 10**30': 'seed=1000',
  'exit(0)': 'does not work: SystemExit: 0',
  "raise BaseException('a\\nb')": 'does not work: BaseException: a b',
  "raise ValueError('a\\nb')": 'a b',
  'raise GeneratorExit': 'does not work: GeneratorExit',
}


def config_file(folder, line):
  lines = ('import numpy as np', 'from ml_collections import ConfigDict, FrozenConfigDict')
  lines += ('from mhc_jax.config_file import parse', 'def get_config(arg=None):')
  path = folder / 'mine.py'
  path.write_text('\n'.join((*lines, f'  c = parse({SMOKE!r}, [])', f'  {line}', '  return c\n')))
  return str(path)


@pytest.mark.parametrize('line', FILES)
def test_config_files_of_wrong_types_or_that_exit(line, tmp_path):
  with pytest.raises(ConfigError) as error:
    parse(config_file(tmp_path, line), [])
  assert FILES[line] in str(error.value) and '\n' not in str(error.value)


def test_numbers_of_numpy_are_pythons(tmp_path):
  """Where they are the same number: the id does not tell them apart. Frozen configs can be overridden."""
  base = resolve(changed(), 'd')
  for line in (
    'with c.ignore_type(): c.model.width = np.int64(32)',
    'c.optimizer.lr = np.float64(4e-3)',
    'c = FrozenConfigDict(c)',
  ):
    config = parse(config_file(tmp_path, line), ['--config.data.repeat=False'])
    run = resolve(config, 'd')
    assert run.run_id == base.run_id and json.dumps(run.resolved) == json.dumps(base.resolved)
    assert type(config.model.width) is int and type(config.optimizer.lr) is float
  config = changed()
  with config.ignore_type(), config.unlocked():
    config.seed = np.int32(0)
  assert resolve(config, 'd').run_id == base.run_id


def test_overrides_of_bools_for_floats():
  for field in ('optimizer.lr', 'model.norm_eps', 'model.rope_theta', 'optimizer.clip_norm'):
    with pytest.raises(ConfigError, match=f'{field} takes float, got True'):
      changed(f'{field}=True')
  with pytest.raises(ConfigError, match='seed takes int'):
    changed('seed={[]:1}')


HOSTILE = ('-1', '0', '1', '7', 'nan', 'inf', '-inf', '1e308', '1e-320', '1e39', str(2**31), str(2**31 - 1))
HOSTILE += ('10**30', str(10**30), '', 'None', 'True', '[]', '{}', '{[]:1}', '(1,2)', 'ünï☃', '\udc80', '0.5')
HOSTILE += ('x' * 5000, '9' * 6000, '0x' + 'f' * 20000, '(a+)+$', '"a"', "b'x'", '1j', '...', '[' * 300, '\0')


def fields_of(config, path=''):
  for key, value in config.items():
    if key == 'constraint_params':
      yield from (f'{path}{key}.{name}' for name in ('iterations', 'eps', 'order', 'preset', 'x'))
    elif isinstance(value, ConfigDict):
      yield from fields_of(value, f'{path}{key}.')
    else:
      yield f'{path}{key}'


def test_hostile_overrides_end_in_a_run_or_one_line(count=150):
  """A run's config.json, its model and its warnings included. Seeded; every field and every value."""
  every = [(field, value) for field in fields_of(base_config()) for value in HOSTILE]
  runs = 0
  for field, value in random.Random(count).sample(every, count):
    try:
      run = resolve(changed(f'{field}={value}'), 'd')
    except ConfigError as error:
      assert '\n' not in str(error) and len(str(error)) < 600, (field, value)
    else:
      runs += 1
      assert rebuild_model(json.loads(json.dumps(run.resolved, allow_nan=False))) == run.model, (field, value)
      assert all('\n' not in line for line in warnings_of(run))
  assert runs


INIT = {'read': [0, 0], 'write': [0, 0], 'mixing': 0.01, 'phi': 1.0, 'alpha': 0.01}
# Path in config.json -> value, or KeyError to take the field out.
DAMAGE = {
  'model.depth': (10**9, 0, -1, 'x', None, 1.5, True, [], 10**400),
  'model.width': ('x', 10**9, 31),
  'model.connection': (None, 3, [], {}),
  'model.connection.streams': (10**9, 'x', 2.0),
  'model.connection.constraint': ('x', 3, None),
  'model.connection.constraint_params': ({'iterations': 10**9}, {'x': 1}, [], 'x'),
  'model.connection.read_gate': (
    'sigmoid',
    {},
    {'kind': 'x', 'scale': 1, 'eps': 0},
    {'kind': 'sigmoid', 'scale': 'x'},
  ),
  'model.connection.init': (
    {},
    None,
    {'read': 'x'},
    {'read': [1], 'write': [1], 'mixing': 0, 'phi': 0, 'alpha': 0},
  ),
  'model.connection.more': (1,),
  'model.dtype': ('float16', 3),
  'model': (None, 3, [], KeyError),
  'data.batch_size': ('x', 10**10),
  'evaluation.sequences': (10**12, -1),
  'mesh': ({'data': 'x'}, 3),
}


@pytest.mark.parametrize('path', DAMAGE)
def test_a_damaged_config_json_is_refused_in_one_line(path):
  text = json.dumps(resolve(changed(), 'd').resolved)
  *sections, field = path.split('.')
  for value in DAMAGE[path]:
    resolved = json.loads(text)
    node = resolved
    for section in sections:
      node = node[section]
    if value is KeyError:
      del node[field]
    else:
      node[field] = value
    with pytest.raises(ConfigError) as error:
      rebuild_model(resolved)
    assert '\n' not in str(error.value), value
  for other in (None, 3, [], {}):
    with pytest.raises(ConfigError):
      rebuild_model(other)


def test_a_warmup_longer_than_the_run_is_said():
  assert warnings_of(resolve(changed(), 'd')) == []
  run = resolve(changed('optimizer.warmup_fraction=None', 'optimizer.warmup_steps=1000'), 'd')
  (said,) = warnings_of(run)
  assert said.startswith('optimizer.warmup_steps=1000 is longer than the run of 20 updates') and '2%' in said


def test_a_platform_that_is_not_here_is_said(monkeypatch):
  def none(*_):
    raise AssertionError

  monkeypatch.setattr(jax, 'devices', none)
  for call in (lambda: sharding.make_mesh({}), lambda: resolve(changed(), 'd')):
    with pytest.raises(ConfigError, match='no devices of cpu are here'):
      call()
  assert (ROOT / 'configs').is_dir()
