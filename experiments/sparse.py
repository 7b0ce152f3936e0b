"""Does what the connection gains survive sparse attention? Three connections, four attentions, three seeds.

Residual, identity and mHC, each with attention to all tokens, to a window of a quarter of them, and to a
quarter and a sixteenth that DeepSeek's index chooses (arXiv 2512.02556), for equal tokens. `mhc sweep sparse
--workers 2`, then `mhc report runs/sparse`: differences at equal attention, and by layer the share of dense
attention's weight that the chosen tokens have.
"""

import itertools

from ml_collections import ConfigDict

from . import protocol

CONNECTIONS = ('residual', 'identity', 'mhc')
TIME = protocol.SCALES['small']['data']['seq_len']
ATTENTIONS = {
  '': {},
  'window 1/4': {'kind': 'window', 'window': TIME // 4},
  'top 1/4': {'kind': 'topk', 'topk': TIME // 4},
  'top 1/16': {'kind': 'topk', 'topk': TIME // 16},
}
DEPTH, STEPS = 2, 200
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """Every connection with every attention at every seed. No argument."""
  if arg:
    raise ValueError(f'sparse takes no argument, got {arg!r}')
  planned = []
  for name, (attention, fields), seed in itertools.product(CONNECTIONS, ATTENTIONS.items(), SEEDS):
    arm = f'{name}, {attention}' if attention else name
    c = protocol.config('small', arm, {'name': name}, seed, protocol.LEARNING_RATES[name])
    c.model.depth, c.duration.steps = DEPTH, STEPS
    c.model.sparse.update(fields)
    c.evaluation.update({'every_steps': STEPS, 'sequences': 256})
    planned.append(c)
  return planned
