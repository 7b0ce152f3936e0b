"""A fit as plain values: parameters, intervals, verdicts and diagnostics, ready for JSON."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from mhc_jax.storage import finite

from .estimate import Fit
from .identify import doubts, unknown_floor, verdicts
from .intervals import (
  LEVEL,
  bootstrap,
  correlation,
  coverage_caveat,
  delta_method,
  derived,
  groups,
  influence,
  percentile,
  preferred,
)


def document(
  fitted: Fit,
  resamples: int = 0,
  progress: bool = False,
  seed: int = 0,
  level: float = LEVEL,
  refused: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, object]:
  """Everything about one fit as JSON types: parameters at the top level, then how it was found.

  A parameter that identify.py does not let through is null, with the reason under `verdicts`. They judge
  95 % intervals, whatever `level` is shown. refused: more labels with reasons.
  """
  values = fitted.parameters | derived(fitted, fitted.theta_P)
  samples = {}
  if resamples:
    clustered = groups(fitted) < len(fitted.points)
    name = 'cluster_bootstrap' if clustered else 'case_bootstrap'
    samples[name] = bootstrap(fitted, resamples, clustered, seed, progress)

  def intervals(level: float) -> dict[str, dict[str, list[float]]]:
    drawn = {name: percentile(fitted, sample, level) for name, sample in samples.items()}
    return {'delta': delta_method(fitted, level)} | drawn

  by_method, redrawn = intervals(level), {name: sample.redrawn for name, sample in samples.items()}
  method = preferred(fitted, tuple(by_method))
  judged = intervals(LEVEL)[method]
  reasons = verdicts(fitted, judged)
  if not doubts(fitted):
    reasons |= refused
  show = {name: reasons.get(name) is None for name in values}  # a pinned value has no interval
  shown = {name: {k: v if show[k] else None for k, v in ends.items()} for name, ends in by_method.items()}
  return finite(
    {name: value if show[name] else None for name, value in values.items()}
    | {
      'objective': fitted.objective,
      'n_points': len(fitted.points),
      'intervals': shown[method],
      'flags': list(fitted.flags),
      'doubts': doubts(fitted),
      'notes': [*fitted.points.notes, *fitted.noise.notes],
      'floor_unknown': unknown_floor(fitted, reasons, judged),
      'verdicts': {k: v for k, v in reasons.items() if v is not None},
      'law': fitted.law.name,
      'formula': fitted.law.formula,
      'level': level,
      'pinned': dict(fitted.law.pinned),
      'interval_method': method,
      'intervals_by_method': shown,
      'resamples': resamples,
      'redrawn': redrawn,
      'caveat': coverage_caveat(fitted),
    }
    | diagnostics(fitted)
  )


def diagnostics(fitted: Fit) -> dict[str, object]:
  """How a fit was made and how far it can be trusted."""
  shift_RP, cook_R = influence(fitted)
  rows = zip(fitted.points.run.tolist(), cook_R, shift_RP, strict=True)
  scaled_RP = fitted.noise.jac_RP / np.maximum(np.linalg.norm(fitted.noise.jac_RP, axis=0), 1e-300)
  return {
    'degrees_of_freedom': fitted.degrees_of_freedom,
    'loss': fitted.problem.kind,
    'delta': fitted.problem.width,
    'reference': fitted.design.arms.reference,
    'within_group_correlation': fitted.noise.shared,
    'noise': [
      {'shared_by': s.name, 'groups': s.groups, 'freedom': s.freedom, 'mean_square': s.mean_square}
      for s in fitted.noise.strata
    ],
    'optimiser': {
      'converged': fitted.converged,
      'starts': fitted.starts,
      'starts_at_optimum': fitted.starts_at_optimum,
      'moved_from_init': fitted.moved_from_init,
    },
    'condition_number': float(np.linalg.cond(scaled_RP)) ** 2,
    'correlation': {
      'parameters': list(fitted.theta_names),
      'matrix': np.round(correlation(fitted), 4),
    },
    'influence': [
      {
        'run': run,
        'cooks_distance': float(f'{cook:.4g}'),
        'shift_in_standard_errors': dict(zip(fitted.theta_names, shift_P.round(3), strict=True)),
      }
      for run, cook, shift_P in rows
    ],
  }
