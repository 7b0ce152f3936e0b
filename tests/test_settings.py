"""JAX's settings that decide numbers: held by a run whatever they were, and x64 only with float64."""

import jax
import pytest

from mhc_jax import settings
from mhc_jax.errors import ConfigError

OTHERS = {'jax_default_prng_impl': 'rbg', 'jax_threefry_partitionable': False, 'jax_random_seed_offset': 3}


def test_start_weights_do_not_depend_on_the_settings_of_the_process(capsys):
  def draw():
    with settings.held():
      return float(jax.random.normal(jax.random.key(0), (3,))[1])

  expected = draw()
  assert not capsys.readouterr().err
  for name, value in OTHERS.items():
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
      assert float(jax.random.normal(jax.random.key(0), (3,))[1]) != expected, name
      assert draw() == expected, name
      assert getattr(jax.config, name) == value, 'left as it was'
    finally:
      jax.config.update(name, before)
    assert f'warning: {name.upper()}={value} would change' in capsys.readouterr().err


@pytest.mark.parametrize('x64,dtype,words', ((True, 'float32', 'unset it'), (False, 'float64', 'needs the')))
def test_x64_goes_with_float64_alone(x64, dtype, words):
  with jax.enable_x64(x64):
    settings.check_precision('float64' if x64 else 'bfloat16')
    with pytest.raises(ConfigError, match=words):
      settings.check_precision(dtype)
