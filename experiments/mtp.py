"""Does predicting one more token add to what mixing streams gains, or replace it?

Residual, identity and mHC, each with and without multi-token prediction (DeepSeek-V3's module and weight,
0.3), three paired seeds; compared by the loss of the next token. `mhc sweep mtp --workers 2`, then
`mhc report runs/mtp`.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

ARMS = ('residual', 'identity', 'mhc')
WEIGHTS = (None, 0.3)
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every connection without and with the module, at every seed. No argument."""
  if arg:
    raise ValueError(f'mtp takes no argument, got {arg!r}')
  planned = []
  for name, weight, seed in itertools.product(ARMS, WEIGHTS, SEEDS):
    arm = name if weight is None else f'{name}, mtp'
    c = protocol.config('small', arm, {'name': name}, seed)
    c.model.update({'depth': 2})
    c.model.mtp.update({'depth': weight and 1, 'weight': weight})
    c.evaluation.update({'every_steps': 300, 'sequences': 256})
    c.log.diagnostics_every_steps = None
    planned.append(c)
  return planned
