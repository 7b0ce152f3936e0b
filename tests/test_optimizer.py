"""optimizer.py: parameter groups, AdamW by hand, schedules at their corners."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import optimizer as optim
from mhc_jax.config import OptimizerConfig, base_config
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.parameters import kinds
from mhc_jax.plan import resolve
from mhc_jax.presets import PRESETS

ARMS = [
  *({'name': name, 'preset': preset} for name in PRESETS for preset in PRESETS[name]),
  {'name': 'hc', 'rank': 2},
  {'name': 'mhc', 'preset': 'deepseek_v4', 'rank': 2, 'weights_rank': 3},
]


def model(weights_rank=None, scan=True, experts=None, **connection):
  c = base_config()
  c.model.moe.experts = experts
  c.model.mla.kv_rank = experts and 6
  c.model.update({'width': 16, 'depth': 4, 'heads': 2, 'scan': scan})
  c.model.weights.rank = weights_rank
  c.model.connection.update(connection)
  c.transfer.base_width, c.transfer.base_depth = 8, 1  # m_N = 2, m_L = 4
  return dataclasses.replace(build_model(c), vocab_size=11)


def optimizer(**fields):
  c = base_config().optimizer
  c.warmup_steps = 0
  c.update(fields)
  return OptimizerConfig(**c.to_dict())


def parameters(config):
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens, tokens)['params']


def by_path(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}


@pytest.mark.parametrize('arm', ARMS, ids=lambda arm: ' '.join(map(str, arm.values())))
def test_every_parameter_has_a_group(arm):
  kind_of = by_path(kinds(parameters(model(**arm))))
  assert set(kind_of.values()) <= {'hidden', 'factor', 'plain', 'scalar', 'mixing'}
  assert kind_of.keys() >= {'embedding', 'unembedding', 'final_norm'}


def test_a_parameter_without_a_group_is_refused():
  with pytest.raises(ValueError, match="no line for parameter 'layers/attention/sink'"):
    kinds({'layers': {'attention': {'sink': np.zeros(2)}}})


# Written out by hand; a block's name stands for both sublayers.
KINDS = {
  'embedding': 'plain',
  'unembedding': 'plain',
  'final_norm': 'scalar',
  'collapse/phi': 'hidden',
  'collapse/alpha': 'scalar',
  'collapse/b': 'scalar',
  **{f'layers/{name}/norm': 'scalar' for name in ('attention', 'feed_forward')},
  **{f'layers/attention/{m}/u': 'hidden' for m in ('query', 'key', 'value', 'output')},
  **{f'layers/attention/{m}/v': 'factor' for m in ('query', 'key', 'value', 'output')},
  **{f'layers/feed_forward/{m}/u': 'hidden' for m in ('gate', 'up', 'down')},
  **{f'layers/feed_forward/{m}/v': 'factor' for m in ('gate', 'up', 'down')},
  **{
    f'layers/{name}_connection/{leaf}': kind
    for name in ('attention', 'feed_forward')
    for leaf, kind in {
      'phi_in': 'hidden',
      'phi_out': 'plain',
      **{f'{letter}_{part}': 'scalar' for letter in ('b', 'alpha') for part in ('pre', 'post')},
      'b_res': 'mixing',
      'alpha_res': 'mixing',
    }.items()
  },
}


def test_the_groups_are_these():
  assert by_path(kinds(parameters(model(**ARMS[-1])))) == KINDS
  full = by_path(kinds(parameters(model(name='mhc'))))
  assert full['layers/attention_connection/phi'] == full['layers/attention/query/w'] == 'hidden'
  loop = by_path(kinds(parameters(model(name='residual', scan=False))))
  assert loop['layer_3/feed_forward/down/w'] == 'hidden'


def test_the_groups_of_experts_and_latent_attention_are_these():
  kind_of = by_path(kinds(parameters(model(name='residual', experts=3))))
  ffn = {
    'norm': 'scalar',
    'router': 'plain',
    'router_bias': 'frozen',
    **{f'expert_{name}': 'hidden' for name in ('gate', 'up', 'down')},
    **{f'shared_{name}/w': 'hidden' for name in ('gate', 'up', 'down')},
  }
  attention = {'norm': 'scalar', 'latent_norm': 'scalar', 'kv_up/w': 'plain'}
  attention |= {f'{name}/w': 'hidden' for name in ('query', 'kv_down', 'output')}
  dense = {'norm': 'scalar', **{f'{name}/w': 'hidden' for name in ('gate', 'up', 'down')}}
  layers = {('layers', 'feed_forward'): ffn, ('layer_0', 'feed_forward'): dense}
  layers |= {(name, 'attention'): attention for name in ('layers', 'layer_0')}
  wanted = {f'{a}/{b}/{name}': kind for (a, b), own in layers.items() for name, kind in own.items()}
  assert kind_of == wanted | {'embedding': 'plain', 'unembedding': 'plain', 'final_norm': 'scalar'}


def adamw_by_hand(params, gradients, rates, c, weight_decay):
  """Three updates of every leaf in float64; m_N = m_R = 2, m_L = 4."""
  params = {name: p.astype(np.float64) for name, p in params.items()}
  m = {name: np.zeros_like(p) for name, p in params.items()}
  v = {name: np.zeros_like(p) for name, p in params.items()}
  for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True), 1):
    norm = np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in gradient.values()))
    for name, g in gradient.items():
      g = g.astype(np.float64) * min(1, c.clip_norm / norm)
      m[name] = c.beta1 * m[name] + (1 - c.beta1) * g
      v[name] = c.beta2 * v[name] + (1 - c.beta2) * g**2
      direction = m[name] / (1 - c.beta1**t) / (np.sqrt(v[name] / (1 - c.beta2**t)) + c.eps / 8)
      rate = lr / {'hidden': 2, 'factor': 2, 'plain': 1, 'scalar': 1, 'mixing': 4}[KINDS[name]]
      decay = {'hidden': 2, 'factor': 2, 'plain': 1, 'scalar': 0, 'mixing': 0}[KINDS[name]] * weight_decay
      params[name] = params[name] - rate * (direction + decay * params[name])
  return params


@pytest.mark.parametrize(
  'transfer,ratio,gain',
  (
    ({}, 1, 1),  # of a rank of 4 at width 16
    ({'base_width': 16}, 1, 1),
    ({'base_width': 8}, 2, 1),  # the rank grows as the width
    ({'base_width': 8, 'base_rank': 4}, 1, 0.5**0.5),  # it stays
    ({'base_width': 4, 'base_rank': 2}, 2, 0.5**0.5),
    ({'base_rank': 1}, 4, 2),  # it grows alone
  ),
)
def test_factors_follow_width_and_rank(transfer, ratio, gain):
  """The rank at the base width is written out where width and rank differ from it: it decides the numbers."""
  c = base_config()
  c.model.update({'width': 16, 'depth': 1, 'heads': 2})
  c.model.weights.rank, c.optimizer.warmup_steps, c.duration.steps = 4, 0, 1
  c.transfer.update(transfer)
  run = resolve(c, 'digest')
  assert (run.model.rank_ratio, run.model.factor_gain) == pytest.approx((ratio, gain), rel=1e-12)
  grown = transfer.get('base_width') == 8 and 2
  assert run.resolved['transfer']['base_rank'] == (transfer.get('base_rank') or grown or None)
  tokens = np.zeros((1, 2), np.int32)
  params = jax.jit(Transformer(run.model).init)(jax.random.key(0), tokens, tokens)['params']
  factors = params['layers']['attention']['query']
  assert np.std(factors['u']) == pytest.approx(gain * 16**-0.5, rel=0.2)  # of 64 numbers
  assert np.std(factors['v']) == pytest.approx(4**-0.5, rel=0.2)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def updated(params, gradients, c, config, rates, weight_decay):
  """The parameters after an update by each gradient, at its rate."""
  state = optim.transform(c, config, jnp.zeros(()), jnp.zeros(())).init(params)
  for gradient, lr in zip(gradients, rates, strict=True):
    transform = optim.transform(c, config, jnp.float32(lr), jnp.float32(weight_decay))
    updates, state = transform.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  return params


def test_three_updates_are_adamw_by_hand(rng):
  """With transfer, decay groups, an eps that matters, and clipping in the second update only."""
  config, c = model(**ARMS[-1]), optimizer(clip_norm=100.0, eps=0.1, beta2=0.9)
  assert (config.width_ratio, config.depth_ratio) == (2, 4)
  shapes = parameters(config)
  scales, rates, weight_decay = (0.1, 10.0, 1.0), (0.5, 0.2, 0.1), 0.3

  def random(scale):
    return jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape).astype(np.float32), shapes)

  params, gradients = random(1.0), [random(scale) for scale in scales]
  norms = [np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(tree))) for tree in gradients]
  assert norms[0] < c.clip_norm < norms[1] and norms[2] < c.clip_norm

  wanted = adamw_by_hand(by_path(params), [by_path(g) for g in gradients], rates, c, weight_decay)
  for name, leaf in by_path(updated(params, gradients, c, config, rates, weight_decay)).items():
    # Some ten float32 operations on numbers of order 1.
    np.testing.assert_allclose(leaf, wanted[name], rtol=2e-6, atol=2e-6, err_msg=name)


def at(steps, num_steps=100, warmup=10, **fields):
  return np.asarray(optim.schedule(jnp.asarray(steps), num_steps, warmup, optimizer(**fields)), np.float64)


CORNERS = {
  'wsd': ((0, 0.1), (4, 0.5), (9, 1), (10, 1), (79, 1), (80, 1), (81, 0.95), (90, 0.5), (99, 0.05)),
  'cosine': ((0, 0.1), (9, 1), (10, 1), (55, 0.5), (99, 0.5 + 0.5 * np.cos(np.pi * 89 / 90))),
  'step': ((0, 0.1), (10, 1), (79, 1), (80, 0.316), (89, 0.316), (90, 0.1), (99, 0.1)),
  'constant': ((0, 0.1), (9, 1), (10, 1), (99, 1)),
}


@pytest.mark.parametrize('schedule', CORNERS)
def test_schedules_at_their_corners(schedule):
  steps, values = zip(*CORNERS[schedule], strict=True)
  np.testing.assert_allclose(at(steps, schedule=schedule), values, rtol=1e-6, atol=1e-7)  # float32


def test_schedules_end_at_the_final_fraction_and_never_at_0():
  """The step after the last would have final_fraction; the last update itself still learns."""
  for schedule in ('wsd', 'cosine'):
    ends = at([99, 100], schedule=schedule, final_fraction=0.1)
    assert ends[0] > ends[1] == pytest.approx(0.1, rel=1e-6)
    for num_steps in (1, 2, 7, 1000):
      assert at(num_steps - 1, num_steps=num_steps, warmup=0, schedule=schedule) > 0
  assert at(99, schedule='wsd', decay_fraction=0.0) == 1


def test_the_step_schedule_changes_at_80_and_90_percent_of_any_length():
  for num_steps in (10, 1000, 123_450, 10_000_000):
    edges = np.array([0.8, 0.9]) * num_steps
    before = at(edges - 1, num_steps, warmup=0, schedule='step')
    after = at(edges, num_steps, warmup=0, schedule='step')
    np.testing.assert_allclose(before, [1, 0.316], rtol=1e-6)
    np.testing.assert_allclose(after, [0.316, 0.1], rtol=1e-6)


def test_warmup_by_steps_and_by_fraction():
  assert optim.warmup_steps(optimizer(warmup_steps=7), 1000) == 7
  assert optim.warmup_steps(optimizer(warmup_steps=None, warmup_fraction=0.05), 1000) == 50
  assert optim.warmup_steps(optimizer(warmup_steps=0), 1000) == 0
  assert at([0, 1], warmup=0).tolist() == [1, 1]
