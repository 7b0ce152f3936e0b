"""`--xla-flags preset`: only flags that XLA knows, and never in place of the user's."""

import os
import subprocess
import sys

import pytest

from mhc_jax import runtime

STARTS = 'import jax; print(jax.device_count())'


def started(flags):
  """The exit code of JAX with these flags."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  return subprocess.run([sys.executable, '-c', STARTS], env=environment, capture_output=True).returncode


def test_the_presets_of_gpus_are_known_to_this_xla_and_an_unknown_flag_is_left_out(monkeypatch, capsys):
  variable, flags = runtime.PRESETS['gpu']
  monkeypatch.setitem(runtime.PRESETS, 'gpu', (variable, (*flags, '--xla_gpu_none_such=true')))
  monkeypatch.setenv(variable, '--xla_cpu_multi_thread_eigen=false --xla_gpu_triton_gemm_any=false')
  runtime.use_preset('gpu')
  given = os.environ[variable].split()
  assert given[:2] == ['--xla_cpu_multi_thread_eigen=false', '--xla_gpu_triton_gemm_any=false']
  assert given[2:] == list(flags[:-1]), 'what the user has set wins'
  said = capsys.readouterr().err
  assert (
    said.startswith('XLA_FLAGS gets --xla_gpu_enable') and "not known here: ['xla_gpu_none_such']" in said
  )
  assert started(os.environ[variable]) == 0
  assert started(f'{os.environ[variable]} --xla_gpu_none_such=true') != 0, 'the reason for all this'


@pytest.mark.parametrize(
  ('asked', 'files', 'package', 'found'),
  [
    ('', '/dev/nvidia0', 'jax_cuda12_plugin', 'gpu'),
    ('', '/dev/nvidia0', 'none', None),
    ('', '', 'jax_cuda12_plugin', None),
    ('cpu', '/dev/nvidia0', 'jax_cuda12_plugin', None),
    ('cuda,cpu', '', 'jax_cuda13_plugin', 'gpu'),
    ('', '/dev/vfio/0', 'libtpu', 'tpu'),
    ('tpu', '/dev/nvidia0', 'libtpu', 'tpu'),
  ],
)
def test_the_platform_is_known_before_jax_starts(asked, files, package, found, monkeypatch):
  monkeypatch.setattr(runtime.glob, 'glob', lambda pattern: [files] * files.startswith(pattern.split('[')[0]))
  monkeypatch.setattr(runtime.importlib.util, 'find_spec', lambda name: name == package or None)
  assert runtime.platform_of({'JAX_PLATFORMS': asked} if asked else {}) == found


def test_a_cpu_has_no_preset(capsys, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--a')
  runtime.use_preset(None)
  assert os.environ['XLA_FLAGS'] == '--a' and 'none for CPU' in capsys.readouterr().err
