"""The paper's 27B model (arXiv 2512.24880, Table 5): 262 billion tokens.

  mhc train --config paper_27b --workdir runs/paper_27b
  mhc train --config paper_27b:residual --workdir runs/paper_27b_residual

For a TPU v5p slice of 8x8x8 = 512 chips. 1280 sequences are a multiple of 256, not of 512, so pairs of chips
share five sequences by the tensor axis; parameters and moments are split 512-fold by fsdp and tensor.
"""

from mhc_jax.configs.paper import paper_config
from ml_collections import ConfigDict


def get_config(arg: str | None = None) -> ConfigDict:
  """arg: residual, hc or mhc (None)."""
  return paper_config(
    arg,
    width=2560,
    depth=30,
    heads=32,
    experts=72,
    expert_width=1536,
    batch_size=1280,
    steps=50_000,
    lr=4.0e-4,
    topology='v5p:8x8x8',
    mesh={'fsdp': 256, 'tensor': 2},
  )
