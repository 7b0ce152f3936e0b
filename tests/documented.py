"""The blocks of README, docs/ and its notebooks, and how they are tried: small, in this process, or parsed.

A block in ```sh or ```python is run. One that cannot be is marked in the line above it, <!-- parsed: why -->:
its lines must be shell, and every command of ours must have arguments that exist and a configuration that
resolves. ```text is no command. A notebook's cells are Python, or a line for the shell; %pip is passed over.
"""

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

from mhc_jax import __main__ as mhc
from mhc_jax.config_file import parse
from mhc_jax.plan import resolve

ROOT = Path(__file__).parent.parent
PAGES = ('README.md', *sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'docs').rglob('*.md')))
FENCE = re.compile(
  r'^(?:<!-- parsed: (?P<why>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$', re.M | re.S
)
INLINE = re.compile(r'`(mhc [^`]+)`')
SCRIPTS = {'slurm.sh': 'train', 'slurm_sweep.sh': 'sweep', 'tpu_slice.sh': 'train'}  # what they pass on to
CORPUS = f'--config.data.name=text_files:{ROOT}/analysis/*.py'
# What a command that trains is given besides: seconds instead of minutes.
SMALL = {
  'data': {'seq_len': 16, 'batch_size': 8},
  'model': {'width': 16, 'depth': 1, 'heads': 2},
  'evaluation': {'sequences': 8, 'batch_size': 8},
  'log': {'tensorboard': False, 'diagnostics_every_steps': 2},
  'duration': {'steps': 2},
}
TINY = [f'--config.{a}.{b}={value}' for a, section in SMALL.items() for b, value in section.items()]
TINY += ['--config.model.connection.streams=2']


@dataclasses.dataclass(frozen=True)
class Block:
  """A fenced block; why: the reason for which it is parsed only."""

  language: str
  text: str
  why: str | None


class Parsed(BaseException):
  """A command's arguments are read: (namespace, what is left)."""


def blocks(page: str) -> list[Block]:
  """All fenced blocks of a page, or cells of a notebook, in order."""
  if page.endswith('.ipynb'):
    cells = [cell for cell in json.loads((ROOT / page).read_text())['cells'] if cell['cell_type'] == 'code']
    texts = [''.join(cell['source']) for cell in cells]
    kinds = {'!': 'sh', '%': 'text'}
    return [Block(kinds.get(text[0], 'python'), text.removeprefix('!'), None) for text in texts]
  return [Block(m['language'], m['text'], m['why']) for m in FENCE.finditer((ROOT / page).read_text())]


def commands(text: str) -> list[list[str]]:
  """The words of every command line, without comments, settings of variables and prompts."""
  lines = text.replace('\\\n', ' ').splitlines()
  found = [shlex.split(line, comments=True) for line in lines]
  found = [words for words in found if words and words[0] not in ('source', 'export')]
  found = [words[next(i for i, word in enumerate(words) if '=' not in word) :] for words in found]
  return [[first.removeprefix('.venv/bin/'), *rest] for first, *rest in found]


@contextlib.contextmanager
def _only_parsing():
  """argparse raises Parsed once it has read a command line."""
  known = argparse.ArgumentParser.parse_known_args

  def read(strict):
    def parse_args(parser, args=None, namespace=None):
      with mock.patch.object(argparse.ArgumentParser, 'parse_known_args', known):
        found, rest = known(parser, args, namespace)
      if strict and rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
      raise Parsed(found, rest)

    return parse_args

  with mock.patch.multiple(argparse.ArgumentParser, parse_args=read(True), parse_known_args=read(False)):
    yield


def check_arguments(words: list[str], whole: bool = True) -> None:
  """mhc NAME ...: the arguments exist, the configurations resolve; nothing is done.

  whole: False allows for a command in a sentence, which leaves arguments out.
  """
  name, arguments = words[1], words[2:]
  if name in ('--help', '--print-config'):
    return
  main = mhc.main_of(name)
  if '--help' in arguments:
    return

  def error(parser, message):
    if whole or 'arguments are required' not in message:
      raise AssertionError(f'{shlex.join(words)}: {message}')
    raise Parsed(None, [])

  try:
    with _only_parsing(), mock.patch.object(argparse.ArgumentParser, 'error', error):
      main(arguments)
    raise AssertionError(f'{shlex.join(words)} reads no arguments')
  except Parsed as parsed:
    args, overrides = parsed.args
  if args is None:
    return
  if name == 'train' and args.config is None:
    assert not whole or args.print_config or args.workdir, 'names neither a config nor a run'
  elif name == 'train':
    resolve(parse(args.config, overrides), '')
  elif name == 'sweep' and args.name not in (None, 'NAME', 'NAME:large', 'NAME:small'):
    importlib.import_module('mhc_jax.experiments.planning').configs_of(args.name, overrides, args.seeds)
  else:
    assert all(word.startswith('--config.') and '=' in word for word in overrides), overrides


def check_block(text: str) -> None:
  """A block that is parsed only: shell, whose commands of ours have arguments that exist."""
  subprocess.run(['bash', '-n'], input=text, text=True, check=True)
  for words in commands(text):
    script = next((word for word in words if word.startswith('experiments/launch/')), None)
    if words[0] == 'mhc':
      check_arguments(words)
    elif script:
      assert os.access(ROOT / script, os.X_OK), script
      passed = words[words.index(script) + 1 :]
      if passed not in (['setup'], ['stop']):
        check_arguments(['mhc', SCRIPTS[Path(script).name], *passed])
    elif words[0].endswith(('make', 'python')) or words[0] == 'cd':
      check_other(words)


def check_other(words: list[str]) -> None:
  """make by its dry run, `python -m MODULE` up to its arguments; `python FILE` is an example."""
  if words[0] == 'make':
    subprocess.run(['make', '--dry-run', *words[1:]], cwd=ROOT, check=True, capture_output=True)
  elif words[1:2] == ['-m']:
    if words[2] in ('pytest', 'pip', 'venv'):
      return
    with mock.patch.object(sys, 'argv', words[2:]), contextlib.suppress(Parsed), _only_parsing():
      with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '.* found in sys.modules', RuntimeWarning)  # of another test
        runpy.run_module(words[2], run_name='__main__')
  else:
    assert words[1].startswith('examples/') and (ROOT / words[1]).exists()  # tests/test_examples.py runs all


def run_mhc(words: list[str]) -> None:
  """A command as its user gives it, but small, in one process, on this project's own files as text."""
  name, arguments = words[1], words[2:]
  if name == 'train':
    arguments = [*arguments, *TINY, CORPUS]
  elif name == 'sweep':
    arguments = shlex.split(re.sub(r'--(workers|seeds) \d+', r'--\1 1', shlex.join(arguments)))
  elif name in ('report', 'fit'):
    arguments = [*arguments, '--resamples', '4']
  code = mhc.main([name, *arguments])
  assert code == 0, f'{shlex.join(words)} ends with {code}'
