"""What `make sweep` runs: scaling curves of four arms, and manifold ranks, in minutes on two cores.

residual, hc, mhc and identity at five sizes that vary width and depth, two paired seeds each; mhc at three
ranks of its generator, of its depth matrix (streams) and of its weights at one size. All see equally many
tokens: of runs whose tokens grow with their size the smallest end before a law of loss against compute begins
to hold. Learning rates come from experiments/learning_rate.py (experiments/LOG.md).
"""

from ml_collections import ConfigDict

from . import protocol
from .protocol import LEARNING_RATES

# (width, depth): width and depth vary on their own and together.
SIZES = ((16, 2), protocol.BASE, (32, 3), (48, 2), (48, 3))
STEPS = 250
SEEDS = (0, 1)
RANK_SIZE = (32, 2)
GENERATOR_RANKS = (1, 2, 4)
STREAMS = (1, 2, 8)  # besides 4
WEIGHT_RANKS = (2, 4, 8)


def config(arm: str, width: int, depth: int, seed: int) -> ConfigDict:
  """One run; heads of 16, so that width scales by heads."""
  c = protocol.config('small', arm, {'name': arm}, seed, LEARNING_RATES[arm])
  c.model.update({'width': width, 'depth': depth, 'heads': width // 16})
  c.duration.steps = STEPS
  c.evaluation.every_steps = c.log.diagnostics_every_steps = STEPS // 2
  c.evaluation.sequences = 128
  return c


def runs(arg: str | None = None) -> list[ConfigDict]:
  """The planned runs, in order. No argument."""
  if arg:
    raise ValueError(f'quick takes no argument, got {arg!r}')
  planned = []
  for width, depth in SIZES:
    for arm in LEARNING_RATES:
      planned += [config(arm, width, depth, seed) for seed in SEEDS]
  for rank in GENERATOR_RANKS:
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.connection.rank = rank
    planned.append(c)
  for streams in STREAMS:
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.connection.streams = streams
    planned.append(c)
  for rank in WEIGHT_RANKS:
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.weights.rank = rank
    planned.append(c)
  return planned
