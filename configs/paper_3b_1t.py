"""The paper's 3B model on a trillion tokens (arXiv 2512.24880, Table 5 and Fig. 6b).

  mhc train --config paper_3b_1t --workdir runs/paper_3b_1t
  mhc train --config paper_3b_1t:residual --workdir runs/paper_3b_1t_residual

For a TPU v5p slice of 8x8x8 = 512 chips, five sequences on each; parameters and moments are split 256-fold
and kept twice, because 512 does not divide the width.
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
    batch_size=2560,
    steps=100_000,
    lr=9.0e-4,
    topology='v5p:8x8x8',
    mesh={'data': 2, 'fsdp': 256},
  )
