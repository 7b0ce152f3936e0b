"""The paper's 3B model (arXiv 2512.24880, Table 5): 39.3 billion tokens.

  mhc train --config paper_3b --workdir runs/paper_3b
  mhc train --config paper_3b:residual --workdir runs/paper_3b_residual

For a TPU v5p slice of 4x4x4 = 64 chips, five sequences on each; parameters and moments are split 64-fold.
"""

from mhc_jax.configs.paper import paper_config
from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
  """arg: residual, hc or mhc (None)."""
  return paper_config(
    arg,
    width=1280,
    depth=12,
    heads=16,
    experts=64,
    expert_width=896,
    batch_size=320,
    steps=30_000,
    lr=8.6e-4,
    topology='v5p:4x4x4',
    mesh={'fsdp': 64},
  )
