"""Members of a population: each as its single run, in numbers, folder and end; killed, they go on."""

import dataclasses
import errno
import functools
import json
import os
import signal
import subprocess
import sys

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sweep, workers
from mhc_jax import population, train
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import hparams_of, init_state, train_step
from tests.test_train import TIMES, config, corpus, restored, rows

# Of a loss of 5 nats after 20 updates of float32: the compiler adds up a member's numbers in another order.
ROUNDING = 1e-5
# Four members of unequal lengths, the last of which diverges: 4 places, then 2, then 1.
MEMBERS = (
  {'seed': 0, 'duration__steps': 20},
  {'seed': 1, 'duration__steps': 13, 'optimizer__lr': 1e-3},
  {'seed': 2, 'duration__steps': 20, 'optimizer__weight_decay': 0.0},
  {
    'seed': 3,
    'duration__steps': 20,
    'optimizer__lr': 1e3,
    'optimizer__weight_decay': 0.0,
    'divergence__patience': 3,
  },
)


def train_together(folder, members=MEMBERS, **options):
  """The statuses of a population; its folders are numbered."""
  folders = [str(folder / str(i)) for i in range(len(members))]
  return train.run_population([config(**c) for c in members], folders, corpus(), quiet=True, **options)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """(folder, statuses) of the population that nothing disturbs."""
  folder = tmp_path_factory.mktemp('population')
  return folder, train_together(folder)


def without_times(folder):
  return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows(folder)]


def distance(tree, other):
  """Of all numbers together, relative: where a gradient is all rounding, Adam moves that parameter by it."""
  ours, theirs = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (tree, other))
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def names_of(folder):
  """All files, but for those that orbax names at random."""
  return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.parent.name != 'd'}


def status_of(folder, but=()):
  status = json.loads((folder / 'status.json').read_text())
  return {name: value for name, value in status.items() if name not in but}


@pytest.mark.parametrize('index', range(len(MEMBERS)))
def test_a_member_is_its_single_run_up_to_rounding(undisturbed, tmp_path, index):
  folder, fields = undisturbed[0] / str(index), MEMBERS[index]
  alone = train.run(config(**fields), str(tmp_path), corpus(), quiet=True)
  assert [list(row) for row in rows(folder)] == [list(row) for row in rows(tmp_path)]
  for row, same in zip(without_times(folder), without_times(tmp_path), strict=True):
    for name in row if index < 3 else ('step', 'tokens'):
      assert row[name] == pytest.approx(same[name], rel=0, abs=ROUNDING), name
  (step, state), (same_step, same_state) = (restored(x, **fields) for x in (folder, tmp_path))
  assert step == same_step and (index == 3 or distance(state, same_state) < ROUNDING)
  numbers = 'seconds', 'population', 'rows_crc32', 'crc32', 'final'
  assert status_of(folder, but=numbers) == status_of(tmp_path, but=numbers)
  assert list(status_of(folder)) == list(status_of(tmp_path))
  assert (folder / 'config.json').read_text() == (tmp_path / 'config.json').read_text()
  assert names_of(folder) == names_of(tmp_path)
  status = undisturbed[1][index]
  assert (status['state'], status['population']) == (alone['state'], 4) and alone['population'] == 1
  assert alone['state'] == ('finished' if index < 3 else 'diverged')
  # Ended: the same command changes nothing.
  assert train.run(config(**fields), str(folder), corpus(), quiet=True) == status


MOE = {'experts': 4, 'active': 2, 'ffn_width': 8}
PRODUCTS = {
  'mhc with experts': {
    'model__connection__name': 'mhc',
    'model__connection__streams': 2,
    'model__dense_layers': 0,
    **{f'model__moe__{name}': value for name, value in MOE.items()},
  },
  'hc, low rank, microbatches': {
    'model__connection__name': 'hc',
    'model__weights__rank': 2,
    'optimizer__microbatches': 2,
  },
  'identity, generator of rank 1': {'model__connection__name': 'identity', 'model__connection__rank': 1},
}


@pytest.mark.slow
@pytest.mark.parametrize('fields', PRODUCTS.values(), ids=PRODUCTS)
def test_products_of_options_are_the_same_under_vmap(fields):
  plan = resolve(config(**fields, model__scan=False), 'digest')
  shapes = {'model': plan.model, 'optimizer': plan.optimizer}
  source, _ = train.load_data(plan, corpus())
  step = functools.partial(train_step, **shapes, mesh=make_mesh({}))

  def steps(state, batch, hparams):
    return jax.lax.scan(lambda state, now: step(state, now, hparams), state, batch)

  state = jax.vmap(functools.partial(init_state, **shapes))(jax.random.split(jax.random.key(0), 2))
  batches = [source.take(range(i, i + 80)) for i in (0, 100)]
  batch = jax.tree.map(lambda *x: np.stack(x).reshape(2, 20, 4, -1), *batches)
  both = [hparams_of(dataclasses.replace(plan.optimizer, lr=lr), 20) for lr in (3e-3, 1e-3)]
  hparams = jax.tree.map(lambda *x: np.stack(x), *both)
  _, together = jax.jit(jax.vmap(steps))(state, batch, hparams)
  alone = jax.jit(steps)
  for i in range(2):
    _, metrics = alone(*jax.tree.map(lambda x, i=i: x[i], (state, batch, hparams)))
    np.testing.assert_allclose(together['loss'][i], metrics['loss'], rtol=0, atol=ROUNDING)
  assert abs(together['loss'][0, -1] - together['loss'][1, -1]) > 0.01


def test_every_constraint_has_its_gradient_for_many_members():
  """Traced alone: `materialise` makes its conditional a select."""
  for make in CONSTRAINTS.values():
    constraint = make()

    def total(coords_KX, constraint=constraint):
      return jnp.sum(constraint.matrix(coords_KX, 4))

    coords = jax.ShapeDtypeStruct((3, constraint.num_coordinates(4), 1, 8), jnp.float32)
    assert jax.eval_shape(jax.vmap(jax.grad(total)), coords).shape == coords.shape


def assert_undisturbed(folder, undisturbed):
  """Bit for bit: rows and parameters."""
  for index, fields in enumerate(MEMBERS):
    ours, theirs = folder / str(index), undisturbed[0] / str(index)
    assert without_times(ours) == without_times(theirs)
    jax.tree.map(np.testing.assert_array_equal, restored(ours, **fields), restored(theirs, **fields))


def test_a_stopped_population_goes_on_bit_for_bit(undisturbed, tmp_path):
  """Twice, each member from its own step: once when all are there, once when some have ended."""
  for last, states in ((3, {'interrupted'}), (16, {'interrupted', 'finished', 'diverged'})):
    statuses = train_together(tmp_path, stops_at=lambda step, last=last: step >= last)
    assert {status['state'] for status in statuses} == states
  train_together(tmp_path)
  assert_undisturbed(tmp_path, undisturbed)


def killed(folder, step):
  """Of the child below: a population that is killed before it looks at the metrics of a step."""
  train_together(folder, stops_at=lambda now: now >= step and os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.slow
def test_a_killed_population_goes_on_bit_for_bit(undisturbed, tmp_path):
  code = 'import sys, pathlib, tests.test_population as t; t.killed(pathlib.Path(sys.argv[1]), 12)'
  child = subprocess.run([sys.executable, '-c', code, str(tmp_path)], check=False)
  assert child.returncode == -signal.SIGKILL
  states = [status_of(tmp_path / str(i))['state'] for i in range(len(MEMBERS))]
  assert states == ['running'] * 3 + ['diverged']
  train_together(tmp_path)
  assert_undisturbed(tmp_path, undisturbed)


def test_a_member_goes_on_alone_and_a_run_goes_on_as_a_member(undisturbed, tmp_path):
  stop = {'stops_at': lambda step: step >= 5}
  members = MEMBERS[:2]
  train_together(tmp_path, members[:1], **stop)
  train.run(config(**members[1]), str(tmp_path / '1'), corpus(), quiet=True, **stop)
  first = train.run(config(**members[0]), str(tmp_path / '0'), corpus(), quiet=True)
  (second,) = train.run_population([config(**members[1])], [str(tmp_path / '1')], corpus(), quiet=True)
  assert first['state'] == second['state'] == 'finished'
  for index, fields in enumerate(members):
    (_, ours), (_, theirs) = (restored(x / str(index), **fields) for x in (tmp_path, undisturbed[0]))
    assert distance(ours, theirs) < ROUNDING


def test_whoever_cannot_take_part_is_left_out(undisturbed, tmp_path, monkeypatch):
  """Held by another process; of another configuration; failing in the middle. The others do not notice."""
  members = MEMBERS[:3]
  (tmp_path / '0').mkdir()
  real = train.Recorder.save

  def broken(self, at, *rest):
    if self._plan.resolved['seed'] == 2 and at.step == 8:
      raise RuntimeError('no luck')
    real(self, at, *rest)

  monkeypatch.setattr(train.Recorder, 'save', broken)
  with filelock.FileLock(tmp_path / '0' / '.lock'):
    statuses = train_together(tmp_path, members)
  assert [status['state'] for status in statuses] == ['busy', 'finished', 'failed']
  assert 'no luck' in statuses[2]['error'] and not (tmp_path / '0' / 'status.json').exists()
  assert [row['step'] for row in rows(tmp_path / '2')][-1] == 8
  monkeypatch.undo()
  other = [{**members[0], 'optimizer__lr': 0.5}, members[1], members[2]]
  (tmp_path / '2').rename(tmp_path / 'failed')
  (tmp_path / '1').rename(tmp_path / '2')  # the folder of another run
  statuses = train_together(tmp_path, other)
  assert [status['state'] for status in statuses] == ['finished', 'finished', 'failed']
  assert 'choose another --workdir' in statuses[2]['error']


def test_a_full_disk_interrupts_all_members(tmp_path, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(train.Recorder, 'save', full)
  with pytest.raises(OSError, match='No space left'):
    train_together(tmp_path, MEMBERS[:2])
  for index in range(2):
    status = status_of(tmp_path / str(index))
    assert status['state'] == 'interrupted' and 'No space left' in status['error']


def test_what_is_called_diverged_goes_on_where_that_is_asked_for(undisturbed, tmp_path):
  train_together(tmp_path, MEMBERS[2:])
  _, status = train_together(tmp_path, MEMBERS[2:], continue_diverged=True)
  assert status['continued_diverged'] and status['step'] > undisturbed[1][3]['diverged_at']


def test_members_that_do_not_fit_beside_each_other_train_in_halves(monkeypatch, tmp_path, capsys):
  tried = []

  def short_of_memory(configs, *_, **__):
    tried.append(len(configs))
    error = 'OutOfMemoryError: out of memory: about 1 GiB'
    return [
      {'state': 'failed', 'error': error} if len(configs) > 2 else {'state': 'finished'} for _ in configs
    ]

  monkeypatch.setattr(workers, 'corpus_of', lambda *_: corpus())
  monkeypatch.setattr(train, 'run_population', short_of_memory)
  ended = workers.run_group([config(seed=i) for i in range(4)], str(tmp_path), True, population='4')
  assert tried == [4, 2, 2] and [state for _, state in ended] == ['finished'] * 4
  assert 'half as many' in capsys.readouterr().err


def test_members_are_alike_and_as_many_as_fit(monkeypatch, tmp_path):
  configs = [config(seed=i, duration__steps=10 + i) for i in range(5)] + [config(model__width=32)]
  monkeypatch.setattr(workers, 'corpus_of', lambda *_: corpus())

  def lengths(asked):
    groups = workers.side_by_side(configs, asked)
    return [[c.duration.steps for c in group] for group in groups]

  assert lengths('off') == lengths('auto') == [[10], [11], [12], [13], [14], [10]]  # this is a CPU
  assert lengths('3') == [[14, 13, 12], [11, 10], [10]]
  with pytest.raises(ConfigError, match='equal shapes'):
    train.run_population(configs[4:], ['a', 'b'], corpus())
  with pytest.raises(ConfigError, match='--population takes'):
    sweep.main(['quick', '--population', '0', '--out', str(tmp_path)])

  class Chip:
    platform, device_kind = 'gpu', 'NVIDIA H100'

    def memory_stats(self):
      return {'bytes_limit': 2**34}

  small, large = (resolve(config(model__width=w, data__batch_size=b), '') for w, b in ((64, 8), (512, 512)))
  assert population.most_members(small) == 1
  monkeypatch.setattr(jax, 'devices', lambda: [Chip()])
  assert population.most_members(small) == 64 and population.most_members(large) == 1
  monkeypatch.setattr(Chip, 'platform', 'tpu')
  assert population.most_members(small) == 8
  monkeypatch.setattr(Chip, 'memory_stats', lambda self: {'bytes_limit': 2**25})
  assert population.most_members(small) == 4
