"""Cycles of a TPU kernel from the compiler's static schedule: bundles of instructions, one a cycle. Pure.

Reads a `*-final_bundles.txt` that libtpu dumps. A loop is what lies from `Start region N` to the last delay
slot after the branch back to N; it runs as often as its exit test says, from 0 in steps of 1, as Pallas's
loops do. A pipelined grid takes a step more for each stage beyond the first, in which little happens: those
are left out. All that may be skipped counts, waits for memory do not: cycles are the least time of the
vector and matrix units.
"""

import dataclasses
import re

_BUNDLE = re.compile(r'\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]+)?\s*:')
_BACK = re.compile(r'sbr\.rel \((!?%p\w+)\) target = \$region(\d+)')
_EXIT = re.compile(r'(%p\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%p\w+\), )?%s\w+, (\d+) /\* loop exit test')
_STAGE = re.compile(r'iteration index, stage = (\d+)')


@dataclasses.dataclass(frozen=True)
class Loop:
  """Bundles first to last, run `trips` times in each run of the loop around it."""

  first: int
  last: int
  trips: int


def cycles(text: str) -> int:
  """Cycles of one run of the kernel on one core; ValueError for a loop whose trips are unknown."""
  bundles = _bundles(text)
  loops = _loops(bundles)
  total = 0
  for at in range(len(bundles)):
    times = 1
    for loop in loops:
      times *= loop.trips if loop.first <= at <= loop.last else 1
    total += times
  return total


def _bundles(text: str) -> list[str]:
  """Each bundle with its comments, which may span lines, in order of address."""
  found: list[str] = []
  for line in text.splitlines():
    match = _BUNDLE.match(line)
    if match and int(match[1], 16) == len(found):
      found.append(line)
    elif found:
      found[-1] += '\n' + line
  if not found:
    raise ValueError('no bundles: this is not a final schedule')
  return found


def _loops(bundles: list[str]) -> list[Loop]:
  """All loops, in order of their ends."""
  starts, ends = {}, {}
  for at, bundle in enumerate(bundles):
    for kind, names in re.findall(r'(Start|End) region (\d+)', bundle):
      (starts if kind == 'Start' else ends).setdefault(names, at)
  loops = []
  for at, bundle in enumerate(bundles):
    for predicate, region in _BACK.findall(bundle):
      first = starts.get(region, len(bundles))
      if first > at:
        continue  # forward: a part that may be skipped
      inside = '\n'.join(bundles[first : at + 1])
      limit = [int(n) for name, n in _EXIT.findall(inside) if name == predicate.removeprefix('!')]
      if len(limit) != 1:
        raise ValueError(f'the loop at bundle {first:#x} does not say how often it runs')
      stages = max((int(n) for n in _STAGE.findall(inside)), default=0)
      loops.append(Loop(first, ends.get(region, at), limit[0] - stages))
  return loops
