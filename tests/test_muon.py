"""muon.py: which parameters, steps by hand in float64, sizes of steps, no trace of it where it is off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_optimizer import ARMS, by_path, model, optimizer, parameters, updated

from mhc_jax import muon
from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.errors import ConfigError
from mhc_jax.parameters import kinds
from mhc_jax.plan import resolve

CASES = {
  'rank and generator': {'arm': ARMS[-1], 'on': True},
  'experts': {'arm': {'name': 'mhc', 'experts': 3}, 'on': False},
  'gated reads': {'arm': {'name': 'gated_residual'}, 'on': True},
  'layer by layer': {'arm': {'name': 'mhc', 'scan': False}, 'on': True},
}


def inputs_of(name, leaf):
  """(matrices, fan-in, fan-out) of a parameter that Muon moves, written out by hand."""
  stacked, shape = name.startswith('layers/') + ('/expert_' in name), leaf.shape
  generates = ('connection/' in name or 'collapse/' in name) and not name.endswith('read_up')
  rows = shape[-1] if generates else None
  matrices = int(np.prod(shape[:stacked]))
  fan_out = rows or int(np.prod(shape[stacked + 1 :]))
  return matrices, leaf.size // matrices // fan_out, fan_out


def orthogonal(m, eps=1e-8):
  m = m.T if m.shape[0] > m.shape[1] else m
  x = m / (np.linalg.norm(m) + eps)
  for a, b, c in ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2:
    gram = x @ x.T
    x = a * x + (b * gram + c * gram @ gram) @ x
  return x


def by_hand(w, gradients, rates, sizes, decay, beta=0.95):
  """Updates of one parameter; rates and decay with transfer's shares."""
  m = np.zeros(w.shape)
  for t, (g, lr) in enumerate(zip(gradients, rates, strict=True), 1):
    m = beta * m + (1 - beta) * g
    ahead = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
    steps = []
    for matrix in ahead.reshape(sizes):
      found = orthogonal(matrix)
      steps.append(found if found.shape == matrix.shape else found.T)
    w = w - lr * (0.18 * max(sizes[1:]) ** 0.5 * np.stack(steps).reshape(w.shape) + decay * w)
  return w


# Shares of lr at m_N = m_R = 2: AdamW's times the root of the smaller side's growth.
SHARES = {'/u': 2**-0.5, '/v': 2**-0.5, 'phi_in': 0.5, 'phi': 0.5, 'phi_out': 1, 'router': 1, 'kv_up/w': 1}
SHARES |= {'kv_down/w': 0.5, '/w': 2**-0.5, 'expert_gate': 2**-0.5, 'expert_up': 2**-0.5}
SHARES |= {'expert_down': 2**-0.5, 'read_down': 0.5, 'read_up': 1}


@pytest.mark.parametrize('case', CASES)
def test_two_updates_by_hand(case, rng):
  arm, on = CASES[case]['arm'], CASES[case]['on']
  config, c = model(**arm), optimizer(name='muon', muon_connections=on, clip_norm=None)
  shapes = parameters(config)
  rates, weight_decay = (0.5, 0.2), 0.3
  params, *gradients = (
    jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes) for _ in range(3)
  )

  start, moved = by_path(params), set()
  found, adamw = (
    by_path(updated(params, gradients, how, config, rates, weight_decay))
    for how in (c, optimizer(clip_norm=None))
  )
  kind_of = by_path(kinds(shapes))
  for name, leaf in start.items():
    ends = [end for end in SHARES if name.endswith(end)]
    ours = ends and (on or not ('connection/' in name or 'collapse/' in name))
    if not ours:
      # The same operations in another program: a rounding or two of numbers up to 3.
      np.testing.assert_allclose(found[name], adamw[name], rtol=0, atol=6e-7, err_msg=name)
      continue
    moved.add(name)
    share, sizes = SHARES[max(ends, key=len)], inputs_of(name, leaf)
    steps = [by_path(g)[name].astype(np.float64) for g in gradients]
    shares = [lr * share for lr in rates]
    wanted = by_hand(leaf.astype(np.float64), steps, shares, sizes, weight_decay / share)
    # Ten steps of cubes and fifth powers in float32, of numbers of order 1 whose slope is up to 3.4 each.
    np.testing.assert_allclose(found[name], wanted, rtol=0, atol=3e-4, err_msg=name)
  assert len(moved) > 5 and all(kind_of[name] in ('hidden', 'factor', 'plain') for name in moved)


@pytest.mark.parametrize('arm', ARMS, ids=lambda arm: ' '.join(map(str, arm.values())))
def test_every_connection_has_matrices_or_adamw(arm):
  """A step's root mean square is 0.18 lr; biases, gates and norms keep AdamW's step, whose first is lr."""
  config, c = model(**arm), optimizer(name='muon', muon_connections=True, clip_norm=None, muon_beta=0.9)
  shapes = parameters(config)
  paths = by_path(jax.tree_util.tree_map_with_path(lambda path, _: muon.is_matrix(path, True), shapes))
  assert any(paths.values()) and not all(paths.values())
  assert not any(paths[name] for name in paths if '/b_' in name or '/alpha_' in name or name.endswith('norm'))
  both = by_path(jax.tree_util.tree_map_with_path(lambda *leaf: all(muon.dimensions(*leaf)), shapes))
  assert all(both[name] for name, ours in paths.items() if ours)  # an input and an output
  if arm not in (ARMS[0], ARMS[-1]):
    return  # compiling them all takes a minute
  transform = optim.transform(c, config, jnp.float32(1), jnp.float32(0))
  keys = iter(jax.random.split(jax.random.key(0), 100))
  gradients = jax.tree.map(lambda s: jax.random.normal(next(keys), s.shape), shapes)
  zeros = jax.tree.map(jnp.zeros_like, gradients)
  steps = by_path(jax.jit(lambda g: transform.update(g, transform.init(zeros), zeros)[0])(gradients))
  for name, ours in paths.items():
    if ours and 'connection/' not in name and 'collapse/' not in name:
      share = SHARES[max((end for end in SHARES if name.endswith(end)), key=len)]
      size = np.sqrt(np.mean(np.square(steps[name]))) / share
      assert size == pytest.approx(0.18, rel=0.02), name  # the last two steps leave singular values 1 +- 0.02


def test_adamw_by_name_is_the_same_run_and_wrong_names_are_refused():
  c = base_config()
  c.optimizer.warmup_steps, c.duration.steps = 0, 1
  one = resolve(c, 'digest').run_id
  c.optimizer.name = 'adamw'
  assert resolve(c, 'digest').run_id == one
  c.optimizer.name = 'muon'
  assert resolve(c, 'digest').run_id != one
  c.optimizer.muon_beta = 1.0
  with pytest.raises(ConfigError, match='muon_beta must lie in'):
    build_optimizer(c)
  c.optimizer.name = None
  with pytest.raises(ConfigError, match=r'need optimizer\.name=muon'):
    build_optimizer(c)
  c.optimizer.name = 'sgd'
  with pytest.raises(ConfigError, match="adamw or muon, got 'sgd'"):
    build_optimizer(c)
