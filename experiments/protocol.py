"""What the runs of the small experiments have in common: data, schedule, evaluation, and two scales.

'small' is for two cores; 'large' for accelerators, with nothing else changed.
"""

from typing import Any

from ml_collections import ConfigDict

from mhc_jax.config import base_config

# 1e10 tokens by its own count. docs/data.md has the command that makes the tokenizer's file.
FINEWEB = 'hf:HuggingFaceFW/fineweb-edu/sample/10BT'
SCALES: dict[str, dict[str, Any]] = {
  'small': {
    'data': {'batch_size': 8, 'seq_len': 128},
    'model': {'width': 32, 'depth': 4, 'heads': 2},
    'evaluation': {'every_steps': 100, 'sequences': 512},
    'log': {'diagnostics_every_steps': 100},
    'checkpoint': {'every_steps': 200},
    'steps': 300,
  },
  'large': {
    'data': {'name': FINEWEB, 'tokenizer': 'fineweb-edu-32k.json', 'batch_size': 256, 'seq_len': 1024},
    'model': {
      **{'width': 512, 'depth': 12, 'heads': 8, 'vocab_size': 32768},
      **{'dtype': 'bfloat16', 'remat': 'layer', 'scan_unroll': 1},
    },
    'evaluation': {'every_steps': 500, 'sequences': 2048},
    'log': {'diagnostics_every_steps': 500},
    'checkpoint': {'every_steps': 500},
    'steps': 5000,
  },
}
BASE = (32, 2)  # width, depth: where learning rates were tuned (learning_rate.py; LOG.md)
LEARNING_RATE = 1.6e-2
LEARNING_RATES = {'residual': 1.6e-2, 'hc': 3.2e-2, 'mhc': 1.6e-2, 'identity': 1.6e-2}


def scale_of(arg: str | None) -> str:
  """'small' or 'large' from a sweep's argument; ValueError otherwise."""
  scale = arg or 'small'
  if scale not in SCALES:
    raise ValueError(f'the argument must be one of {", ".join(SCALES)}, got {arg!r}')
  return scale


def config(
  scale: str, arm: str, connection: dict[str, Any], seed: int, lr: float = LEARNING_RATE
) -> ConfigDict:
  """One run of `arm`, whose model.connection has these fields."""
  c, sizes = base_config(), SCALES[scale]
  c.arm, c.seed = arm, seed
  for section in ('data', 'model', 'evaluation', 'log', 'checkpoint'):
    c[section].update(sizes[section])
  c.model.connection.update(connection)
  c.transfer.base_width, c.transfer.base_depth = BASE
  c.optimizer.lr, c.optimizer.warmup_fraction = lr, 0.05
  c.duration.steps = sizes['steps']
  return c
