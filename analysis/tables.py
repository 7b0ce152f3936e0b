"""The two tables of results: final losses by arm and size, and mHC's Table 1 (what each map is worth).

Where: Study -> here -> page.py and `python -m analysis.plots paper`.
"""

import numpy as np
import pandas as pd

from .selection import largest
from .study import Study


def final_losses(s: Study) -> pd.DataFrame:
  """Final loss and bits per byte by arm, size and budget, with the gap to the reference.

  Diverged runs are counted, and have a row also where no run finished.
  """
  gap = {(g.arm, g.size, round(g.log_flops, 2)): g for g in s.gaps}
  rows = []
  ended = s.table[s.table['paired'] | (s.table['on_grid'] & (s.table['state'] == 'diverged'))]
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


def ablation(s: Study) -> pd.DataFrame:
  """Table 1 style: arms with their maps at the largest common size; empty where all maps are the same."""
  shown, losses = largest(s.table, s.reference), final_losses(s)
  parts = {arm: maps(own.iloc[0]) for arm, own in shown.groupby('arm', sort=False)}
  if not len(losses) or len({tuple(part.values()) for part in parts.values()}) < 2:
    return pd.DataFrame()
  here = losses[(losses['size'] == shown['size'].iloc[0]) & losses['arm'].isin(parts)]
  here = here[here['run_ids'].map(lambda ids: ids.split()[0]).isin(shown['run_id'])]
  return pd.DataFrame([{'arm': row['arm']} | parts[row['arm']] | dict(row) for _, row in here.iterrows()])
