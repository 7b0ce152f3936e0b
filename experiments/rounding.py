"""What a run's loss differs by where only the machine's rounding does: rounding.csv, for `mhc verify`.

  python -m experiments.rounding

The same runs, equal seeds and data, by processes that may use other instructions or several threads: sums
come in another order, and updates make the difference larger. A GPU's or another JAX's rounding differs
likewise.
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

from . import quick
from .verify import ROUNDING
from .workers import ONE_THREAD, corpus_of

CONNECTIONS = ('residual', 'identity', 'mhc', 'hc')
ROUNDINGS = {
  'SSE4.2': f'{ONE_THREAD} --xla_cpu_max_isa=SSE4_2',
  'all instructions': ONE_THREAD,
  'all instructions, threads': '',
}
SIZE, UPDATES, SEEDS = (32, 2), (100, 400), (0, 1)


def config(connection: str, updates: int, seed: int) -> ConfigDict:
  """One run, at the rate of the small experiments."""
  c = quick.config(connection, *SIZE, seed)
  c.duration.steps = c.evaluation.every_steps = updates
  c.log.update({'diagnostics_every_steps': None, 'tensorboard': False})
  return c


def measure(rounding: str) -> None:
  """Trains every run in this process, whose flags are set; prints a CSV row for each."""
  with tempfile.TemporaryDirectory() as folder:
    for connection in CONNECTIONS:
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
  """Writes rounding.csv beside verify.py; `--rounding` is for the processes that it starts."""
  parser = argparse.ArgumentParser('python -m experiments.rounding', description=main.__doc__)
  parser.add_argument('--rounding', help=argparse.SUPPRESS)
  a = parser.parse_args(argv)
  if a.rounding:
    measure(a.rounding)
    return 0
  lines = ['connection,updates,seed,rounding,validation_loss']
  for rounding, flags in ROUNDINGS.items():
    say(f'rounding: {rounding}')
    environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-m', __spec__.name, '--rounding', rounding]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    lines += done.stdout.splitlines()
  ROUNDING.write_text('\n'.join(lines) + '\n')
  table = pd.read_csv(ROUNDING)
  spread = (
    table.groupby(['connection', 'updates', 'seed'])['validation_loss']
    .std()
    .groupby(['connection', 'updates'])
    .mean()
  )
  print(spread.unstack().to_string())
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
