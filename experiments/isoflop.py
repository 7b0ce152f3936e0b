"""IsoFLOP profiles: which size is best at a compute budget, for residual and for mHC.

  mhc sweep isoflop:small --workers 2
  mhc plots paper runs/isoflop-small

Widths at one depth, each trained for the same FLOPs (connections included), two seeds.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

SIZES = {
  'small': {'depth': 2, 'head': 8, 'widths': (16, 24, 32, 48, 64)},
  'large': {'depth': 12, 'head': 64, 'widths': (256, 384, 512, 768, 1024)},
}
# Training FLOPs. Below 2e11 a small model of width 16 is best, so that no minimum lies inside the grid.
BUDGETS = {'small': (2e11, 3.2e11, 5e11, 8e11), 'large': (1e18, 3e18, 1e19, 3e19)}
ARMS = ('residual', 'mhc')
SEEDS = (0, 1)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm and width at every budget and seed. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  sizes, planned = SIZES[scale], []
  for flops, width, arm, seed in itertools.product(BUDGETS[scale], sizes['widths'], ARMS, SEEDS):
    c = protocol.config(scale, arm, {'name': arm}, seed)
    c.model.update({'width': width, 'depth': sizes['depth'], 'heads': width // sizes['head']})
    c.duration.steps, c.duration.flops = None, flops
    c.evaluation.every_steps, c.log.diagnostics_every_steps = 1000, None
    planned.append(c)
  return planned
