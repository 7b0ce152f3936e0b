"""Sparse attention: gains of connections at equal attention, and what attention the chosen tokens have.

Where: the runs' files -> here -> study.py, for sweeps like experiments/sparse.py.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import stats

from .fitting.intervals import LEVEL
from .gaps import Pairs, spreads
from .runs import Run, last_list

MEASURES = ('recall', 'best', 'random', 'entropy')
ALL = 'all tokens'
PLAIN = 'residual'


@dataclasses.dataclass(frozen=True)
class Sparsity:
  """Both are empty where no run has sparse attention.

  gains: attention, connection, size, seeds, loss (mean), and where residual runs have the same attention the
  paired difference to them with its interval, low to high. layers: attention, connection, arm, seed, run_id,
  layer and MEASURES as logged last: the share of dense attention's weight on the attended tokens, on as many
  at best and by chance, and the entropy of the index (nats; NaN without one).
  """

  gains: pd.DataFrame
  layers: pd.DataFrame


def sparsity(table: pd.DataFrame, runs: dict[str, Run]) -> Sparsity:
  """table: selection.classify's, whose paired runs have gains; layers are of all runs that logged them."""
  known = {i: run for i, run in runs.items() if (run.config or {}).get('model')}
  own = {i: (attention_of(run), run.config['model']['connection']['name']) for i, run in known.items()}
  if {attention for attention, _ in own.values()} <= {ALL}:
    return Sparsity(pd.DataFrame(), pd.DataFrame())
  rows = []
  for i, run in known.items():
    given = {name: last_list(run, f'diagnostics/attention_{name}') for name in MEASURES}
    ids = dict(zip(('attention', 'connection'), own[i], strict=True))
    ids |= {'arm': run.arm, 'seed': run.config.get('seed'), 'run_id': i}
    for layer in range(len(given['recall'] or ())):
      values = {name: v[layer] if v and len(v) > layer else np.nan for name, v in given.items()}
      rows.append(ids | {'layer': layer + 1} | values)
  kept = table[table['paired'] & table['run_id'].isin(own)]
  kept = kept.assign(**{name: [own[i][k] for i in kept['run_id']] for k, name in enumerate(_WHAT)})
  return Sparsity(_gains(kept), pd.DataFrame(rows))


_WHAT = ('attention', 'connection')


def attention_of(run: Run) -> str:
  """What a run's attention is over, in words: 'top 32', 'window 32' or ALL."""
  given = run.config['model'].get('sparse') or {}
  if given.get('kind') == 'topk':
    return f'top {given.get("topk")}' + (', warm-up' if given.get('stage') else '')
  return f'window {given.get("window")}' if given.get('kind') == 'window' else ALL


def _gains(kept: pd.DataFrame) -> pd.DataFrame:
  rows, groups, differences = [], [], []
  for (attention, connection, size), runs in kept.groupby([*_WHAT, 'size'], sort=False):
    plain = kept[(kept['attention'] == attention) & (kept['connection'] == PLAIN) & (kept['size'] == size)]
    both = runs.merge(plain, on=['seed', 'duration'], suffixes=('', '_plain'))
    row = {'attention': attention, 'connection': connection, 'size': size}
    rows.append(row | {'seeds': len(runs), 'loss': runs['validation_loss'].mean(), 'pairs': len(both)})
    if connection != PLAIN and len(both):
      losses = both['validation_loss'].to_numpy(), both['validation_loss_plain'].to_numpy()
      groups.append(Pairs(connection, float(np.log(both['flops']).mean()), losses))
      differences.append(losses[0] - losses[1])
      rows[-1]['group'] = len(groups) - 1
  found = spreads(groups, differences) if groups else None
  for row in rows:
    k = row.pop('group', None)
    row |= dict.fromkeys(('difference', 'low', 'high'))
    if k is not None:
      row['difference'] = middle = float(differences[k].mean())
    if k is not None and found is not None:
      sd, free = found[k]
      half = float(stats.t.ppf(0.5 + LEVEL / 2, free)) * sd / np.sqrt(len(differences[k]))
      row |= {'low': middle - half, 'high': middle + half}
  return pd.DataFrame(rows)
