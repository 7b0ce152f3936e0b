"""Shared test set-up: 8 fake CPU devices, strict rank promotion, float64 on request."""

import gc
import importlib.metadata
import os
import pathlib
import signal

# Compiling is most of the time: unoptimised code takes a third of it. One thread each: pytest-xdist runs
# a process per core.
FLAGS = (
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
  '--xla_cpu_multi_thread_eigen=false',
)
if importlib.metadata.version('jaxlib').startswith('0.10.'):  # newer ones end at a flag they do not know
  FLAGS = (*FLAGS, '--xla_cpu_use_fusion_emitters=false')  # a fifth of the time
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), *FLAGS)).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')  # as many that wait for each other take a hundredfold
CACHE = pathlib.Path(__file__).parents[1] / '.pytest_cache'
os.environ['XDG_CACHE_HOME'] = str(CACHE)  # not the user's
# Tests in other processes, and the next time, find what one has compiled.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(CACHE / 'jax'))
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', '-1')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')
# Where a line of a program stood in Python is no part of what is tested, and a tenth of the time.
os.environ.setdefault('JAX_TRACEBACK_IN_LOCATIONS_LIMIT', '0')
# Nothing is fetched, and what is prepared by default is not the user's.
os.environ['PIP_NO_INDEX'] = '1'
os.environ['TFDS_DATA_DIR'] = str(CACHE / 'data')

import jax
import numpy as np
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
# Who starts the tests in the background of a script has it ignored, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
  """Traces are many small objects that live on: to look for cycles among them is a tenth of the time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(100_000, 20, 50)


@pytest.fixture
def x64():
  """Runs the test with float64 enabled."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def rng() -> np.random.Generator:
  """A generator with a fixed seed."""
  return np.random.default_rng(0)
