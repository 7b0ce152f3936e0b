"""Which runs enter the scaling law, which belong to a rank sweep, and why the others are left out.

Where: Sweep (runs.py) -> here -> study.py. Every run that is not in the law has its reason in the
table's column `excluded`; nothing is dropped without one.
"""

import numpy as np
import pandas as pd

from analysis.laws import Points

AXES = ('connection_rank', 'weights_rank', 'connection_streams')
AXIS_LABEL = {
  'connection_rank': 'rank of the generator (connection.rank)',
  'weights_rank': 'rank of the weights (weights.rank)',
  'connection_streams': 'streams n (connection.streams)',
}
MIN_ARM_SIZES = 2  # of an arm in the joint law: one multiplier from one size has no check at all


def classify(table: pd.DataFrame) -> pd.DataFrame:
  """Adds columns size, cluster, axis (rank sweep or None) and excluded (reason or None)."""
  t = table.copy()
  known = t['width'].notna() & t['depth'].notna()
  t['size'] = [
    f'{w:.0f}x{d:.0f}' if ok else None for w, d, ok in zip(t['width'], t['depth'], known, strict=True)
  ]
  # Paired runs: same size, seed and budget, so the same data in the same order in every arm.
  columns = (t['size'], t['seed'], t['duration'])
  t['cluster'] = ['|'.join(map(str, values)) for values in zip(*columns, strict=True)]
  home = home_streams(t)
  t['axis'] = [_axis(row, home) for _, row in t.iterrows()]
  t['excluded'] = [_reason(row, home) for _, row in t.iterrows()]
  _exclude_other_corpora(t)
  _exclude_other_rates(t)
  return t


def home_streams(t: pd.DataFrame) -> dict[str, float]:
  """Arm -> number of streams of its size grid: the one trained at most sizes (ties: most runs)."""
  out = {}
  for arm, rows in t[t['connection_rank'].isna() & t['weights_rank'].isna()].groupby('arm'):
    counts = rows.dropna(subset='connection_streams').groupby('connection_streams')['size']
    ranked = sorted(((s.nunique(), len(s), -n) for n, s in counts), reverse=True)
    if ranked:
      out[arm] = -ranked[0][2]
  return out


def _axis(row: pd.Series, home: dict[str, float]) -> str | None:
  for name in ('connection_rank', 'weights_rank'):
    if pd.notna(row[name]):
      return name
  streams = row['connection_streams']
  if pd.notna(streams) and streams != home.get(row['arm'], streams):
    return 'connection_streams'
  return None


def _reason(row: pd.Series, home: dict[str, float]) -> str | None:
  state = row['state']
  if state == 'missing':
    return 'missing: planned, but never started'
  if state == 'diverged':
    at = row['diverged_at']
    return 'diverged' + (f' at step {at:.0f}' if pd.notna(at) else '')
  if state == 'failed':
    return 'failed: ' + (row['error'] if pd.notna(row['error']) else 'no error recorded')
  if state != 'finished':
    done, of = row['steps_done'], row['num_steps']
    progress = f' at step {done:.0f} of {of:.0f}' if pd.notna(done) and pd.notna(of) else ''
    return f'not finished: {state}{progress}'
  needed = ('validation_loss', 'params_matmul', 'tokens', 'flops')
  absent = [name for name in needed if not (pd.notna(row[name]) and row[name] > 0)]
  if absent:
    return f'finished without {" and ".join(absent)}'
  if row['axis'] == 'connection_streams':
    return (
      f'rank figures only: {row["connection_streams"]:.0f} streams, '
      f"where the arm's grid has {home[row['arm']]:.0f}"
    )
  if pd.notna(row['axis']):
    return f'rank figures only: {row["axis"].replace("_", ".")} = {row[row["axis"]]:.0f}'
  return None


def _exclude_other_corpora(t: pd.DataFrame) -> None:
  """Losses on different data cannot share a law: the most common data digest stays."""
  inside = t['excluded'].isna() & t['data_digest'].notna()
  digests = t.loc[inside, 'data_digest'].value_counts()
  if len(digests) > 1:
    other = inside & (t['data_digest'] != digests.index[0])
    t.loc[other, 'excluded'] = f'other data digest than the {digests.iloc[0]} runs kept'


def _exclude_other_rates(t: pd.DataFrame) -> None:
  """Of several learning rates for one arm, size and budget the one of lowest mean loss stays.

  A diverged run counts as infinitely bad, so that no rate wins by the seeds that survived it.
  """
  grid = t[t['excluded'].isna() | ((t['state'] == 'diverged') & t['axis'].isna())]
  for _, rows in grid.groupby(['arm', 'size', 'duration'], dropna=False):
    finite = rows['validation_loss'].where(rows['state'] == 'finished', np.inf)
    losses = finite.groupby(rows['lr']).mean()
    if len(losses) > 1:
      best = losses.idxmin()
      worse = rows.index[(rows['lr'] != best) & rows['excluded'].isna()]
      t.loc[worse, 'excluded'] = f'learning-rate sweep: lr = {best:g} is better at this size'


def drop_small_arms(t: pd.DataFrame) -> pd.DataFrame:
  """Marks the runs of arms with too few sizes for a multiplier (changes and returns the table).

  Column `paired`: runs that may enter paired gaps, which need no fit.
  """
  t['paired'] = t['excluded'].isna()
  sizes = t[t['excluded'].isna()].groupby('arm')['size'].nunique()
  if len(sizes) > 1:
    for arm in sizes.index[sizes < MIN_ARM_SIZES]:
      rows = t['excluded'].isna() & (t['arm'] == arm)
      t.loc[rows, 'excluded'] = f'arm {arm} finished at one size only: no multiplier can be checked there'
  return t


def to_points(t: pd.DataFrame, convention: str = 'matmul') -> Points:
  """Points of table rows; N counts parameters by `convention`: total, non_embedding or matmul."""
  n = t[f'params_{convention}'].to_numpy(float)
  d, c = t['tokens'].to_numpy(float), t['flops'].to_numpy(float)
  return Points(
    {'N': np.log(n), 'D': np.log(d), 'C': np.log(c), 'M': np.log(d / n)},
    t['validation_loss'].to_numpy(float),
    t['arm'].to_numpy(str),
    t['cluster'].to_numpy(str),
    t['size'].to_numpy(str),
    t['run_id'].to_numpy(str),
  )


def reference_arm(t: pd.DataFrame) -> str | None:
  """The arm with m = 1: the residual one where it has runs, else the first with finished runs."""
  finished = t[t['state'] == 'finished']
  inside = finished[finished['excluded'].isna()]
  inside = inside if len(inside) else finished
  if not len(inside):
    return None
  residual = inside[inside['connection_name'] == 'residual']
  return (residual if len(residual) else inside)['arm'].iloc[0]


def pair_up(t: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
  """Arm -> pairs with the reference: same size and seed, and equal budget, tokens or FLOPs.

  Columns: size, seed, duration; run_id, validation_loss, flops and tokens of the arm (suffix _own)
  and of the reference (_ref). Of several partners the one nearest in tokens counts.
  """
  inside = t[t['paired']]
  base = inside[inside['arm'] == reference]
  out = {}
  for arm in dict.fromkeys(inside['arm']):
    rows = []
    for _, own in inside[inside['arm'] == arm].iterrows():
      partners = base[(base['size'] == own['size']) & (base['seed'] == own['seed'])]
      best = _partner(own, partners)
      if best is not None and arm != reference:
        keys = ('run_id', 'validation_loss', 'flops', 'tokens')
        rows.append(
          {name: own[name] for name in ('size', 'seed', 'duration')}
          | {f'{k}_own': own[k] for k in keys}
          | {f'{k}_ref': best[k] for k in keys}
        )
    if rows:
      out[arm] = pd.DataFrame(rows)
  return out


def _partner(own: pd.Series, partners: pd.DataFrame) -> pd.Series | None:
  def close(name: str) -> pd.Series:
    return np.abs(np.log(partners[name] / own[name])) < 0.05

  if not len(partners):
    return None
  fits = (partners['duration'] == own['duration']) | close('tokens') | close('flops')
  partners = partners[fits]
  if not len(partners):
    return None
  return partners.loc[np.abs(np.log(partners['tokens'] / own['tokens'])).idxmin()]
