"""Is mixing fractions of a stream worth as much as mixing copies of it?

One stream in four fractions takes the memory of a residual stream, four streams take four times that. Arms
at one size for equal tokens, three paired seeds: one plain stream, mHC's four, Frac-Connections (2503.14125),
the same with a doubly stochastic H_res, mHC on the fractions of one stream, two streams of two fractions
(virtual width, 2511.11238), mHC's streams kept in part and unmixed (diagonal H_res), and dense reads of all
layers (MUDD, 2502.12170). Linear gates have HC's learning rate, the others mHC's (learning_rate.py); neither
was tuned for fractions or dense reads.
`mhc sweep fractions --workers 2`, then `mhc report runs/fractions`.
"""

from typing import Any

from ml_collections import ConfigDict

from . import protocol

ARMS: dict[str, dict[str, Any]] = {
  'residual': {'name': 'residual'},
  'mhc': {'name': 'mhc'},
  'frac': {'name': 'frac'},
  'frac, doubly stochastic': {'name': 'frac', 'constraint': 'birkhoff_sinkhorn', 'mixing': 0.01},
  'mhc on fractions': {'name': 'mhc', 'streams': 1, 'fractions': 4},
  'vwn': {'name': 'vwn', 'streams': 2},
  'mhc, diagonal': {'name': 'mhc', 'constraint': 'diagonal'},
  'mudd': {'name': 'mudd'},
}
SIZE = (48, 3)
TOKENS = 200_000.0
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm at every seed. No argument."""
  if arg:
    raise ValueError(f'fractions takes no argument, got {arg!r}')
  planned = []
  for arm, connection in ARMS.items():
    kind = 'hc' if connection['name'] in ('frac', 'vwn') else 'mhc'
    for seed in SEEDS:
      c = protocol.config('small', arm, connection, seed, protocol.LEARNING_RATES[kind])
      c.model.update({'width': SIZE[0], 'depth': SIZE[1], 'heads': SIZE[0] // 16})
      c.duration.steps, c.duration.tokens = None, TOKENS
      c.evaluation.update({'every_steps': 200, 'sequences': 512})
      c.log.diagnostics_every_steps = None
      planned.append(c)
  return planned
