"""`mhc COMMAND ...`: every command of the project under one name; `python -m mhc_jax` is the same.

Nothing is imported before the command is known, so that the list and mistakes cost nothing. In mhc_jax this
file alone knows of experiments/ and analysis/, which are mhc_jax.experiments and mhc_jax.analysis where the
project is installed.
"""

import contextlib
import difflib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError
from mhc_jax.log import say

COMMANDS = {
  'train': 'train one model; the same command goes on where it stopped',
  'evaluate': "validation loss of a run's last checkpoint, and a sample of its text",
  'export': "a run's weights as safetensors, config.json and a model card",
  'import': 'the folder of a run from published weights',
  'tokenizer': 'train a tokenizer on a corpus',
  'sweep': 'run an experiment: many runs, resumable, on one machine or many',
  'report': 'results.csv, fits, figures and one HTML page of a sweep',
  'plots': "the papers' figures from a sweep",
  'verify': 'published results against this code: the cheapest runs trained again',
  'fit': 'fit a scaling law to the points of a CSV file',
  'reproduce': 'published scaling-law fits, reproduced from their data',
  'coverage': 'how often the intervals of a fit hold the truth, by simulation',
  'compile': 'memory and predicted speed on chips that are not here',
  'overhead': "mHC over residual at the paper's sizes, compiled",
  'energy': 'joules of a token and of equal loss, beside the claims: docs/energy.md',
  'bench': 'measured ratios: steps, constraints, communication, memory',
  'env': 'versions, devices, memory and flags: what a report of a fault needs',
}
HEAD = """usage: mhc COMMAND ...

Measure how constrained hyper-connections scale.
"""
EXAMPLES = """
examples:
  mhc train --config laptop:smoke --workdir runs/smoke
  mhc sweep quick --workers 2
  mhc report runs/quick
  mhc --print-config          # every field that --config.section.field=value can set
  mhc COMMAND --help"""


def main_of(command: str) -> Callable[[list[str]], int]:
  """The command's main, imported; raises ConfigError for an unknown one, naming the nearest."""
  match command:
    case 'train':
      from mhc_jax.train import main
    case 'evaluate':
      from mhc_jax.evaluate import main
    case 'export':
      from mhc_jax.weights.exporting import main
    case 'import':
      from mhc_jax.weights.importing import main
    case 'tokenizer':
      from mhc_jax.tokenizer_training import main
    case 'sweep':
      from mhc_jax.experiments.sweep import main
    case 'report':
      from mhc_jax.analysis.report import main
    case 'plots':
      from mhc_jax.analysis.plots import main
    case 'verify':
      from mhc_jax.experiments.verify import main
    case 'fit':
      from mhc_jax.analysis.fit import main
    case 'reproduce':
      from mhc_jax.analysis.reproduce import main
    case 'coverage':
      from mhc_jax.analysis.coverage import main
    case 'compile':
      from mhc_jax.experiments.compile.__main__ import main
    case 'overhead':
      from mhc_jax.experiments.compile.overhead import main
    case 'energy':
      from mhc_jax.analysis.energy import main
    case 'bench':
      from mhc_jax.experiments.bench.__main__ import main
    case 'env':
      from mhc_jax.environment import main
    case _:
      near = difflib.get_close_matches(command, COMMANDS, 1)
      hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(COMMANDS)}'
      raise ConfigError(f'no command {command!r}; {hint}')
  return main


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the command's exit code, 2 for an unknown one."""
  return end_with_message(lambda: _main((sys.argv[1:] if argv is None else argv) or ['--help']))


@contextlib.contextmanager
def _quiet_interrupt() -> Iterator[None]:
  """Ctrl-C ends the process at once: libraries of C++ make a traceback of an interrupted import."""
  ours = threading.current_thread() is threading.main_thread()
  before = signal.getsignal(signal.SIGINT)
  if ours and before is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    if ours and before is signal.default_int_handler:
      signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _said_if_slow(line: str) -> Iterator[None]:
  """Says the line where the block takes longer than a second: JAX and the rest from a cold disk do."""
  timer = threading.Timer(1.0, say, [line])
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def _main(argv: list[str]) -> int:
  command, *rest = argv
  if command in ('-h', '--help', 'help'):
    print(HEAD, *(f'  {name:10} {words}' for name, words in COMMANDS.items()), EXAMPLES, sep='\n')
    return 0
  if command == '--version':
    from importlib.metadata import version

    print(version('mhc_jax'))
    return 0
  if command == '--print-config':
    command, rest = 'train', argv
  try:
    with _quiet_interrupt(), _said_if_slow(f'mhc {command}: loading'):
      run = main_of(command)
  except ValueError as error:
    if 'jax' in sys.modules or 'JAX' not in str(error):
      raise
    # JAX reads its settings while it is imported, and none of it is left where it takes one of them amiss.
    raise ConfigError(f'the environment has a setting that JAX refuses: {error}') from None
  return run(rest)


if __name__ == '__main__':
  sys.exit(main())
