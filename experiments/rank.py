"""The three manifold ranks: of the generator phi, of the depth matrix (streams n), of the weights.

  mhc sweep rank:small --workers 2
  mhc report runs/rank-small

One mHC model; one rank at a time. Weights of rank r twice: as factors W = U V, and as W projected to rank r
after every update (manifold_updates.py). The learning rate of full matrices does not suit factors (LOG.md),
so these run at three.
"""

from ml_collections import ConfigDict

from . import protocol

GENERATOR_RANKS = (1, 2, 4, 8)  # of 24 at n = 4
STREAMS = (1, 2, 8)  # besides 4
WEIGHT_RANKS = {'small': (2, 4, 8), 'large': (32, 64, 128)}
FACTOR_RATES = (4e-3, 8e-3, protocol.LEARNING_RATE)
SEEDS = (0, 1, 2)
MAPS = r'layers/(attention|feed_forward)/\w+/w'


def runs(arg: str | None = None) -> list[ConfigDict]:
  """residual, full-rank mHC, and each rank, at three seeds. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  planned = []
  for seed in SEEDS:
    planned.append(protocol.config(scale, 'residual', {'name': 'residual'}, seed))
    planned.append(protocol.config(scale, 'mhc', {}, seed))
    planned += [protocol.config(scale, 'mhc', {'rank': rank}, seed) for rank in GENERATOR_RANKS]
    planned += [protocol.config(scale, 'mhc', {'streams': n}, seed) for n in STREAMS]
    for rank in WEIGHT_RANKS[scale]:
      for lr in FACTOR_RATES:
        factors = protocol.config(scale, 'mhc', {}, seed, lr)
        factors.model.weights.rank = rank
        planned.append(factors)
      held = protocol.config(scale, f'mhc, W projected to rank {rank}', {}, seed)
      held.optimizer.update(
        {'manifold': 'fixed_rank', 'manifold_pattern': MAPS, 'manifold_value': float(rank)}
      )
      planned.append(held)
  return planned
