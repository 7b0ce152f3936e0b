"""Numbers and verdicts in words, for the page's templates and for the command line.

Where: under write.py.
"""

import math
from collections.abc import Sequence

from ..alternatives import Alternative
from ..multipliers import Multiplier
from ..study import Study

METHODS = {
  'delta': 'delta method',
  'case_bootstrap': 'bootstrap of runs',
  'cluster_bootstrap': 'bootstrap of paired groups',
}


def _known(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 4) -> str:
  """A number with `digits` significant digits; a dash where there is none."""
  return f'{value:.{digits}g}' if _known(value) else '–'


def loss(value: float | None) -> str:
  """Nats to four decimals."""
  return f'{value:.4f}' if _known(value) else '–'


def big(value: float | None) -> str:
  """1.2M, 3.4e+15: counts of parameters and tokens in short."""
  if not _known(value):
    return '–'
  for scale, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if scale <= abs(value) < 1e12:
      return f'{value / scale:.3g}{unit}'
  return f'{value:.3g}'


def whole(value: float | None) -> str:
  """A count."""
  return f'{value:.0f}' if _known(value) else '–'


def span(ends: Sequence[float] | None, digits: int = 3) -> str:
  """[low, high] or a dash."""
  return f'[{number(ends[0], digits)}, {number(ends[1], digits)}]' if ends and ends[0] is not None else '–'


def signed(value: float | None) -> str:
  """A difference of losses, nats."""
  return f'{value:+.4f}' if _known(value) else '–'


def signed_span(low: float | None, high: float | None) -> str:
  """Its interval."""
  return f'[{low:+.4f}, {high:+.4f}]' if _known(low) else '–'


def percent(value: float | None, sign: str = '') -> str:
  """A share, in percent to two decimals."""
  return '–' if value is None else f'{100 * value:{sign}.2f} %'


def multiplier(m: Multiplier, unit: str = 'flops', digits: int = 3) -> str:
  """m in one currency with its interval, or the reason why there is none."""
  value, ends = getattr(m, unit), getattr(m, f'{unit}_interval')
  if value is None:
    return getattr(m, f'{unit}_problem')
  return f'{value:.{digits}f} ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})'


def multiplier_cell(s: Study, arm: str) -> str:
  """m of an arm in the summary, or why it has none."""
  for m in s.multipliers:
    if m.arm == arm:
      if m.flops is None:
        return f'none: {m.problem}'
      return f'{m.flops:.3f} [{m.flops_interval[0]:.3f}, {m.flops_interval[1]:.3f}]'
  if s.fit is None:
    return 'none: no law fitted'
  return '1 (reference)' if arm == s.reference else 'none: not in the law'


def headlines(s: Study) -> list[str]:
  """What the sweep found, in one sentence per arm."""
  shown = [m for m in s.multipliers if m.flops is not None]
  if not shown and s.fit is None:
    return [s.choice.reason]
  if not shown and s.multipliers:
    return [f'Compute multipliers: {s.multipliers[0].problem}.']
  if not shown:
    return [f'One arm ({s.reference}) has finished runs, so there is nothing to compare it with.']
  out = []
  for m in shown:
    low, high = m.flops_interval
    verdict = 'saves compute' if low > 1 else 'costs compute' if high < 1 else 'undecided'
    equal = '' if m.equal_tokens is None else f'; at equal size and tokens {multiplier(m, "equal_tokens", 2)}'
    out.append(
      f'{m.arm}: {s.reference} needs {m.flops:.2f} times the compute for equal loss '
      f'(95 % {low:.2f} to {high:.2f}; {verdict}){equal}.'
    )
  return out


def lack_of_fit(s: Study) -> str:
  """How far the law misses the runs, against how far seeds differ."""
  lack = s.lack_of_fit
  out = f'Runs scatter about the fit by {100 * lack.scatter:.2f} % of the loss'
  if lack.seeds is None:
    return f'{out}; no size has two seeds to compare.'
  out += f', seeds by {100 * lack.seeds:.2f} %.'
  if lack.beyond_seeds:
    out += ' The law misses more than seeds explain: sizes differ by more than their compute.'
  return out


def alternative(a: Alternative) -> str:
  """The formula with its exponents, or why the grid cannot carry the law."""
  if a.problem:
    return f'{a.formula}: {a.problem}'
  return f'{a.formula}: ' + ', '.join(
    f'{name} {value}' if isinstance(value, str) else f'{name} = {value[0]:.2f} {span(value[1], 2)}'
    for name, value in a.exponents.items()
  )


def varying(values: Sequence[str], most: int = 8) -> str:
  """The values of a field that runs do not share."""
  more = f', ... ({len(values)} values)' if len(values) > most else ''
  return ', '.join(values[:most]) + more


def counted(counts: dict[str, int]) -> str:
  """Values with how many runs have them, where there are several."""
  return '; '.join(v if len(counts) == 1 else f'{v} ({n} runs)' for v, n in counts.items())


def known(value: object) -> object:
  """The value, or a dash where there is none."""
  return '–' if value is None or value != value else value
