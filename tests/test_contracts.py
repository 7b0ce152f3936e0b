"""Contracts discovered from folders: every config builds, every experiment is valid."""

import dataclasses
import hashlib
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import sweep
from mhc_jax import hyper_connection
from mhc_jax.config import base_config
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.model_config import build_model
from mhc_jax.plan import resolve
from mhc_jax.train_step import init_state

ROOT = pathlib.Path(__file__).parent.parent
CONFIGS = sorted(p for p in (ROOT / 'configs').glob('*.py') if 'def get_config(' in p.read_text())


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_resolves_and_builds(path):
  """Locked, valid, and its parameters are those that cost.py counts."""
  config = parse(str(path), [])
  assert config.is_locked
  run = resolve(config, 'digest')
  abstract = jax.eval_shape(lambda key: init_state(key, run.model, run.optimizer), jax.random.key(0))
  assert sum(leaf.size for leaf in jax.tree.leaves(abstract.params)) == run.derived['params']['total']


def test_every_experiment_is_listed():
  """A file with runs() that sweep.py does not know would never run."""
  files = {path.stem for path in (ROOT / 'experiments').glob('*.py') if 'def runs(' in path.read_text()}
  assert files == set(sweep.EXPERIMENTS)


# SHA-256 of the run ids of every plan, in order.
PLANS = {
  'quick': '919283258c48',
  'learning_rate': '637d33d96a86',
  'identity_or_mixing': '437f3419f9f2',
  'ablation': '37609ae6fb40',
  'stability': '33e41e4baa89',
  'rank': '3b1504575770',
  'isoflop': 'e75d0e49bf2c',
  'router': '8e62ee6f998d',
  'attention_residual': '96a6c5087d7e',
  'fractions': '3e2d01fdf8d3',
  'fp8': '04232054bf1a',
  'sparse': '338ceeb8bd70',
  'mtp': '18c3936055d2',
  'clusters': '8202575c9377',
  'study': '23a98ad716e0',
  'rotations': 'dc29185751e7',
}


@pytest.mark.slow
@pytest.mark.parametrize('name', sweep.EXPERIMENTS)
def test_every_experiment_plans_the_runs_that_it_planned_before(name):
  """Valid, different from each other, and with the ids of runs that somebody may already have."""
  ids = [resolve(config, 'digest').run_id for config in sweep.EXPERIMENTS[name](None)]
  assert ids and len(set(ids)) == len(ids)
  assert hashlib.sha256(' '.join(ids).encode()).hexdigest()[:12] == PLANS[name], (
    'If the plan changed on purpose, put its new hash here and say so in CHANGELOG.md; if not, every run of '
    'this plan would be trained again: find what moved the ids.'
  )
  with pytest.raises(ValueError, match='argument'):
    sweep.EXPERIMENTS[name]('nonsense')


def test_quick_has_what_its_report_needs():
  """Four arms at five or more sizes of several widths and depths, two seeds each; three ranks each."""
  runs = [run.resolved for run in (resolve(c, 'd') for c in sweep.EXPERIMENTS['quick'](None))]
  full = [
    r for r in runs if r['model']['connection']['rank'] is None and r['model']['weights']['rank'] is None
  ]
  for arm in ('residual', 'hc', 'mhc', 'identity'):
    of_arm = [r for r in full if r['arm'] == arm and r['model']['connection']['streams'] in (1, 4)]
    sizes = {(r['model']['width'], r['model']['depth']) for r in of_arm}
    assert len(sizes) >= 5 and len({w for w, _ in sizes}) > 1 and len({d for _, d in sizes}) > 1
    for size in sizes:
      seeds = {r['seed'] for r in of_arm if (r['model']['width'], r['model']['depth']) == size}
      assert seeds == {0, 1}
    assert len({r['duration']['steps'] for r in of_arm}) == 1, 'all see equally many tokens'
  assert len({r['model']['connection']['rank'] for r in runs} - {None}) >= 3
  assert len({r['model']['weights']['rank'] for r in runs} - {None}) >= 3


def test_what_is_not_in_the_run_id_and_what_is():
  config = base_config()
  config.duration.steps, config.optimizer.warmup_steps = 10, 1
  name = resolve(config, 'd').run_id
  config.mesh.data, config.data.dir, config.arm = 2, 'elsewhere', 'label'
  assert resolve(config, 'd').run_id == name
  assert resolve(config, 'other corpus').run_id != name
  config.seed = 1
  assert resolve(config, 'd').run_id != name


def test_no_defaults_hidden_in_the_core():
  """`.get(name, default)` walks round the lock of a config."""
  pattern = re.compile(r'\b(config|c|cfg)(\.\w+)*\.get\([^)]*,')
  for path in (ROOT / 'mhc_jax').rglob('*.py'):
    assert not pattern.search(path.read_text()), path


def test_custom_constraint_needs_no_change_of_the_package():
  """The Python API takes a Constraint; its name and parameters are its run id."""
  from mhc_jax.constraints import CONSTRAINTS

  config = base_config()
  config.duration.steps, config.optimizer.warmup_steps = 10, 1
  mine = [CONSTRAINTS['birkhoff_sinkhorn'](iterations=t) for t in (3, 4)]
  ids = [resolve(config, 'd', constraint).run_id for constraint in mine]
  assert len({*ids, resolve(config, 'd').run_id}) == 3
  assert build_model(config, mine[0]).connection.constraint is mine[0]


def test_a_redefined_constraint_is_another_and_the_package_keeps_its_names():
  """Compiled programs are shared by equal models: an edited function must not find those of the old one."""
  from mhc_jax.constraints import CONSTRAINTS

  config = base_config()
  config.duration.steps, config.optimizer.warmup_steps = 10, 1
  ours = CONSTRAINTS['circulant']()
  first = dataclasses.replace(ours, name='mine', matrix=lambda coords_KX, n: ours.matrix(coords_KX, n))
  edited = dataclasses.replace(first, matrix=lambda coords_KX, n: 2 * ours.matrix(coords_KX, n))
  models = [build_model(config, constraint) for constraint in (first, edited, first)]
  assert models[0] != models[1] and models[0] == models[2]
  with pytest.raises(ConfigError, match="'identity' names a constraint of the package"):
    build_model(config, dataclasses.replace(first, name='identity'))


@pytest.mark.slow
def test_stability_has_the_depth_effect_in_full():
  """No division of F by the depth, no slower H_res, and a gradient norm of every update."""
  runs = sweep.EXPERIMENTS['stability'](None)
  models = [build_model(config) for config in runs]
  assert {model.depth for model in models} == {4, 8, 16}
  assert {model.depth_ratio for model in models} == {model.width_ratio for model in models} == {1.0}
  assert {config.log.every_steps for config in runs} == {1}


def test_factored_weights_have_learning_rates_of_their_own():
  """Each rank and seed at three rates; projected matrices at the one of full ones."""
  rates = {}
  for c in sweep.EXPERIMENTS['rank'](None):
    kind = 'factors' if c.model.weights.rank else c.optimizer.manifold or 'full'
    rank = c.model.weights.rank or c.optimizer.manifold_value
    rates.setdefault((kind, rank, c.seed), set()).add(c.optimizer.lr)
  for (kind, _, _), found in rates.items():
    assert found == ({4e-3, 8e-3, 1.6e-2} if kind == 'factors' else {1.6e-2}), kind


def test_ablation_leaves_maps_out_one_by_one():
  """Every map is missing alone from hc; no row of mhc is residual by construction: all have H_post."""
  rows = {'hc': set(), 'mhc': set()}
  for config in sweep.EXPERIMENTS['ablation'](None):
    spec = build_model(config).connection
    if config.arm != 'residual':
      rows[config.model.connection.name].add(frozenset(spec.parts))
  full = frozenset({'pre', 'post', 'res'})
  one_less = {full - {part} for part in full}
  assert rows['hc'] == {full, frozenset({'res'}), *one_less}
  assert rows['mhc'] == {full, *(parts for parts in one_less if 'post' in parts)}


@pytest.mark.slow
def test_identity_or_mixing_starts_every_arm_at_the_same_mixing():
  """Off-diagonal mass 0.01 at every token, whatever the coordinates mean."""
  x_NBTD = jax.random.normal(jax.random.key(0), (4, 2, 8, 32))
  specs = {}
  for config in sweep.EXPERIMENTS['identity_or_mixing'](None):
    if config.arm != 'residual':
      specs[config.arm] = build_model(config).connection
  assert len(specs) >= 5
  for arm, spec in specs.items():
    params = hyper_connection.init_params(jax.random.key(1), spec, 32, 0)
    res_NMBT = hyper_connection.generate(params, x_NBTD, spec).res_NMBT
    mass_NBT = 0.0 if res_NMBT is None else abs(res_NMBT).sum(1) - abs(jnp.einsum('nnbt->nbt', res_NMBT))
    wanted = 0.0 if arm == 'identity' else 0.01
    np.testing.assert_allclose(mass_NBT, wanted, atol=2e-4, err_msg=arm)
