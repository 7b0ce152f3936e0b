"""What connections may vary: gates, expansions, norm scopes, CP generators, single pass, depth matrices.

Each against a plain loop or formula; Qwen4-Exp's elementwise read against its authors' code.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_model import SEGMENTS, TOKENS, initial, model
from test_oracles import SEEDS, close, load, stream_major

from mhc_jax import hyper_connection as hc
from mhc_jax.connection import Gate
from mhc_jax.layers.attention import Attention, visible
from mhc_jax.layers.feed_forward import FeedForward
from mhc_jax.layers.parts import rms_norm
from mhc_jax.model import Transformer
from mhc_jax.presets import connection_spec

N, B, T, D = 4, 2, 3, 8


def random_params(rng, spec):
  shapes = jax.eval_shape(lambda key: hc.init_params(key, spec, D, 0), jax.random.key(0))
  return {name: rng.normal(size=leaf.shape) for name, leaf in shapes.items()}


def test_gates_are_their_formulas(x64, rng):
  x = rng.normal(size=(N, B, T))
  sigmoid = 1 / (1 + np.exp(-x))
  exp = np.exp(x)
  expected = {
    Gate('sigmoid'): sigmoid,
    Gate('sigmoid', 2.0, 1e-6): 2 * sigmoid + 1e-6,
    Gate('sigmoid', 3.5): 3.5 * sigmoid,
    Gate('softmax'): exp / exp.sum(0),
    Gate('tanh', 0.5): 0.5 * np.tanh(x),
    Gate('linear'): x,
  }
  for gate, value in expected.items():
    np.testing.assert_allclose(gate(jnp.asarray(x)), value, rtol=1e-13)


def test_gates_by_name():
  spec = connection_spec('mhc', read_gate='softmax', write_scale=1.5, write_eps=1e-4)
  assert spec.read_gate == Gate('softmax') and spec.write_gate == Gate('sigmoid', 1.5, 1e-4)
  v4 = connection_spec('mhc', read_eps=1e-6)  # DeepSeek-V4: of the reads alone
  assert v4.read_gate == Gate('sigmoid', eps=1e-6) and v4.write_gate == Gate('sigmoid', 2.0)
  fixed = connection_spec('hc', read_gate='fixed', write_gate='fixed')
  assert fixed.read_gate == Gate('fixed', 1 / 4) and fixed.write_gate == Gate('fixed', 1.0)
  assert list(fixed.parts) == ['res']
  unit = dataclasses.replace(connection_spec('identity', streams=4), read_gate=Gate('fixed'), dynamic=False)
  x_NBTD = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1)
  c = hc.generate({'b_post': jnp.zeros(4)}, x_NBTD, unit)
  assert float(hc.read(c.pre_NBT, x_NBTD).item()) == 10, 'fixed reads of 1 are the sum of all streams'
  c = hc.generate({'b_res': jnp.zeros(16)}, jnp.ones((4, 1, 1, 2)), dataclasses.replace(fixed, dynamic=False))
  np.testing.assert_array_equal(c.pre_NBT[:, 0, 0], np.full(4, 0.25))
  assert c.post_NBT is None


@pytest.mark.parametrize(
  'fields,message',
  (
    ({'read_gate': 'relu'}, 'read_gate must be one of'),
    ({'write_gate': 'elementwise'}, 'write_gate must be one of'),
    ({'single_pass': True}, 'need each other'),
    ({'collapse': 'read'}, 'need each other'),
    ({'read_gate': 'fixed', 'single_pass': True, 'collapse': 'read'}, 'needs generated reads'),
    ({'generator': 'cp'}, 'needs a connection.rank'),
    ({'generator': 'cp', 'rank': 2, 'constraint': 'identity'}, 'an H_res to generate'),
    ({'read_rank': 2}, 'need each other'),
    ({'expansion': 'zeros'}, 'expansion must be one of'),
    ({'phi_only': True}, 'needs constraint=identity'),
    ({'phi_only': True, 'constraint': 'identity', 'dynamic': False}, 'needs constraint=identity'),
  ),
)
def test_combinations_that_make_no_sense_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    connection_spec('mhc', **fields)


@pytest.mark.parametrize('weight', (False, True))
@pytest.mark.parametrize('norm_scope', ('joint', 'per_stream'))
def test_norm_scopes_are_their_formulas(x64, rng, norm_scope, weight):
  spec = connection_spec('mhc', norm_scope=norm_scope, norm_weight=weight, norm_eps=1e-6)
  p, x = random_params(rng, spec), rng.normal(size=(N, B, T, D))
  axes = (0, 3) if norm_scope == 'joint' else (3,)
  normed = x / np.sqrt(np.mean(x**2, axes, keepdims=True) + 1e-6)
  if weight:
    normed = normed * p['norm_weight'][:, None, None]
  raw = np.einsum('nbtd,ndk->kbt', normed, p['phi'])
  wanted = p['alpha_post'] * raw[N : 2 * N] + p['b_post'][:, None, None]
  found = jax.jit(lambda p, x: hc.coordinates(p, x, spec))(p, x)['post']
  np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize('constraint', ('birkhoff_sinkhorn', 'birkhoff_permutations'))
def test_a_cp_generator_is_the_full_one_of_its_factors(x64, rng, constraint):
  """TEMPER factors W_res alone: (n, C, n, n), or (n, C, K) for other coordinates; gates keep a full phi."""
  spec = connection_spec('mhc', constraint=constraint, generator='cp', rank=3)
  p, x = random_params(rng, spec), rng.normal(size=(N, B, T, D))
  assert p['phi'].shape == (N, D, 2 * N)
  if constraint == 'birkhoff_sinkhorn':
    res = np.einsum('nr,dr,ir,jr->ndij', *(p[f'phi_res_{f}'] for f in ('stream', 'width', 'row', 'column')))
  else:
    res = np.einsum('nr,dr,kr->ndk', *(p[f'phi_res_{f}'] for f in ('stream', 'width', 'out')))
  full = {k: v for k, v in p.items() if not k.startswith('phi')}
  full['phi'] = np.concatenate([p['phi'], res.reshape(N, D, -1)], -1)
  plain = connection_spec('mhc', constraint=constraint)
  found = jax.jit(lambda p, x: hc.generate(p, x, spec))(p, x)
  wanted = jax.jit(lambda p, x: hc.generate(p, x, plain))(full, x)
  for actual, desired in zip(found, wanted, strict=True):
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-12)


def test_a_cp_generator_starts_with_the_variance_of_the_full_one():
  width = 4096

  def deviation(**fields):
    spec = connection_spec('mhc', alpha=1.0, **fields)

    @jax.jit
    def start(key):
      x_NBTD = jax.random.normal(key, (4, 1, 64, width))
      return hc.coordinates(hc.init_params(key, spec, width, 0), x_NBTD, spec)['res']

    return np.std([start(jax.random.key(seed)) for seed in range(6)], 0).mean()

  # Products of normals have heavy tails: six seeds give the deviation to some 20 %.
  assert deviation(generator='cp', rank=16) == pytest.approx(deviation(), rel=0.4)


def test_expansions(rng):
  x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
  one_hot = hc.expand(x_BTD, N, 'one_hot')
  np.testing.assert_array_equal(one_hot[0], x_BTD)
  assert not np.asarray(one_hot[1:]).any()
  spec = connection_spec('mhc', expansion='learned')
  params = hc.init_expand(spec, D)
  learned = hc.expand(x_BTD, N, 'learned', params)
  np.testing.assert_allclose(learned, np.array([1, 0.6, 0.6, 0.6])[:, None, None, None] * x_BTD, rtol=1e-6)
  assert hc.init_expand(connection_spec('mhc'), D) == {}
  with pytest.raises(ValueError, match='expansion must be'):
    hc.expand(x_BTD, N, 'zeros')


def sublayers(config, params):
  """(connection parameters, function) of every sublayer in order, from the scanned tree."""
  seen = visible(SEGMENTS, config, None)
  for layer in range(config.depth):
    tree = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['layers'])
    for name, module in (('attention', Attention(config)), ('feed_forward', FeedForward(config))):
      apply = jax.jit(lambda h, module=module, p=tree[name]: module.apply({'params': p}, h, seen)[0])
      yield tree[f'{name}_connection'], apply


def logits(config, params, x_BTD):
  return rms_norm(x_BTD, params['final_norm'], config.norm_eps) @ params['unembedding']


def disturbed(params, rng):
  def leaf(path, value):
    ours = 'connection' in jax.tree_util.keystr(path) or path[0].key in ('collapse', 'expansion')
    return value + 0.3 * rng.normal(size=value.shape) if ours else value

  return jax.tree_util.tree_map_with_path(leaf, params)


@pytest.mark.slow
def test_single_pass_reads_by_the_map_of_the_sublayer_before(x64, rng):
  config = model({'name': 'mhc', 'preset': 'deepseek_v4_1'})
  params = disturbed(initial(config), rng)
  x = hc.expand(params['embedding'][TOKENS], N, 'one_hot')
  read_map = np.zeros((N, *TOKENS.shape))
  read_map[0] = 1
  for p, function in sublayers(config, params):
    own = hc.generate(p, x, config.connection)
    h = jnp.einsum('nbt,nbtd->btd', read_map, x)
    x = jnp.einsum('nmbt,mbtd->nbtd', own.res_NMBT, x) + own.post_NBT[..., None] * function(h)[None]
    read_map = own.pre_NBT
  wanted = logits(config, params, jnp.einsum('nbt,nbtd->btd', read_map, x))
  found = Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0]
  np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12)


def test_the_depth_matrix_weighs_every_earlier_output(x64, rng):
  config = model('depth_matrix')
  params = disturbed(initial(config), rng)
  outputs = [params['embedding'][TOKENS]]
  for p, function in sublayers(config, params):
    outputs.append(function(sum(a * out for a, out in zip(p['b_pre'], outputs, strict=False))))
  assert len(outputs) == config.connection.streams == 2 * config.depth + 1
  total = sum(a * out for a, out in zip(params['collapse']['b'], outputs, strict=True))
  found = Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0]
  np.testing.assert_allclose(found, logits(config, params, total), rtol=1e-10, atol=1e-12)


def test_the_depth_matrix_starts_as_the_residual_model(x64):
  ours, residual = model('depth_matrix'), model('residual')
  found, wanted = (
    Transformer(c).apply({'params': initial(c)}, TOKENS, SEGMENTS)[0] for c in (ours, residual)
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-13)


def test_learned_expansion_scales_the_embedding_of_each_stream(x64, rng):
  config = model({'name': 'mhc', 'expansion': 'learned'})
  params = disturbed(initial(config), rng)
  x = params['expansion']['scale'][:, None, None] * params['embedding'][TOKENS][None]
  for p, function in sublayers(config, params):
    c = hc.generate(p, x, config.connection)
    x = hc.write(c.res_NMBT, c.post_NBT, x, function(hc.read(c.pre_NBT, x)))
  found = Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0]
  np.testing.assert_allclose(found, logits(config, params, x.mean(0)), rtol=1e-10, atol=1e-12)


QWEN = {
  'read_down': 'p_input_mix_weight_down.weight',
  'read_up': 'p_input_mix_weight_up.weight',
  'phi': 'p_block_inject_weight.weight',
  'norm_weight': 'p_hc_norm.weight',
}


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('rank', (1, 4))
def test_elementwise_read_equals_source(x64, rank, seed):
  """Qwen4-Exp's norm weight is 1 + w; its inject map, without bias, sees the normed streams over n."""
  oracle = load(f'hf_qwen4exp_rank{rank}', seed)
  spec = connection_spec('gated_residual', read_rank=rank)
  inputs = {name: oracle[name] for name in ('x', 'Wf', *QWEN.values())}
  cot = stream_major(oracle['cot'])
  start = functools.partial(hc.init_params, spec=spec, width=8, sublayer=0)

  @jax.jit
  def run(inputs):
    down, up, inject, w = (inputs[name] for name in QWEN.values())
    params = {
      'read_down': jnp.moveaxis(down.reshape(rank, N, -1), 0, -1),
      'read_up': jnp.moveaxis(up.reshape(N, -1, rank), -1, 0),
      'phi': jnp.moveaxis(inject.reshape(N, N, -1), 0, -1),
      'norm_weight': 1 + w.reshape(N, -1),
    }
    assert params.keys() == jax.eval_shape(start, jax.random.key(0)).keys()
    x = stream_major(inputs['x'])
    c = hc.generate(params, x, spec)
    h = hc.read(c.pre_NBT, x)
    out = hc.write(c.res_NMBT, c.post_NBT, x, jnp.tanh(h @ inputs['Wf']))
    return jnp.sum(out * cot), (out, h, c.post_NBT)

  grads, (out, h, post) = jax.grad(run, has_aux=True)(inputs)
  close(jnp.moveaxis(out, 0, 2).reshape(oracle['out'].shape), oracle['out'])
  close(h, oracle['branch_in'])
  close(jnp.moveaxis(post, 0, -1), oracle['inject'])
  for name, grad in grads.items():
    close(grad.reshape(oracle['d_' + name.removeprefix('p_')].shape), oracle['d_' + name.removeprefix('p_')])
