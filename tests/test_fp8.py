"""FP8 products: rounding bit for bit, three products against NumPy, and what the model does with them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax.config import base_config
from mhc_jax.diagnostics import diagnose
from mhc_jax.errors import ConfigError
from mhc_jax.layers import fp8
from mhc_jax.layers.grouped_experts import Routing, experts
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.sharding import AXES, BATCH, check_mesh, make_mesh
from mhc_jax.train_step import gradients

E4M3 = ml_dtypes.float8_e4m3fn


def by_numpy(x, tile):
  """x in E4M3 by one scale for each tile, in float64 from float32 arithmetic of ml_dtypes."""
  x, out = np.asarray(x, np.float32), np.zeros(np.shape(x), np.float64)
  t, u = tile or x.shape[-2:]
  for i in np.ndindex(*x.shape[:-2]) if tile else [slice(None)]:
    for j in range(0, x.shape[-2], t):
      for k in range(0, x.shape[-1], u):
        part = x[i][..., j : j + t, k : k + u]
        amax = np.abs(part).max()
        scale = np.float32(448) / amax if amax else np.float32(1)
        out[i][..., j : j + t, k : k + u] = (part * scale).astype(E4M3).astype(np.float32) * (1 / scale)
  return out


def test_rounding_is_that_of_ml_dtypes_bit_for_bit(rng):
  """Every number, the middles between two, their neighbours in float32, and what no float16 tells apart."""
  numbers = np.arange(128, dtype=np.uint8).view(E4M3).astype(np.float32)
  numbers = np.sort(numbers[np.isfinite(numbers)])
  middles = (numbers[1:] + numbers[:-1]) / 2
  near = [np.nextafter(middles, np.float32(away)) for away in (0, 1e9)]
  near += [middles * np.float32(1 + relative) for relative in (-2e-5, 2e-5)]
  drawn = rng.uniform(-448, 448, 10**5) * np.exp(rng.uniform(-9, 0, 10**5))
  x = np.concatenate([numbers, middles, *near, [np.nan, np.inf, 465, 1e-42], drawn]).astype(np.float32)
  x = np.concatenate([x, -x])
  found = np.asarray(jax.jit(fp8.rounded)(x))
  np.testing.assert_array_equal(found.view(np.uint8), x.astype(E4M3).view(np.uint8))


@pytest.mark.parametrize('platform', ('tpu', 'cuda'))
def test_other_platforms_get_the_same_conversions(platform):
  """Of a number that is one of E4M3 already, behind a barrier: nothing there is left to round or to drop."""
  x = jnp.ones((3, 130))
  text = (
    jax.jit(fp8.fake, static_argnums=1).trace(x, (1, 128)).lower(lowering_platforms=(platform,)).as_text()
  )
  steps = (
    'reduce_precision',
    '-> tensor<3x130xf8E4M3FN>',
    'barrier .*f8E4M3FN',
    r'f8E4M3FN>\) -> tensor<3x130xf32>',
  )
  assert re.search(r'(.|\n)*?'.join(steps), text)


EDGES = {
  'zeros': (np.zeros((2, 200)), 0.0),
  'denormal': (np.full((1, 3), 1e-42), 1e-42),
  'tiny': (np.full((1, 3), 1e-37), 1e-37 / 16),  # 448 / amax overflows
  'huge': (np.full((1, 3), 3.4e38), 3.4e38 / 16),
}


@pytest.mark.parametrize('name', EDGES)
def test_no_tile_divides_by_zero_or_overflows(name):
  x, error = EDGES[name]
  found = np.asarray(jax.jit(fp8.fake, static_argnums=1)(jnp.asarray(x, jnp.float32), (1, 128)))
  np.testing.assert_allclose(found, x, rtol=0, atol=error)


def test_what_is_not_finite_stays_in_its_tile(rng):
  x = rng.normal(size=(3, 300)).astype(np.float32)
  x[1, 140], x[2, 10] = np.inf, np.nan
  found = np.asarray(jax.jit(fp8.fake, static_argnums=1)(jnp.asarray(x), (1, 128)))
  wanted = np.zeros(x.shape, bool)
  wanted[1, 128:256] = wanted[2, :128] = True
  np.testing.assert_array_equal(np.isnan(found), wanted)


def inputs(rng, batch=2, time=150, width=200, out=130):
  """Numbers over many orders of magnitude by channel, as activations are; no size is one of tiles."""
  x = rng.normal(size=(batch, time, width)) * np.exp(2 * rng.normal(size=width))
  g = rng.normal(size=(batch, time, out)) * np.exp(3 * rng.normal(size=(batch, time, 1)))
  return x, rng.normal(size=(width, out)), g


@pytest.mark.parametrize('precision', fp8.TILES)
def test_three_products_are_those_of_numpy(x64, rng, precision):
  """Float64 sums of up to 300 terms; tiles of tokens end with the sequence."""
  x, w, g = inputs(rng)
  row, block, column = fp8.TILES[precision]

  @functools.partial(jax.jit, static_argnums=3)
  def both(x, w, g, flat):
    y, pull = jax.vjp(lambda *xw: fp8.product(*xw, precision, flat), x, w)
    return y, *pull(g)

  x_rows, w_blocks = by_numpy(x, row), by_numpy(w, block)
  x_columns = by_numpy(x_rows, column) if column else x_rows
  wanted = (
    x_rows @ w_blocks,
    by_numpy(g, row) @ w_blocks.T,
    np.einsum('btk,btn->kn', x_columns, by_numpy(g, column)),
  )
  for flat in (True, False):
    for found, expected in zip(both(x, w, g, flat), wanted, strict=True):
      np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
  exact = x @ w
  assert 0.01 < np.abs(wanted[0] - exact).max() / np.abs(exact).max() < 0.1
  many = jax.vmap(both, (0, 0, 0, None))(*(np.stack([a, 3 * a[::-1]]) for a in (x, w, g)), True)
  for found, expected in zip(many, wanted, strict=True):
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_backward_pass_keeps_bytes(rng):
  x, w, _ = (jnp.asarray(a, jnp.float32) for a in inputs(rng))
  kept = jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(lambda x: fp8.product(x, w, 'fp8_v3'), x)[1], x))
  types = {str(leaf.dtype): leaf.shape for leaf in kept if leaf.shape[:2] == x.shape[:2]}
  assert types == {'float8_e4m3fn': x.shape, 'float32': (2, 150, 2)}


def test_every_row_keeps_its_precision(x64, rng):
  """2^-4 of a number, or half a step of the tile's: per row, also of one a million times smaller."""
  x, w, _ = inputs(rng)
  x[:, 7] *= 1e-6
  ex, ew = (
    np.maximum(np.abs(a) / 16, amax / 448 / 2**10)
    for a, amax in ((x, np.abs(x).max(-1, keepdims=True)), (w, np.abs(w).max()))
  )
  bound = ex @ np.abs(w) + np.abs(x) @ ew + ex @ ew
  exact = x @ w
  product = jax.jit(fp8.product, static_argnums=2)
  y = np.asarray(product(x, w, 'fp8_v3'))
  assert (np.abs(y - exact) <= bound).all()
  errors = np.asarray(fp8.row_errors(y, exact))
  np.testing.assert_allclose(
    errors, np.linalg.norm(y - exact, axis=-1) / np.linalg.norm(exact, axis=-1), rtol=1e-12
  )
  one_scale = np.asarray(fp8.row_errors(product(x, w, 'fp8_tensor'), exact))
  assert (
    errors.max() < 0.08 and one_scale[:, 7].min() > 0.9
  )  # the row is lost; over all rows together it is not
  assert np.linalg.norm(product(x, w, 'fp8_tensor') - exact) / np.linalg.norm(exact) < 0.08


def test_derivatives_are_straight_through(x64, rng):
  """Of a fake number 1; forward mode meets the numbers of the other factor as FP8 has them."""
  x, w, _ = inputs(rng, 1, 5, 7, 4)
  t, u = rng.normal(size=x.shape), rng.normal(size=w.shape)

  @jax.jit
  def tangents(x, w, t, u):
    of_fake = jax.jvp(lambda x: fp8.fake(x, (1, 128)), (x,), (t,))[1]
    return of_fake, jax.jvp(lambda *xw: fp8.product(*xw, 'fp8_v3'), (x, w), (t, u))[1]

  of_fake, found = tangents(x, w, t, u)
  np.testing.assert_array_equal(of_fake, t)
  x_columns = by_numpy(by_numpy(x, (1, 128)), (128, 1))
  np.testing.assert_allclose(found, t @ by_numpy(w, (128, 128)) + x_columns @ u, rtol=1e-12)


def test_measures_count_what_is_lost(rng):
  x = np.where(np.arange(200) < 128, 1.0, 2.0)[None, None] * np.ones((1, 2, 1))
  x[0, 0, 3], x[0, 1, 5:9], x[0, 1, 150] = 0, 2.0**-10 / 448, 3
  found = jax.jit(fp8.measures, static_argnums=2)(jnp.asarray(x, jnp.float32), jnp.eye(200), 'fp8_v3')
  assert float(found['underflow']) == pytest.approx(4 / 400)
  assert float(found['saturated']) == pytest.approx((127 + 72 + 124 + 1) / 400)
  assert float(found['weight_underflow']) == 0 and 0 < found['row_error'] < found['row_error_max'] < 0.04


E, D, F = 3, 20, 12


def test_experts_are_those_of_numpy(x64, rng):
  """Tiles of an expert's rows are its own, of one sequence, and of 128 rows at the most."""
  batch, time = 2, 180
  x, g = rng.normal(size=(2, batch, time, D)) * np.exp(3 * rng.normal(size=(2, batch, time, 1)))
  maps = [rng.normal(size=shape) for shape in ((E, D, F), (E, D, F), (E, F, D))]
  first = np.where(rng.random((batch, time)) < 0.8, 0, 1)  # more than 128 rows of a sequence at expert 0
  index = np.stack([first, (first + rng.integers(1, E, first.shape)) % E], -1)
  weight = rng.random(index.shape)
  row, block, column = fp8.TILES['fp8_v3']

  @jax.jit
  def ours(x, weight, *maps):
    routing = Routing(jnp.asarray(index), weight)
    y, pull = jax.vjp(lambda x, *maps: experts(x, routing, *maps, None, in_fp8=True), x, *maps)
    return y, *pull(g)

  y, d_x, d_maps = np.zeros(x.shape), np.zeros(x.shape), [np.zeros(m.shape) for m in maps]
  for e in range(E):
    gate, up, down = (by_numpy(m[e], block) for m in maps)
    for b in range(batch):
      token, choice = np.nonzero(index[b] == e)
      rows = by_numpy(x[b, token], row)
      a, c = rows @ gate, rows @ up
      sigmoid = (1 + np.tanh(a / 2)) / 2
      hidden = by_numpy(a * sigmoid * c, row)
      y[b, token] += weight[b, token, choice][:, None] * (hidden @ down)
      d_y = weight[b, token, choice][:, None] * g[b, token]
      d_hidden = by_numpy(d_y, row) @ down.T
      d_maps[2][e] += by_numpy(hidden, column).T @ by_numpy(d_y, column)
      d_a, d_c = d_hidden * c * sigmoid * (1 + a * (1 - sigmoid)), d_hidden * a * sigmoid
      for i, d in ((0, d_a), (1, d_c)):
        d_maps[i][e] += by_numpy(rows, column).T @ by_numpy(d, column)
      d_x[b, token] += by_numpy(d_a, row) @ gate.T + by_numpy(d_c, row) @ up.T
    assert (e == 0) == (len(token) > 128)
  for found, expected in zip(ours(x, weight, *maps), (y, d_x, *d_maps), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * np.abs(expected).max())


VOCAB, B, T = 11, 4, 6


def config(experts_too=False, **fields):
  c = base_config()
  c.model.update({'width': 16, 'depth': 2, 'heads': 2, 'dtype': 'float64', 'scan_unroll': 1})
  c.model.connection.streams = 2
  c.model.precision = 'fp8_v3'
  if experts_too:
    c.model.mla.kv_rank = 6
    c.model.moe.update({'experts': 4, 'active': 2, 'shared': 1, 'ffn_width': 6})
    c.model.dense_layers = 0
  c.model.update(fields)
  return c


def model(experts_too=False, **fields):
  return dataclasses.replace(build_model(config(experts_too, **fields)), vocab_size=VOCAB)


def batch():
  rng = np.random.default_rng(0)
  token = rng.integers(0, VOCAB, (B, T + 1)).astype(np.int32)
  segments = np.cumsum(rng.random((B, T)) < 0.2, 1).astype(np.int32)
  labels = {'targets': token[:, 1:].copy(), 'weights': np.ones((B, T), np.float32)}
  return {'inputs': token[:, :-1].copy(), 'segments': segments, **labels}


@functools.cache
def start():
  tokens, rng = jnp.zeros((1, 2), jnp.int32), np.random.default_rng(0)
  like = jax.eval_shape(Transformer(model(True)).init, jax.random.key(0), tokens, tokens)['params']
  return jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape), like)


@functools.cache
def outcome(parts=None, **fields):
  program = jax.jit(functools.partial(gradients, model=model(True, **fields), parts=parts))
  return jax.device_get(program(start(), batch()))


@pytest.mark.slow
def test_recomputation_and_microbatches_change_no_number(x64):
  """To float64 sums: what is rounded to E4M3 is the same, whoever computes it and when."""
  (loss, _), grads = outcome(remat='block', parts=2)
  (wanted, _), alone = outcome()
  assert float(loss) == pytest.approx(float(wanted), rel=1e-13)
  for path, leaf in jax.tree_util.tree_leaves_with_path(alone):
    other = functools.reduce(lambda node, key: node[key.key], path, grads)
    atol = 1e-11 * np.abs(leaf).max() + 1e-15
    np.testing.assert_allclose(other, leaf, rtol=0, atol=atol, err_msg=str(path))


def meshed(function, specs, arrays):
  """(values on a mesh of 8 devices laid out by specs, on one device)."""
  mesh = make_mesh(dict(zip(AXES, (1, 2, 2, 2), strict=True)))
  there = [jax.device_put(a, NamedSharding(mesh, spec)) for a, spec in zip(arrays, specs, strict=True)]
  return jax.jit(functools.partial(function, mesh))(*there), jax.jit(functools.partial(function, None))(
    *arrays
  )


def test_a_mesh_changes_no_number(x64, rng):
  """Devices that cut tiles of rows, blocks and columns share their scales. Float64 sums."""
  x, w, g = inputs(rng, 4, 130, 200, 140)

  def three(mesh, x, w, g):
    y, pull = jax.vjp(lambda *xw: fp8.product(*xw, 'fp8_v3', mesh is None), x, w)
    return y, *pull(g)

  specs = P(BATCH, 'tensor'), P('fsdp', 'tensor'), P(BATCH, None, 'tensor')
  for found, expected in zip(*meshed(three, specs, (x, w, g)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


@pytest.mark.slow
def test_a_mesh_of_experts_changes_no_number(x64, rng):
  """Width 256 of an expert on two devices, tokens and experts on four."""
  x = rng.normal(size=(4, 6, 8))
  maps = [rng.normal(size=shape) for shape in ((4, 8, 256), (4, 8, 256), (4, 256, 8))]
  index = np.argsort(rng.random((4, 6, 4)), -1)[..., :2]

  def both(mesh, x, *maps):
    routing = Routing(jnp.asarray(index), jnp.full(index.shape, 0.5))
    y, pull = jax.vjp(lambda x, *maps: experts(x, routing, *maps, mesh, True), x, *maps)
    return y, *pull(y)

  specs = P(BATCH, 'tensor'), *[P('expert', 'fsdp', 'tensor')] * 2, P('expert', 'tensor', 'fsdp')
  for found, expected in zip(*meshed(both, specs, (x, *maps)), strict=True):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def conversions(jaxpr):
  """How often numbers become E4M3."""
  here = sum(
    equation.primitive.name == 'convert_element_type' and equation.params['new_dtype'] == fp8.FORMAT
    for equation in jaxpr.eqns
  )
  return here + sum(conversions(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params))


def test_both_factors_of_linear_maps_are_fp8_and_nothing_else_is():
  """7 maps of a dense layer; 4 of latent attention, 3 of shared and 3 of routed experts. Off, nothing is."""

  def traced(experts_too, **fields):
    c = model(experts_too, dtype='float32', **fields)
    return jax.make_jaxpr(Transformer(c).init)(jax.random.key(0), *(jnp.zeros((B, T), jnp.int32),) * 2)

  assert conversions(traced(False).jaxpr) == 2 * 7
  assert conversions(traced(True).jaxpr) == 2 * (4 + 3 + 3)
  assert conversions(traced(False, precision=None).jaxpr) == 0


@functools.cache
def recorded():
  """A model in float32 with experts, its parameters, and tokens -> (logits, records)."""
  c = model(True, dtype='float32')
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start())
  apply = functools.partial(Transformer(c).apply, {'params': params}, record=1)
  return c, jax.jit(lambda tokens: apply(tokens, jnp.zeros_like(tokens)))


def test_no_token_sees_a_later_one():
  """To the bit, whatever token comes, also through what is rounded: tiles of activations are of one token."""
  tokens, apply = jnp.asarray(batch()['inputs']), recorded()[1]
  logits = np.asarray(apply(tokens)[0])
  for other in range(1, VOCAB):
    changed = (np.asarray(apply(tokens.at[:, 3].set((tokens[:, 3] + other) % VOCAB))[0]) != logits).any(-1)
    assert changed[:, 3:].all() and not changed[:, :3].any()


def test_diagnostics_have_every_sublayer():
  c, apply = recorded()
  found = diagnose(jax.device_get(apply(batch()['inputs'])[1]), c)
  names = ('underflow', 'saturated', 'weight_underflow', 'row_error', 'row_error_max')
  assert {name for name in found if name.startswith('fp8')} == {f'fp8_{name}' for name in names}
  assert all(found[f'fp8_{name}'].shape == (4,) for name in names)
  assert ((found['fp8_row_error'] > 0.005) & (found['fp8_row_error'] < 0.1)).all()
  assert (found['fp8_row_error_max'] > found['fp8_row_error']).all()


@pytest.mark.parametrize('shared,dense', ((0, 1), (1, 0)))
def test_experts_record_what_other_sublayers_do(shared, dense):
  """Of routed experts alone too: layers of both kinds are shown side by side."""
  c = model(True, moe={'shared': shared}, dense_layers=dense, dtype='float32')
  tokens = jnp.zeros((1, T), jnp.int32)
  params = jax.eval_shape(Transformer(c).init, jax.random.key(0), tokens, tokens)
  _, records = jax.eval_shape(functools.partial(Transformer(c).apply, record=1), params, tokens, tokens)
  names = [{name for name in of_kind if name.startswith('fp8_')} for of_kind in records]
  assert names[0] == names[1] and len(names[0]) == 5
  assert all(of_kind[name].shape == (2,) for of_kind in records for name in names[0])


def test_what_cannot_be_is_refused():
  with pytest.raises(ConfigError, match='must be fp8_v3'):
    build_model(config(precision='fp8'))
  with pytest.raises(ConfigError, match='does not go with model'):
    build_model(config(True, precision='fp8_tensor'))
  with pytest.raises(ConfigError, match='cuts tiles of 128'):
    check_mesh({'tensor': 2, 'expert': 1}, model(True), 6)
