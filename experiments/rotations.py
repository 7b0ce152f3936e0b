"""Why do rotations diverge, whose gain is one? Gradient norms of rotations with and without a feedback.

  mhc sweep rotations --workers 2, then mhc report runs/rotations

At depth 16 and a rate of 0.064 rotations have gradient norms of 1e5 and more within ten updates, doubly
stochastic matrices have not. Two causes are tried one at a time: reads whose streams cancel, so that the norm
after them divides by little ('norms bounded': an epsilon of 1 in the norms), and matrices that follow the
streams that they turn, so that a sublayer's map is no isometry though its matrix is ('static': the same for
every token).
"""

import itertools
from typing import Any

from ml_collections import ConfigDict

from . import stability

ROTATIONS = {'name': 'mhc', 'constraint': 'orthogonal_cayley'}
ARMS: dict[str, tuple[dict[str, Any], float]] = {  # connection, epsilon of the norms
  'doubly stochastic': ({'name': 'mhc'}, 1e-6),
  'rotations': (ROTATIONS, 1e-6),
  'rotations, norms bounded': (ROTATIONS, 1.0),
  'rotations, static': (ROTATIONS | {'dynamic': False}, 1e-6),
}
DEPTHS, RATES, UPDATES, SEEDS = (8, 16), (6.4e-2, 2.56e-1), 40, (0, 1)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every arm at every depth, rate and seed. No argument."""
  if arg:
    raise ValueError(f'rotations takes no argument, got {arg!r}')
  like, planned = stability.runs('small')[0], []
  for (arm, (connection, eps)), depth, lr, seed in itertools.product(ARMS.items(), DEPTHS, RATES, SEEDS):
    c = like.copy_and_resolve_references()
    c.arm, c.seed, c.optimizer.lr, c.model.depth, c.model.norm_eps = arm, seed, lr, depth, eps
    c.model.connection.update(connection)
    c.duration.steps = c.evaluation.every_steps = UPDATES
    c.log.diagnostics_every_steps = UPDATES // 2
    planned.append(c)
  return planned
