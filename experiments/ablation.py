"""mHC's Table 1: what H_res, H_pre and H_post are worth, one by one.

  mhc sweep ablation:small --workers 2
  mhc plots paper runs/ablation-small

A map that is off is fixed as in the paper: H_pre = 1 / n, H_post = 1, H_res = I; residual is the row where
all are off. HC's free matrices have the paper's three rows and the two that leave out H_res or H_pre alone.
mHC's have the rows with H_post: without it all streams stay equal, and a doubly stochastic H_res does nothing
to equal streams, so 'mhc res' is residual by construction, and so is 'mhc res+pre' but for the size of its
reads, which a norm follows. HC's differ because its H_res may scale.
"""

from ml_collections import ConfigDict

from . import protocol
from .protocol import LEARNING_RATES

OFF = {
  'res': {'constraint': 'identity'},
  'pre': {'read_gate': 'fixed'},
  'post': {'write_gate': 'fixed'},
}
PARTS = {
  'hc': (('res',), ('res', 'pre'), ('res', 'post'), ('pre', 'post'), ('res', 'pre', 'post')),
  'mhc': (('res', 'post'), ('pre', 'post'), ('res', 'pre', 'post')),
}
SEEDS = (0, 1, 2)


def runs(arg: str | None = None) -> list[ConfigDict]:
  """residual, and every set of maps of hc and mhc, at three seeds. Argument: 'small' or 'large'."""
  scale = protocol.scale_of(arg)
  arms = {'residual': {'name': 'residual'}}
  for name, rows in PARTS.items():
    for parts in rows:
      off = [fields for part, fields in OFF.items() if part not in parts]
      arms[f'{name} {"+".join(parts)}'] = {'name': name} | {k: v for fields in off for k, v in fields.items()}
  return [
    protocol.config(scale, arm, connection, seed, LEARNING_RATES[connection['name']])
    for arm, connection in arms.items()
    for seed in SEEDS
  ]
