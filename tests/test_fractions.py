"""Streams in fractions: Frac-Connections, virtual width and constraints on fractions, against plain loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import diagnostics, fractions
from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config
from mhc_jax.errors import ConfigError
from mhc_jax.kernels import boundary as kernels
from mhc_jax.kernels.choice import Chip
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import connection_spec
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import gradients

B, T, D = 2, 3, 12
COMPILER = {'xla_backend_optimization_level': 0}  # compiles in half the time, same arithmetic
SPECS = {
  'frac': connection_spec('frac'),
  'vwn': connection_spec('vwn', streams=2),
  'mhc': connection_spec('mhc', streams=3, fractions=2, constraint='row_stochastic'),
  'one stream, own writes': connection_spec(
    'mhc', streams=1, fractions=3, write_across=False, constraint='birkhoff_permutations'
  ),
  'softmax reads, unmixed': connection_spec(
    'identity', streams=2, fractions=2, read_gate='softmax', write_gate='fixed', write_scale=0.7
  ),
  'fixed reads, static': connection_spec('hc', 'static', streams=2, fractions=2, read_gate='fixed'),
}


def random_params(rng, spec):
  like = jax.eval_shape(lambda key: hc.init_params(key, spec, D, 0), jax.random.key(0))
  return {name: rng.normal(size=leaf.shape) for name, leaf in like.items()}


def norm(x, eps):
  return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


def coordinate_of(spec, p, units):
  """(part, number in the part) -> coordinate (B, T): phi's column for it on the units that make it."""
  parts, n = spec.parts, len(units)
  per_stream = spec.scope == 'per_stream'
  columns = {part: -(-size // n) if per_stream else size for part, size in parts.items()}
  first = dict(zip(columns, np.cumsum([0, *columns.values()]), strict=False))
  together = norm(jnp.concatenate(units, -1), spec.norm_eps) if not per_stream else None

  def coordinate(part, k):
    value = jnp.zeros((B, T)) + p[f'b_{part}'][k]
    if not spec.dynamic:
      return value
    if per_stream:  # unit j makes numbers j, j + n, ...
      made = norm(units[k % n], spec.norm_eps) @ p['phi'][0, :, first[part] + k // n]
    else:
      made = together @ p['phi'].reshape(-1, sum(columns.values()))[:, first[part] + k]
    made = jnp.tanh(made) if spec.activation == 'tanh' else made
    return value + p[f'alpha_{spec.alpha_of(part)}'] * made

  return coordinate


def by_definition(p, x, y_map, spec):
  """One sublayer on streams (n, B, T, C), by loops over fractions (VWN: H' = B^T F(A^T H) + A_r^T H)."""
  n, m, width = spec.streams, spec.fractions, D // spec.fractions
  units = [x[j][..., f * width : (f + 1) * width] for j in range(n) for f in range(m)]
  coordinate, count = coordinate_of(spec, p, units), n * m
  gates = {
    'sigmoid': lambda gate, value: gate.scale / (1 + jnp.exp(-value)),
    'linear': lambda gate, value: gate.scale * value,
  }

  def weights(part, gate, across):
    """weights[f][j] of fraction f of a sublayer's input or output and unit j."""
    if part not in spec.parts:
      return [[gate.scale * (j % m == f) for j in range(count)] for f in range(m)]
    if not across:
      return [
        [gates[gate.kind](gate, coordinate(part, j)) * (j % m == f) for j in range(count)] for f in range(m)
      ]
    values = [[coordinate(part, f * count + j) for j in range(count)] for f in range(m)]
    if gate.kind == 'softmax':
      return [[jnp.exp(v) / sum(jnp.exp(u) for u in row) for v in row] for row in values]
    return [[gates[gate.kind](gate, v) for v in row] for row in values]

  def times(weight, value):
    return jnp.broadcast_to(weight, (B, T))[..., None] * value

  pre = weights('pre', spec.read_gate, True)
  post = weights('post', spec.write_gate, spec.write_across)
  if 'res' in spec.parts:
    res = spec.constraint.matrix(jnp.stack([coordinate('res', k) for k in range(spec.parts['res'])]), count)
  else:
    res = np.eye(count)
  h = jnp.concatenate([sum(times(pre[f][j], units[j]) for j in range(count)) for f in range(m)], -1)
  y = jnp.tanh(h @ y_map)
  outputs = [y[..., f * width : (f + 1) * width] for f in range(m)]
  new = [
    sum(times(res[i][j], units[j]) for j in range(count))
    + sum(times(post[f][i], outputs[f]) for f in range(m))
    for i in range(count)
  ]
  return h, jnp.stack([jnp.concatenate(new[j * m : (j + 1) * m], -1) for j in range(n)])


def by_streams(p, x, y_map, spec):
  m = spec.fractions
  x_NBTD = fractions.split(x, m)
  c = hc.generate(p, x_NBTD, spec)
  h_BTD = hc.read(c.pre_NBT, x_NBTD, m)
  y_BTD = jnp.tanh(h_BTD @ y_map)
  return h_BTD, fractions.merge(hc.write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD, m), m)


@pytest.mark.parametrize('name', SPECS)
def test_values_and_all_gradients(x64, rng, name):
  spec = SPECS[name]
  p, x = random_params(rng, spec), rng.normal(size=(spec.streams, B, T, D))
  arguments, weights = (p, x, rng.normal(size=(D, D))), (rng.normal(size=(B, T, D)), rng.normal(size=x.shape))

  def both(function):
    def run(arguments):
      outputs = function(*arguments, spec)
      return sum((jnp.sin(out) * w).sum() for out, w in zip(outputs, weights, strict=True)), outputs

    return jax.jit(jax.value_and_grad(run, has_aux=True)).lower(arguments).compile(COMPILER)(arguments)

  found, wanted = map(jax.tree.leaves, (both(by_streams), both(by_definition)))
  assert all(np.abs(leaf).max() > 0 for leaf in wanted)
  for one, other in zip(found, wanted, strict=True):  # float64 sums of some hundred terms
    np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)


def test_frac_connections_are_their_papers_pseudocode(x64, rng):
  """Algorithm 2 of 2503.14125: alpha (m, 2 m) for reads and mixing, beta (m,); fractions make their rows."""
  spec = SPECS['frac']
  m, width = 4, D // 4
  p, h = {k: np.asarray(v) for k, v in random_params(rng, spec).items()}, rng.normal(size=(B, T, D))
  parts = h.reshape(B, T, m, width)
  normed = parts / np.sqrt(np.mean(parts**2, -1, keepdims=True) + spec.norm_eps)
  static_alpha = np.concatenate([p['b_pre'].reshape(m, m).T, p['b_res'].reshape(m, m).T], 1)
  # Columns of phi: m for reads, one for beta, m for mixing.
  alpha_fn = np.concatenate([p['phi'][0, :, :m], p['phi'][0, :, m + 1 :]], 1)
  alpha = p['alpha_pre'] * np.tanh(normed @ alpha_fn) + static_alpha
  beta = p['alpha_post'] * np.tanh(normed @ p['phi'][0, :, m]) + p['b_post']
  mixed = alpha.swapaxes(-1, -2) @ parts
  y_map = rng.normal(size=(D, D))
  y = np.tanh(mixed[..., :m, :].reshape(B, T, D) @ y_map)
  wanted = (beta[..., None] * y.reshape(B, T, m, width) + mixed[..., m:, :]).reshape(B, T, D)
  found = jax.jit(lambda p, x: by_streams(p, x, y_map, spec))(p, h[None])[1][0]
  np.testing.assert_allclose(found, wanted, rtol=1e-11, atol=1e-12)
  assert {k: v.shape for k, v in p.items()} == {
    **{'b_pre': (m * m,), 'b_post': (m,), 'b_res': (m * m,), 'alpha_pre': (), 'alpha_post': ()},
    'phi': (1, width, 2 * m + 1),
  }


def test_the_mixing_matrix_carries_unit_j_to_unit_i(rng):
  """A matrix that is not symmetric: fraction 1 of stream 0 goes to fraction 0 of stream 1 alone."""
  x = rng.normal(size=(2, B, T, D)).astype(np.float32)
  res_NM = np.zeros((4, 4), np.float32)
  res_NM[2, 1] = 1
  res_NMBT = jnp.broadcast_to(res_NM[:, :, None, None], (4, 4, B, T))
  new = hc.write(res_NMBT, jnp.zeros((4, B, T)), fractions.split(x, 2), jnp.zeros((B, T, D)), 2)
  wanted = np.zeros_like(x)
  wanted[1, ..., : D // 2] = x[0, ..., D // 2 :]
  np.testing.assert_array_equal(fractions.merge(new, 2), wanted)
  np.testing.assert_array_equal(fractions.merge(fractions.split(x, 3), 3), x)


def test_sums_of_bfloat16_are_rounded_once():
  """256 + 1 + 1 is 258, which bfloat16 holds; rounded in between, it stays at 256. So do gradients."""
  values = np.array([256, 1, 1, 0], np.float32)
  x = jnp.asarray(np.broadcast_to(values[:, None, None, None], (4, 1, 1, 2)), jnp.bfloat16)
  ones = jnp.ones((4, 4, 1, 1))
  y = jnp.zeros((1, 1, 8), jnp.bfloat16)
  pre = ones.reshape(16, 1, 1)
  assert (hc.read(pre, x, 4) == 258).all() and (hc.write(ones, pre, x, y, 4) == 258).all()
  g = jnp.asarray(np.repeat(values, 2).reshape(1, 1, 8), jnp.bfloat16)
  d_pre, d_x = jax.vjp(lambda pre, x: hc.read(pre, x, 4), pre, x)[1](g)
  assert d_x.dtype == jnp.bfloat16 and (d_x == 258).all() and d_pre.dtype == jnp.float32


@pytest.mark.parametrize('name', ('vwn', 'mhc'))
def test_at_the_start_fractions_are_themselves(x64, name):
  """Weights between different fractions are 0, or sigmoid(-4) of the gate; the rest is the streams' start."""
  spec, sublayer = SPECS[name], 4
  n, m = spec.streams, spec.fractions
  plain = connection_spec('mhc' if name == 'mhc' else 'hc', streams=n)

  def at_start(spec):
    x_NBTD = jnp.zeros((spec.units, 1, 1, D // spec.fractions))
    return hc.generate(hc.init_params(jax.random.key(0), spec, D, sublayer), x_NBTD, spec)

  c, wanted = jax.jit(lambda: (at_start(spec), at_start(plain)))()
  pre, post = (np.asarray(value).reshape(m, n, m) for value in (c.pre_NBT, c.post_NBT))
  across = 0.0 if name != 'mhc' else 1 / (1 + np.exp(4))
  for f in range(m):
    np.testing.assert_allclose(pre[f, :, f], np.asarray(wanted.pre_NBT)[:, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(np.delete(pre[f], f, 1), across, rtol=1e-12)
    np.testing.assert_allclose(post[f, :, f], np.asarray(wanted.post_NBT)[:, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(np.delete(post[f], f, 1), 2 * across, rtol=1e-12)


def test_the_depth_matrix_of_fractions(rng):
  s, n, m = 3, 4, 2
  pre, post = rng.normal(size=(2, s, m * n, 1, 1)).astype(np.float32)
  res = rng.normal(size=(s, n, n, 1, 1)).astype(np.float32)
  found = diagnostics.depth_matrix(pre, post, res)[..., 0, 0]
  reads, writes = pre[..., 0, 0].reshape(s, m, n), post[..., 0, 0].reshape(s, m, n)
  for t in range(s):
    for u in range(s):
      between = res[1, :, :, 0, 0] if (t, u) == (2, 0) else np.eye(n)
      wanted = reads[t] @ between @ writes[u].T if u < t else np.zeros((m, m))
      np.testing.assert_allclose(found[t * m : t * m + m, u * m : u * m + m], wanted, rtol=1e-4, atol=1e-5)


def test_what_does_not_go_with_fractions_is_refused():
  def config_of(**fields):
    c = base_config()
    c.model.update({'width': 16, 'depth': 2, 'heads': 2})
    c.model.connection.update(fields)
    return build_model(c)

  assert config_of(fractions=1) == config_of() and config_of(name='frac').connection.units == 4
  for fields, message in (
    ({'fractions': 3}, 'does not divide the width 16'),
    ({'fractions': 0}, 'must be at least 1'),
    ({'write_across': False}, 'needs connection.fractions'),
    ({'fractions': 2, 'write_gate': 'one_hot'}, 'write_gate=one_hot does not go'),
    ({'fractions': 2, 'preset': 'deepseek_v4_1'}, 'single_pass does not go'),
    ({'fractions': 2, 'name': 'gated_residual'}, 'read_gate=elementwise does not go'),
    ({'fractions': 2, 'name': 'attention_residual'}, 'read_gate=sources does not go'),
    ({'fractions': 16, 'streams': 8}, r'streams \* fractions = 128'),
    ({'fractions': 2, 'constraint': 'orthogonal_quaternion'}, 'n = 4 streams only'),
  ):
    with pytest.raises(ConfigError, match=message):
      config_of(**fields)
  spec = config_of(fractions=2).connection
  assert 'fractions' in kernels.why_not(spec, 256, 256, jnp.float32, Chip('tpu'))


TRAINED = {'vwn': {'name': 'vwn', 'streams': 2}, 'mudd': {'name': 'mudd', 'preset': 'normed'}}


@pytest.mark.slow
@pytest.mark.parametrize('name', TRAINED)
def test_loops_recomputation_and_meshes_change_no_gradient(x64, name):
  """Layers written out and as a loop, recomputation, microbatches, devices that split time."""
  tokens = np.random.default_rng(0).integers(0, 11, (4, 8)).astype(np.int32)
  batch = {'inputs': tokens, 'targets': tokens[::-1].copy(), 'segments': np.cumsum(tokens == 0, 1)}
  batch |= {'weights': np.ones((4, 8), np.float32)}

  def outcome(parts=None, shape=None, **fields):
    c = base_config()
    c.model.update({'width': 16, 'depth': 2, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1, **fields})
    c.model.connection.update(TRAINED[name])
    model = dataclasses.replace(build_model(c), vocab_size=11)
    mesh = None if shape is None else make_mesh(shape)
    like = jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens, tokens)['params']
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape) * 0.3, like)
    run = jax.jit(lambda params, batch: gradients(params, batch, model, parts, mesh))
    (loss, *_), grads = run.lower(params, batch).compile(COMPILER)(params, batch)
    return jax.device_get((loss, grads))

  wanted = outcome()
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(wanted))
  mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
  for change in ({'scan_unroll': 2, 'remat': 'layer'}, {'remat': 'block', 'parts': 2, 'shape': mesh}):
    for one, other in zip(*map(jax.tree.leaves, (outcome(**change), wanted)), strict=True):
      np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12 * np.abs(other).max(), err_msg=str(change))
