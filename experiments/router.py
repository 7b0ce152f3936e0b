"""Do the experts of a mixture get equal loads? E = 8, 2 active, three layers with experts, three seeds.

  mhc sweep router --workers 2
  mhc plots router runs/router

Loss-free balancing with sigmoid and with Sinkhorn scores, and without any balancing (bias rate 0), which
shows what the balancing does. Every update logs the load of each layer's fullest expert over the mean load.
"""

from ml_collections import ConfigDict

from . import protocol

ARMS = {
  'sigmoid': {},
  # Its bias is added to logits, by which a score moves a quarter as far at most.
  'sinkhorn': {'router': 'sinkhorn', 'bias_rate': 4e-2},
  'no balancing': {'bias_rate': 0.0},
}
BIAS_RATE = 1e-2  # ten times that of long runs, for 200 updates
STEPS = 200
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every router at every seed. No argument."""
  if arg:
    raise ValueError(f'router takes no argument, got {arg!r}')
  planned = []
  for arm, fields in ARMS.items():
    for seed in SEEDS:
      c = protocol.config('small', arm, {'name': 'mhc'}, seed)
      c.model.moe.update({'experts': 8, 'active': 2, 'shared': 1, 'bias_rate': BIAS_RATE} | fields)
      c.duration.steps = STEPS
      c.evaluation.every_steps = STEPS
      c.log.every_steps, c.log.diagnostics_every_steps = 1, None
      planned.append(c)
  return planned
