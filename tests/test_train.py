"""The loop: how many updates, which rows, how runs end; train_step's losses; start weights of the arms."""

import dataclasses
import functools
import json
import math

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mhc_jax import train
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config import base_config
from mhc_jax.data import BYTES, Corpus
from mhc_jax.divergence import Divergence
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve
from mhc_jax.recorder import join_revisions
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import init_state, programs, train_step

TIMES = ('time/', 'device/')  # columns that no two processes have alike begin so


def text(rng, size):
  """A stream of documents of random words out of twenty, so that there is something to learn."""
  words = [rng.integers(97, 123, rng.integers(2, 6)) for _ in range(20)]
  stream = [BYTES.bos]
  while len(stream) < size:
    stream += [BYTES.bos] if rng.random() < 0.02 else [*words[rng.integers(20)], 32]
  return np.array(stream[:size], np.uint16)


@functools.cache
def corpus():
  rng = np.random.default_rng(0)
  return Corpus('words', 'digest', text(rng, 20_000), text(rng, 2000), BYTES)


def config(**fields):
  """A tiny residual run of ten updates; fields as {'section__name': value}."""
  c = base_config()
  c.model.connection.name = 'residual'
  c.model.width, c.model.depth, c.model.heads = 16, 1, 2
  c.data.seq_len, c.data.batch_size = 16, 4
  c.optimizer.warmup_steps, c.duration.steps = 2, 10
  c.evaluation.every_steps, c.evaluation.sequences, c.evaluation.batch_size = 4, 8, 4
  c.log.every_steps, c.log.tensorboard, c.checkpoint.every_steps = 3, False, 4
  for name, value in fields.items():
    *path, last = name.split('__')
    functools.reduce(getattr, path, c)[last] = value
  return c


def run(workdir, **fields):
  status = train.run(config(**fields), str(workdir), corpus(), quiet=True)
  return status, rows(workdir)


def rows(workdir):
  """metrics.jsonl, which must be JSON without NaN or Infinity."""

  def refuse(constant):
    raise AssertionError(f'{constant} in metrics.jsonl')

  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line, parse_constant=refuse) for line in lines]


def restored(workdir, **fields):
  """(step, state) of the newest checkpoint."""
  plan = resolve(config(**fields), 'digest')
  abstract = programs(plan.model, plan.optimizer, make_mesh({})).abstract
  step, state, _ = Checkpoints(workdir / 'checkpoints').restore_latest(abstract)
  return step, state


def test_a_run_makes_exactly_num_steps_updates_and_logs_them_in_order(tmp_path):
  status, logged = run(tmp_path)
  assert (status['state'], status['step'], status['num_steps']) == ('finished', 10, 10)
  step, state = restored(tmp_path)
  assert step == int(state.step) == 10
  assert int(optax.tree.get(state.opt_state, 'count')) == 10  # Adam's own
  assert [row['step'] for row in logged] == [0, 3, 4, 6, 8, 9, 10]
  assert [row['step'] for row in logged if 'validation/loss' in row] == [0, 4, 8, 10]
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['10']
  per_step = status['derived']['tokens_per_step']
  for row in logged:
    assert row['tokens'] == row['step'] * per_step == row['step'] * 64
    assert row['flops'] == row['tokens'] * status['derived']['flops_per_token']
    update = {
      'train/loss',
      'train/grad_norm',
      'train/update_norm',
      'train/lr',
      'time/seconds',
      'time/data_seconds',
    }
    assert (row.keys() >= update) == (row['step'] > 0)
    if 'validation/loss' in row:
      assert row['validation/bits_per_byte'] == pytest.approx(row['validation/loss'] / math.log(2))
  assert logged[1]['train/lr'] == pytest.approx(4e-3) and logged[-1]['train/lr'] == pytest.approx(2e-3)
  last = {key: logged[-1][key] for key in ('train/loss', 'validation/loss', 'validation/bits_per_byte')}
  assert status['final'] == last and last['validation/loss'] < logged[0]['validation/loss']
  assert json.loads((tmp_path / 'status.json').read_text()) == status
  assert status['seconds'] == logged[-1]['time/seconds'] > 0


def test_the_same_command_after_the_end_changes_nothing(tmp_path):
  first, logged = run(tmp_path, duration__steps=4)
  again, relogged = run(tmp_path, duration__steps=4)
  assert again == first and relogged == logged


def test_metrics_of_an_update_are_fetched_after_the_next_is_dispatched(tmp_path, monkeypatch):
  calls, real, log = [], train.programs, train.Recorder.update

  def recorded(*args):
    found = real(*args)

    def step(*inputs):
      calls.append('update')
      return found.step(*inputs)

    return dataclasses.replace(found, step=step)

  def recorded_log(self, at, step, *rest):
    calls.append(step)
    return log(self, at, step, *rest)

  monkeypatch.setattr(train, 'programs', recorded)
  monkeypatch.setattr(train.Recorder, 'update', recorded_log)
  run(tmp_path, duration__steps=5, evaluation__every_steps=5, checkpoint__every_steps=5)
  assert calls == [0, 'update', 'update', 1, 'update', 2, 'update', 3, 'update', 4, 5]


def test_every_run_is_validated_on_the_same_batches(tmp_path, monkeypatch):
  seen, real = [], train.Single.sums

  def recorded(self, batches):
    seen.append([{name: np.asarray(value) for name, value in batch.items()} for batch in batches])
    return real(self, batches)

  monkeypatch.setattr(train.Single, 'sums', recorded)
  losses = []
  for seed in (0, 1):
    losses.append(run(tmp_path / str(seed), seed=seed, duration__steps=4)[1][-1]['train/loss'])
  assert len(seen) == 4 and len(seen[0]) == 2 and losses[0] != losses[1]
  for batches in seen[1:]:
    jax.tree.map(np.testing.assert_array_equal, batches, seen[0])


def test_runs_of_equal_shapes_share_one_compilation(tmp_path):
  def of(**fields):
    plan = resolve(config(**fields), 'digest')
    return programs(plan.model, plan.optimizer, make_mesh({}))

  other = {'seed': 5, 'optimizer__lr': 0.1, 'optimizer__weight_decay': 0.0, 'duration__steps': 2}
  run(tmp_path / 'a', duration__steps=2)
  run(tmp_path / 'b', optimizer__warmup_steps=1, **other)
  assert of() is of(**other) and of().step._cache_size() == 1
  assert of() is not of(optimizer__beta1=0.8)


def assert_only_finite_checkpoints(workdir, **fields):
  step, state = restored(workdir, **fields)
  for leaf in jax.tree.leaves(state):
    assert np.isfinite(leaf).all()
  return step


def test_a_run_whose_loss_stays_above_its_first_is_recorded_as_diverged(tmp_path):
  fields = {'optimizer__lr': 1e3, 'optimizer__weight_decay': 0.0, 'divergence__patience': 3}
  status, logged = run(tmp_path, **fields)
  assert (status['state'], status['diverged_at'], status['step']) == ('diverged', 5, 5)
  assert status['final'] is None and status['error'] is None
  # Updates 3, 4 and 5: after the warmup of 2, three in a row.
  assert [row['step'] for row in logged] == [0, 3, 4, 5]
  assert logged[-1]['train/loss'] > 10 and 'validation/loss' not in logged[-1]
  assert assert_only_finite_checkpoints(tmp_path, **fields) == 4
  again, relogged = run(tmp_path, **fields)
  assert again['diverged_at'] == 5 and [row['step'] for row in relogged] == [0, 3, 4, 5]


def test_a_non_finite_update_is_recorded_and_never_saved(tmp_path):
  """Weight decay times this lr enlarges the parameters a hundredfold per update, until they overflow."""
  fields = {'optimizer__lr': 1e3, 'divergence__patience': 100, 'checkpoint__every_steps': 1}
  status, logged = run(tmp_path, **fields)
  assert status['state'] == 'diverged' and status['diverged_at'] == logged[-1]['step'] < 10
  assert logged[-1]['train/update_norm'] is None, 'not by what was meant to diverge'
  assert assert_only_finite_checkpoints(tmp_path, **fields) == status['diverged_at'] - 1


def fed(losses, patience=2, warmup=2, saved=None):
  """What is said after each loss, and the judge."""
  judge = Divergence(patience, warmup, saved or {})
  return [judge.diverged(step, {'loss': float(loss)}) for step, loss in enumerate(losses, 1)], judge


def test_divergence_smooths_the_losses_after_warmup():
  quiet = [5.0] * 20
  assert fed([*quiet, 4.0, 6.0, 6.0])[0] == [False] * 22 + [True]
  assert fed([*quiet, 9.0, 3.0, 3.0, 9.0], patience=3)[0] == [False] * 24, 'spikes'
  assert fed([5.0, 9.0, 9.0, 5.0])[0] == [False] * 4, 'warmup counts, or an equal loss'
  assert fed([5.0, math.nan])[0] == [False, True] and fed([math.inf])[0] == [True]
  saved = fed([*quiet, 6.0])[1].saved
  resumed = Divergence(2, 2, json.loads(json.dumps(saved)))
  assert resumed.diverged(22, {'loss': 6.0})
  older = Divergence(2, 2, {'initial_loss': 5.0, 'above': 1})
  assert [older.diverged(step, {'loss': loss}) for step, loss in ((7, 5.5), (8, 5.5))] == [False, True]


@pytest.mark.parametrize(
  'draw',
  (
    lambda rng, n: 5.5 + 0.1 * rng.normal(size=n),
    lambda rng, n: 5.5 + 0.5 * rng.normal(size=n),
    lambda rng, n: 5.5 + 0.1 * rng.standard_t(2, size=n),
    lambda rng, n: np.full(n, 5.5) + 1e-7 * rng.normal(size=n),
  ),
  ids=('quiet', 'loud', 'heavy tails', 'rounding'),
)
def test_losses_that_only_scatter_do_not_diverge_and_that_climb_do(draw):
  """300 runs of 300 updates at a rate of 0; half as much again as the first loss is too much at any noise."""
  rng = np.random.default_rng(0)
  assert not any(any(fed(draw(rng, 300), 10, 0)[0]) for _ in range(300))
  climb = np.linspace(0, 6, 60)
  assert all(any(fed(draw(rng, 60) + climb, 10, 0)[0]) for _ in range(50))


def test_a_rate_of_zero_finishes(tmp_path):
  fields = {'optimizer__lr': 0.0, 'duration__steps': 40, 'evaluation__every_steps': 40}
  assert run(tmp_path, **fields, checkpoint__every_steps=None)[0]['state'] == 'finished'


def test_a_diverged_run_goes_on_where_asked(tmp_path):
  fields = {'optimizer__lr': 1e3, 'optimizer__weight_decay': 0.0, 'divergence__patience': 3}
  assert run(tmp_path, **fields)[0]['state'] == 'diverged'
  status = train.run(config(**fields), str(tmp_path), corpus(), quiet=True, continue_diverged=True)
  assert (status['state'], status['step'], status['continued_diverged']) == ('finished', 10, True)
  assert [row['step'] for row in rows(tmp_path)] == [0, 3, 4, 6, 8, 9, 10]


def test_batches_without_a_target_change_nothing_and_are_counted(tmp_path):
  """Windows of one token, half of them the mark that begins a document."""
  tokens = np.tile(np.array([BYTES.bos, 97], np.uint16), 200)
  pairs = Corpus('pairs', 'digest', tokens, tokens, BYTES)
  fields = {'data__seq_len': 1, 'data__batch_size': 1, 'log__every_steps': 1, 'checkpoint__every_steps': None}
  status = train.run(config(**fields, duration__steps=40), str(tmp_path), pairs, quiet=True)
  logged = rows(tmp_path)[1:]
  empty = [row for row in logged if row['train/loss'] == 0]
  assert status['state'] == 'finished' and 5 < status['skipped_updates'] == len(empty) < 35
  assert all(row['train/update_norm'] >= 0 for row in logged) and logged[-1]['train/loss'] is not None
  plan = resolve(config(**fields), 'digest')
  compiled, ones = programs(plan.model, plan.optimizer, make_mesh({})), np.ones((1, 1), np.int32)
  before = jax.device_get(compiled.init(jax.random.key(0)))
  batch = {'inputs': ones, 'targets': ones, 'segments': 0 * ones, 'weights': np.zeros((1, 1), np.float32)}
  hparams = {'lr': 1.0, 'weight_decay': 1.0, 'num_steps': 9, 'warmup': 0}
  after, metrics = compiled.step(jax.device_put(before), batch, jax.tree.map(jnp.float32, hparams))
  assert metrics['loss'] == 0 and int(after.step) == 1
  jax.tree.map(np.testing.assert_array_equal, before.params, jax.device_get(after.params))
  jax.tree.map(np.testing.assert_array_equal, before.opt_state, jax.device_get(after.opt_state))


def test_an_error_is_recorded_as_failed_and_raised(tmp_path, monkeypatch):
  real, died_at = train.Recorder.save, 8

  def broken(self, at, *rest):
    if at.step == died_at:
      raise RuntimeError('no luck')
    real(self, at, *rest)

  monkeypatch.setattr(train.Recorder, 'save', broken)
  with pytest.raises(RuntimeError, match='no luck'):
    run(tmp_path)
  status = json.loads((tmp_path / 'status.json').read_text())
  assert (status['state'], status['error'], status['step']) == ('failed', 'RuntimeError: no luck', died_at)


def test_ctrl_c_before_the_first_update_is_no_failure(tmp_path, monkeypatch):
  """A sweep skips what failed and goes on with what was interrupted."""

  def pressed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train, 'train_batches', pressed)
    run(tmp_path)
  assert json.loads((tmp_path / 'status.json').read_text())['state'] == 'interrupted'
  assert run(tmp_path)[0]['state'] == 'finished'


def test_a_program_that_does_not_compile_is_recorded_at_the_step_it_died(tmp_path, monkeypatch):
  def broken(*_):
    raise TypeError('does not trace')

  with monkeypatch.context() as patch, pytest.raises(TypeError):
    patch.setattr(train, 'programs', broken)
    run(tmp_path)
  status = json.loads((tmp_path / 'status.json').read_text())
  assert (status['state'], status['step']) == ('failed', 0)


def test_a_workdir_in_use_is_refused(tmp_path):
  with filelock.FileLock(tmp_path / '.lock'), pytest.raises(ConfigError, match='in use by another'):
    run(tmp_path)
  assert not (tmp_path / 'metrics.jsonl').exists()


# train_step by itself: the default mhc model, through one compiled program.


@functools.cache
def mhc():
  """(state, a batch, compiled train_step) of a tiny model with every default of mhc."""
  c = config(model__connection__name='mhc', model__depth=2, optimizer__lr=1e-2, optimizer__warmup_steps=0)
  c.optimizer.schedule = 'constant'
  plan = resolve(c, 'digest')
  init = functools.partial(init_state, model=plan.model, optimizer=plan.optimizer)
  state = jax.jit(init)(jax.random.key(0))
  train_windows, _ = train.load_data(plan, corpus())
  batch = train_windows.take(range(4))
  hparams = {'lr': 1e-2, 'weight_decay': 0.1, 'num_steps': 10.0, 'warmup': 0.0}
  step = functools.partial(train_step, model=plan.model, optimizer=plan.optimizer)
  hparams = jax.tree.map(jnp.float32, hparams)
  return state, batch, functools.partial(jax.jit(step), hparams=hparams)


@functools.cache
def repeated_losses():
  """Losses of 30 updates on one batch."""
  state, batch, step = mhc()
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics['loss']))
  return losses


def test_the_first_loss_is_close_to_that_of_guessing():
  """Logits of standard deviation 1 / sqrt(width) = 1/4 add about half their variance, 0.03."""
  assert repeated_losses()[0] == pytest.approx(math.log(BYTES.vocab_size), abs=0.1)


def test_the_loss_falls_on_one_repeated_batch():
  losses = repeated_losses()
  assert losses[-1] < 1.5 < 5 < losses[0] and np.mean(np.diff(losses) < 0) > 0.8


GOLDEN = (5.608967, 5.324472, 5.096430)


def test_the_first_three_losses_are_the_recorded_ones():
  """Guards against changes nobody meant; other compiler options and instruction sets move these by 2e-7."""
  np.testing.assert_allclose(
    repeated_losses()[:3],
    GOLDEN,
    rtol=2e-6,
    err_msg='If the model, its start, the optimizer or the order of the data changed on purpose, say so in '
    'the commit and put the actual values into GOLDEN; otherwise find what changed.',
  )


def test_metrics_of_an_update_are_its_norms():
  state, batch, step = mhc()
  new, metrics = step(state, batch)
  moved = jax.tree.map(
    lambda a, b: np.sum(np.square(np.float64(a) - np.float64(b))), new.params, state.params
  )
  # Differences of float32 parameters of order 1, updates of order 1e-2.
  assert float(metrics['update_norm']) == pytest.approx(math.sqrt(sum(jax.tree.leaves(moved))), rel=1e-4)
  assert float(metrics['lr']) == pytest.approx(1e-2) and int(new.step) == 1
  assert 0.01 < float(metrics['grad_norm']) < 100


ARMS = {
  'hc': {},
  'mhc': {},
  'identity': {},
  'mhc, DeepSeek-V4': {'model__connection__name': 'mhc', 'model__connection__preset': 'deepseek_v4'},
}


@functools.cache
def start(arm):
  """Parameters by path, through the program that training initialises with."""
  plan = resolve(config(**({'model__connection__name': arm} | ARMS.get(arm, {}))), 'digest')
  state = programs(plan.model, plan.optimizer, make_mesh({})).init(jax.random.key(7))
  leaves = jax.tree_util.tree_leaves_with_path(state.params)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize('arm', ARMS)
def test_body_weights_are_bit_equal_across_arms(arm):
  plain, other = start('residual'), start(arm)
  assert other.keys() > plain.keys()
  assert all('connection' in name or name.startswith('collapse/') for name in other.keys() - plain.keys())
  for name, leaf in plain.items():
    assert leaf.tobytes() == other[name].tobytes(), name


def test_revisions_that_worked_on_a_run_are_named_in_order():
  assert join_revisions(None, 'a') == join_revisions('a', 'a') == join_revisions('a', None) == 'a'
  assert join_revisions('a', 'b') == 'a then b' == join_revisions('a then b', 'b')
  assert join_revisions('a then b', 'a') == 'a then b then a'


def test_a_run_that_other_code_goes_on_with_says_so(tmp_path, monkeypatch):
  monkeypatch.setattr('mhc_jax.recorder.revision', lambda: 'older')

  def pressed(*_, **__):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(train, 'loop', pressed)
    run(tmp_path)
  monkeypatch.setattr('mhc_jax.recorder.revision', lambda: 'newer')
  status, _ = run(tmp_path)
  assert status['git_revision'] == 'older then newer' and status['state'] == 'finished'
  assert status['versions']['jax'] == jax.__version__
