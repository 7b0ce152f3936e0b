"""What a run's loss differs by where only the machine's rounding does: rounding.csv, for `mhc verify`.

  python -m experiments.rounding            # all of it anew: some twenty minutes of one core
  python -m experiments.rounding --missing  # what the file lacks, where nothing changed that rounds

The same runs, equal seeds and data, by processes that may use other instructions or several threads: sums
come in another order, and updates make the difference larger. A GPU's or another JAX's rounding differs
likewise. Threads alone changed no bit of 16 losses, so the process with threads has other instructions, too.
"""

import argparse
import os
import subprocess
import sys
import tempfile

import pandas as pd
from ml_collections import ConfigDict

from mhc_jax import train
from mhc_jax.command import end_with_message
from mhc_jax.log import say
from mhc_jax.plan import resolve

from . import protocol
from .study import ARMS
from .verify import ROUNDING, deviations
from .workers import ONE_THREAD, corpus_of

# Those of the study, called by their constraint where they name one.
CONNECTIONS = {spec.get('constraint', spec['name']): spec for spec in ARMS.values()}
ROUNDINGS = {
  'SSE4.2': f'{ONE_THREAD} --xla_cpu_max_isa=SSE4_2',
  'AVX2, threads': '--xla_cpu_max_isa=AVX2',
  'all instructions': ONE_THREAD,
}
UPDATES, SEEDS = (100, 400), (0, 1)
HEAD = 'connection,updates,seed,rounding,validation_loss'


def config(connection: str, updates: int, seed: int) -> ConfigDict:
  """One run at the base size, at the rate of the small experiments."""
  lr = protocol.LEARNING_RATES.get(connection, protocol.LEARNING_RATE)
  c = protocol.config('small', connection, CONNECTIONS[connection], seed, lr)
  c.model.depth = protocol.BASE[1]
  c.evaluation.sequences = 128
  c.duration.steps = c.evaluation.every_steps = updates
  c.log.update({'diagnostics_every_steps': None, 'tensorboard': False})
  return c


def measure(rounding: str, connections: list[str]) -> None:
  """Trains every run in this process, whose flags are set; prints a CSV row for each."""
  with tempfile.TemporaryDirectory() as folder:
    for connection in connections:
      for updates in UPDATES:
        for seed in SEEDS:
          c = config(connection, updates, seed)
          corpus = corpus_of(c.data)
          run_id = resolve(c, corpus.digest).run_id
          status = train.run(c, os.path.join(folder, run_id), corpus, quiet=True)
          print(
            f'{connection},{updates},{seed},"{rounding}",{status["final"]["validation/loss"]!r}', flush=True
          )


def main(argv: list[str] | None = None) -> int:
  """Writes rounding.csv, beside this file; prints the deviations."""
  parser = argparse.ArgumentParser('python -m experiments.rounding', description=main.__doc__)
  parser.add_argument('--missing', action='store_true', help='keep the rows that are there')
  parser.add_argument('--rounding', nargs='+', help=argparse.SUPPRESS)  # of the processes that it starts
  a = parser.parse_args(argv)
  if a.rounding:
    measure(a.rounding[0], a.rounding[1:])
    return 0
  lines = ROUNDING.read_text().splitlines() if a.missing else [HEAD]
  for rounding, flags in ROUNDINGS.items():
    there = {line.split(',')[0] for line in lines if f'"{rounding}"' in line}
    if wanted := [name for name in CONNECTIONS if name not in there]:
      say(f'rounding: {rounding}: {", ".join(wanted)}')
      environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
      command = [sys.executable, '-m', __spec__.name, '--rounding', rounding, *wanted]
      done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
      lines += done.stdout.splitlines()
      ROUNDING.write_text('\n'.join(lines) + '\n')
  print(deviations(pd.read_csv(ROUNDING))['deviation'].unstack().to_string())
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
