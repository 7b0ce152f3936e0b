"""Shared test set-up: 8 fake CPU devices, strict rank promotion, float64 on request."""

import os

os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
  """Runs the test with float64 enabled."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng() -> np.random.Generator:
  """A generator with a fixed seed."""
  return np.random.default_rng(0)
