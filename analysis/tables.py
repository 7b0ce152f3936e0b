"""Tables of results: a line per arm, final losses by arm and size, mHC's Table 1 (what each map is worth).

Where: classified table and gaps -> here -> study.py.
"""

import numpy as np
import pandas as pd

from .gaps import Gap


def summary(table: pd.DataFrame) -> pd.DataFrame:
  """One row per arm: what it reached at its largest compute (mean over seeds), and how its runs ended."""
  rows = []
  for arm, own in table.groupby('arm', sort=False):
    row = {'arm': arm, 'loss': None, 'flops': None, 'size': None, 'seeds': 0}
    grid = own[own['paired']]
    if len(grid):
      top = grid[grid['size'] == grid.loc[grid['flops'].idxmax(), 'size']]
      top = top[top['flops'] > 0.9 * top['flops'].max()]
      row |= {'loss': top['validation_loss'].mean(), 'flops': top['flops'].mean()}
      row |= {'size': top['size'].iloc[0], 'seeds': top['seed'].nunique()}
    states = {state: int((own['state'] == state).sum()) for state in ('finished', 'diverged')}
    rows.append(row | {'planned': len(own)} | states)
  return pd.DataFrame(rows)


def final_losses(table: pd.DataFrame, gaps: list[Gap]) -> pd.DataFrame:
  """Final loss and bits per byte by arm, size and budget, with the gap to the reference.

  Diverged runs are counted, and have a row also where no run finished.
  """
  gap = {(g.arm, g.size, round(g.log_flops, 2)): g for g in gaps}
  rows = []
  ended = table[table['paired'] | (table['on_grid'] & (table['state'] == 'diverged'))]
  for (arm, size, _), own in ended.groupby(['arm', 'size', 'duration'], sort=False):
    done = own[own['paired']]
    g = gap.get((arm, size, round(float(np.log(done['flops']).mean()), 2))) if len(done) else None
    counts = {'seeds': done['seed'].nunique(), 'diverged': int((own['state'] == 'diverged').sum())}
    rows.append(
      {'arm': arm, 'size': size, 'tokens': own['tokens'].mean(), 'flops': own['flops'].mean()}
      | counts
      | {'validation_loss': done['validation_loss'].mean()}
      | {'standard_deviation': done['validation_loss'].std()}
      | {'bits_per_byte': done['validation_bits_per_byte'].mean()}
      | {name: None if g is None else getattr(g, name) for name in ('difference', 'low', 'high')}
      | {'run_ids': ' '.join(own['run_id'])}
    )
  return pd.DataFrame(rows)


def maps(row: pd.Series) -> dict[str, str]:
  """What H_res, H_pre and H_post of a run are: 'I', 'fixed', or the constraint and the gates."""
  if row['connection_name'] == 'residual':
    return {'H_res': 'I', 'H_pre': 'fixed', 'H_post': 'fixed'}
  res = 'I' if row['connection_constraint'] == 'identity' else row['connection_constraint']
  return {'H_res': res, 'H_pre': row['connection_read_gate'], 'H_post': row['connection_write_gate']}


def ablation(shown: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
  """Table 1 style: arms with their maps at the largest common size; empty where all maps are the same.

  shown: the runs there (selection.largest); losses: final_losses.
  """
  parts = {arm: maps(own.iloc[0]) for arm, own in shown.groupby('arm', sort=False)}
  if not len(losses) or len({tuple(part.values()) for part in parts.values()}) < 2:
    return pd.DataFrame()
  here = losses[(losses['size'] == shown['size'].iloc[0]) & losses['arm'].isin(parts)]
  here = here[here['run_ids'].map(lambda ids: ids.split()[0]).isin(shown['run_id'])]
  return pd.DataFrame([{'arm': row['arm']} | parts[row['arm']] | dict(row) for _, row in here.iterrows()])
