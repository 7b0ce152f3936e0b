"""What the choice of a law decides: the other laws that the grid can carry, other losses, other counts of N.

Where: a fit -> here -> study.py; the figures of width and depth quote the exponents.
"""

import dataclasses

import pandas as pd

from .compare import NO_ERRORS, Errors, errors
from .conventions import PARAMS
from .fitting.estimate import Fit, fit
from .fitting.identify import Choice, choose_law, shape_law, verdicts
from .fitting.intervals import delta_method
from .fitting.laws import LAWS
from .selection import to_points


@dataclasses.dataclass(frozen=True)
class Alternative:
  """A law with its errors (mean |log error|) and exponents: (value, 95 % interval), or why there is none."""

  law: str
  formula: str
  problem: str | None
  parameters: int | None = None
  errors: Errors = NO_ERRORS
  exponents: dict[str, tuple[float, list[float]] | str] = dataclasses.field(default_factory=dict)


def alternatives(whole: Fit | None, width: float | str) -> list[Alternative]:
  """Every law in LAWS on the runs of a fit, or why the grid cannot carry it."""
  if whole is None:
    return []
  points, arms = whole.points, whole.design.arms
  chosen, shape = choose_law(points), shape_law(points)
  both = None if chosen.law is LAWS['chinchilla'] else chosen.reason
  cases = [
    Choice(chosen.law and LAWS['compute'], chosen.reason),
    *(Choice(None if both else LAWS[name], both or '') for name in ('chinchilla', 'overtraining')),
    shape,
  ]
  out = []
  for name, case in zip(('compute', 'chinchilla', 'overtraining', 'width_depth'), cases, strict=True):
    law = case.law
    if law is None or len(points) <= len(points.arms) + 1 + 2 * len(law.terms):
      reason = case.reason if law is None else f'{len(points)} runs are too few for its parameters.'
      out.append(Alternative(name, LAWS[name].formula, reason))
      continue
    fitted = fit(points, law, arms, width=width)
    reasons, ends = verdicts(fitted), delta_method(fitted)
    exponents = {k: reasons[k] or (fitted.parameters[k], ends[k]) for k in law.exponents}
    note = case.reason if law is shape.law else law.formula
    out.append(
      Alternative(name, note, None, len(fitted.theta_P), errors(fitted, fitted.problem.width), exponents)
    )
  return out


def other_choices(whole: Fit | None, inside: pd.DataFrame, params: str) -> list[dict]:
  """The same fit under other losses and, for L(N, D), other counts of N: what the choices decide.

  inside: the runs of the law.
  """
  if whole is None:
    return []
  points, width = whole.points, whole.problem.width
  cases = [
    ('Huber, delta = 0.001', points, 'huber', 1e-3),
    ('Huber, delta = 0.01', points, 'huber', 1e-2),
    ('squares of log loss', points, 'mse_log', 1e-3),
    ('squares of loss', points, 'mse', 1e-3),
  ]
  if 'N' in whole.law.covariates:
    cases += [
      (f'N = {words}', to_points(inside, name), 'huber', width)
      for name, words in PARAMS.items()
      if name != params
    ]
  out = []
  for choice, case_points, loss, case_width in cases:
    other = fit(case_points, whole.law, whole.design.arms, loss, case_width, start_count=0)
    allowed = verdicts(other)
    shown = {k: v if allowed[k] is None else None for k, v in other.parameters.items()}
    out.append({'choice': choice} | shown)
  return out
