"""Sinkhorn: values and gradients against plain numpy, large logits, orientation, backward."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn, sinkhorn

ITERATIONS = (1, 2, 20)
COMPILER = {'xla_backend_optimization_level': 0}  # compiles twice as fast, same arithmetic
# preset -> the operator: (transposed logits, axes of one iteration, eps, how, softmax eps)
CONVENTIONS = {
  'paper': (False, (0, 1), 0.0, 'add', 0.0),
  'deepseek_v4': (True, (0, 1), 1e-6, 'add', 1e-6),
  'megatron_main': (False, (1, 0), 1e-6, 'clamp', 0.0),
  'lucidrains': (False, (1, 0), 0.0, 'add', 0.0),
}


def plain(logits_NM, preset, iterations, np=np):
  """The iterations as their sources state them, one matrix, linear domain, no shortcuts."""
  transposed, axes, eps, how, softmax_eps = CONVENTIONS[preset]
  m_NM = logits_NM.T if transposed else logits_NM
  m_NM = np.exp(m_NM - m_NM.max(axes[0], keepdims=True))
  for step, axis in enumerate(axes * iterations):
    sums = m_NM.sum(axis, keepdims=True)
    if step == 0:
      m_NM = m_NM / sums + softmax_eps
    else:
      m_NM = m_NM / (np.maximum(sums, eps) if how == 'clamp' else sums + eps)
  return m_NM


def in_logs(logits_NM, iterations):
  """Preset paper in the log domain: the float64 reference for logits that overflow exp."""
  for axis in (0, 1) * iterations:
    top = logits_NM.max(axis, keepdims=True)
    logits_NM = logits_NM - top - np.log(np.exp(logits_NM - top).sum(axis, keepdims=True))
  return np.exp(logits_NM)


@functools.partial(jax.jit, static_argnums=(2, 3), compiler_options=COMPILER)
def matrix_and_gradient(logits_NMX, cot_NMX, preset, iterations):
  constraint, n = birkhoff_sinkhorn(iterations, preset), logits_NMX.shape[0]
  coords_KX = logits_NMX.reshape(n * n, *logits_NMX.shape[2:])
  h_NMX, pull = jax.vjp(lambda c: constraint.matrix(c, n), coords_KX)
  return h_NMX, pull(cot_NMX)[0].reshape(logits_NMX.shape)


def plain_gradient(logits_NMX, cot_NMX, preset, iterations):
  def loss(logits_NM, cot_NM):
    return jnp.sum(cot_NM * plain(logits_NM, preset, iterations, jnp))

  return jax.vmap(jax.grad(loss), in_axes=-1, out_axes=-1)(logits_NMX, cot_NMX)


def draw(rng, scale=3.0, n=4, tokens=5):
  logits_NMX, cot_NMX = rng.normal(size=(2, n, n, tokens))
  return scale * logits_NMX, cot_NMX


@pytest.mark.parametrize('iterations', ITERATIONS)
@pytest.mark.parametrize('preset', CONVENTIONS)
def test_equals_plain_iterations(x64, rng, preset, iterations):
  """Values against numpy; gradients against autodiff through the unrolled plain loop."""
  logits_NMX, cot_NMX = draw(rng)
  h_NMX, grad_NMX = matrix_and_gradient(logits_NMX, cot_NMX, preset, iterations)
  for x in range(logits_NMX.shape[-1]):
    expected_NM = plain(logits_NMX[..., x], preset, iterations)
    np.testing.assert_allclose(h_NMX[..., x], expected_NM, rtol=1e-12, atol=1e-15)
  expected_NMX = plain_gradient(logits_NMX, cot_NMX, preset, iterations)
  np.testing.assert_allclose(grad_NMX, expected_NMX, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('preset', CONVENTIONS)
def test_gradient_equals_finite_differences(x64, rng, preset):
  """The plain loop itself, in numpy: no autodiff on this side."""
  logits_NMX, cot_NMX = draw(rng, tokens=1)
  grad_NMX = matrix_and_gradient(logits_NMX, cot_NMX, preset, 20)[1]
  step = 1e-5  # error of the central difference ~ step**2
  for index in np.ndindex(4, 4):
    shift_NM = np.zeros((4, 4))
    shift_NM[index] = step
    up, down = (plain(logits_NMX[..., 0] + s * shift_NM, preset, 20) for s in (1, -1))
    expected = np.sum(cot_NMX[..., 0] * (up - down)) / (2 * step)
    np.testing.assert_allclose(grad_NMX[index][0], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('scale', (1e2, 1e3))
@pytest.mark.parametrize('preset', CONVENTIONS)
def test_large_logits_stay_finite_in_float32(rng, preset, scale):
  logits_NMX, cot_NMX = (a.astype(np.float32) for a in draw(rng, scale, tokens=500))
  h_NMX, grad_NMX = matrix_and_gradient(logits_NMX, cot_NMX, preset, 20)
  assert h_NMX.dtype == grad_NMX.dtype == jnp.float32
  assert np.isfinite(h_NMX).all() and np.isfinite(grad_NMX).all()
  last = h_NMX.sum(1 if CONVENTIONS[preset][1][1] == 1 else 0)
  if preset in ('paper', 'lucidrains'):  # with eps, sums of vanishing entries do not reach 1
    np.testing.assert_allclose(last, 1, atol=1e-6)
  if preset == 'paper':
    wide_XNM = np.moveaxis(logits_NMX, 2, 0).astype(np.float64)
    expected = np.stack([in_logs(logits_NM, 20) for logits_NM in wide_XNM])
    # float32 rounds logits of 1e3 by 6e-5, which the iterations (nonexpansive in logs) hand on
    np.testing.assert_allclose(np.moveaxis(h_NMX, 2, 0), expected, atol=6e-7 * scale)


def test_orientation_of_a_matrix_made_by_hand(x64):
  """[[3, 2], [1, 1]], not symmetric, one iteration of each order; each number by hand."""
  logits_KX = np.log(np.array([3.0, 2, 1, 1])).reshape(4, 1)
  # Columns: [[3/4, 2/3], [1/4, 1/3]]; then rows of sums 17/12 and 7/12.
  paper = np.array([[9 / 17, 8 / 17], [3 / 7, 4 / 7]])
  found = birkhoff_sinkhorn(1, 'paper').matrix(logits_KX, 2)[..., 0]
  np.testing.assert_allclose(found, paper, rtol=1e-14)
  # Rows: [[3/5, 2/5], [1/2, 1/2]]; then columns of sums 11/10 and 9/10.
  rows_first = np.array([[6 / 11, 4 / 9], [5 / 11, 5 / 9]])
  found = birkhoff_sinkhorn(1, 'megatron_main').matrix(logits_KX, 2)[..., 0]
  np.testing.assert_allclose(found, rows_first, rtol=1e-14)


@pytest.mark.parametrize('n', (2, 3, 4, 8))
def test_deepseek_v4_at_eps_0_is_paper_on_transposed_logits(x64, rng, n):
  logits_NMX, _ = draw(rng, n=n)
  assert np.abs(logits_NMX - logits_NMX.swapaxes(0, 1)).max() > 1
  v4 = birkhoff_sinkhorn(preset='deepseek_v4', eps=0.0, softmax_eps=0.0)
  h_NMX = v4.matrix(logits_NMX.swapaxes(0, 1).reshape(n * n, -1), n)
  expected_NMX = birkhoff_sinkhorn(preset='paper').matrix(logits_NMX.reshape(n * n, -1), n)
  np.testing.assert_allclose(h_NMX, expected_NMX, rtol=1e-13)


@pytest.mark.parametrize('seed', (0, 1))
def test_equals_lucidrains(x64, seed):
  """Its linear and log-domain Sinkhorn (columns, then rows), and the gradient of sum(H * arange)."""
  with np.load(pathlib.Path(__file__).parent / f'oracles/lucidrains_mhcv2_seed{seed}.npz') as file:
    logits_NM, *values, grad_NM = (file[f'sk_{k}'] for k in ('logits', 'out', 'log_out', 'grad'))
  cot_NM = np.arange(16.0).reshape(4, 4)
  h_NM1, actual_NM1 = matrix_and_gradient(logits_NM[..., None], cot_NM[..., None], 'paper', 20)
  for value_NM in values:
    np.testing.assert_allclose(h_NM1[..., 0], value_NM, rtol=1e-9)
  np.testing.assert_allclose(actual_NM1[..., 0], grad_NM, rtol=1e-9, atol=1e-12 * cot_NM.max())


def test_rows_last_leaves_the_error_in_the_columns(rng):
  """At logit std 3, 20 iterations leave column sums off by percents (and row sums exact)."""
  logits_NMX, _ = draw(rng, tokens=2000)
  h_NMX = sinkhorn(jnp.asarray(logits_NMX, jnp.float32))
  assert np.abs(h_NMX.sum(1) - 1).max() < 1e-6
  assert 1e-2 < np.abs(h_NMX.sum(0) - 1).max() < 0.2


@pytest.mark.parametrize('eps, eps_mode', ((0.0, 'add'), (1e-2, 'add'), (0.3, 'clamp')))
@pytest.mark.parametrize('order', ('columns', 'rows'))
def test_backward_is_that_of_the_unrolled_loop(x64, rng, order, eps, eps_mode):
  """With eps large enough to matter: sums below 0.3 are clamped, in some rows, not in all."""
  logits_NMX, cot_NMX = draw(rng, n=3)
  axes = (0, 1) if order == 'columns' else (1, 0)

  def unrolled(logits_NMX):
    m_NMX = jax.nn.softmax(logits_NMX, axes[0]) + 1e-3
    clamped = []
    for axis in (axes * 4)[1:]:
      sums = m_NMX.sum(axis, keepdims=True)
      clamped.append(sums < eps)
      m_NMX = m_NMX / (jnp.maximum(sums, eps) if eps_mode == 'clamp' else sums + eps)
    return m_NMX, jnp.concatenate([c.reshape(-1) for c in clamped])

  def value_and_gradient(function):
    def evaluate(logits_NMX):
      (h_NMX, pull, clamped) = jax.vjp(function, logits_NMX, has_aux=True)
      return h_NMX, pull(cot_NMX)[0], clamped

    return jax.jit(evaluate, compiler_options=COMPILER)(logits_NMX)

  def custom(logits_NMX):
    return sinkhorn(logits_NMX, 4, order, eps, eps_mode, softmax_eps=1e-3), None

  h_NMX, grad_NMX, _ = value_and_gradient(custom)
  expected_NMX, expected_grad_NMX, clamped = value_and_gradient(unrolled)
  assert (clamped.any() and not clamped.all()) == (eps_mode == 'clamp')
  np.testing.assert_allclose(h_NMX, expected_NMX, rtol=1e-12)
  np.testing.assert_allclose(grad_NMX, expected_grad_NMX, rtol=1e-10, atol=1e-12)


def test_lower_precision_is_raised_and_higher_kept(x64):
  logits_KX = np.linspace(-1, 1, 16).reshape(16, 1)
  matrix = jax.jit(birkhoff_sinkhorn().matrix, static_argnums=1, compiler_options=COMPILER)
  low = matrix(jnp.asarray(logits_KX, jnp.bfloat16), 4)
  assert low.dtype == jnp.float32 and matrix(jnp.asarray(logits_KX), 4).dtype == jnp.float64
  rounded = jnp.asarray(logits_KX, jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(low, matrix(rounded, 4))


@pytest.mark.parametrize(
  'kwargs, message',
  (
    ({'preset': 'papers'}, 'unknown preset'),
    ({'iterations': 0}, 'at least 1'),
    ({'order': 'diagonals'}, 'order'),
    ({'eps_mode': 'max'}, 'eps_mode'),
  ),
)
def test_bad_parameters_are_named(kwargs, message):
  with pytest.raises(ValueError, match=message):
    birkhoff_sinkhorn(**kwargs)
