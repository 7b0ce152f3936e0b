"""What `make sweep` runs: scaling curves of four arms, and manifold ranks, in minutes on two cores.

residual, hc, mhc and identity at five sizes that vary width and depth, two paired seeds at the two
smallest; mhc at three ranks of its generator, of its depth matrix (streams) and of its weights at one size.
Learning rates come from experiments/learning_rate.py (experiments/LOG.md).
"""

from ml_collections import ConfigDict

from mhc_jax.cost import parameters
from mhc_jax.model_config import build_model

from . import protocol
from .protocol import LEARNING_RATES

# (width, depth): width and depth vary on their own and together.
SIZES = (protocol.BASE, (32, 4), (64, 2), (48, 4), (64, 4))
TOKENS_PER_PARAM = 3.0
RANK_SIZE = (32, 2)
GENERATOR_RANKS = (1, 2, 4)
STREAMS = (1, 2, 8)  # besides 4
WEIGHT_RANKS = (2, 4, 8)


def config(arm: str, width: int, depth: int, seed: int) -> ConfigDict:
  """One run; heads of 16, so that width scales by heads."""
  c = protocol.config('small', arm, {'name': arm}, seed, LEARNING_RATES[arm])
  c.model.update({'width': width, 'depth': depth, 'heads': width // 16})
  c.duration.steps, c.duration.tokens_per_param = None, TOKENS_PER_PARAM
  c.evaluation.every_steps = c.log.diagnostics_every_steps = 200
  return c


def full_rank_tokens() -> float:
  """Tokens of the full-rank run at RANK_SIZE."""
  model = build_model(config('mhc', *RANK_SIZE, seed=0))
  return TOKENS_PER_PARAM * parameters(model)['matmul']


def runs(arg: str | None = None) -> list[ConfigDict]:
  """The planned runs, in order. No argument."""
  if arg:
    raise ValueError(f'quick takes no argument, got {arg!r}')
  planned = []
  for index, (width, depth) in enumerate(SIZES):
    for arm in LEARNING_RATES:
      for seed in (0, 1) if index < 2 else (0,):
        planned.append(config(arm, width, depth, seed))
  for rank in GENERATOR_RANKS:
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.connection.rank = rank
    planned.append(c)
  for streams in STREAMS:
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.connection.streams = streams
    planned.append(c)
  for rank in WEIGHT_RANKS:  # for as many tokens as the full rank gets
    c = config('mhc', *RANK_SIZE, seed=0)
    c.model.weights.rank = rank
    c.duration.tokens_per_param, c.duration.tokens = None, full_rank_tokens()
    planned.append(c)
  return planned
