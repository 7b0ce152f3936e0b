"""hyper_connection.py and presets.py: orientation, backwards, dtypes, start values, HC's formula."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import hyper_connection as hc
from mhc_jax.presets import INITS, PRESETS, connection_spec

N, B, T, D = 4, 2, 3, 8
ALL_PRESETS = [(name, preset) for name, presets in PRESETS.items() for preset in presets]


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def streams(rng, dtype=np.float64):
  return jnp.asarray(rng.normal(size=(N, B, T, D)), dtype)


def random_params(rng, spec, dtype=np.float64):
  """Parameters of the right names and shapes, all of them of order 1."""
  like = jax.eval_shape(lambda key: hc.init_params(key, spec, D, 0), jax.random.key(0))
  return {name: jnp.asarray(rng.normal(size=leaf.shape), dtype) for name, leaf in like.items()}


def test_entry_i_j_of_the_mixing_matrix_carries_stream_j_to_stream_i(rng):
  x_NBTD = streams(rng, np.float32)
  y_BTD = jnp.zeros((B, T, D))
  res_NM = np.zeros((N, N), np.float32)
  res_NM[0, 1] = res_NM[3, 0] = 1
  res_NMBT = jnp.broadcast_to(res_NM[:, :, None, None], (N, N, B, T))
  new = hc.write(res_NMBT, jnp.ones((N, B, T)), x_NBTD, y_BTD)
  np.testing.assert_array_equal(new[0], x_NBTD[1])
  np.testing.assert_array_equal(new[3], x_NBTD[0])
  assert not new[1:3].any()


def test_read_and_write_weights_belong_to_their_stream(rng):
  x_NBTD = streams(rng, np.float32)
  one_hot_NBT = jnp.zeros((N, B, T)).at[2].set(1.0)
  np.testing.assert_array_equal(hc.read(one_hot_NBT, x_NBTD), x_NBTD[2])
  new = hc.write(None, one_hot_NBT, x_NBTD, x_NBTD[0])
  np.testing.assert_array_equal(new[2], x_NBTD[2] + x_NBTD[0])
  np.testing.assert_array_equal(new[:2], x_NBTD[:2])


def plain_sublayer(pre_NBT, res_NMBT, post_NBT, x_NBTD):
  """read, a nonlinear F, write: by einsum, with autodiff's backward."""
  h_BTD = jnp.einsum('nbt,nbtd->btd', pre_NBT, x_NBTD)
  kept = x_NBTD if res_NMBT is None else jnp.einsum('nmbt,mbtd->nbtd', res_NMBT, x_NBTD)
  post_NBT = jnp.ones_like(pre_NBT) if post_NBT is None else post_NBT
  return h_BTD, kept + jnp.einsum('nbt,btd->nbtd', post_NBT, jnp.sin(h_BTD))


def our_sublayer(pre_NBT, res_NMBT, post_NBT, x_NBTD):
  h_BTD = hc.read(pre_NBT, x_NBTD)
  return h_BTD, hc.write(res_NMBT, post_NBT, x_NBTD, jnp.sin(h_BTD))


@pytest.mark.parametrize('mixed', (True, False))
@pytest.mark.parametrize('gated', (True, False))
def test_custom_backwards_equal_autodiff_of_einsums(x64, rng, mixed, gated):
  inputs = (
    jnp.asarray(rng.normal(size=(N, B, T))),
    jnp.asarray(rng.normal(size=(N, N, B, T))) if mixed else None,
    jnp.asarray(rng.normal(size=(N, B, T))) if gated else None,
    streams(rng),
  )
  weights = (jnp.asarray(rng.normal(size=(B, T, D))), streams(rng))

  def value(sublayer):
    def scalar(inputs):
      return sum(jnp.sum(w * jnp.cos(out)) for w, out in zip(weights, sublayer(*inputs), strict=True))

    return jax.jit(jax.value_and_grad(scalar))(inputs)

  ours, plain = value(our_sublayer), value(plain_sublayer)
  # Sums of at most 4 * 24 terms of order 1 in float64.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), ours, plain)


def test_unit_gates_of_one_stream_are_the_plain_residual(rng):
  x_NBTD, y_BTD = streams(rng, np.float32)[:1], streams(rng, np.float32)[1]
  np.testing.assert_array_equal(hc.read(None, x_NBTD), x_NBTD[0])
  np.testing.assert_array_equal(hc.write(None, None, x_NBTD, y_BTD)[0], x_NBTD[0] + y_BTD)


def dyadic(rng, shape, bits):
  """Multiples of 1/8 whose products of two, added up, are exact in float32 and need more than bfloat16."""
  return rng.integers(-(2**bits), 2**bits, shape).astype(np.float64) / 8


def test_bfloat16_streams_are_accumulated_in_float32_and_rounded_once(rng):
  """All sums are exact in float32, so the only rounding is the last one, and equality is exact."""
  bf16 = jnp.bfloat16
  x, y, g = dyadic(rng, (N, B, T, D), 7), dyadic(rng, (B, T, D), 7), dyadic(rng, (N, B, T, D), 7)
  pre, post, res = dyadic(rng, (N, B, T), 6), dyadic(rng, (N, B, T), 6), dyadic(rng, (N, N, B, T), 6)
  coefficients = [jnp.asarray(a, jnp.float32) for a in (pre, post, res)]

  @jax.jit
  def run(pre, post, res, x, y, g):
    h, pull_read = jax.vjp(hc.read, pre, x)
    new, pull_write = jax.vjp(hc.write, res, post, x, y)
    return h, new, pull_read(g[0]), pull_write(g)

  h, new, (d_pre, d_x_read), (d_res, d_post, d_x, d_y) = run(
    *coefficients, *(jnp.asarray(a, bf16) for a in (x, y, g))
  )
  expected = {
    'h': (h, np.einsum('nbt,nbtd->btd', pre, x), bf16),
    'new': (new, np.einsum('nmbt,mbtd->nbtd', res, x) + np.einsum('nbt,btd->nbtd', post, y), bf16),
    'd_pre': (d_pre, np.einsum('btd,nbtd->nbt', g[0], x), jnp.float32),
    'd_x of read': (d_x_read, np.einsum('nbt,btd->nbtd', pre, g[0]), bf16),
    'd_res': (d_res, np.einsum('nbtd,mbtd->nmbt', g, x), jnp.float32),
    'd_post': (d_post, np.einsum('nbtd,btd->nbt', g, y), jnp.float32),
    'd_x': (d_x, np.einsum('nmbt,nbtd->mbtd', res, g), bf16),
    'd_y': (d_y, np.einsum('nbt,nbtd->btd', post, g), bf16),
  }
  for name, (actual, exact, dtype) in expected.items():
    assert actual.dtype == dtype, name
    np.testing.assert_array_equal(actual, jnp.asarray(exact, jnp.float32).astype(dtype), err_msg=name)
  assert (np.asarray(new, np.float64) != expected['new'][1]).any(), 'the example never rounds'


@pytest.mark.parametrize('name,preset', ALL_PRESETS)
def test_coefficients_are_float32_for_bfloat16_streams(rng, name, preset):
  spec = connection_spec(name, preset, streams=N)
  params = random_params(rng, spec, np.float32)
  units, m = spec.units, spec.fractions
  x_NBTD = jax.ShapeDtypeStruct((units, B, T, D // m), jnp.bfloat16)
  found = jax.eval_shape(lambda x: hc.generate(params, x, spec), x_NBTD)
  per_channel = (D,) if spec.read_gate.kind == 'elementwise' or spec.read_heads > 1 else ()
  written = m if spec.write_across else 1
  shapes = {'pre_NBT': (m * spec.read_ways * units, B, T, *per_channel), 'post_NBT': (written * units, B, T)}
  shapes['res_NMBT'] = (units, units, B, T)
  for field, value in found._asdict().items():
    if value is not None:
      assert (value.dtype, value.shape) == (jnp.float32, shapes[field])
  if name == 'residual':
    assert found == (None, None, None) and not params


def coefficients_at_start(spec, sublayer):
  """With the generator's contribution removed: float64 arrays of one token."""
  params = hc.init_params(jax.random.key(0), spec, D, sublayer)
  params = {name: jnp.zeros_like(v) if name == 'phi' else v for name, v in params.items()}
  found = jax.jit(lambda params, x: hc.generate(params, x, spec))(params, jnp.ones((N, 1, 1, D)))
  return [np.asarray(value)[..., 0, 0] for value in found]


@pytest.mark.parametrize('sublayer', (0, 5))
@pytest.mark.parametrize('init', INITS)
def test_start_values_of_each_init(x64, init, sublayer):
  name = 'hc' if init in ('pre_norm', 'unit_reads') else 'mhc'
  pre, post, res = coefficients_at_start(connection_spec(name, init=init), sublayer)
  home = np.arange(N) == sublayer % N
  near = np.full((N, N), 0.01 / 3) + np.eye(N) * (0.99 - 0.01 / 3)
  cyclic = (sigmoid(np.where(home, 1, -1)), 2 * sigmoid(np.where(home, 1, -1)), near)
  expected = {
    'cyclic': cyclic,
    'cyclic_zero_phi': cyclic,
    'zero': (np.full(N, 0.5), np.ones(N), np.full((N, N), 0.25)),
    'near_identity': (np.full(N, 0.25), np.ones(N), near),
    'pre_norm': (home.astype(float), np.ones(N), np.eye(N)),
    'unit_reads': (np.ones(N), np.zeros(N), np.zeros((N, N))),
    'scaled_phi': (np.full(N, 0.5), np.ones(N), np.full((N, N), 0.25)),
  }[init]
  for actual, wanted in zip((pre, post, res), expected, strict=True):
    np.testing.assert_allclose(actual, wanted, rtol=1e-12, atol=1e-12)


def test_mixing_and_alpha_replace_one_value_of_the_init(x64):
  spec = connection_spec('mhc', mixing=0.3, alpha=0.5)
  res = coefficients_at_start(spec, 0)[2]
  np.testing.assert_allclose(res.sum(1) - np.diag(res), 0.3, rtol=1e-12)
  params = hc.init_params(jax.random.key(0), spec, D, 0)
  assert {float(params[f'alpha_{part}']) for part in ('pre', 'post', 'res')} == {0.5}
  assert spec.init.read == INITS['cyclic'](N).read


def test_the_home_stream_follows_a_traced_sublayer_index():
  spec = connection_spec('mhc')
  traced = jax.jit(jax.vmap(lambda s: hc.init_params(jax.random.key(0), spec, D, s)['b_pre']))(jnp.arange(8))
  assert np.argmax(traced, 1).tolist() == [0, 1, 2, 3] * 2


def test_full_and_factored_generators_start_with_the_stated_variance():
  """Variance 1 / (n C) of each entry, and of their mean square an error of sqrt(2 / count) or more."""
  n, width, rank = 4, 512, 6

  def start(seed, phi_scale=1.0, **fields):
    spec = connection_spec('mhc', **fields)
    return jax.jit(lambda key: hc.init_params(key, spec, width, 0, phi_scale))(jax.random.key(seed))

  full = start(0)['phi']
  assert full.shape == (n, width, n * n + 2 * n)
  # 49k independent entries: 4 standard errors are 2.5 %.
  assert np.mean(np.square(full)) * n * width == pytest.approx(1, rel=0.025)
  low = {name: np.asarray(value) for name, value in start(1, rank=rank).items()}
  product = low['phi_in'].reshape(-1, rank) @ low['phi_out']
  # tr(U V V' U') / r has relative variance close to 2 / (r K) + 2 / (r n C): 4 standard errors are 48 %.
  assert np.mean(product**2) * n * width == pytest.approx(1, rel=0.48)
  assert np.linalg.matrix_rank(product) == rank
  np.testing.assert_allclose(start(0, phi_scale=0.5)['phi'], 0.5 * full, rtol=1e-6)


@pytest.mark.parametrize('name', ('mhc', 'hc'))
def test_a_factored_generator_is_the_full_one_of_its_product(x64, rng, name):
  full, low = connection_spec(name), connection_spec(name, rank=2)
  params, x_NBTD = random_params(rng, low), streams(rng)
  product = {k: v for k, v in params.items() if not k.startswith('phi')}
  product['phi'] = jnp.einsum('ndr,rk->ndk', params['phi_in'], params['phi_out'])
  ours = jax.jit(lambda p, x: hc.generate(p, x, low))(params, x_NBTD)
  wanted = jax.jit(lambda p, x: hc.generate(p, x, full))(product, x_NBTD)
  for actual, desired in zip(ours, wanted, strict=True):
    np.testing.assert_allclose(actual, desired, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('preset', PRESETS['hc'])
def test_hc_is_the_formula_of_its_paper(x64, rng, preset):
  """2409.19606, section 2: each stream makes its own row of A_r; h = A_m^T H, new H = B^T y + A_r^T H."""
  spec = connection_spec('hc', preset)
  p = {k: np.asarray(v) for k, v in random_params(rng, spec).items()}
  x = np.asarray(streams(rng))
  beta = np.tile(p['b_post'][:, None, None], (1, B, T))
  a_m = np.tile(p['b_pre'][:, None, None], (1, B, T))
  a_r = np.tile(p['b_res'].reshape(N, N).T[:, :, None, None], (1, 1, B, T))  # b_res is H_res, row-major
  if preset == 'static':
    assert not any(name.startswith(('phi', 'alpha')) for name in p)
  else:
    assert {k for k in p if k.startswith('alpha')} == {'alpha_pre', 'alpha_post'}
    bound = np.tanh if preset == 'dynamic' else (lambda z: z)
    normed = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6)
    w_m, w_beta, w_r = p['phi'][0, :, 0], p['phi'][0, :, 1], p['phi'][0, :, 2:]
    beta += p['alpha_post'] * bound(normed @ w_beta)
    a_m += p['alpha_pre'] * bound(normed @ w_m)
    a_r += p['alpha_pre'] * np.moveaxis(bound(normed @ w_r), 3, 1)
  c = jax.jit(lambda p, x: hc.generate(p, x, spec))(p, x)
  np.testing.assert_allclose(c.pre_NBT, a_m, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(c.post_NBT, beta, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(c.res_NMBT, a_r.swapaxes(0, 1), rtol=1e-12, atol=1e-12)


def test_presets_keep_what_their_papers_say():
  """HC's streams are summed; mHC's norms have eps 1e-20 (Table 5), which float32 holds; V4's have 1e-6."""
  assert {connection_spec('hc', preset).collapse for preset in PRESETS['hc']} == {'sum'}
  assert connection_spec('mhc').norm_eps == connection_spec('identity').norm_eps == 1e-20
  assert np.float32(1e-20) > np.finfo(np.float32).tiny
  assert connection_spec('mhc', 'deepseek_v4').norm_eps == 1e-6


def test_streams_far_below_1_are_normed_all_the_same(rng):
  """With eps 1e-6 for 1e-20 streams of size 1e-6 would hardly reach the generator; zeros stay finite."""
  spec, x_NBTD = connection_spec('mhc'), streams(rng, np.float32)
  params = random_params(rng, spec, np.float32)
  run = jax.jit(lambda x: hc.coordinates(params, x, spec)['res'])
  np.testing.assert_allclose(run(1e-6 * x_NBTD), run(x_NBTD), rtol=1e-4, atol=1e-5)
  grad = jax.jit(jax.grad(lambda x: jnp.sum(hc.coordinates(params, x, spec)['res'])))
  assert np.isfinite(run(0 * x_NBTD)).all() and np.isfinite(grad(0 * x_NBTD)).all()


def test_expand_copies_and_collapses_undo_it(rng):
  x_BTD = streams(rng, np.float32)[0]
  x_NBTD = hc.expand(x_BTD, N)
  np.testing.assert_array_equal(hc.collapse(x_NBTD, 'mean'), x_BTD)
  np.testing.assert_array_equal(hc.collapse(x_NBTD, 'sum'), 4 * x_BTD)
  with pytest.raises(ValueError, match='collapse must be mean, sum, learned'):
    hc.collapse(x_NBTD, 'max')


def test_the_learned_collapse_starts_as_a_mean(x64, rng):
  spec = dataclasses.replace(connection_spec('mhc', 'deepseek_v4'), collapse_eps=0.0)
  x_NBTD = streams(rng)
  found = jax.jit(lambda x: hc.collapse(x, 'learned', hc.init_collapse(spec, D), spec))(x_NBTD)
  np.testing.assert_allclose(found, np.mean(x_NBTD, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
  'fields,message',
  (
    ({'name': 'mhcc'}, 'must be one of residual, hc, mhc, identity'),
    ({'preset': 'papr'}, 'must be one of paper, deepseek_v4'),
    ({'streams': 0}, 'streams must be at least 1'),
    ({'constraint': 'sphere'}, 'constraint must be one of'),
    ({'init': 'ones'}, 'init must be one of'),
    ({'rank': 0}, 'between 1 and 24'),
    ({'rank': 25}, 'between 1 and 24'),
    ({'rank': 2, 'dynamic': False}, 'rank'),
    ({'constraint_params': {'iterations': 0}}, 'between 1 and 10000'),
  ),
)
def test_impossible_connections_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    connection_spec(**fields)
