"""Which connections stay stable as depth and learning rate grow: divergence rate, gradient norms, gains.

  mhc sweep stability:small --workers 2
  mhc plots paper runs/stability-small

residual, HC, mHC, H_res = I, exact Birkhoff matrices and rotations, three seeds each. No transfer over depth,
as in the papers: its rules divide F by the depth and slow b_res and alpha_res down, which would hide part of
what is asked. Losses and gradient norms of every update (spikes are short) and gains are in every run's
metrics; a diverged run ends as such and stays in the results.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

ARMS = {
  'residual': {'name': 'residual'},
  'hc': {'name': 'hc'},
  'mhc': {'name': 'mhc'},
  'identity': {'name': 'identity'},
  'birkhoff_dual': {'name': 'mhc', 'constraint': 'birkhoff_dual'},
  'orthogonal_cayley': {'name': 'mhc', 'constraint': 'orthogonal_cayley'},
}
DEPTHS = {'small': (4, 8, 16), 'large': (12, 24, 48)}
RATES = (1.6e-2, 6.4e-2, 2.56e-1)
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm at every depth, learning rate and seed. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  planned = []
  for depth, (arm, connection), lr, seed in itertools.product(DEPTHS[scale], ARMS.items(), RATES, SEEDS):
    c = protocol.config(scale, arm, connection, seed, lr)
    c.model.depth, c.transfer.base_depth, c.log.every_steps = depth, None, 1
    if scale == 'small':  # shorter than the other experiments: there are many
      c.data.seq_len, c.duration.steps = 64, 80
      c.evaluation.update({'every_steps': 80, 'sequences': 128})
      c.log.diagnostics_every_steps = 40
    planned.append(c)
  return planned
