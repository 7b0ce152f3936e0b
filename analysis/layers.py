"""Diagnostics by sublayer at the largest size that all arms share: gains of H_res, and its token means.

Where: the runs of `selection.largest` and their files -> here -> study.py. Both are what a run logged last,
also of diverged runs.
"""

import numpy as np
import pandas as pd

from .runs import Run, array, last_list

GAINS = ('gain_forward', 'gain_backward', 'composite_gain_forward', 'composite_gain_backward')
MATRICES = ('res_mean', 'composite_res_mean')


def gains(shown: pd.DataFrame, runs: dict[str, Run]) -> pd.DataFrame:
  """Amax gains by sublayer of every run that logged as many as the longest of its arm; empty without any."""
  rows = []
  for name in GAINS:
    for arm, own in shown.groupby('arm', sort=False):
      logged = {i: last_list(runs[i], f'diagnostics/{name}') or [] for i in own['run_id']}
      longest = max(map(len, logged.values()))
      state = own.set_index('run_id')['state']
      rows += [
        {'gain': name, 'arm': arm, 'run_id': i, 'state': state[i], 'sublayer': k, 'value': v}
        for i, values in logged.items()
        if len(values) == longest
        for k, v in enumerate(values, 1)
      ]
  return pd.DataFrame(rows)


def matrices(shown: pd.DataFrame, runs: dict[str, Run]) -> list[tuple[str, str, dict[str, np.ndarray]]]:
  """(arm, run, MATRICES by name (sublayer, n, n)) of each arm's first run, where it has several streams.

  Reads metrics rows 'diagnostics/res_mean' and 'diagnostics/composite_res_mean': one matrix per sublayer.
  """
  out = []
  for arm, own in shown.groupby('arm', sort=False):
    run_id = own['run_id'].iloc[0]
    stacks = _last_matrices(runs[run_id])
    if any(len(stack[0]) > 1 for stack in stacks.values()):  # one stream has nothing to show
      out.append((arm, run_id, stacks))
  return out


def _last_matrices(run: Run) -> dict[str, np.ndarray]:
  for row in reversed(run.rows):
    given = {name: array(row.get(f'diagnostics/{name}'), 3) for name in MATRICES}
    if given['res_mean'] is not None:
      return {name: v for name, v in given.items() if v is not None}
  return {}
