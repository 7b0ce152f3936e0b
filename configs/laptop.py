"""A small mHC transformer on the source of some Python packages, for a laptop.

  mhc train --config laptop --workdir runs/laptop
  mhc train --config laptop:smoke --workdir runs/smoke   # seconds

Width, depth, connection and everything else change by --config.a.b=v, for example
--config.model.connection.name=residual.
"""

from ml_collections import ConfigDict

from mhc_jax.config import base_config


def get_config(arg: str | None = None) -> ConfigDict:
  """arg 'smoke': twenty updates of a tiny model."""
  if arg not in (None, '', 'smoke'):
    raise ValueError(f"configs/laptop.py takes no argument or 'smoke', got {arg!r}")
  c = base_config()
  c.transfer.base_width, c.transfer.base_depth = 64, 4
  c.optimizer.warmup_fraction = 0.05
  c.log.diagnostics_every_steps = 50
  c.checkpoint.every_steps = 100
  c.duration.steps = 1000
  if arg == 'smoke':
    c.model.width, c.model.depth, c.model.heads = 32, 2, 2
    c.data.seq_len, c.data.batch_size = 64, 8
    c.evaluation.every_steps, c.evaluation.sequences, c.evaluation.batch_size = 10, 16, 16
    c.log.every_steps, c.log.diagnostics_every_steps = 1, 10
    c.checkpoint.every_steps, c.duration.steps = 5, 20
  c.lock()
  return c
