"""JAX's settings that decide numbers, held at what a run id stands for whatever the environment says."""

import contextlib
import os
import re
from collections.abc import Iterator

import jax

from mhc_jax.errors import require
from mhc_jax.log import say_once

# Each changes the start weights, updates or samples of a run, as trying every option of jax.config showed.
# x64 has a field of its own (model.dtype); switches of JAX that only raise or print are left to the user.
HELD = {
  'jax_default_prng_impl': 'threefry2x32',
  'jax_threefry_partitionable': True,
  'jax_random_seed_offset': 0,
  'jax_enable_custom_prng': False,
  'jax_default_matmul_precision': None,
  'jax_numpy_dtype_promotion': 'standard',
  'jax_disable_jit': False,
  'jax_disable_most_optimizations': False,
  'jax_allow_f16_reductions': True,
  'jax_softmax_custom_jvp': False,
  'jax_high_dynamic_range_gumbel': False,
}
# Flags of XLA that trade exactness for speed.
_LOOSE = re.compile(r'--xla\w*(?:fast_math|excess_precision)\w*(?:=true|=1)?(?!\S)')


@contextlib.contextmanager
def held() -> Iterator[None]:
  """Sets JAX's settings to HELD for the block, saying which of them were others."""
  values = jax.config.values  # some options are not attributes, and another JAX may lack one
  found = {name: getattr(jax.config, name, values[name]) for name in HELD if name in values}
  changed = {name: value for name, value in found.items() if value != HELD[name]}
  for name, value in changed.items():
    say_once(f'warning: {name.upper()}={value} would change the numbers of a run id: {HELD[name]} is used')
    jax.config.update(name, HELD[name])
  for flag in _LOOSE.findall(os.environ.get('XLA_FLAGS', '')):  # read once, when JAX starts: not to be held
    say_once(
      f'warning: {flag} in XLA_FLAGS changes the numbers of a run id: unset it where runs are compared'
    )
  try:
    yield
  finally:
    for name, value in changed.items():
      jax.config.update(name, value)


def check_precision(dtype: str) -> None:
  """Raises ConfigError unless JAX_ENABLE_X64 is what models of this dtype are trained with."""
  require(
    (dtype == 'float64') == jax.config.jax_enable_x64,
    'model.dtype=float64 needs the environment variable JAX_ENABLE_X64=1'
    if dtype == 'float64'
    else f'JAX_ENABLE_X64=1 would change the numbers of model.dtype={dtype}: unset it, or train in float64',
  )
