"""Compute that an arm needs for the loss that the reference has, over the reference's: 1 / m.

Where: multipliers.py -> here -> figures/ and page/: sentences, tables and figures all read in this direction,
the arm's; fits.json has m, which reads in the reference's.
"""

import dataclasses
from collections.abc import Sequence

from .multipliers import Multiplier


@dataclasses.dataclass(frozen=True)
class Need:
  """A ratio of compute with its 95 % interval; flops: of the size at which it holds, None for all sizes."""

  value: float
  low: float
  high: float
  flops: float | None = None

  @property
  def verdict(self) -> str:
    """What the interval says."""
    return 'saves compute' if self.high < 1 else 'costs compute' if self.low > 1 else 'undecided'


def _turned(m: float, ends: list[float], flops: float | None = None) -> Need:
  return Need(1 / m, 1 / ends[1], 1 / ends[0], flops)


def need(m: Multiplier, unit: str = 'flops') -> Need | None:
  """That of all sizes in one currency; None where m is not one number."""
  value = getattr(m, unit)
  return None if value is None else _turned(value, getattr(m, f'{unit}_interval'))


def ends(m: Multiplier) -> tuple[Need, Need] | None:
  """Those at the smallest and at the largest size where the gain is not the same at all sizes, else None."""
  if m.trend not in ('fades', 'grows') or m.smallest is None:
    return None
  return tuple(_turned(at.value, at.interval, at.flops) for at in (m.smallest, m.largest))


def needs(m: Multiplier) -> list[Need]:
  """All that is known of an arm: one, or one at either end of the sizes, or none."""
  one = need(m)
  return list(ends(m) or ()) if ends(m) or one is None else [one]


def shown(multipliers: Sequence[Multiplier], arms: Sequence[str]) -> list[Multiplier]:
  """Those with a number, in the order of the arms given."""
  return sorted((m for m in multipliers if needs(m)), key=lambda m: arms.index(m.arm))
