"""Sweeps along one manifold rank: which runs belong together, and the exponent of the rank.

Where: classified table and the fitted law -> here -> study.py. With a law a rank acts as compute, m = r^phi
in one joint fit; without one (a single size) the loss itself is a constant and a power of the rank.
"""

import dataclasses

import numpy as np
import pandas as pd

from .compare import nested_f, split_levels
from .conventions import AXIS_FIELD
from .fitting.estimate import Fit, fit
from .fitting.identify import MIN_LEVELS, MIN_SIZES, verdicts
from .fitting.intervals import delta_method
from .fitting.laws import ArmModel, Law, Points, Term
from .selection import to_points

OWN_LAW = Law('rank', 'L = a + b r^-phi', (Term('A', 'power', (('r', 1.0),), 1.0),))


@dataclasses.dataclass(frozen=True)
class Exponent:
  """phi of `form` with its 95 % interval, or the problem that forbids it.

  p_value: of the power against a free multiplier at every rank (clustered F); None where it cannot be tested.
  """

  form: str
  phi: float | None
  interval: list[float] | None
  p_value: float | None
  problem: str | None


@dataclasses.dataclass(frozen=True)
class RankSweep:
  """Runs of one arm and size that differ along one manifold rank."""

  axis: str
  arm: str
  size: str
  rows: pd.DataFrame  # rank points: run_id, seed, rank, loss, tokens, flops
  full: pd.DataFrame  # the same model at full rank (empty where it was not run)
  reference: pd.DataFrame  # runs of the reference at this size and budget (empty where it is the arm itself)
  means: pd.DataFrame  # rank, validation_loss, standard_error (NaN where no size has two seeds)
  exponent: Exponent


def rank_sweeps(
  table: pd.DataFrame, fitted: Fit | None, params: str, reference: str | None, seed_spread: float | None
) -> list[RankSweep]:
  """Groups of finished runs equal but for one rank (and the seed), at least two ranks each.

  Each rank is at its best learning rate. The full-rank runs beside them have the same duration, or as many
  tokens within 5 %.
  """
  usable = table[
    (table['state'] == 'finished')
    & table['validation_loss'].notna()
    & (table['paired'] | (table['axis'].notna() & table['best_rate']))
  ]
  out = []
  for axis in AXIS_FIELD:
    keys = ['variant', 'size', *(name for name in AXIS_FIELD if name != axis)]
    for _, rows in usable.groupby(keys, dropna=False, sort=False):
      for _, swept in rows[rows[axis].notna()].groupby('duration', sort=False):
        if swept[axis].nunique() < 2:
          continue
        near = np.abs(np.log(rows['tokens'] / swept['tokens'].median())) < 0.05
        full = rows[rows[axis].isna() & (near | (rows['duration'] == swept['duration'].iloc[0]))]
        keep = swept.assign(rank=swept[axis].astype(float))
        exponent = _own_power(keep) if fitted is None else _joint_power(axis, keep, fitted, params)
        base = _alike(table[table['paired'] & (table['arm'] == reference)], keep)
        arm, size = keep['arm'].iloc[0], keep['size'].iloc[0]
        out.append(RankSweep(axis, arm, size, keep, full, base, _means(keep, seed_spread), exponent))
  return out


def _alike(base: pd.DataFrame, swept: pd.DataFrame) -> pd.DataFrame:
  """The reference's runs at a sweep's size and budget, none where it is the sweep's own arm."""
  same = base[(base['arm'] != swept['arm'].iloc[0]) & (base['size'] == swept['size'].iloc[0])]
  near = np.abs(np.log(same['tokens'] / swept['tokens'].median())) < 0.05
  return same[near | same['duration'].isin(swept['duration'])]


def _means(rows: pd.DataFrame, seed_spread: float | None) -> pd.DataFrame:
  groups = rows.groupby('rank')['validation_loss']
  error = (np.nan if seed_spread is None else seed_spread) / np.sqrt(groups.size())
  return groups.mean().to_frame().assign(standard_error=error).reset_index()


def _joint_power(axis: str, rows: pd.DataFrame, fitted: Fit, params: str) -> Exponent:
  """phi of m = m_0 r^phi by one joint fit with the law's runs, tested against a free m at every rank."""
  form, levels = 'm = r^phi', rows['rank'].nunique()
  if levels < MIN_LEVELS:
    problem = f'{levels} values cannot test a power law ({MIN_LEVELS} are needed)'
    return Exponent(form, None, None, None, problem)
  extra = to_points(rows.assign(arm=f'{rows["arm"].iloc[0]}, {axis}'), params)
  # Runs of the law that are also points of this sweep (its home streams) count once.
  base = fitted.points.take(~np.isin(fitted.points.run, extra.run))
  log_r = np.concatenate([np.zeros(len(base)), np.log(rows['rank'].to_numpy(float))])
  merged = Points(
    {name: np.concatenate([base.log_x[name], extra.log_x[name]]) for name in base.log_x},
    *(
      np.concatenate([getattr(base, k), getattr(extra, k)]) for k in ('loss', 'arm', 'cluster', 'size', 'run')
    ),
    axes={axis: log_r},
  )
  reference, width = fitted.design.arms.reference, fitted.problem.width
  one, power = ArmModel('common', reference), ArmModel('common', reference, (axis,))
  joint = fit(merged, fitted.law, power, width=width, start_count=9)
  name = f'phi[{axis}]'
  reason = verdicts(joint)[name]
  if reason is not None:
    return Exponent(form, None, None, None, reason)
  free = fit(split_levels(merged, axis), fitted.law, one, width=width, start_count=9)
  test = nested_f(free, joint)
  return Exponent(form, joint.parameters[name], delta_method(joint)[name], test and test[2], None)


def _own_power(rows: pd.DataFrame) -> Exponent:
  """phi of L = a + b r^-phi at one size."""
  form, levels = OWN_LAW.formula, rows['rank'].nunique()
  if levels < MIN_SIZES:
    problem = f'{levels} values cannot test a constant and a power ({MIN_SIZES} are needed)'
    return Exponent(form, None, None, None, problem)
  rank = rows['rank'].to_numpy(float)
  points = Points(
    {'r': np.log(rank)},
    *(rows[k].to_numpy() for k in ('validation_loss', 'arm', 'cluster')),
    rank.astype(str),
    rows['run_id'].to_numpy(str),
  )
  own = fit(points, OWN_LAW, ArmModel('none'), width='auto')
  reason = verdicts(own)['power']
  if reason is not None:
    return Exponent(form, None, None, None, reason)
  return Exponent(form, own.parameters['power'], delta_method(own)['power'], None, None)


def exponent_words(e: Exponent) -> str:
  """The fitted exponent in a sentence, or why there is none."""
  if e.phi is None:
    return f'no exponent of {e.form}: {e.problem}.'
  # + 0.0 after rounding: no "-0.00".
  phi, low, high = (round(v, 2) + 0.0 for v in (e.phi, *e.interval))
  tested = ''
  if e.p_value is not None:
    tested = f'; against a free multiplier at every rank p = {e.p_value:.2g}'
  return f'{e.form} with phi = {phi:.2f} (95 % {low:.2f} to {high:.2f}{tested}).'
