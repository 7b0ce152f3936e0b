"""diagnostics.py on matrices whose gains are known, and through a model."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from mhc_jax import diagnostics
from mhc_jax.config import base_config
from mhc_jax.connection import Gate
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import PRESETS


def matrices(*tokens):
  """(S=1, n, n, B=1, T) from one matrix per token."""
  return np.asarray(np.stack(tokens, -1)[None, :, :, None], np.float32)


def test_gains_are_the_largest_row_and_column_sums():
  h = [[1.0, -2.0], [0.5, 0.25]]  # rows: 3 and 0.75, signed -1 and 0.75; columns: 1.5 and 2.25, -1.75
  found = {name: float(value[0]) for name, value in diagnostics.gains(matrices(h)).items()}
  assert found == {
    'gain_forward': 3.0,
    'gain_backward': 2.25,
    'gain_forward_signed': 1.0,
    'gain_backward_signed': 1.75,
    'gain_forward_of_mean': 3.0,
    'gain_backward_of_mean': 2.25,
    'gain_forward_signed_of_mean': 1.0,
    'gain_backward_signed_of_mean': 1.75,
  }


def test_gains_are_means_over_tokens_of_the_maximum_of_each():
  """Token 0 is largest in row 0, token 1 in row 1: a maximum of means would give 2."""
  found = diagnostics.gains(matrices([[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 5.0]]))
  assert float(found['gain_forward'][0]) == float(found['gain_backward'][0]) == 4.0
  assert float(found['gain_forward_of_mean'][0]) == 3.0
  # Signs cancel between tokens before, not after, the mean.
  found = diagnostics.gains(matrices([[3.0, 0.0], [0.0, 1.0]], [[-3.0, 0.0], [0.0, 1.0]]))
  assert float(found['gain_forward_signed'][0]) == 3.0
  assert float(found['gain_forward_signed_of_mean'][0]) == 1.0


def test_composites_multiply_later_matrices_from_the_left(rng):
  h = rng.normal(size=(3, 4, 4, 2, 5)).astype(np.float32)
  found = diagnostics.composites(h)
  for b in range(2):
    for t in range(5):
      product = np.eye(4)
      for s in range(3):
        product = h[s, :, :, b, t] @ product
        np.testing.assert_allclose(found[s, :, :, b, t], product, rtol=1e-5, atol=1e-5)


def gram(x_NTD):
  """(S=1, n, n, B=1, T)."""
  return np.asarray(np.einsum('ntd,mtd->nmt', x_NTD, x_NTD)[None, :, :, None], np.float32)


def test_stream_cosine_of_equal_opposite_and_orthogonal_streams(rng):
  x_TD = rng.normal(size=(3, 8))
  # Norms play no part; float32 rounding of sums of 8 terms.
  close = functools.partial(pytest.approx, abs=1e-5)
  assert float(diagnostics.stream_cosine(gram(np.stack([x_TD, 3 * x_TD, x_TD])))[0]) == close(1)
  assert float(diagnostics.stream_cosine(gram(np.stack([x_TD, -x_TD])))[0]) == close(-1)
  basis_NTD = np.broadcast_to(np.eye(4)[:, None], (4, 3, 4))
  assert float(diagnostics.stream_cosine(gram(basis_NTD))[0]) == close(0)
  assert diagnostics.stream_cosine(gram(x_TD[None])).tolist() == [1.0]


def test_singular_values_and_distances(rng):
  h_XNM = rng.normal(size=(5, 3, 3))
  found = {name: np.asarray(value)[0] for name, value in diagnostics.shape_of(matrices(*h_XNM)).items()}
  sigma = np.linalg.svd(h_XNM, compute_uv=False)
  norm = functools.partial(np.linalg.norm, axis=(1, 2))
  expected = {
    'spectral_norm': sigma[:, 0].mean(),
    'sigma_min': sigma[:, -1].mean(),
    'distance_to_mean': norm(h_XNM - 1 / 3).mean(),
    'distance_to_identity': norm(h_XNM - np.eye(3)).mean(),
    'res_mean': h_XNM.mean(0),
  }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)  # float32


def test_effective_ranks(rng):
  assert float(diagnostics.effective_rank(np.array([1.0, 1, 1, 0]))) == pytest.approx(3)
  assert float(diagnostics.effective_rank(np.array([5.0, 0, 0]))) == pytest.approx(1)
  basis_NTD = np.broadcast_to(np.eye(4)[:, None], (4, 3, 4))
  assert float(diagnostics.stream_rank(gram(basis_NTD))[0]) == pytest.approx(4)
  # Singular values 2 and 1, shares 2/3 and 1/3; from their squares it would be 1.649.
  uneven_NTD = np.array([2.0, 1.0])[:, None, None] * np.eye(2, 4)[:, None]
  wanted = np.exp(-(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3)))
  assert wanted == pytest.approx(1.890, abs=5e-4)
  assert float(diagnostics.stream_rank(gram(uneven_NTD))[0]) == pytest.approx(wanted, rel=1e-5)
  copies_NTD = np.broadcast_to(rng.normal(size=(3, 8)), (4, 3, 8))
  assert float(diagnostics.stream_rank(gram(copies_NTD))[0]) == pytest.approx(1, abs=1e-4)


def test_the_depth_matrix_is_pre_times_the_product_between_times_post(rng):
  s, n = 5, 2
  pre, post = rng.normal(size=(2, s, n, 1, 3)).astype(np.float32)
  res = rng.normal(size=(s, n, n, 1, 3)).astype(np.float32)
  found = diagnostics.depth_matrix(pre, post, res)
  for token in range(3):
    for t in range(s):
      for u in range(s):
        between = np.eye(n)
        for k in range(u + 1, t):
          between = res[k, :, :, 0, token] @ between
        wanted = pre[t, :, 0, token] @ between @ post[u, :, 0, token] if u < t else 0.0
        assert float(found[t, u, 0, token]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
  # Rank <= n below the diagonal although sublayers are more.
  assert np.linalg.matrix_rank(np.asarray(found[2:, :2, 0, 0]), tol=1e-4) <= n


def test_gates_at_their_bounds_are_saturated():
  value = np.array([0.001, 0.5, 1.0, 1.999]).reshape(1, 4, 1, 1)
  found = diagnostics.gate_values(value, Gate('sigmoid', 2.0), 'post')
  assert float(found['post_saturation'][0]) == 0.5 and float(found['post_mean'][0]) == pytest.approx(0.875)
  assert 'pre_saturation' not in diagnostics.gate_values(value, Gate('linear'), 'pre')


def test_lambda_2_is_the_second_modulus():
  rotation = np.array([[0.0, -0.5, 0], [0.5, 0, 0], [0, 0, 1]])
  found = diagnostics.lambda_2({'res_mean': rotation[None], 'composite_res_mean': np.ones((2, 1, 1))})
  assert found['lambda_2'] == pytest.approx(0.5) and found['composite_lambda_2'].tolist() == [0, 0]


def test_records_of_attention_and_feed_forward_alternate():
  records = [{'a': np.array([0.0, 2.0]), 'b': None}, {'a': np.array([1.0, 3.0]), 'b': None}]
  assert diagnostics.interleave(records, 'a').tolist() == [0, 1, 2, 3]
  assert diagnostics.interleave(records, 'b') is None


def diagnosed(disturb=None, **connection):
  c = base_config()
  c.model.update({'width': 8, 'depth': 2, 'heads': 2})
  c.model.connection.update(connection)
  model = dataclasses.replace(build_model(c), vocab_size=11)
  inputs = (np.arange(6, dtype=np.int32)[None], np.zeros((1, 6), np.int32))

  @jax.jit
  def run(key):
    params = Transformer(model).init(key, *inputs)['params']
    if disturb:
      params['layers'][disturb]['b_res'] += 0.3 * jax.random.normal(key, (2, 16))
    return Transformer(model).apply({'params': params}, *inputs, record=1)[1]

  return diagnostics.diagnose(jax.device_get(run(jax.random.key(0))), model)


def test_of_a_residual_model():
  found = diagnosed(name='residual')
  # Numbers of a triangle of ones: 1 / (2 sin(pi (2k - 1) / 14)) for k = 1, 2, 3, and 0.
  sigma = 1 / (2 * np.sin(np.pi * np.array([1, 3, 5]) / 14))
  share = sigma / sigma.sum()
  assert float(found.pop('depth_rank')) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
  for name, value in found.items():
    assert len(value) == 4
    wanted = 0.0 if 'distance' in name or 'defect' in name or 'lambda' in name else 1.0
    np.testing.assert_allclose(value, wanted, rtol=1e-6, err_msg=name)
  assert len(found) == 32 and 'logit_range' not in found and 'pre_mean' not in found


@pytest.mark.slow
@pytest.mark.parametrize('name,preset', [(name, p) for name in PRESETS for p in PRESETS[name]])
def test_every_connection_has_finite_diagnostics(name, preset):
  found = diagnosed(name=name, preset=preset)
  for key, value in found.items():
    assert np.isfinite(value).all() and value.dtype in (np.float32, np.float64), key
  assert ('logit_range' in found) == (name in ('hc', 'mhc', 'frac', 'vwn'))
  assert ('pre_saturation' in found) == (name in ('mhc', 'identity'))
  other_reads = name in ('gated_residual', 'mudd') or preset == 'heads'
  assert ('depth_rank' in found) == (not other_reads)


def test_of_a_model_with_exact_matrices_twice():
  """Newton's loops in the layers' loop; XLA:CPU has hung on the second run of such a program."""
  for _ in range(2):
    assert diagnosed(name='mhc', constraint='birkhoff_dual')['defect'].max() < 1e-6


def test_of_an_unconstrained_model_whose_feed_forward_mixing_is_disturbed():
  """Sublayers 1 and 3 are the disturbed ones; the composite of 2 is that of 1."""
  found = diagnosed('feed_forward_connection', name='hc', preset='static')
  single, composite = found['gain_forward'], found['composite_gain_forward']
  np.testing.assert_array_equal(single[::2], 1.0)
  assert (single[1::2] > 1.1).all() and composite[0] == 1.0
  assert composite[1] == pytest.approx(single[1], rel=1e-6)
  assert composite[2] == pytest.approx(composite[1], rel=1e-6) and composite[3] != composite[2]
  assert (found['defect'] == 0).all(), 'no equation is violated by an unconstrained matrix'


def test_of_mhc_at_its_start():
  found = diagnosed(name='mhc')
  np.testing.assert_allclose(found['gain_forward'], 1, rtol=1e-6)  # rows are normalised last
  assert (found['defect'] < 1e-3).all() and (found['stream_cosine'] < 1).all()
  assert (np.diff(found['composite_gain_forward']) < 1e-5).all()
