"""The transformer against a textbook in numpy, and against itself: streams, scan, start values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.config import base_config
from mhc_jax.connection import Gate
from mhc_jax.layers.parts import Linear
from mhc_jax.layers.unembedding import loss_sums
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import PRESETS, connection_spec

VOCAB, B, T = 11, 2, 6
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (B, T)).astype(np.int32)
SEGMENTS = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 2]], np.int32)


def model(connection='residual', weights_rank=None, transfer=None, **fields):
  """A tiny model with grouped queries, in float64 if nothing else is said."""
  c = base_config()
  c.model.update({'width': 16, 'depth': 2, 'heads': 4, 'kv_heads': 2, 'ffn_width': 12, 'dtype': 'float64'})
  c.model.weights.rank = weights_rank
  spec = connection if isinstance(connection, dict) else {'name': connection}
  c.model.connection.update({'name': 'mhc'} | spec)
  c.model.update(fields)
  if transfer:
    c.transfer.base_width, c.transfer.base_depth = transfer
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


@functools.cache
def initial(config):
  init = jax.jit(lambda key: Transformer(config).init(key, TOKENS, SEGMENTS)['params'])
  return init(jax.random.key(0))


@functools.cache
def forward(config):
  return jax.jit(lambda params: Transformer(config).apply({'params': params}, TOKENS, SEGMENTS)[0])


def disturbed(params, rng, names=('norm', 'final_norm')):
  """Parameters with random values where the start is constant, so that a forgotten one shows."""

  def leaf(path, value):
    name = path[-1].key
    return jnp.asarray(rng.normal(1, 0.3, value.shape)) if name in names else value

  return jax.tree_util.tree_map_with_path(leaf, params)


# A pre-norm transformer as in the textbooks: float64 numpy, loops over heads and positions.


def weight(layer, name):
  """A map's matrix (in, out), the product of its factors if it has any."""
  p = layer[name]
  if 'u' in p:
    return p['u'] @ p['v'].reshape(p['u'].shape[1], -1)
  return p['w'].reshape(p['w'].shape[0], -1)


def rms_norm(x, scale):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * scale


def rotate(x_TK):
  """Positions as angles of complex numbers."""
  half = x_TK.shape[1] // 2
  angle = np.arange(len(x_TK))[:, None] * 10000.0 ** (-np.arange(half)[None] / half)
  z = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], 1)


def textbook_attention(layer, x_TD, segment_T, heads, kv_heads, scale):
  x_TD = rms_norm(x_TD, layer['norm'])
  q, k, v = (x_TD @ weight(layer, name) for name in ('query', 'key', 'value'))
  size = q.shape[1] // heads
  out = np.zeros_like(q)
  for head in range(heads):
    group = head // (heads // kv_heads)
    of, of_kv = slice(head * size, (head + 1) * size), slice(group * size, (group + 1) * size)
    scores = rotate(q[:, of]) @ rotate(k[:, of_kv]).T * scale
    for t in range(len(x_TD)):
      seen = [s for s in range(t + 1) if segment_T[s] == segment_T[t]]
      e = np.exp(scores[t, seen])
      out[t, of] = e / e.sum() @ v[seen, of_kv]
  return out @ weight(layer, 'output')


def textbook_feed_forward(layer, x_TD):
  x_TD = rms_norm(x_TD, layer['norm'])
  gate, up = x_TD @ weight(layer, 'gate'), x_TD @ weight(layer, 'up')
  return (gate / (1 + np.exp(-gate)) * up) @ weight(layer, 'down')


def textbook(params, config, scale, branch=1.0, output=1.0):
  params, rows = jax.tree.map(np.asarray, params), []
  for token_T, segment_T in zip(TOKENS, SEGMENTS, strict=True):
    x_TD = params['embedding'][token_T]
    for index in range(config.depth):
      layer = jax.tree.map(lambda leaf, index=index: leaf[index], params['layers'])
      sizes = (config.heads, config.kv_heads, scale)
      x_TD = x_TD + branch * textbook_attention(layer['attention'], x_TD, segment_T, *sizes)
      x_TD = x_TD + branch * textbook_feed_forward(layer['feed_forward'], x_TD)
    rows.append(output * rms_norm(x_TD, params['final_norm']) @ params['unembedding'])
  return np.stack(rows)


TEXTBOOK_CASES = {
  'plain': ({}, {'scale': 4**-0.5}),
  'factored weights': ({'weights_rank': 3}, {'scale': 4**-0.5}),
  # CompleteP at twice the base width and half the base depth.
  'transfer': ({'transfer': (8, 4)}, {'scale': 4**-1.0, 'branch': 2.0, 'output': 0.5}),
}


@pytest.mark.parametrize('case', TEXTBOOK_CASES)
def test_the_residual_arm_is_the_textbook_model(x64, rng, case):
  fields, constants = TEXTBOOK_CASES[case]
  config = model('residual', **fields)
  params = disturbed(initial(config), rng)
  assert set(params['layers']) == {'attention', 'feed_forward'}, 'the residual arm has extra parameters'
  # float64 rounding of some hundred additions of terms of order 1.
  np.testing.assert_allclose(forward(config)(params), textbook(params, config, **constants), rtol=1e-12)


def body(params):
  """Parameters that are no connection's, by path."""
  leaves = jax.tree_util.tree_leaves_with_path(params)
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  return {name: leaf for name, leaf in named.items() if '_connection' not in name}


def test_streams_that_stay_equal_make_the_residual_model(x64, rng):
  """H_res with unit row sums, reads summing to 1, unit writes, mean collapse; nothing else is special."""
  residual = model('residual')
  spec = connection_spec('mhc', dynamic=False)
  spec = dataclasses.replace(spec, read_gate=Gate('linear'), write_gate=Gate('fixed'))
  streams = dataclasses.replace(residual, connection=spec)
  params = initial(streams)
  for name in ('attention_connection', 'feed_forward_connection'):
    reads_LN = rng.normal(size=(2, 4))
    params['layers'][name] = {
      'b_pre': jnp.asarray(reads_LN - reads_LN.mean(1, keepdims=True) + 0.25),
      'b_res': jnp.asarray(rng.normal(size=(2, 16))),
    }
  plain = {**params, 'layers': {k: v for k, v in params['layers'].items() if 'connection' not in k}}
  expected = forward(residual)(plain)
  np.testing.assert_allclose(forward(streams)(params), expected, rtol=1e-12)
  params['layers']['feed_forward_connection']['b_pre'] *= -1  # reads that sum to -1
  assert np.abs(forward(streams)(params) - expected).max() > 1e-2


@pytest.mark.parametrize(
  'name,preset', [(name, preset) for name in ('hc', 'frac', 'vwn') for preset in PRESETS[name]]
)
def test_hc_is_exactly_pre_norm_at_step_0(x64, name, preset):
  # The final norm's eps, set to 0, would tell HC's sum of streams from their mean.
  configs = model('residual'), model({'name': name, 'preset': preset})
  residual, hc = (dataclasses.replace(config, norm_eps=0.0) for config in configs)
  ours, plain = initial(hc), initial(residual)
  for name, leaf in body(plain).items():
    np.testing.assert_array_equal(body(ours)[name], leaf, err_msg=name)
  np.testing.assert_allclose(forward(hc)(ours), forward(residual)(plain), rtol=1e-12)
  assert 'attention_connection' in ours['layers']


def test_gradients_respect_time_and_documents():
  """Tokens are all different, so the gradient of their embedding rows is that of the positions."""
  config = model('mhc', dtype='float32')
  token_1T = np.arange(T, dtype=np.int32)[None]
  weight_V = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)

  @jax.jit
  def influence_on(position, params, segments):
    def output(embedding):
      changed = {**params, 'embedding': embedding}
      logits_BTV = Transformer(config).apply({'params': changed}, token_1T, segments)[0]
      return logits_BTV[0, position] @ weight_V

    return jnp.abs(jax.grad(output)(params['embedding'])).max(-1)[:T]

  params = initial(config)
  for segment_T in ([0] * T, [0, 0, 1, 1, 1, 2]):
    same = np.equal.outer(segment_T, segment_T)
    allowed = np.tril(np.ones((T, T), bool)) & same
    segments_1T = np.array([segment_T], np.int32)
    found = np.stack([influence_on(t, params, segments_1T) for t in range(T)])
    assert (found[allowed] > 0).all() and (found[~allowed] == 0).all(), found


@functools.cache
def gradients(config):
  """parameters -> ((loss, records), gradients)."""

  def loss(params):
    logits_BTV, records = Transformer(config).apply({'params': params}, TOKENS, SEGMENTS, record=len(TOKENS))
    total, count = loss_sums(logits_BTV, np.roll(TOKENS, -1, 1), jnp.ones((B, T)))
    return total / count, records

  return jax.jit(jax.value_and_grad(loss, has_aux=True))


def restacked(params, depth):
  """Parameters of the loop from those of the scan."""
  loop = {name: value for name, value in params.items() if name != 'layers'}
  for layer in range(depth):
    loop[f'layer_{layer}'] = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params['layers'])
  return loop


def close(actual, desired):
  """Equal but for the order of some hundred additions in float64."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), actual, desired)


def test_a_python_loop_and_layers_written_out_are_the_scan(x64, rng):
  unrolled = model('mhc')
  scan, loop = dataclasses.replace(unrolled, scan_unroll=1), dataclasses.replace(unrolled, scan=False)
  params = disturbed(initial(scan), rng)
  expected = forward(scan)(params)
  close(forward(unrolled)(params), expected)
  close(forward(loop)(restacked(params, 2)), expected)
  assert 'length=2' in str(forward(scan).trace(params).jaxpr)
  assert 'length=2' not in str(forward(unrolled).trace(params).jaxpr)
  assert 'length=2' not in str(forward(loop).trace(restacked(params, 2)).jaxpr)


def without_generator(params, **replaced):
  """phi = 0, and the biases named in `replaced` at that constant."""

  def leaf(path, value):
    name = path[-1].key
    return jnp.full_like(value, replaced.get(name, 0.0)) if name in ('phi', *replaced) else value

  return jax.tree_util.tree_map_with_path(leaf, params)


def largest_mixing_gradient(grads):
  names = ('attention_connection', 'feed_forward_connection')
  return max(float(jnp.abs(grads['layers'][name]['b_res']).max()) for name in names)


def spread(records):
  """Largest squared distance between two streams after any sublayer."""
  return max(
    float((gram[:, i, i] + gram[:, j, j] - 2 * gram[:, i, j]).max())
    for gram in (record['gram_NMBT'] for record in records)
    for i in range(4)
    for j in range(i)
  )


def test_the_mixing_matrix_of_mhc_learns_from_step_0(x64):
  """Without phi's help; and not with unit writes or uniform reads (facts 1.9), so the test can fail."""
  params, program = initial(model('mhc')), gradients(model('mhc'))
  (_, records), grads = program(without_generator(params))
  assert largest_mixing_gradient(grads) >= 1e-5 and spread(records) > 1e-3
  # Near the identity 20 iterations leave columns that do not sum to 1; at b_res = 0 they do.
  for replaced in ({'b_post': 0.0}, {'b_pre': -np.log(3), 'b_res': 0.0}):
    _, grads = program(without_generator(params, **replaced))
    assert largest_mixing_gradient(grads) < 1e-10, replaced
  (_, records), _ = program(without_generator(params, b_post=0.0))
  assert spread(records) < 1e-12
  # And with everything at its start: every parameter has a gradient, a finite one.
  _, grads = program(params)
  for path, grad in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0, jax.tree_util.keystr(path)


def test_factored_weights_start_with_the_variance_of_full_ones():
  inputs, rank, outputs = 256, 64, (4, 64)
  x = jnp.zeros((1, inputs))

  def start(rank):
    linear = Linear((inputs, *outputs), rank, jnp.float32)
    return jax.jit(lambda key: linear.init(key, x)['params'])(jax.random.key(0))

  full, low = start(None)['w'], start(rank)
  product = np.einsum('ir,rhk->ihk', low['u'], low['v'])
  assert low['u'].shape == (inputs, rank) and low['v'].shape == (rank, *outputs)
  # Relative variance of the mean square: 2 / 65536 for full rank, (2 / 256 + 2 / 256) / 64 for the product
  # (its r singular directions scatter); bounds are 4 standard errors.
  assert np.mean(np.square(full)) * inputs == pytest.approx(1, rel=4 * (2 / 65536) ** 0.5)
  assert np.mean(np.square(product)) * inputs == pytest.approx(1, rel=4 * (4 / 256 / 64) ** 0.5)


def test_output_init_scaling_enlarges_the_maps_that_write_to_the_streams(x64):
  plain, scaled = (
    initial(model({'name': 'hc', 'preset': 'static', 'output_init_scaling': s})) for s in (False, True)
  )
  for name, leaf in body(plain).items():
    gain = 2.0 if name.endswith(('output/w', 'down/w')) else 1.0  # sqrt(4 streams)
    np.testing.assert_allclose(body(scaled)[name], gain * leaf, rtol=1e-14, err_msg=name)


def equations(jaxpr):
  """All equations of a jaxpr, those of inner ones included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, 'eqns') or hasattr(value, 'jaxpr'):
        yield from equations(getattr(value, 'jaxpr', value))


def test_bfloat16_models_keep_parameters_coefficients_and_logits_in_float32():
  config = model('mhc', dtype='bfloat16')
  variables = jax.eval_shape(Transformer(config).init, jax.random.key(0), TOKENS, SEGMENTS)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  apply = functools.partial(Transformer(config).apply, record=len(TOKENS))
  found, records = jax.eval_shape(apply, variables, TOKENS, SEGMENTS)
  assert found.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(records)} == {jnp.dtype('float32')}
  plain = model('residual', dtype='bfloat16')
  variables = jax.eval_shape(Transformer(plain).init, jax.random.key(0), TOKENS, SEGMENTS)
  jaxpr = jax.make_jaxpr(Transformer(plain).apply)(variables, TOKENS, SEGMENTS)
  products = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == 'dot_general']
  assert len(products) == 2 * 9 + 1  # of two blocks, and the unembedding
  assert {v.aval.dtype for e in products for v in e.invars} == {jnp.dtype('bfloat16')}
