"""`mhc`: one name for every command, cheap until the command is known; `mhc env`."""

import json
import os
import re
import signal
import subprocess
import sys

import jax
import pytest

from mhc_jax import __main__ as mhc
from mhc_jax import environment
from mhc_jax.command import end_with_message
from mhc_jax.errors import OutOfMemoryError


def test_every_command_is_listed_with_what_it_does(capsys):
  assert mhc.main([]) == 0
  said = capsys.readouterr().out
  assert all(re.search(rf'^  {name} +\w.*', said, re.MULTILINE) for name in mhc.COMMANDS)
  wanted = 'train evaluate export import tokenizer sweep report fit reproduce plots compile overhead bench'
  wanted += ' energy coverage env verify'
  assert sorted(mhc.COMMANDS) == sorted(wanted.split())


@pytest.mark.parametrize('name', mhc.COMMANDS)
def test_every_command_explains_itself(name, capsys):
  with pytest.raises(SystemExit) as ended:
    mhc.main([name, '--help'])
  said = capsys.readouterr().out
  assert ended.value.code == 0 and said.startswith(f'usage: mhc {name} ')
  assert 'python -m' not in said


def test_mistakes_end_in_one_line(capsys):
  assert mhc.main(['tarin']) == 2
  assert capsys.readouterr().err == "error: no command 'tarin'; did you mean train?\n"
  assert mhc.main(['train', '--config', 'laptob', '--workdir', 'x']) == 2
  assert re.match(r"error: no config file 'laptob'; by name there are laptop, .*\n$", capsys.readouterr().err)


@pytest.mark.parametrize(
  'error',
  (
    MemoryError(),
    RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nof 9 GiB'),
    OutOfMemoryError('out of memory: about 1 GiB; what helps'),
  ),
)
def test_memory_that_is_full_is_one_line(error, capsys):
  def main():
    raise error

  assert end_with_message(main) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: out of memory')
  assert ('what helps' in line) == (line == f'error: {error}') == isinstance(error, OutOfMemoryError)


@pytest.mark.parametrize('arguments', ('', '--version', 'tarin'))
def test_the_list_of_commands_needs_no_reader(arguments):
  with open('/dev/full', 'w') as full:
    ended = subprocess.run([sys.executable, '-m', 'mhc_jax', *arguments.split()], stdout=full, stderr=full)
  assert ended.returncode == (2 if arguments == 'tarin' else 0)


def test_a_setting_that_jax_refuses_is_one_line():
  settings = os.environ | {'JAX_DEFAULT_PRNG_IMPL': 'none_such'}
  command = [sys.executable, '-m', 'mhc_jax', 'env']
  ended = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60)
  assert ended.returncode == 2 and ended.stderr.startswith('error: the environment has a setting that JAX')
  assert len(ended.stderr.splitlines()) == 1 and 'jax_default_prng_impl' in ended.stderr


@pytest.mark.parametrize(
  ('arguments', 'unwanted'),
  [([], 'jax numpy argparse'), (['fit', '--help'], 'jax scipy.optimize matplotlib')],
  ids=['mhc', 'fit'],
)
def test_help_does_not_wait_for_what_it_does_not_use(arguments, unwanted):
  code = (
    'import contextlib, json, sys; from mhc_jax.__main__ import main\n'
    f'with contextlib.suppress(SystemExit): main({arguments!r})\n'
    'print(json.dumps(sorted(sys.modules)))'
  )
  answer = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True, timeout=60
  )
  assert not set(unwanted.split()) & set(json.loads(answer.stdout.splitlines()[-1]))


def test_env_names_what_a_report_of_a_fault_needs(capsys):
  assert environment.main([]) == 0
  said = capsys.readouterr().out
  for part in ('revision', 'python', f'jax {jax.__version__}', 'GiB free', 'cpu (cpu)', 'JAX_PLATFORMS=cpu'):
    assert part in said, part


def test_env_warns_of_an_accelerator_that_jax_does_not_see(monkeypatch, capsys):
  monkeypatch.setattr(environment.glob, 'glob', lambda files: ['x'] if 'nvidia' in files else [])
  assert environment.main([]) == 1
  assert 'an NVIDIA GPU is here, but JAX does not see it: JAX_PLATFORMS=cpu' in capsys.readouterr().err
  monkeypatch.delenv('JAX_PLATFORMS')
  assert 'cuda13' in environment.warnings()[0] and len(environment.warnings()) == 1


def test_a_second_interrupt_while_python_ends_is_no_traceback():
  code = (
    'import atexit, os, signal, sys; from mhc_jax.command import end_with_message\n'
    'atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))\n'
    'def main(): raise KeyboardInterrupt\n'
    'sys.exit(end_with_message(main))'
  )
  ended = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
  assert ended.returncode in (130, -signal.SIGINT) and ended.stderr.startswith('interrupted')
  assert 'Traceback' not in ended.stderr


def test_an_interrupt_of_an_import_ends_at_once(monkeypatch):
  """By the signal itself: what C++ makes of it would be a traceback."""
  seen = []
  monkeypatch.setattr(mhc, 'main_of', lambda name: lambda rest: seen.append(signal.getsignal(signal.SIGINT)))
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    real = mhc.main_of
    monkeypatch.setattr(
      mhc, 'main_of', lambda name: seen.append(signal.getsignal(signal.SIGINT)) or real(name)
    )
    mhc.main(['train'])
  finally:
    signal.signal(signal.SIGINT, before)
  assert seen == [signal.SIG_DFL, signal.default_int_handler], 'while it imports, and afterwards'
