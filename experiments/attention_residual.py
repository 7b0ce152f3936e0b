"""Do reads by attention over earlier outputs beat mixing, gated reads and one stream?

The comparison that papers on residual connections leave out: pre-norm, attention residuals (full, sums of two
sublayers, four heads; arXiv 2603.15031, 2607.27230), mHC and the gated residual under one protocol, each
at four learning rates and two sizes, two paired seeds. `mhc sweep attention_residual --workers 2`, then
`mhc report runs/attention_residual`.
"""

import itertools
from typing import Any

from ml_collections import ConfigDict

from . import learning_rate, protocol

ARMS: dict[str, dict[str, Any]] = {
  'residual': {'name': 'residual'},
  'mhc': {'name': 'mhc'},
  'gated_residual': {'name': 'gated_residual'},
  'attention_residual': {'name': 'attention_residual'},
  'attention_residual, sums of 2': {'name': 'attention_residual', 'preset': 'block', 'write_period': 2},
  'attention_residual, 4 heads': {'name': 'attention_residual', 'preset': 'heads', 'read_heads': 4},
}


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm at every size and rate, for equal tokens. No argument."""
  if arg:
    raise ValueError(f'attention_residual takes no argument, got {arg!r}')
  planned = []
  arms = itertools.product(learning_rate.SIZES, ARMS.items(), learning_rate.GRID, learning_rate.SEEDS)
  for (width, depth), (arm, connection), lr, seed in arms:
    c = protocol.config('small', arm, connection, seed, lr)
    c.model.update({'width': width, 'depth': depth, 'heads': width // 16})
    c.duration.steps, c.duration.tokens = None, learning_rate.TOKENS
    c.evaluation.update({'every_steps': 200, 'sequences': 512})
    c.log.diagnostics_every_steps = None
    planned.append(c)
  return planned
