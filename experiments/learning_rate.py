"""The learning rate of each arm, at the base size and at one twice as wide and twice as deep.

Shows whether the transfer rules carry the optimum from the first size to the second for every arm.
`mhc sweep learning_rate --workers 2`, then `mhc report runs/learning_rate`.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol, quick

GRID = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
SIZES = (protocol.BASE, (64, 4))
TOKENS = 200_000.0
SEEDS = (0, 1)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm at every size and rate, for equal tokens. No argument."""
  if arg:
    raise ValueError(f'learning_rate takes no argument, got {arg!r}')
  planned = []
  for size, arm, lr, seed in itertools.product(SIZES, protocol.LEARNING_RATES, GRID, SEEDS):
    c = quick.config(arm, *size, seed)
    c.optimizer.lr = lr
    c.duration.steps, c.duration.tokens = None, TOKENS
    c.evaluation.update({'every_steps': 200, 'sequences': 512})
    c.log.diagnostics_every_steps = None
    planned.append(c)
  return planned
