"""Does mixing beat H_res = I? Identity, Birkhoff variants and rotations from the same off-diagonal mass.

  mhc sweep identity_or_mixing:small --workers 2
  python -m analysis.learning_rate runs/identity_or_mixing-small
  mhc plots paper runs/identity_or_mixing-small

All arms share mHC's reads and writes and start with H_res at off-diagonal mass 0.01 (identity: 0, for ever),
exactly: phi starts at 0, because a dynamic part of equal size is a different mass in other coordinates.
Every arm runs at every learning rate of the grid and every seed, so that each is compared at its own best.
"""

from ml_collections import ConfigDict

from . import protocol

CONSTRAINTS = (
  'identity',
  'birkhoff_sinkhorn',
  'birkhoff_dual',
  'birkhoff_permutations',
  'orthogonal_cayley',
)
RATES = (8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2)
MIXING = 0.01


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every constraint at every learning rate and seed, and residual. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  arms = {'residual': {'name': 'residual'}}
  for constraint in CONSTRAINTS:
    mixing = None if constraint == 'identity' else MIXING
    arms[constraint] = {'name': 'mhc', 'constraint': constraint, 'mixing': mixing, 'init': 'cyclic_zero_phi'}
  return [
    protocol.config(scale, arm, connection, seed, lr)
    for arm, connection in arms.items()
    for lr in RATES
    for seed in SEEDS
  ]
