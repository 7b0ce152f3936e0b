"""IsoFLOP profiles: which size is best at a compute budget, for residual and for mHC.

  mhc sweep isoflop:small --workers 2
  mhc plots paper runs/isoflop-small

Widths at one depth, each trained for the same FLOPs (connections included), two seeds.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

SIZES = {
  'small': {'depth': 2, 'head': 8},
  'large': {'depth': 12, 'head': 64},
}
# Training FLOPs -> widths. small: below 2e11 a model of width 16 is best, so that no minimum lies inside the
# grid. large: widths on both sides of 20 tokens a parameter, none of which sees more than FineWeb-Edu's
# sample of 1e10 tokens has once.
GRID = {
  'small': dict.fromkeys((2e11, 3.2e11, 5e11, 8e11), (16, 24, 32, 48, 64)),
  'large': {
    3e16: (128, 192, 256, 320, 384),
    1e17: (192, 256, 320, 384, 512),
    3e17: (256, 384, 512, 640, 768),
    1e18: (384, 512, 640, 768, 1024),
  },
}
ARMS = ('residual', 'mhc')
SEEDS = (0, 1)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm and width at every budget and seed. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  sizes, planned = SIZES[scale], []
  points = ((flops, width) for flops, widths in GRID[scale].items() for width in widths)
  for (flops, width), arm, seed in itertools.product(points, ARMS, SEEDS):
    c = protocol.config(scale, arm, {'name': arm}, seed)
    c.model.update({'width': width, 'depth': sizes['depth'], 'heads': width // sizes['head']})
    c.duration.steps, c.duration.flops = None, flops
    c.evaluation.every_steps, c.log.diagnostics_every_steps = 1000, None
    planned.append(c)
  return planned
