"""Numbers and verdicts in words, for the page's templates and for the command line.

Where: under write.py.
"""

import math
from collections.abc import Sequence

from ..alternatives import Alternative
from ..compare import Candidate
from ..multipliers import Multiplier
from ..needs import Need, ends, need, needs
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
  return f'[{number(ends[0], digits)}, {number(ends[1], digits)}]' if ends and _known(ends[0]) else '–'


def signed(value: float | None) -> str:
  """A difference of losses, nats."""
  return f'{value:+.4f}' if _known(value) else '–'


def signed_span(low: float | None, high: float | None) -> str:
  """Its interval."""
  return f'[{low:+.4f}, {high:+.4f}]' if _known(low) else '–'


def percent(value: float | None, sign: str = '') -> str:
  """A share, in percent to two decimals."""
  return '–' if value is None else f'{100 * value:{sign}.2f} %'


def power(value: float) -> str:
  """2.3e14: FLOPs in a sentence."""
  return f'{value:.1e}'.replace('e+', 'e').replace('.0e', 'e')


def times(need: Need, digits: int = 2) -> str:
  """0.72 (0.61 to 0.86)."""
  return f'{need.value:.{digits}f} ({need.low:.{digits}f} to {need.high:.{digits}f})'


def needed(m: Multiplier, unit: str = 'flops') -> str:
  """Compute over the reference's in one currency with its interval, or the reason why there is none."""
  if unit == 'flops' and ends(m):
    return '; '.join(f'{times(at)} at {power(at.flops)} FLOPs' for at in ends(m))
  one = need(m, unit)
  return times(one, 3) if one else getattr(m, 'problem' if unit == 'flops' else f'{unit}_problem') or '–'


def needed_cell(s: Study, arm: str) -> str:
  """The same in the summary."""
  for m in s.multipliers:
    if m.arm == arm:
      return needed(m) if needs(m) else f'none: {needed(m)}'
  if s.fit is None:
    return 'none: no law fitted'
  return '1 (reference)' if arm == s.reference else 'none: not in the law'


def _listed(names: Sequence[str]) -> str:
  return ' and '.join(filter(None, (', '.join(names[:-1]), names[-1])))


def question(s: Study) -> str:
  """What the sweep asks, as the page's title."""
  others = [arm for arm in s.arms if arm != s.reference]
  if s.reference is None:
    return f'{s.sweep.name}: no run has finished'
  if not others:
    return f'How does the loss of {s.reference} fall with compute?'
  asked = 'a lower loss' if s.fit is None else 'less compute'
  verb = ('reach', 'reaches') if s.fit is None else ('need', 'needs')
  if len(others) > 4:
    return f'Which of {len(others)} arms {verb[1]} {asked} than {s.reference}?'
  return f'{"Do" if len(others) > 1 else "Does"} {_listed(others)} {verb[0]} {asked} than {s.reference}?'


def headlines(s: Study) -> list[str]:
  """What the sweep found: a sentence per arm, in the order of the plan, or why there is none."""
  arms = [arm for arm in s.arms if arm != s.reference]
  if s.reference is None:
    return [s.choice.reason]
  if not s.multipliers and not s.gaps:
    only = f'One arm ({s.reference}) has finished runs, so there is nothing to compare it with.'
    return [only] if s.fit else [only, s.choice.reason]
  known = {m.arm: m for m in s.multipliers}
  out = [] if s.fit else [s.choice.reason]
  for arm in arms:
    if arm in known and needs(known[arm]):
      out.append(_need_sentence(s.reference, known[arm]))
    elif sentence := _gap_sentence(s, arm, known.get(arm)):
      out.append(sentence)
  return out


def _need_sentence(reference: str, m: Multiplier) -> str:
  """Compute that the arm needs for the same loss, at all sizes or at either end of them."""
  if two := ends(m):
    small, large = two
    if small.value > 1 < large.value:
      change = f'its cost {"grows" if large.value > small.value else "fades"}'
    else:
      change = f'its gain {m.trend}'
    return (
      f"{m.arm} needs {times(small)} times {reference}'s compute for the same loss at {power(small.flops)} "
      f'FLOPs but {times(large)} times at {power(large.flops)}: {change}.'
    )
  one = need(m)
  verdict = one.verdict if one.verdict == 'undecided' else f'it {one.verdict}'
  more = '; whether that holds at all sizes, these runs cannot tell' if _trend_unknown(m) else ''
  return (
    f"{m.arm} needs {one.value:.2f} times {reference}'s compute for the same loss "
    f'(95 %: {one.low:.2f} to {one.high:.2f}): {verdict}{more}.'
  )


def _trend_unknown(m: Multiplier) -> bool:
  return m.trend == 'cannot tell'


def _gap_sentence(s: Study, arm: str, m: Multiplier | None) -> str | None:
  """Why an arm has no multiplier, if there is a law; its paired gap at the largest size, if it has one."""
  reason = (m.problem if m else 'it is not in the law') if s.fit else None
  own = [g for g in s.gaps if g.arm == arm]
  if not own:
    return (
      f'{arm} has no compute multiplier: {reason}.' if reason else f'{arm}: no run to compare has finished.'
    )
  g = max(own, key=lambda g: g.flops)
  place = f'the largest size, {g.size},' if len({one.size for one in own}) > 1 else g.size
  lower = g.difference < 0
  sentence = f"{abs(g.difference):.3f} nats {'lower' if lower else 'higher'} than {s.reference}'s"
  pairs = f'{g.pairs} paired seed{"s" * (g.pairs > 1)}'
  if g.low is None:
    sentence += f' ({pairs}: no interval)'
  elif g.low * g.high > 0:
    low, high = sorted((abs(g.low), abs(g.high)))
    sentence += f' (95 %: {low:.3f} to {high:.3f}, {pairs})'
  else:
    out, back = (-g.low, g.high) if lower else (g.high, -g.low)
    names = ('lower', 'higher') if lower else ('higher', 'lower')
    sentence += f' (95 %: {out:.3f} {names[0]} to {back:.3f} {names[1]}, {pairs}): undecided'
  start = f'{arm} has no compute multiplier ({reason}); its' if reason else f"{arm}'s"
  return f'{start} loss at {place} is {sentence}.'


def evidence(s: Study) -> str | None:
  """How far the law misses, and how many seeds there are: what the first screen says beside the answer."""
  counts = s.grid.groupby(['arm', 'size'])['seed'].nunique()
  if counts.empty:
    return None
  few, many = int(counts.min()), int(counts.max())
  seeds = (
    f'{few} to {many} seeds per arm and size' if few < many else f'{few} seed{"s" * (few > 1)} at every size'
  )
  if s.lack_of_fit is None:
    return f'{seeds[:1].upper()}{seeds[1:]}.'
  lack, last = s.lack_of_fit, s.rollout[-1] if s.rollout else None
  differ = '' if lack.seeds is None else f' (seeds differ by {100 * lack.seeds:.1f} %)'
  missed = f'The law misses the runs by {100 * lack.scatter:.1f} %{differ}'
  if last is not None and last.problem is None:
    missed += f' and the largest size, held out, by {100 * last.held_out_error:.1f} %'
  return f'{missed}; {seeds}.'


def parameter(doc: dict, name: str) -> list[str]:
  """Name, value and quoted interval of a parameter of the fit: an arm's as compute needed, 1 / m."""
  if name in doc['verdicts']:
    return [name, doc['verdicts'][name], '']
  value, (low, high) = doc[name], doc['intervals'][name]
  if name.startswith('m['):
    return [f'1 / {name}', number(1 / value), span([1 / high, 1 / low])]
  return [name, number(value), span([low, high])]


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


def test(c: Candidate) -> str:
  """F with its degrees of freedom."""
  return '–' if c.f_statistic is None else f'{c.f_statistic:.2f} ({c.degrees[0]}, {c.degrees[1]:.0f})'


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
