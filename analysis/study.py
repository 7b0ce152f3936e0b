"""All numbers of a report: law, intervals, comparisons, gaps, rank sweeps. No plotting, no files.

Where: Sweep (runs.py) -> Study -> figures.py and page.py. Everything printed later is computed
here once, so that figures, tables and fits.json cannot disagree.
"""

import dataclasses

import numpy as np
import pandas as pd

from . import selection
from .alternatives import Alternative, alternatives
from .compare import Candidate, RolloutStep, nested, rollout
from .fitting.document import document, json_ready
from .fitting.estimate import Fit, fit
from .fitting.identify import RULES, Choice, choose_law, verdicts
from .fitting.laws import ArmModel, Points
from .gaps import Gap, gaps
from .multipliers import Multiplier, multipliers
from .ranks import RankSweep, rank_sweeps
from .rates import RateSweep, rate_sweeps
from .runs import Sweep

WIDTH = 'auto'  # report: that of Huber's loss follows the noise (estimate.make_problem)


@dataclasses.dataclass(frozen=True)
class Study:
  """Everything that the report prints or draws; params: the convention of N, a key of selection.PARAMS."""

  sweep: Sweep
  table: pd.DataFrame
  params: str
  reference: str | None
  choice: Choice
  points: Points | None
  fit: Fit | None
  document: dict | None
  multipliers: list[Multiplier]
  sensitivity: list[dict]
  alternatives: list[Alternative]
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


def study(
  sweep: Sweep,
  resamples: int = 500,
  progress: bool = False,
  params: str = 'matmul',
  reference: str | None = None,
) -> Study:
  """Computes all of it from the sweep's runs; partial sweeps leave parts empty, with reasons.

  reference: the arm that gaps and multipliers are against; None is residual where it has runs. Raises
  ConfigError for an arm without finished runs.
  """
  table = selection.drop_small_arms(selection.classify(sweep.table))
  inside = table[table['excluded'].isna()]
  reference = selection.reference_arm(table, reference)
  points = selection.to_points(inside, params) if len(inside) else None
  choice = choose_law(points) if points is not None else Choice(None, 'There is no finished run.')
  fitted = doc = None
  if choice.law is not None:
    arms = ArmModel('common' if len(points.arms) > 1 else 'none', reference)
    if len(points) <= len(points.arms) + 1 + 2 * len(choice.law.terms):
      choice = Choice(None, f'No law is fitted: {len(points)} runs are too few for its parameters.')
    else:
      fitted = fit(points, choice.law, arms, width=WIDTH)
      doc = document(fitted, resamples, progress)
  return Study(
    sweep,
    table,
    params,
    reference,
    choice,
    points,
    fitted,
    doc,
    multipliers(fitted, doc, inside, reference),
    sensitivity(fitted, inside, params),
    alternatives(points, fitted.design.arms, WIDTH) if fitted else [],
    nested(points, choice.law, reference, width=fitted.problem.width)
    if fitted and len(points.arms) > 1
    else [],
    rollout(points, choice.law, fitted.design.arms, width=WIDTH) if fitted else [],
    gaps(table, reference),
    rank_sweeps(table, fitted, points, params),
    rate_sweeps(table, params),
  )


def sensitivity(fitted: Fit | None, inside: pd.DataFrame, params: str) -> list[dict]:
  """The same fit under other losses and, for L(N, D), other counts of N: what the choices decide."""
  if fitted is None:
    return []
  points, width = fitted.points, fitted.problem.width
  cases = [
    ('Huber, delta = 0.001', points, 'huber', 1e-3),
    ('Huber, delta = 0.01', points, 'huber', 1e-2),
    ('squares of log loss', points, 'mse_log', 1e-3),
    ('squares of loss', points, 'mse', 1e-3),
  ]
  if 'N' in fitted.law.covariates:
    cases += [
      (f'N = {words}', selection.to_points(inside, name), 'huber', width)
      for name, words in selection.PARAMS.items()
      if name != params
    ]
  out = []
  for label, case_points, loss, case_width in cases:
    other = fit(case_points, fitted.law, fitted.design.arms, loss, case_width, start_count=0)
    allowed = verdicts(other)
    shown = {k: v if allowed[k] is None else None for k, v in other.parameters.items()}
    out.append({'choice': label} | shown)
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
      'params': s.params,
      'other_choices': s.sensitivity,
      'other_laws': [vars(a) for a in s.alternatives],
      'nested': [{k: v for k, v in vars(c).items() if k != 'fit'} for c in s.nested],
      'rollout': [vars(step) for step in s.rollout],
      'seed_standard_deviation': s.seed_spread,
      'gaps': [vars(g) for g in s.gaps],
      'rank_sweeps': [
        {k: getattr(r, k) for k in ('axis', 'arm', 'size')}
        | {'form': r.exponent.form, 'phi': r.exponent.phi, 'phi_interval': r.exponent.interval}
        | {'p_value': r.exponent.p_value, 'problem': r.exponent.problem}
        | {'runs': r.rows['run_id'].tolist(), 'full_rank_runs': r.full['run_id'].tolist()}
        for r in s.ranks
      ],
      'learning_rates': [
        {k: getattr(r, k) for k in ('arm', 'size', 'budget', 'best', 'problem', 'sensitivity')}
        | {'lr_range': [r.losses.index.min(), r.losses.index.max()], 'runs': r.rows['run_id'].tolist()}
        for r in s.rates
      ],
      'excluded': [
        {'run_id': row['run_id'], 'arm': row['arm'], 'reason': row['excluded']}
        for _, row in s.table[s.table['excluded'].notna()].iterrows()
      ],
      'warnings': s.sweep.warnings,
    }
  )
