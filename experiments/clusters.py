"""What do clusters that seldom average lose, and save in bytes between them? Residual and mHC.

  mhc sweep clusters --workers 2
  python -m analysis.clusters runs/clusters

Every update is four clusters' of 512 tokens each, or one cluster's alone: data parallelism, whose gradients
cross at every update; DiLoCo with 10 or 50 updates between averages, by the published outer settings and by
plain averaging, which suits few rounds; and streaming with two fragments, an overlap of one update and 4
bits. Three paired seeds.
"""

from typing import Any

from ml_collections import ConfigDict

from . import protocol

WORKERS, ROWS = 4, 4  # clusters, and sequences of each in an update
AVERAGED = {'outer_lr': 1.0, 'outer_momentum': 0.0}
SCHEMES: dict[str, dict[str, Any] | None] = {
  'one cluster alone': None,
  'data parallel': {},
  'H = 10': {'sync_every': 10, **AVERAGED},
  'H = 10, published': {'sync_every': 10, 'outer_lr': 0.7, 'outer_momentum': 0.9},
  'H = 50': {'sync_every': 50, **AVERAGED},
  'H = 10, streaming 4 bits': {
    **{'sync_every': 10, **AVERAGED, 'fragments': 2, 'overlap': 1, 'outer_bits': 4},
  },
}
ARMS = ('residual', 'mhc')
STEPS = 200
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every scheme of both arms at every seed. No argument."""
  if arg:
    raise ValueError(f'clusters takes no argument, got {arg!r}')
  planned = []
  for arm in ARMS:
    for scheme, fields in SCHEMES.items():
      for seed in SEEDS:
        label = f'{arm}, {scheme}'
        c = protocol.config('small', label, {'name': arm}, seed, protocol.LEARNING_RATES[arm])
        c.model.width, c.model.depth = protocol.BASE
        c.data.batch_size = ROWS
        if fields is not None:
          c.data.batch_size = WORKERS * ROWS
          c.cluster.update({'workers': WORKERS, **fields})
        c.duration.steps = STEPS
        c.evaluation.update({'every_steps': 50, 'sequences': 128})
        c.log.diagnostics_every_steps = None
        planned.append(c)
  return planned
