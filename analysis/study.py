"""All numbers of a report, computed once: law, intervals, comparisons, tables, curves. No plotting, no files.

Where: Sweep (runs.py) -> Study -> figures/ and page/, which only lay out, so that figures, tables and
fits.json cannot disagree. fits.json has every number but the points of curves and of their means over seeds,
which are in the CSV beside each figure.
"""

import dataclasses

import numpy as np
import pandas as pd

from mhc_jax.storage import finite

from . import layers, training
from .alternatives import Alternative, alternatives, other_choices
from .compare import Candidate, LackOfFit, RolloutStep, lack_of_fit, nested, residuals, rollout
from .diagnostics import Diagnostics, diagnostics
from .efficiency import efficiency
from .fitting.document import document
from .fitting.estimate import Fit, fit
from .fitting.identify import RULES, Choice, choose_law
from .fitting.laws import ArmModel, Points
from .gain import gains, refused
from .gaps import Gap, gaps, seed_spread
from .law_curves import LawCurve, arrows, at_equal_flops, law_curves
from .multipliers import Multiplier, multipliers
from .optima import Optimum, as_json, optima
from .published import Published, published
from .ranks import RankSweep, rank_sweeps
from .rates import RateSweep, rate_sweeps
from .router import Loads, loads
from .runs import Sweep
from .selection import classify, largest, rate_notes, rate_problems, reference_arm, to_points
from .sparse import Sparsity, sparsity
from .stability import Stability, stability
from .tables import ablation, final_losses, summary

WIDTH = 'auto'  # report: that of Huber's loss follows the noise (estimate.make_problem)


@dataclasses.dataclass(frozen=True)
class Study:
  """Everything that the report prints or draws; each part may be empty.

  params: the convention of N, a key of conventions.PARAMS. table: runs with what selection.classify says of
  them; largest: those at the size and budget at which the arms are shown side by side.
  """

  sweep: Sweep
  table: pd.DataFrame
  largest: pd.DataFrame
  params: str
  reference: str | None
  choice: Choice
  fit: Fit | None
  document: dict | None
  multipliers: list[Multiplier]
  lack_of_fit: LackOfFit | None
  other_choices: list[dict]
  alternatives: list[Alternative]
  nested: list[Candidate]
  rate_notes: list[str]
  rollout: list[RolloutStep]
  residuals: pd.DataFrame
  curves: dict[str, LawCurve]
  at_equal_flops: pd.DataFrame
  arrows: list[dict]
  seed_spread: float | None
  gaps: list[Gap]
  published: Published
  efficiency: pd.DataFrame
  summary: pd.DataFrame
  final_losses: pd.DataFrame
  ablation: pd.DataFrame
  optima: list[Optimum]
  ranks: list[RankSweep]
  rates: list[RateSweep]
  stability: Stability
  loads: Loads
  sparsity: Sparsity
  training_losses: pd.DataFrame
  gaps_over_updates: pd.DataFrame
  gaps_over_tokens: pd.DataFrame
  gains: pd.DataFrame
  matrices: list[tuple[str, str, dict[str, np.ndarray]]]
  diagnostics: Diagnostics

  @property
  def arms(self) -> list[str]:
    """In the order of the plan."""
    return list(dict.fromkeys(self.table['arm']))

  @property
  def grid(self) -> pd.DataFrame:
    """Finished runs of the size grid: those of the law, and those of arms too small for it."""
    return self.table[self.table['paired']]


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
  table = classify(sweep.table)
  inside, grid = table[table['excluded'].isna()], table[table['paired']]
  reference = reference_arm(table, reference)
  choice, fitted = fit_law(to_points(inside, params), reference)
  candidates, unequal_rates = nested(fitted), rate_problems(table, reference)
  changes = gains(fitted, candidates)
  no_multiplier = refused(changes) | {f'm[{arm}]': reason for arm, reason in unequal_rates.items()}
  doc = None if fitted is None else document(fitted, resamples, progress, refused=no_multiplier)
  spread, paired = seed_spread(grid), gaps(table, reference, unequal_rates)
  own = multipliers(fitted, doc, inside, reference, changes)
  curves = law_curves(fitted, doc, inside, params)
  losses, shown = final_losses(table, paired), largest(table, reference)
  return Study(
    sweep=sweep,
    table=table,
    largest=shown,
    params=params,
    reference=reference,
    choice=choice,
    fit=fitted,
    document=doc,
    multipliers=own,
    lack_of_fit=lack_of_fit(fitted, spread),
    other_choices=other_choices(fitted, inside, params),
    alternatives=alternatives(fitted, WIDTH),
    nested=candidates,
    rate_notes=rate_notes(table),
    rollout=rollout(fitted, WIDTH),
    residuals=residuals(fitted),
    curves=curves,
    at_equal_flops=at_equal_flops(curves, grid, reference),
    arrows=arrows(curves, own, grid),
    seed_spread=spread,
    gaps=paired,
    published=published(grid, paired, own, reference),
    efficiency=efficiency(shown, own, reference),
    summary=summary(table),
    final_losses=losses,
    ablation=ablation(shown, losses),
    optima=optima(grid, params),
    ranks=rank_sweeps(table, fitted, params, reference, spread),
    rates=rate_sweeps(table, params),
    stability=stability(table, sweep.runs),
    loads=loads(sweep.runs),
    sparsity=sparsity(table, sweep.runs),
    training_losses=training.losses(shown, sweep.runs),
    gaps_over_updates=training.gaps_over_updates(shown, sweep.runs, reference),
    gaps_over_tokens=training.gaps_over_tokens(shown, sweep.runs, reference),
    gains=layers.gains(shown, sweep.runs),
    matrices=layers.matrices(shown, sweep.runs),
    diagnostics=diagnostics(shown, sweep.runs),
  )


def fit_law(points: Points, reference: str | None) -> tuple[Choice, Fit | None]:
  """The law that the runs identify with its joint fit of all arms, or why there is none."""
  choice = choose_law(points)
  if choice.law is None:
    return choice, None
  if len(points) <= len(points.arms) + 1 + 2 * len(choice.law.terms):
    return Choice(None, f'No law is fitted: {len(points)} runs are too few for its parameters.'), None
  arms = ArmModel('common' if len(points.arms) > 1 else 'none', reference)
  return choice, fit(points, choice.law, arms, width=WIDTH)


def fits_json(s: Study) -> dict[str, object]:
  """fits.json: the choice of law, the fit, every comparison and table, and the rules that were applied."""
  left_out = s.table[s.table['excluded'].notna()].rename(columns={'excluded': 'reason'})
  return finite(
    {
      'sweep': s.sweep.name,
      'law': None if s.choice.law is None else s.choice.law.name,
      'choice': s.choice.reason,
      'rules': RULES,
      'reference': s.reference,
      'fit': s.document,
      'multipliers': s.multipliers,
      'params': s.params,
      'lack_of_fit': s.lack_of_fit,
      'other_choices': s.other_choices,
      'other_laws': s.alternatives,
      'rate_notes': s.rate_notes,
      'nested': [c.as_json() for c in s.nested],
      'rollout': s.rollout,
      'seed_standard_deviation': s.seed_spread,
      'gaps': s.gaps,
      'efficiency': s.efficiency.to_dict('records'),
      'published_gaps': s.published.gaps.to_dict('records'),
      'published_fits': s.published.fits.to_dict('records'),
      'summary': s.summary.to_dict('records'),
      'final_losses': s.final_losses.to_dict('records'),
      'ablation': s.ablation.to_dict('records'),
      'isoflop': [as_json(o) for o in s.optima],
      'rank_sweeps': [_rank_json(r) for r in s.ranks],
      'learning_rates': [
        {k: getattr(r, k) for k in ('arm', 'size', 'budget', 'best', 'problem', 'sensitivity')}
        | {'lr_range': [r.losses.index.min(), r.losses.index.max()], 'runs': r.rows['run_id'].tolist()}
        for r in s.rates
      ],
      'stability': s.stability.means.to_dict('records'),
      'router_loads': s.loads.last.to_dict('records'),
      'sparse_gains': s.sparsity.gains.to_dict('records'),
      'sparse_layers': s.sparsity.layers.to_dict('records'),
      'diagnostics': s.diagnostics.by_arm.to_dict('records'),
      'excluded': left_out[['run_id', 'arm', 'reason']].to_dict('records'),
      'warnings': s.sweep.warnings,
    }
  )


def _rank_json(r: RankSweep) -> dict[str, object]:
  levels = {'full_rank_loss': r.full, 'reference_loss': r.reference}
  return (
    {k: getattr(r, k) for k in ('axis', 'arm', 'size')}
    | {'form': r.exponent.form, 'phi': r.exponent.phi, 'phi_interval': r.exponent.interval}
    | {'p_value': r.exponent.p_value, 'problem': r.exponent.problem}
    | {'runs': r.rows['run_id'].tolist(), 'full_rank_runs': r.full['run_id'].tolist()}
    | {'means': r.means.to_dict('records')}
    | {name: rows['validation_loss'].mean() if len(rows) else None for name, rows in levels.items()}
  )
