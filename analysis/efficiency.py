"""What a token costs in each arm, and the same loss: parameters, FLOPs, seconds, joules.

Where: classified table and multipliers -> here -> study.py. Joules at most: the board's power (chips.py) for
the time that a token takes; measured: the run's own counter (mhc_jax/energy.py). For equal loss an arm needs
1 / m of the reference's FLOPs; each costs it as many joules as its tokens do over their FLOPs.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mhc_jax.chips import chip_of

from .multipliers import Multiplier
from .needs import Need, need


def efficiency(shown: pd.DataFrame, multipliers: Sequence[Multiplier], reference: str | None) -> pd.DataFrame:
  """A row per arm at one size (selection.largest), medians over its finished runs; empty without speeds.

  for_equal_loss, _low, _high: joules over the reference's, counted ones where both have them (by: 'counter'),
  else by time on the same board (by: 'time'); None for an arm without one multiplier.
  """
  done = shown[shown['state'] == 'finished']
  if reference is None or not np.isfinite(done['tokens_per_second']).any():
    return pd.DataFrame()
  rows = {arm: _row(arm, own) for arm, own in done.groupby('arm', sort=False)}
  base, known = rows.get(reference), {m.arm: need(m) for m in multipliers}
  for arm, row in rows.items():
    row |= _for_equal_loss(row, base, Need(1, 1, 1) if arm == reference else known.get(arm))
  return pd.DataFrame(rows.values())


def at_equal_loss(needed: Need, energy: float, flops: float) -> tuple[float, float, float]:
  """Energy for the reference's loss over the reference's, with the interval of the compute needed.

  energy, flops: of a token over the reference's.
  """
  return tuple(value * energy / flops for value in (needed.value, needed.low, needed.high))


def _row(arm: str, own: pd.DataFrame) -> dict[str, object]:
  seconds = 1 / own['tokens_per_second'].median()
  kinds = own['device_kind'].dropna().unique()
  chip = chip_of(kinds[0]) if len(kinds) == 1 else None
  watts = chip.watts / chip.devices * own['device_count'].iloc[0] if chip and chip.watts else None
  return {
    **{'arm': arm, 'size': own['size'].iloc[0], 'parameters': own['params_total'].median()},
    **{'flops_per_token': own['flops_per_token'].median(), 'seconds_per_token': seconds},
    'joules_per_token': own['joules_per_token'].median(),
    'measured_by': next(iter(own['energy'].dropna()), None),
    'joules_per_token_at_most': watts and watts * seconds,
  }


def _for_equal_loss(row: dict, base: dict | None, needed: Need | None) -> dict[str, object]:
  names = ('for_equal_loss', 'for_equal_loss_low', 'for_equal_loss_high')
  if base is None or needed is None:
    return dict.fromkeys((*names, 'by'))
  measured = np.isfinite([row['joules_per_token'], base['joules_per_token']]).all()
  unit = 'joules_per_token' if measured else 'seconds_per_token'
  flops = row['flops_per_token'] / base['flops_per_token']
  values = at_equal_loss(needed, row[unit] / base[unit], flops)
  return dict(zip(names, values, strict=True)) | {'by': 'counter' if measured else 'time'}
