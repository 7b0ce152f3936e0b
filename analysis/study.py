"""All numbers of a report: law, intervals, comparisons, gaps, rank sweeps. No plotting, no files.

Where: Sweep (runs.py) -> Study -> figures.py and page.py. Everything printed later is computed
here once, so that figures, tables and fits.json cannot disagree.
"""

import dataclasses

import numpy as np
import pandas as pd

from analysis import selection
from analysis.compare import Candidate, Gap, RolloutStep, nested, paired_gap, pooled_spread, rollout
from analysis.estimate import Fit, fit
from analysis.fit import document, json_ready
from analysis.identify import RULES, Choice, choose_law, verdicts
from analysis.intervals import delta
from analysis.isoflop import best_learning_rate
from analysis.laws import ArmModel, Points
from analysis.runs import Sweep

DELTA = 'auto'  # report: Huber's width follows the noise (estimate.make_problem)


@dataclasses.dataclass(frozen=True)
class Multiplier:
  """Compute multiplier of an arm over the reference in three currencies; or why there is none.

  equal_tokens: at equal sizes and tokens, the connection's own cost left out. seconds: of training at the
  speeds measured. Intervals: 95 %.
  """

  arm: str
  flops: float | None
  flops_interval: list[float] | None
  equal_tokens: float | None
  equal_tokens_interval: list[float] | None
  seconds: float | None
  seconds_interval: list[float] | None
  problem: str | None


@dataclasses.dataclass(frozen=True)
class RankSweep:
  """Runs of one arm and size that differ along one manifold rank, and the exponent of m = r^phi."""

  axis: str
  arm: str
  size: str
  rows: pd.DataFrame  # rank points: run_id, seed, rank, loss, tokens, flops
  full: pd.DataFrame  # the same model at full rank (empty where it was not run)
  phi: float | None
  phi_interval: list[float] | None
  problem: str | None


@dataclasses.dataclass(frozen=True)
class RateSweep:
  """Runs of one arm, size and budget at several learning rates; the interpolated optimum."""

  arm: str
  size: str
  rows: pd.DataFrame  # run_id, seed, lr, state, validation_loss (NaN where it diverged)
  best: float | None
  problem: str | None  # why there is no optimum inside the grid


@dataclasses.dataclass(frozen=True)
class Study:
  """Everything that the report prints or draws."""

  sweep: Sweep
  table: pd.DataFrame
  reference: str | None
  choice: Choice
  points: Points | None
  fit: Fit | None
  document: dict | None
  multipliers: list[Multiplier]
  sensitivity: list[dict]
  nested: list[Candidate]
  rollout: list[RolloutStep]
  gaps: list[Gap]
  ranks: list[RankSweep]
  rates: list[RateSweep]

  @property
  def grid(self) -> pd.DataFrame:
    """Finished runs of the size grid: those of the law, and those of arms too small for it."""
    return self.table[self.table['paired']]

  @property
  def seed_spread(self) -> float | None:
    """Standard deviation of the final loss between seeds (nats), pooled over arms and sizes."""
    groups = [g for _, g in self.grid.groupby(['arm', 'size', 'duration', 'lr'])['validation_loss']]
    freedom = sum(len(g) - 1 for g in groups)
    if not freedom:
      return None
    return float(np.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom))


def study(sweep: Sweep, resamples: int = 500, progress: bool = False) -> Study:
  """Computes all of it from the sweep's runs; partial sweeps leave parts empty, with reasons."""
  table = selection.drop_small_arms(selection.classify(sweep.table))
  inside = table[table['excluded'].isna()]
  reference = selection.reference_arm(table)
  points = selection.to_points(inside) if len(inside) else None
  choice = choose_law(points) if points is not None else Choice(None, 'There is no finished run.')
  fitted = doc = None
  if choice.law is not None:
    arms = ArmModel('common' if len(points.arms) > 1 else 'none', reference)
    if len(points) <= len(points.arms) + 1 + 2 * len(choice.law.terms):
      choice = Choice(None, f'No law is fitted: {len(points)} runs are too few for its parameters.')
    else:
      fitted = fit(points, choice.law, arms, delta=DELTA)
      doc = document(fitted, resamples, progress)
  return Study(
    sweep,
    table,
    reference,
    choice,
    points,
    fitted,
    doc,
    multipliers(fitted, doc, inside, reference),
    sensitivity(fitted, inside),
    nested(points, choice.law, reference, delta=fitted.problem.delta)
    if fitted and len(points.arms) > 1
    else [],
    rollout(points, choice.law, fitted.design.arms, delta=DELTA) if fitted else [],
    gaps(table, reference),
    rank_sweeps(table, fitted, points),
    rate_sweeps(table),
  )


def multipliers(
  fitted: Fit | None, doc: dict | None, inside: pd.DataFrame, reference: str | None
) -> list[Multiplier]:
  """m per arm: FLOPs, work (N x D: equal sizes and tokens) and seconds the reference needs, over
  the arm's own, for equal loss.

  L(C) is fitted once per currency, each run's FLOPs replaced by its cost in that currency: the overhead of
  a connection differs between sizes. L(N, D) measures work; the costs at the largest common size convert it.
  """
  out = []
  if fitted is None:
    return out
  other = {}
  if fitted.law.name != 'chinchilla' and len(fitted.points.arms) > 1:
    other = {unit: _in_currency(fitted, inside, reference, unit) for unit in ('equal_tokens', 'seconds')}
  for arm in fitted.points.arms:
    if arm == reference:
      continue
    name = f'm[{arm}]'
    if name in doc['verdicts']:
      out.append(Multiplier(arm, *[None] * 6, doc['verdicts'][name]))
      continue
    value, ends = doc[name], np.array(doc['intervals'][name])
    if fitted.law.name == 'chinchilla':
      cost, speed = cost_ratios(inside, arm, reference)
      found = [(value / cost, ends / cost), (value, ends), (value * speed / cost, ends * speed / cost)]
    else:
      found = [(value, ends), *(other[unit].get(arm, (np.nan, ends)) for unit in other)]
    fields = [
      x for v, e in found for x in ((float(v), list(map(float, e))) if np.isfinite(v) else (None, None))
    ]
    out.append(Multiplier(arm, *fields, None))
  return out


def _in_currency(
  fitted: Fit, inside: pd.DataFrame, reference: str, unit: str
) -> dict[str, tuple[float, list[float]]]:
  """Arm -> (m, interval) of the same L(C) with C in another unit.

  equal_tokens: the FLOPs that the reference would spend on the run's tokens at its size; seconds: its tokens
  over the median speed of its arm and size. Runs of sizes without the reference, or without a speed, are out.
  """
  rows = inside.reset_index(drop=True)
  if unit == 'equal_tokens':
    per_token = rows[rows['arm'] == reference].groupby('size')['flops_per_token'].median()
    cost = rows['tokens'] * rows['size'].map(per_token)
  else:
    cost = rows['tokens'] / rows.groupby(['arm', 'size'])['tokens_per_second'].transform('median')
  known = np.isfinite(cost.to_numpy(float))
  points = fitted.points.take(known)
  points = dataclasses.replace(points, log_x=points.log_x | {'C': np.log(cost.to_numpy(float)[known])})
  left = points.arms
  if reference not in left or len(left) < 2 or len(points) <= len(left) + 1 + 2 * len(fitted.law.terms):
    return {}
  again = fit(points, fitted.law, ArmModel('common', reference), delta=DELTA)
  ends = delta(again)
  return {arm: (again.parameters[f'm[{arm}]'], ends[f'm[{arm}]']) for arm in left if arm != reference}


def cost_ratios(inside: pd.DataFrame, arm: str, reference: str) -> tuple[float, float]:
  """Arm over reference at the largest common size: FLOPs per token, and FLOPs per second."""
  own, base = inside[inside['arm'] == arm], inside[inside['arm'] == reference]
  common = base[base['size'].isin(own['size'])]
  if not len(common):
    return np.nan, np.nan
  size = common.loc[common['flops'].idxmax(), 'size']
  own, base = own[own['size'] == size], base[base['size'] == size]
  cost = own['flops_per_token'].median() / base['flops_per_token'].median()
  return float(cost), float(cost * own['tokens_per_second'].median() / base['tokens_per_second'].median())


def sensitivity(fitted: Fit | None, inside: pd.DataFrame) -> list[dict]:
  """The same fit under other losses and, for L(N, D), other counts of N: what the choices decide."""
  if fitted is None:
    return []
  points, width = fitted.points, fitted.problem.delta
  cases = [
    ('Huber, delta = 0.001', points, 'huber', 1e-3),
    ('Huber, delta = 0.01', points, 'huber', 1e-2),
    ('squares of log loss', points, 'mse_log', 1e-3),
    ('squares of loss', points, 'mse', 1e-3),
  ]
  if 'N' in fitted.law.covariates:
    cases += [
      ('N = all parameters', selection.to_points(inside, 'total'), 'huber', width),
      ('N = without embeddings', selection.to_points(inside, 'non_embedding'), 'huber', width),
    ]
  out = []
  for label, case_points, loss, delta_width in cases:
    other = fit(case_points, fitted.law, fitted.design.arms, loss, delta_width, start_count=0)
    allowed = verdicts(other)
    shown = {k: v if allowed[k] is None else None for k, v in other.parameters.items()}
    out.append({'choice': label} | shown)
  return out


def gaps(table: pd.DataFrame, reference: str | None) -> list[Gap]:
  """Paired gaps to the reference of every arm, smallest size first; the spread of the paired
  differences is pooled over all arms and sizes, since one arm has too few seeds for its own.
  """
  if reference is None:
    return []
  groups = []
  for arm, pairs in selection.pair_up(table, reference).items():
    groups += [(arm, size, rows) for size, rows in pairs.groupby(['size', 'duration'], sort=False)]
  losses = [_both(rows, 'validation_loss') for *_, rows in groups]
  spread = pooled_spread(losses)
  out = []
  for (arm, (size, _), rows), loss in zip(groups, losses, strict=True):
    flops, tokens = _both(rows, 'flops'), _both(rows, 'tokens')
    costs = (flops[0] / flops[1], tokens[0] / tokens[1])
    out.append(paired_gap(arm, size, loss, flops[0], costs, spread))
  return sorted(out, key=lambda g: (g.arm, g.log_flops))


def _both(pairs: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
  return pairs[f'{name}_own'].to_numpy(float), pairs[f'{name}_ref'].to_numpy(float)


def rank_sweeps(table: pd.DataFrame, fitted: Fit | None, points: Points | None) -> list[RankSweep]:
  """Groups of finished runs equal but for one rank (and the seed), at least two ranks each.

  The full-rank runs beside them have the same duration, or as many tokens within 5 %.
  """
  usable = table[
    (table['state'] == 'finished')
    & table['validation_loss'].notna()
    & (table['paired'] | table['axis'].notna())
  ]
  same = ['connection_name', 'connection_preset', 'connection_constraint', 'size', 'lr']
  out = []
  for axis in selection.AXES:
    keys = same + [name for name in selection.AXES if name != axis]
    for _, rows in usable.groupby(keys, dropna=False, sort=False):
      for _, swept in rows[rows[axis].notna()].groupby('duration', sort=False):
        if swept[axis].nunique() < 2:
          continue
        near = np.abs(np.log(rows['tokens'] / swept['tokens'].median())) < 0.05
        full = rows[rows[axis].isna() & (near | (rows['duration'] == swept['duration'].iloc[0]))]
        keep = swept.rename(columns={axis: 'rank'})
        phi, interval, problem = _exponent(axis, keep, fitted, points)
        name = (keep['arm'].iloc[0], keep['size'].iloc[0])
        out.append(RankSweep(axis, *name, keep, full, phi, interval, problem))
  return out


def _exponent(
  axis: str, rows: pd.DataFrame, fitted: Fit | None, points: Points | None
) -> tuple[float | None, list[float] | None, str | None]:
  """phi of m = m_0 r^phi by one joint fit with the law's runs, its interval, or why not."""
  levels = rows['rank'].nunique()
  if fitted is None:
    return None, None, 'no law was fitted, so a rank cannot be turned into compute'
  if levels < 3:
    return None, None, f'{levels} values cannot test a power law (3 are needed)'
  extra = selection.to_points(rows.assign(arm=f'{rows["arm"].iloc[0]}, {axis}'))
  # Runs of the law that are also points of this sweep (its home streams) count once.
  base = points.take(~np.isin(points.run, extra.run))
  log_r = np.concatenate([np.zeros(len(base)), np.log(rows['rank'].to_numpy(float))])
  merged = Points(
    {name: np.concatenate([base.log_x[name], extra.log_x[name]]) for name in base.log_x},
    *(
      np.concatenate([getattr(base, k), getattr(extra, k)]) for k in ('loss', 'arm', 'cluster', 'size', 'run')
    ),
    axes={axis: log_r},
  )
  arms = ArmModel('common', fitted.design.arms.reference, (axis,))
  joint = fit(merged, fitted.law, arms, delta=fitted.problem.delta, start_count=9)
  name = f'phi[{axis}]'
  reason = verdicts(joint)[name]
  if reason is not None:
    return None, None, reason
  return joint.parameters[name], delta(joint)[name], None


def rate_sweeps(table: pd.DataFrame) -> list[RateSweep]:
  """Learning-rate grids (at least three rates) of the size grid; a rate at which any run diverged is out."""
  tried = table[table['axis'].isna() & table['state'].isin(['finished', 'diverged'])]
  out = []
  for (arm, size, _), rows in tried.groupby(['arm', 'size', 'duration'], sort=False):
    if rows['lr'].nunique() < 3:
      continue
    losses = rows['validation_loss'].where(rows['state'] == 'finished', np.inf).groupby(rows['lr']).mean()
    found = best_learning_rate(losses.index.to_numpy(float), losses.to_numpy(float))
    best = None if found.log_x is None else float(np.exp(found.log_x))
    out.append(RateSweep(arm, size, rows, best, found.problem))
  return out


def fits_json(s: Study) -> dict[str, object]:
  """fits.json: the choice of law, the fit, every comparison, and the rules that were applied."""
  return json_ready(
    {
      'sweep': s.sweep.name,
      'law': None if s.choice.law is None else s.choice.law.name,
      'choice': s.choice.reason,
      'rules': RULES,
      'reference': s.reference,
      'fit': s.document,
      'multipliers': [vars(m) for m in s.multipliers],
      'other_choices': s.sensitivity,
      'nested': [{k: v for k, v in vars(c).items() if k != 'fit'} for c in s.nested],
      'rollout': [vars(step) for step in s.rollout],
      'seed_standard_deviation': s.seed_spread,
      'gaps': [vars(g) for g in s.gaps],
      'rank_sweeps': [
        {k: getattr(r, k) for k in ('axis', 'arm', 'size', 'phi', 'phi_interval', 'problem')}
        | {'runs': r.rows['run_id'].tolist(), 'full_rank_runs': r.full['run_id'].tolist()}
        for r in s.ranks
      ],
      'learning_rates': [
        {k: getattr(r, k) for k in ('arm', 'size', 'best', 'problem')} | {'runs': r.rows['run_id'].tolist()}
        for r in s.rates
      ],
      'excluded': [
        {'run_id': row['run_id'], 'arm': row['arm'], 'reason': row['excluded']}
        for _, row in s.table[s.table['excluded'].notna()].iterrows()
      ],
      'warnings': s.sweep.warnings,
    }
  )
