"""`mhc COMMAND ...`: every command of the project under one name; `python -m mhc_jax` is the same.

Nothing is imported before the command is known, so that the list and mistakes cost nothing. In mhc_jax this
file alone knows of experiments/ and analysis/, which are mhc_jax.experiments and mhc_jax.analysis where the
project is installed.
"""

import difflib
import sys

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError


def train(argv: list[str]) -> int:
  """train one model; the same command goes on where it stopped"""
  from mhc_jax.train import main

  return main(argv)


def evaluate(argv: list[str]) -> int:
  """validation loss of a run's last checkpoint, and a sample of its text"""
  from mhc_jax.evaluate import main

  return main(argv)


def sweep(argv: list[str]) -> int:
  """run an experiment: many runs, resumable, on one machine or many"""
  from mhc_jax.experiments.sweep import main

  return main(argv)


def report(argv: list[str]) -> int:
  """results.csv, fits, figures and one HTML page of a sweep"""
  from mhc_jax.analysis.report import main

  return main(argv)


def plots(argv: list[str]) -> int:
  """the papers' figures from a sweep"""
  from mhc_jax.analysis.plots import main

  return main(argv)


def fit(argv: list[str]) -> int:
  """fit a scaling law to the points of a CSV file"""
  from mhc_jax.analysis.fit import main

  return main(argv)


def reproduce(argv: list[str]) -> int:
  """published scaling-law fits, reproduced from their data"""
  from mhc_jax.analysis.reproduce import main

  return main(argv)


def coverage(argv: list[str]) -> int:
  """how often the intervals of a fit hold the truth, by simulation"""
  from mhc_jax.analysis.coverage import main

  return main(argv)


def compile(argv: list[str]) -> int:
  """memory and predicted speed on chips that are not here"""
  from mhc_jax.experiments.compile.__main__ import main

  return main(argv)


def overhead(argv: list[str]) -> int:
  """mHC over residual at the paper's sizes, compiled"""
  from mhc_jax.experiments.compile.overhead import main

  return main(argv)


def bench(argv: list[str]) -> int:
  """measured ratios: steps, constraints, communication, memory"""
  from mhc_jax.experiments.bench.__main__ import main

  return main(argv)


def env(argv: list[str]) -> int:
  """versions, devices, memory and flags: what a report of a fault needs"""
  from mhc_jax.environment import main

  return main(argv)


COMMANDS = {
  command.__name__: command
  for command in (
    *(train, evaluate, sweep, report, plots, fit, reproduce, coverage),
    *(compile, overhead, bench, env),
  )
}

EXAMPLES = """examples:
  mhc train --config laptop:smoke --workdir runs/smoke
  mhc sweep quick --workers 2
  mhc report runs/quick
  mhc COMMAND --help
"""


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the command's exit code, 2 for an unknown one."""
  name, *rest = (sys.argv[1:] if argv is None else argv) or ['--help']
  if name in ('-h', '--help', 'help'):
    lines = [f'  {command:10} {function.__doc__}' for command, function in COMMANDS.items()]
    print('usage: mhc COMMAND ...\n\nMeasure how constrained hyper-connections scale.\n', *lines, sep='\n')
    print(f'\n{EXAMPLES}', end='')
    return 0
  if name == '--version':
    from importlib.metadata import version

    print(version('mhc_jax'))
    return 0
  return end_with_message(lambda: _command(name)(rest))


def _command(name: str):
  if name not in COMMANDS:
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(COMMANDS)}'
    raise ConfigError(f'no command {name!r}; {hint}')
  return COMMANDS[name]


if __name__ == '__main__':
  sys.exit(main())
