"""The paper's 9B model (arXiv 2512.24880, Table 5): 105 billion tokens.

  mhc train --config paper_9b --workdir runs/paper_9b
  mhc train --config paper_9b:residual --workdir runs/paper_9b_residual

For a TPU v5p slice of 4x4x8 = 128 chips, four sequences on each; parameters and moments are split 128-fold.
"""

from mhc_jax.configs.paper import paper_config
from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
  """arg: residual, hc or mhc (None)."""
  return paper_config(
    arg,
    width=1920,
    depth=18,
    heads=24,
    experts=64,
    expert_width=1280,
    batch_size=512,
    steps=50_000,
    lr=5.9e-4,
    topology='v5p:4x4x8',
    mesh={'fsdp': 128},
  )
