"""Loads of experts over training: the fullest expert of each layer over the mean, per router.

Where: the runs' files -> here -> study.py, for sweeps like experiments/router.py.
"""

import dataclasses

import pandas as pd

from .runs import Run, array

METRIC = 'train/load_max_over_mean'
LAST = 20  # batches over which a load is averaged at the end of training


@dataclasses.dataclass(frozen=True)
class Loads:
  """Loads of every logged update, and their means over the last LAST batches; both may be empty.

  updates: arm, seed, run_id, step, and layer_1 .. of the layers with experts. last: arm, seed, layer, load.
  No single expert of a layer has a higher mean, since that expert is never fuller than the fullest.
  """

  updates: pd.DataFrame
  last: pd.DataFrame


def loads(runs: dict[str, Run]) -> Loads:
  """Empty where no run has logged loads."""
  rows = [
    {'arm': run.arm, 'seed': run.config.get('seed'), 'run_id': run.run_id, 'step': row['step']}
    | {f'layer_{layer}': value for layer, value in enumerate(loads_L, _first_layer(run))}
    for run in runs.values()
    for row in run.rows
    if (loads_L := array(row.get(METRIC), 1)) is not None
  ]
  if not rows:
    return Loads(pd.DataFrame(), pd.DataFrame())
  table = pd.DataFrame(rows)
  layers = [name for name in table.columns if name.startswith('layer_')]
  last = table.sort_values('step').groupby(['arm', 'seed'], sort=False).tail(LAST)
  means = last.groupby(['arm', 'seed'], sort=False)[layers].mean().stack().rename('load')
  return Loads(table, means.rename_axis(['arm', 'seed', 'layer']).reset_index())


def _first_layer(run: Run) -> int:
  """Number, from 1 on, of the first layer with experts."""
  return (run.config['model'].get('dense_layers') or 0) + 1
