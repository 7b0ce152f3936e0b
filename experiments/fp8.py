"""Does mixing streams keep training in FP8 as stable as one stream does?

Residual, identity and mHC in float32, in FP8 as DeepSeek-V3 trains (tiles), and in FP8 with one scale for an
array; at the tuned learning rate and at four times that, where rounding could tip it over; three paired
seeds. Width 128, so that tiles of 128 are whole ones.

  mhc sweep fp8 --workers 2
  mhc report runs/fp8
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

ARMS = ('residual', 'identity', 'mhc')
PRECISIONS = {'float32': None, 'fp8_v3': 'fp8_v3', 'fp8_tensor': 'fp8_tensor'}
RATES = (protocol.LEARNING_RATE, 4 * protocol.LEARNING_RATE)
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every connection in every precision, at every rate and seed. No argument."""
  if arg:
    raise ValueError(f'fp8 takes no argument, got {arg!r}')
  planned = []
  for arm, (name, precision), lr, seed in itertools.product(ARMS, PRECISIONS.items(), RATES, SEEDS):
    c = protocol.config('small', f'{arm}, {name}', {'name': arm}, seed, lr)
    c.model.update({'width': 128, 'depth': 2, 'heads': 4, 'precision': precision})
    c.model.scan_unroll = 1  # compiling is half of what these runs take
    c.data.batch_size, c.duration.steps = 4, 60
    c.evaluation.update({'every_steps': 60, 'sequences': 64})
    c.log.update({'every_steps': 1, 'diagnostics_every_steps': 60})
    c.checkpoint.every_steps = None
    planned.append(c)
  return planned
