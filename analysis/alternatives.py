"""The other laws that a grid can carry beside the one that compares the arms: shape, over-training.

Where: after identify.py; the report tabulates them, and the figures of width and depth quote the exponents.
"""

import dataclasses

from .compare import errors
from .fitting.estimate import fit
from .fitting.identify import Choice, choose_law, shape_law, verdicts
from .fitting.intervals import delta_method
from .fitting.laws import LAWS, ArmModel, Points


@dataclasses.dataclass(frozen=True)
class Alternative:
  """A law with its errors (mean |log error|) and exponents: (value, 95 % interval), or why there is none."""

  law: str
  formula: str
  problem: str | None
  parameters: int | None = None
  in_sample_error: float | None = None
  held_out_error: float | None = None
  left_out_error: float | None = None
  exponents: dict[str, tuple[float, list[float]] | str] = dataclasses.field(default_factory=dict)


def alternatives(points: Points, arms: ArmModel, width: float | str) -> list[Alternative]:
  """Every law in LAWS on the same runs, or why the grid cannot carry it."""
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
      Alternative(
        name, note, None, len(fitted.theta_P), *errors(fitted, 'huber', fitted.problem.width), exponents
      )
    )
  return out
