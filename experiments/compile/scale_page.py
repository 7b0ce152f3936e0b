"""docs/scale.md: an arm over another in one line each, and where the time of a step goes. Pure.

Where: reports of overhead.py -> **here** -> docs/scale.md. before.json: the same steps before the project had
kernels, with nothing overlapped.
"""

import json
import pathlib
from typing import Any

from mhc_jax.chips import CHIPS

from . import population
from .kernels import CLOCKS
from .scale_words import HEAD, LIMITS, PEERS, POPULATION, SMALL, TABLES_HEAD
from .step_time import GIB

Report = dict[str, Any]
TABLE = [
  '| model | FLOPs of residual (mHC) | bytes of memory (mHC) | seconds of a step | overhead '
  '| nothing overlapped | of the roofline | of the cycles | MFU, causal (full) | GiB of a device |',
  '|---' * 10 + '|',
]
CHANGES = [
  '| model | seconds of a step, before | now | overhead, before | now '
  '| MFU of residual and mHC, before | now |',
  '|---' * 7 + '|',
]


def page(
  pairs: dict[str, tuple[Report, Report]],
  detailed: dict[str, Report],
  tables: dict[str, Report],
  revisions: list[str],
  missing: list[str],
) -> str:
  """The page: a line for each pair of residual and another arm, tables, sections of detailed reports.

  missing: cells that are not compiled yet.
  """
  lines = [HEAD, f'Git revision of the reports: {", ".join(revisions) or "none"}.', '', *TABLE]
  lines += [row(name, *pair) for name, pair in pairs.items()]
  if missing:
    lines += ['', f'Not compiled yet by this rule, and not shown: {", ".join(missing)}.']
  lines += [LIMITS, *changes(pairs), PEERS]
  for name, table in tables.items():
    if table['options'].get('population'):  # older tables do not have it
      lines += populations(table)
    else:
      lines += small(table) if table['options']['small'] else kernels(name, table)
  for name, report in detailed.items():
    lines += costliest(name, report)
  return '\n'.join(lines) + '\n'


def row(name: str, base: Report, other: Report) -> str:
  """One line of the table: an arm over residual."""
  pair = (base, other)
  if not all(report['fits'] for report in pair):
    return _line(name, _not_fitting(pair), *[''] * 8)
  predicted = [report['predicted'] for report in pair]
  flops, moved, cycles = (
    [p['per_device'][key] for p in predicted] for key in ('flops', 'hbm_bytes', 'compiler_cycles')
  )
  step, serial, roofline = ([p['seconds'][key] for p in predicted] for key in ('step', 'serial', 'roofline'))
  total = [report['memory_bytes']['total'] / GIB for report in pair]
  return _line(
    name,
    f'{flops[0]:.3g} ({_more(flops)})',
    f'{moved[0]:.3g} ({_more(moved)})',
    f'{step[0]:.3f} -> {step[1]:.3f}',
    *map(_more, (step, serial, roofline, cycles)),
    ' -> '.join(f'{_percent(p["mfu"])} ({_percent(p["mfu_full"])})' for p in predicted),
    f'{total[0]:.1f} -> {total[1]:.1f}',
  )


def changes(pairs: dict[str, tuple[Report, Report]]) -> list[str]:
  """The table of what the same steps were before."""
  old = json.loads((pathlib.Path(__file__).parent / 'before.json').read_text())
  lines = ['', '## Before and now', '', *CHANGES]
  for name, pair in pairs.items():
    was = [old.get(report['cell']) for report in pair]
    if not all(was) or not all(report['fits'] for report in pair):
      continue
    now = [report['predicted'] for report in pair]
    before, after = [w['seconds'] for w in was], [p['seconds']['step'] for p in now]
    lines.append(
      _line(
        name,
        *(f'{a:.3f} -> {b:.3f}' for a, b in (before, after)),
        _more(before),
        _more(after),
        *(' -> '.join(_percent(p['mfu']) for p in arms) for arms in (was, now)),
      )
    )
  revisions = sorted({row['revision'] for row in old.values()})
  return [*lines, '', f'Before: revision {", ".join(revisions)}; MFU with the causal numerator in both.']


def kernels(name: str, table: Report) -> list[str]:
  """The tables of `mhc compile --kernels` and `--connection`: programs, and their kernels."""
  options, programs = table['options'], table['programs']
  chip = CHIPS[options['topology'].partition(':')[0]]
  clock, unit = CLOCKS.get(chip.name), options['tokens'] * options['width'] * 2
  where = f'{chip.name}, n = {options["streams"]}, {options["tokens"]} tokens, width {options["width"]}'
  lines = ['', f'## {TABLES_HEAD[name.partition("-")[0]]} ({where})', '']
  if options['connection']:
    lines += [_line('program', 'C-units', "XLA's count", 'us, of bytes', 'cycles'), '|---' * 5 + '|']
    for program, found in programs.items():
      if 'error' in found:
        lines.append(_line(program, found['error'], *[''] * 3))
        continue
      xla = f'{found["xla_bytes"] / unit:.1f}' if found['xla_bytes'] else ''
      us, cycles = f'{1e6 * found["seconds"]:.0f}', f'{found["cycles"]:.3g}'
      lines.append(_line(program, f'{found["bytes"] / unit:.2f}', xla, us, cycles))
    return lines
  lines += [_line('kernel', 'C-units', 'us, of bytes', 'cycles', 'us, of cycles', 'over'), '|---' * 6 + '|']
  for program, found in programs.items():
    if 'error' in found:
      lines.append(_line(program, found['error'], *[''] * 4))
      continue
    sums = [0.0, 0.0]
    for kernel, numbers in found['kernels'].items():
      us = 1e6 * numbers['bytes'] / (chip.bandwidth / chip.devices)
      of_cycles = numbers['cycles'] / clock / 1e3 if clock else float('nan')
      sums = [sums[0] + us, sums[1] + of_cycles]
      cells = f'{numbers["bytes"] / unit:.2f}', f'{us:.1f}', f'{numbers["cycles"]:,}', f'{of_cycles:.1f}'
      lines.append(_line(f'{program}: {kernel}', *cells, f'{of_cycles / us:.2f}'))
    if len(found['kernels']) > 1:
      lines.append(
        _line(f'{program}, all', '', f'{sums[0]:.1f}', '', f'{sums[1]:.1f}', f'{sums[1] / sums[0]:.2f}')
      )
  return lines


def small(table: Report) -> list[str]:
  """A small step of both arms by the compiler's cycles."""
  cycles = {name: found['cycles'] for name, found in table['programs'].items()}
  lines = ['', SMALL, '', _line('arm', 'cycles', 'over residual'), '|---|---|---|']
  return [*lines, *(_line(arm, f'{n:.3g}', f'{n / cycles["residual"]:.2f}') for arm, n in cycles.items())]


def populations(table: Report) -> list[str]:
  """Microseconds of a member and update, by how many members there are."""
  columns = ('arm', 'width', *(f'P = {members}' for members in population.MEMBERS), 'members per second')
  clock = CLOCKS[table['options']['topology'].partition(':')[0]]
  rows = population.table(table['programs'], clock)
  return ['', POPULATION, '', _line(*columns), '|---' * len(columns) + '|', *(_line(*row) for row in rows)]


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


def _not_fitting(pair: tuple[Report, Report]) -> str:
  return f'{" and ".join(report["connection"] for report in pair if not report["fits"])} does not fit'


def _percent(share: float | None) -> str:
  return 'unknown' if share is None else f'{100 * share:.1f} %'


def _more(pair: list[float]) -> str:
  if not pair[0]:
    return ''
  return f'{100 * (pair[1] / pair[0] - 1):+.1f} %'


def _line(*cells: str) -> str:
  return f'| {" | ".join(cells)} |'
