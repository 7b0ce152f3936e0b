"""Which runs enter the scaling law, which belong to a rank sweep, and why the others are left out.

Where: Sweep (runs.py) -> here -> study.py. Every run that is not in the law has its reason in the
table's column `excluded`; nothing is dropped without one.
"""

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from .conventions import AXIS_FIELD, RANKS
from .fitting.laws import Points
from .fitting.points import completed
from .fitting.table import SMALLEST

# Connections whose streams are counted by what writes them, so by the depth (mhc_jax/presets.py).
BY_DEPTH = ('depth_matrix', 'attention_residual', 'mudd')
MIN_ARM_SIZES = 2  # of an arm in the joint law: one multiplier from one size has no check at all


def classify(table: pd.DataFrame) -> pd.DataFrame:
  """The table with what each run is for.

  arm: runs at a rank take that of the grid runs that have their connection. size; cluster: size and seed.
  axis: the rank sweep that a run belongs to, or None. excluded: why it is not in the law, or None. best_rate:
  runs at the learning rate that stays for their arm, size, rank, budget and seed; rates: how many were tried
  there, rate_seeds: on how many seeds. on_grid: runs of the grid of
  sizes, however they ended. paired: those that may enter paired gaps, which need no fit.
  """
  known = table['width'].notna() & table['depth'].notna()
  shapes = zip(table['width'], table['depth'], known, strict=True)
  t = table.assign(size=[f'{w:.0f}x{d:.0f}' if ok else None for w, d, ok in shapes])
  # Equal size and seed: the same start and, up to the shorter of the two, the same data in the same order.
  t = t.assign(cluster=[f'{size}|{seed}' for size, seed in zip(t['size'], t['seed'], strict=True)])
  t = t.assign(axis=[next((k for k in RANKS if pd.notna(row[k])), None) for _, row in t.iterrows()])
  t = t.assign(arm=_arms(t))
  home = home_streams(t)
  streams = [_streams_axis(row, home) for _, row in t.iterrows()]
  t = t.assign(axis=[a if pd.notna(a) else b for a, b in zip(t['axis'], streams, strict=True)])
  excluded = pd.Series([_reason(row, home) for _, row in t.iterrows()], t.index, object)
  other_corpus = _other_corpora(t, excluded)
  excluded = excluded.mask(other_corpus.notna(), other_corpus)
  best_rate, other_rate, tried = _best_rates(t, excluded)
  excluded = excluded.mask(other_rate.notna(), other_rate)
  # Runs whose rates were chosen on one another do not stand alone.
  chosen = (tried['rates'] > 1) & (tried['rate_seeds'] > 1)
  cells = [f'{size}|{arm}' for size, arm in zip(t['size'], t['arm'], strict=True)]
  t = t.assign(cluster=t['cluster'].mask(chosen, pd.Series(cells, t.index, object)))
  paired = excluded.isna()
  small = _small_arms(t[paired])
  return t.assign(
    excluded=excluded.mask(paired, t['arm'].map(small)),
    best_rate=best_rate,
    rates=tried['rates'],
    rate_seeds=tried['rate_seeds'],
    on_grid=t['axis'].isna() & t['flops'].notna() & other_corpus.isna() & best_rate,
    paired=paired,
  )


def _arms(t: pd.DataFrame) -> list[str]:
  """A run at a rank belongs to the arm of full rank with its connection, if there is exactly one."""
  homes = t[t['axis'].isna()].groupby('variant')['arm'].unique()
  alike = [homes.get(variant, ()) for variant in t['variant']]
  return [
    own[0] if pd.notna(axis) and len(own) == 1 else arm
    for arm, axis, own in zip(t['arm'], t['axis'], alike, strict=True)
  ]


def home_streams(t: pd.DataFrame) -> dict[str, float]:
  """Arm -> number of streams of its size grid: that of most sizes (ties: of most runs, at any rank)."""
  out = {}
  for arm, rows in t.groupby('arm'):
    counts = rows.dropna(subset='connection_streams').groupby('connection_streams')['size']
    ranked = sorted(((s.nunique(), len(s), -n) for n, s in counts), reverse=True)
    if ranked:
      out[arm] = -ranked[0][2]
  return out


def _streams_axis(row: pd.Series, home: dict[str, float]) -> str | None:
  streams = row['connection_streams']
  derived = row['connection_name'] in BY_DEPTH
  other = pd.notna(streams) and not derived and streams != home.get(row['arm'], streams)
  return 'connection_streams' if other else None


def _reason(row: pd.Series, home: dict[str, float]) -> str | None:
  state = row['state']
  if state == 'missing':
    return 'missing: ' + (row['error'] if pd.notna(row['error']) else 'planned, but never started')
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
  absent = [name for name in needed if not (pd.notna(row[name]) and row[name] >= SMALLEST)]
  if absent:
    return f'finished without {" and ".join(absent)}'
  if row['axis'] == 'connection_streams':
    return (
      f'rank figures only: {row["connection_streams"]:.0f} streams, '
      f"where the arm's grid has {home[row['arm']]:.0f}"
    )
  if pd.notna(row['axis']):
    return f'rank figures only: {AXIS_FIELD[row["axis"]]} = {row[row["axis"]]:.0f}'
  return None


def _other_corpora(t: pd.DataFrame, excluded: pd.Series) -> pd.Series:
  """Losses on different data cannot share a law: the most common data digest stays. Why others do not."""
  inside = excluded.isna() & t['data_digest'].notna()
  digests = t.loc[inside, 'data_digest'].value_counts()
  reasons = pd.Series(None, t.index, object)
  if len(digests) > 1:
    other = inside & (t['data_digest'] != digests.index[0])
    reasons[other] = f'other data digest than the {digests.max()} runs kept'
  return reasons


def _best_rates(t: pd.DataFrame, excluded: pd.Series) -> tuple[pd.Series, pd.Series, pd.DataFrame]:
  """Of several learning rates for one arm, size, rank and budget: the best on the other seeds stays.

  The lowest of noisy losses is too low: a rate chosen on the run that is then compared makes an arm better by
  chance. With one seed there is no other choice, which `rate_problems` judges. A diverged run counts as
  infinitely bad, so that no rate wins by the seeds that survived it.

  Returns whether each run stays, the reason for finished runs that do not, and columns `rates` (how many were
  tried beside the run) and `rate_seeds` (seeds to choose on).
  """
  stays, reasons = pd.Series(True, t.index), pd.Series(None, t.index, object)
  tried = pd.DataFrame({'rates': 1, 'rate_seeds': 0}, t.index)
  finished = excluded.isna() | (t['axis'].notna() & (t['state'] == 'finished'))
  for _, rows in t.groupby(['arm', 'size', 'duration', *AXIS_FIELD], dropna=False):
    ended = rows[finished[rows.index] | (rows['state'] == 'diverged')]
    if ended['lr'].nunique() < 2:
      continue
    tried.loc[rows.index, ['rates', 'rate_seeds']] = ended['lr'].nunique(), ended['seed'].nunique()
    for seed, own in rows.groupby('seed', dropna=False):
      others = ended[ended['seed'] != seed]
      losses = rate_losses(others if len(others) else ended)
      losses = losses[losses.index.isin(ended.loc[ended['seed'] == seed, 'lr'])]
      if losses.empty:
        continue
      best = losses.idxmin()
      worse = own.index[own['lr'] != best]
      stays[worse] = False
      on = 'by its other seeds ' if len(others) else ''
      reasons[worse[finished[worse]]] = (
        f'learning-rate sweep: lr = {best:g} is better at this size {on}'.strip()
      )
  return stays, reasons, tried


def rate_problems(t: pd.DataFrame, reference: str | None) -> dict[str, str]:
  """Arm -> why it cannot be compared: its rate was chosen on the compared runs, among more or fewer."""
  grid = t[t['paired']]
  base = grid[grid['arm'] == reference].groupby(['size', 'duration'])['rates'].max()
  out = {}
  for arm, own in grid[grid['arm'] != reference].groupby('arm', sort=False):
    for key, rows in own.groupby(['size', 'duration'], sort=False):
      ours, theirs = int(rows['rates'].max()), int(base.get(key, 1))
      if ours != theirs and rows['rate_seeds'].max() < 2 and key in base.index:
        out[arm] = (
          f'at {key[0]} its learning rate is the best of {ours} on the one seed compared, that of '
          f'{reference} of {theirs}: give both as many, or choose on other seeds'
        )
        break
  return out


def rate_notes(t: pd.DataFrame) -> list[str]:
  """How learning rates were chosen, in a sentence per kind; none where every arm has one."""
  several = t[t['paired'] & (t['rates'] > 1)]
  out = []
  for chosen, rows in several.groupby(several['rate_seeds'] > 1):
    counts = ', '.join(f'{arm} {int(own["rates"].max())}' for arm, own in rows.groupby('arm', sort=False))
    how = 'for each seed on the other seeds' if chosen else 'on the compared runs themselves, which flatters'
    out.append(f'learning rates were chosen {how}; tried: {counts}')
  return out


def rate_losses(rows: pd.DataFrame) -> pd.Series:
  """Learning rate -> mean loss over seeds; infinite where one of them diverged."""
  finite = rows['validation_loss'].where(rows['state'] == 'finished', np.inf)
  return finite.groupby(rows['lr']).mean()


def _small_arms(paired: pd.DataFrame) -> dict[str, str]:
  """Arm with too few sizes for a multiplier -> why it is not in the law; none where every arm is small."""
  sizes = paired.groupby('arm')['size'].nunique()
  if not (sizes >= MIN_ARM_SIZES).any():
    return {}
  return {
    arm: f'arm {arm} finished at one size only: no multiplier can be checked there'
    for arm in sizes.index[sizes < MIN_ARM_SIZES]
  }


def to_points(t: pd.DataFrame, convention: str = 'matmul') -> Points:
  """Points of table rows; N counts parameters by `convention`, a key of PARAMS."""
  columns = {'N': f'params_{convention}', 'D': 'tokens', 'C': 'flops', 'W': 'width', 'H': 'depth'}
  return Points(
    completed({name: np.log(t[column].to_numpy(float)) for name, column in columns.items()}),
    t['validation_loss'].to_numpy(float),
    t['arm'].to_numpy(str),
    t['cluster'].to_numpy(str),
    t['size'].to_numpy(str),
    t['run_id'].to_numpy(str),
  )


def reference_arm(t: pd.DataFrame, wanted: str | None = None) -> str | None:
  """The arm with m = 1: `wanted`, else the residual one where it has runs, else the first with finished runs.

  Raises ConfigError where `wanted` has no finished run.
  """
  finished = t[t['state'] == 'finished']
  if wanted is not None:
    arms = list(dict.fromkeys(finished['arm']))
    if wanted not in arms:
      raise ConfigError(f'--reference {wanted}: no finished run of that arm; there are {", ".join(arms)}')
    return wanted
  inside = finished[finished['excluded'].isna()]
  inside = inside if len(inside) else finished
  if not len(inside):
    return None
  residual = inside[inside['connection_name'] == 'residual']
  return (residual if len(residual) else inside)['arm'].iloc[0]


def largest(t: pd.DataFrame, reference: str | None) -> pd.DataFrame:
  """The grid's runs at one size and budget, the same for every arm, however they ended.

  Of all (size, budget) the one at which most arms ended runs, the reference among them; of several that of
  most parameters, then tokens.
  """
  started = t[t['on_grid'] & (t['state'] != 'missing')]
  best, best_rank = started, None
  for _, rows in started.groupby(['size', 'duration'], sort=False):
    ended = rows[rows['state'].isin(['finished', 'diverged'])]
    arms = (reference in set(ended['arm']), ended['arm'].nunique(), rows['arm'].nunique())
    rank = (*arms, rows['params_matmul'].max(), rows['tokens'].max())
    if best_rank is None or rank > best_rank:
      best, best_rank = rows, rank
  return best
