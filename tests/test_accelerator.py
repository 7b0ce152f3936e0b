"""The kernels on a real accelerator against XLA's programs: `pytest -m accelerator`, skipped where none is.

tests/conftest.py asks for CPU devices: set JAX_PLATFORMS=cuda or tpu.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import chips
from mhc_jax import hyper_connection as hc
from mhc_jax import optimizer as optim
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.kernels import attention, boundary, lanes
from mhc_jax.kernels.choice import chip_of
from mhc_jax.layers.attention import causal_mask, formula
from mhc_jax.memory import memory_in_use, memory_of
from mhc_jax.model_config import build_model
from mhc_jax.presets import connection_spec
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs

pytestmark = [
  pytest.mark.accelerator,
  pytest.mark.skipif(jax.default_backend() == 'cpu', reason='no accelerator is here'),
]


def normal(seed, shape, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


def with_gradients(function, *arguments):
  """All outputs, and the gradients of their product with random numbers."""

  @jax.jit
  def run(*arguments):
    outputs, pull = jax.vjp(function, *arguments)
    leaves, tree = jax.tree.flatten(outputs)
    cotangents = [normal(i, leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)]
    return outputs, pull(jax.tree.unflatten(tree, cotangents))

  # Products of float32 in float32, in XLA's programs at least.
  with jax.default_matmul_precision('highest'):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), run(*arguments))


def assert_close(found, expected, tolerance):
  """In the root mean square of each array."""
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    if other.size:
      assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


# A product of numbers rounded to bfloat16, or TensorFloat-32 of 11 bits, is off by 2e-3; gradients have some.
TOLERANCE = {'float32': 1e-2, 'bfloat16': 2e-2}


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('sizes', [(4, 2, 128, 128), (4, 4, 192, 128)])
def test_attention(sizes, dtype):
  heads, groups, head_dim, value_dim = sizes
  shapes = ((heads, head_dim), (groups, head_dim), (groups, value_dim))
  arrays = [normal(i, (2, 1024, *shape), dtype) for i, shape in enumerate(shapes)]
  segments = jnp.cumsum(jax.random.bernoulli(jax.random.key(9), 1 / 300, (2, 1024)), 1, dtype=jnp.int32)
  kernel = attention.triton if chip_of('auto', None).platform == 'gpu' else attention.splash
  found = with_gradients(lambda q, k, v: kernel(q, k, v, segments, head_dim**-0.5), *arrays)
  expected = with_gradients(lambda q, k, v: formula(q, k, v, causal_mask(segments), head_dim**-0.5), *arrays)
  assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize('name', CONSTRAINTS)
def test_constraints(name):
  constraint, chip = CONSTRAINTS[name](), chip_of('auto', None)
  reason = lanes.why_not(constraint, 4, chip.platform)
  if reason is not None:
    pytest.skip(reason)
  coords = normal(0, (constraint.num_coordinates(4), 2, 1024))
  found = with_gradients(lambda c: lanes.matrix_kernel(constraint, c, 4, chip.platform), coords)
  assert_close(found, with_gradients(lambda c: constraint.matrix(c, 4), coords), 1e-4)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('name', ['identity', 'hc', 'mhc'])
def test_boundary(name, dtype):
  spec, chip, width, tokens = connection_spec(name, streams=4), chip_of('auto', None), 1024, (2, 1024)
  reason = boundary.why_not(spec, width, 2048, jnp.dtype(dtype), chip)
  if reason is not None:
    pytest.skip(reason)
  params = hc.init_params(jax.random.key(0), spec, width, 0)
  params = jax.tree.map(lambda x: x + 0.1 * normal(1, x.shape), params)
  start = hc.Pending(normal(2, (4, *tokens, width), dtype), pre_NBT=None)
  first = boundary.start(start, spec)
  arrays = (
    first.x_NBTD,
    normal(3, (*tokens, width), dtype),
    first.mix_MBT + 0.1 * normal(4, first.mix_MBT.shape),
  )

  def kernel(params, *pending):
    return boundary.boundary(params, boundary.Pending(*pending), spec, jnp.int32(0), chip)[:2]

  def definition(params, *pending):
    return hc.boundary(params, boundary.definition(boundary.Pending(*pending), spec), spec)[:2]

  found, expected = (with_gradients(f, params, *arrays) for f in (kernel, definition))
  assert_close(found, expected, TOLERANCE[dtype])


def losses(kernels):
  """Of three updates on one batch."""
  c = base_config()
  c.model.update({'width': 256, 'depth': 2, 'heads': 2, 'dtype': 'bfloat16', 'kernels': kernels})
  c.model.connection.name, c.data.batch_size, c.data.seq_len = 'mhc', 4, 256
  c.optimizer.warmup_fraction = 0.05
  model, optimizer = dataclasses.replace(build_model(c), vocab_size=256), build_optimizer(c)
  of_model = programs(model, optimizer, make_mesh({}))
  tokens = jax.random.randint(jax.random.key(0), (4, 256), 0, 255)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': jnp.ones(tokens.shape)}
  batch['segments'] = jnp.zeros(tokens.shape, jnp.int32)
  values = {'lr': 1e-3, 'weight_decay': 0.1, 'num_steps': 100, 'warmup': optim.warmup_steps(optimizer, 100)}
  hparams = {name: jnp.float32(value) for name, value in values.items()}
  state, found = of_model.init(jax.random.key(0)), []
  for _ in range(3):
    state, metrics = of_model.step(state, batch, hparams)
    found.append(float(metrics['loss']))
  return found


def test_three_updates_of_a_small_model():
  kernels, xla = losses('pallas'), losses('xla')
  assert kernels[0] > kernels[2]
  np.testing.assert_allclose(kernels, xla, rtol=2e-3)  # bfloat16 has steps of 8e-3; the mean over 1024 tokens


def test_an_accelerator_says_what_is_in_use_and_is_a_chip_of_the_table():
  found, device = memory_in_use(make_mesh({})), jax.devices()[0]
  assert 0 < found['device/bytes_in_use'] <= found['device/peak_bytes_in_use'] <= memory_of(device)
  chip = chips.chip_of(device.device_kind)
  assert chip.memory == pytest.approx(memory_of(device), rel=0.3), 'JAX takes three quarters of a GPU'
