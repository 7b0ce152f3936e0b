"""Memory and programs that a process keeps, in processes of their own."""

import json
import os
import pathlib
import subprocess
import sys

PROGRAM = """
import json, os, sys, jax, jax.numpy as jnp
from mhc_jax import runtime
runtime.keep_programs('off' not in sys.argv)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
hits = []
jax.monitoring.register_event_listener(lambda name, **more: hits.append(name))
value = float(jax.jit(lambda x: jnp.sin(x).sum())(jnp.arange(8.0)))
hits = sum(name.endswith('cache_hits') for name in hits)
print(json.dumps([value, hits, jax.config.jax_compilation_cache_dir]))
"""
FAULTS = """
import resource, sys
from mhc_jax import runtime
if 'keep' in sys.argv:
  runtime.keep_memory()
b'1' * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
  b'1' * 2**26  # 64 MiB: 16384 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
ROOT = pathlib.Path(__file__).parents[1]


def python(program, *arguments, **environment):
  """(what it printed, its messages), without the settings of these tests."""
  inherited = {k: v for k, v in os.environ.items() if not k.startswith(('JAX_', 'MALLOC_', 'XLA_'))}
  environment = inherited | {'JAX_PLATFORMS': 'cpu'} | environment
  done = subprocess.run(
    [sys.executable, '-c', program, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout), done.stderr


def test_a_second_process_finds_what_the_first_has_compiled_and_damage_is_said_once(tmp_path):
  (value, hits, folder), _ = python(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
  assert hits == 0 and folder.startswith(str(tmp_path / 'mhc_jax'))
  (again, hits, _), _ = python(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
  assert again == value and hits >= 2  # sin and its sum, and arange
  for entry in pathlib.Path(folder).glob('*-cache'):
    entry.write_bytes(b'damaged')
  (again, hits, _), messages = python(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
  assert again == value and hits == 0
  assert messages.count('cannot be read or written') == 1 and 'UserWarning' not in messages


def test_the_cache_can_be_off_elsewhere_or_impossible(tmp_path):
  (_, _, folder), _ = python(PROGRAM, 'off', XDG_CACHE_HOME=str(tmp_path / 'a'))
  assert folder is None and not (tmp_path / 'a').exists()
  own = str(tmp_path / 'own')
  (_, _, folder), _ = python(PROGRAM, XDG_CACHE_HOME=str(tmp_path / 'b'), JAX_COMPILATION_CACHE_DIR=own)
  assert folder == own and os.listdir(own)
  (tmp_path / 'file').touch()
  (_, hits, folder), messages = python(PROGRAM, XDG_CACHE_HOME=str(tmp_path / 'file'))
  assert folder is None and hits == 0 and 'Traceback' not in messages


def test_freed_memory_stays():
  returned, _ = python(FAULTS)
  kept, _ = python(FAULTS, 'keep')
  assert returned > 10 * 16_000 > 10 * kept  # 4 KiB pages, each of the ten arrays anew
  inherited, _ = python(FAULTS, MALLOC_MMAP_THRESHOLD_=f'{2**30}', MALLOC_TRIM_THRESHOLD_=f'{2**31 - 1}')
  assert 10 * inherited < returned
