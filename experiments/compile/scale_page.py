"""docs/scale.md: an arm over another in one line each, and where the time of a step goes. Pure.

Where: reports of overhead.py -> **here** -> docs/scale.md.
"""

from typing import Any

from .step_time import GIB

Report = dict[str, Any]
HEAD = """# mHC at the paper's sizes: predicted cost over the plain residual model

Written by `mhc overhead` from the reports in `docs/compile/`, each of them what `mhc compile --json` prints:
the real train step (forward, backward, AdamW), compiled by the TPU's own compiler for a described slice.
**Nothing here was measured on a TPU.** Memory is the compiler's. FLOPs and bytes are counted in its program
with loops multiplied out, per device and step. The time of a step is the sum over its operations of
max(FLOPs / peak, bytes / bandwidth), collectives at the links' bandwidth, nothing overlapped; the roofline
overlaps everything; cycles are the compiler's own estimate of everything but collectives. Percentages: mHC
over residual, same mesh, same recomputation. Attention's scores move through the memory here; "without
scores" leaves them out of both arms (the scope `attention_scores`), as if a fused kernel made them free,
which raises the percentage.
"""
TABLE = [
  '| model | FLOPs of residual (mHC) | bytes of memory (mHC) | seconds of a step | overhead '
  '| without scores | of the roofline | of the cycles | GiB of a device |',
  '|---' * 9 + '|',
]
LIMITS = """
What limits. Hyper-connections add few FLOPs; they move streams through the memory, and their cost is that of
its traffic. Peak rates are never reached, and unequally: products come closer to theirs than small vector
operations do, whose time on the vector unit (it has no published peak) is not counted; the compiler's cycles
count it. Float32 products count three or six passes. On the real machine collectives overlap with
products. The overheads are estimates, good for comparing two programs, not for promising a speed.
"""


def page(pairs: dict[str, tuple[Report, Report]], detailed: dict[str, Report], revisions: list[str]) -> str:
  """The page: a line for each pair of residual and another arm, a section for each detailed report."""
  lines = [HEAD, f'Git revision of the reports: {", ".join(revisions)}.', '', *TABLE]
  lines += [row(name, *pair) for name, pair in pairs.items()]
  lines += [LIMITS]
  for name, report in detailed.items():
    lines += costliest(name, report)
  return '\n'.join(lines) + '\n'


def row(name: str, base: Report, other: Report) -> str:
  """One line of the table: an arm over residual."""
  pair = (base, other)
  if not all(report['fits'] for report in pair):
    which = ' and '.join(report['connection'] for report in pair if not report['fits'])
    return _line(name, f'{which} does not fit', *[''] * 7)
  predicted = [report['predicted'] for report in pair]
  flops, moved, cycles = (
    [p['per_device'][key] for p in predicted] for key in ('flops', 'hbm_bytes', 'compiler_cycles')
  )
  step, roofline = ([p['seconds'][key] for p in predicted] for key in ('step', 'roofline'))
  rest = [p['seconds']['step'] - p['scopes']['attention_scores']['seconds'] for p in predicted]
  total = [report['memory_bytes']['total'] / GIB for report in pair]
  return _line(
    name,
    f'{flops[0]:.3g} ({_more(flops)})',
    f'{moved[0]:.3g} ({_more(moved)})',
    f'{step[0]:.3f} -> {step[1]:.3f}',
    *map(_more, (step, rest, roofline, cycles)),
    f'{total[0]:.1f} -> {total[1]:.1f}',
  )


def costliest(name: str, report: Report) -> list[str]:
  """The ten costliest operations of a report as a table, and seconds by source file."""
  if not report['fits']:
    return []
  columns = ('seconds', 'share', 'limit', 'times', 'FLOPs', 'bytes', 'source', 'operation')
  lines = ['', f'## {name}: the ten costliest operations', '', _line(*columns), '|---' * len(columns) + '|']
  for op in report['predicted']['costliest']:
    seconds, share = f'{op["seconds"]:.4f}', f'{100 * op["share"]:.1f} %'
    counted = str(op['times']), f'{op["flops"]:.3g}', f'{op["hbm_bytes"]:.3g}'
    lines.append(_line(seconds, share, op['limit'], *counted, op['source'], op['op_name'].split('/')[-1]))
  parts = list(report['predicted']['parts'].items())[:8]
  return [
    *lines,
    '',
    'Seconds by source file: ' + ', '.join(f'{n} {p["seconds"]:.3f}' for n, p in parts) + '.',
  ]


def _more(pair: list[float]) -> str:
  return f'{100 * (pair[1] / pair[0] - 1):+.1f} %'


def _line(*cells: str) -> str:
  return f'| {" | ".join(cells)} |'
