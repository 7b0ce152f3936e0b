"""What mHC costs over the plain residual model at the paper's sizes, predicted for TPUs that are not there.

  python -m experiments.overhead                  # every cell, each some minutes; finished ones are skipped
  python -m experiments.overhead --only paper_27b # cells whose name contains this

Each cell is one report of experiments.compile, kept as docs/compile/CELL.json; docs/scale.md is written from
all that are there. Both arms of a comparison have the same config, mesh and recomputation.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import jax

from mhc_jax.config_file import parse
from mhc_jax.errors import require

from .step_time import GIB
from .tpu import compile_step

ARMS = ('residual', 'mhc')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One compilation: a file of configs/ without its suffix, arm, streams, slice and fields."""

  config: str
  arm: str
  streams: int
  topology: str
  fields: tuple[str, ...]  # that differ from the config's own, as section.field=value

  @property
  def name(self) -> str:
    """config-chip-arm, with the streams where there are several."""
    chip = self.topology.partition(':')[0]
    return f'{self.config}-{chip}-{self.arm}' + (f'-n{self.streams}' if self.arm != 'residual' else '')

  @property
  def overrides(self) -> list[str]:
    """The same as on the command line of experiments.compile."""
    streams = [] if self.arm == 'residual' else [f'--config.model.connection.streams={self.streams}']
    return [*streams, *(f'--config.{field}' for field in self.fields)]


# Slices of as many chips as the configs' own on v5p; v6e ends at 256 chips, whose 32 GB need microbatches.
SLICES = {
  'paper_3b': {'v5p': ('v5p:4x4x4', ()), 'v6e': ('v6e:8x8', ())},
  'paper_9b': {'v5p': ('v5p:4x4x8', ()), 'v6e': ('v6e:8x16', ())},
  'paper_27b': {
    'v5p': ('v5p:8x8x8', ()),
    'v6e': ('v6e:16x16', ('mesh.tensor=1', 'optimizer.microbatches=5')),
  },
  'paper_3b_1t': {
    'v5p': ('v5p:8x8x8', ()),
    'v6e': ('v6e:16x16', ('mesh.data=1', 'optimizer.microbatches=2')),
  },
}
STREAMS_AT = 'paper_9b'  # n = 2 and 8 besides 4, on v5p


def cells() -> list[Cell]:
  """Every cell, the cheapest first."""
  found = []
  for config, chips in SLICES.items():
    for topology, fields in chips.values():
      found += [Cell(config, arm, 1 if arm == 'residual' else 4, topology, fields) for arm in ARMS]
  return [*found, *(Cell(STREAMS_AT, 'mhc', n, *SLICES[STREAMS_AT]['v5p']) for n in (2, 8))]


def run(cell: Cell, folder: pathlib.Path) -> dict[str, Any]:
  """The report of a cell: read where it is there, else compiled and kept."""
  path = folder / f'{cell.name}.json'
  if path.exists():
    return json.loads(path.read_text())
  config = parse(f'configs/{cell.config}.py:{cell.arm}', cell.overrides)
  report = {'cell': cell.name, **compile_step(config, cell.topology)}
  folder.mkdir(parents=True, exist_ok=True)
  part = path.with_suffix('.part')
  part.write_text(json.dumps(report, indent=1) + '\n')
  os.replace(part, path)
  jax.clear_caches()
  return report


def row(name: str, base: dict[str, Any], other: dict[str, Any]) -> str:
  """One line of the table: an arm over residual."""
  if not (base['fits'] and other['fits']):
    which = [arm['connection'] for arm in (base, other) if not arm['fits']]
    return f'| {name} | {" and ".join(which)} does not fit' + ' |' * 8
  device = [report['predicted']['per_device'] for report in (base, other)]
  seconds = [report['predicted']['seconds'] for report in (base, other)]
  total = [report['memory_bytes']['total'] / GIB for report in (base, other)]

  def more(a: float, b: float) -> str:
    return f'{100 * (b / a - 1):+.1f} %'

  step, roofline = ([s[key] for s in seconds] for key in ('step', 'roofline'))
  cycles = [d['compiler_cycles'] for d in device]
  rest = [
    s - r['predicted']['parts']['attention.py']['seconds'] for s, r in zip(step, (base, other), strict=True)
  ]
  return (
    f'| {name} | {device[0]["flops"]:.3g} ({more(*(d["flops"] for d in device))}) '
    f'| {device[0]["hbm_bytes"]:.3g} ({more(*(d["hbm_bytes"] for d in device))}) '
    f'| {step[0]:.3f} -> {step[1]:.3f} | {more(*step)} | {more(*rest)} | {more(*roofline)} '
    f'| {more(*cycles)} | {total[0]:.1f} -> {total[1]:.1f} |'
  )


def page(reports: dict[str, dict[str, Any]], every: list[Cell]) -> str:
  """docs/scale.md from the reports that are there."""
  revisions = sorted({str(report['git_revision']) for report in reports.values()})
  lines = [HEAD, f'Git revision of the reports: {", ".join(revisions)}.', '', *TABLE]
  for cell in every:
    base = dataclasses.replace(cell, arm='residual', streams=1).name
    if cell.arm != 'residual' and cell.name in reports and base in reports:
      where = f'{cell.config.removeprefix("paper_").replace("_", "-").upper()}, n = {cell.streams}'
      fields = f' ({", ".join(cell.fields)})' * bool(cell.fields)
      lines.append(row(f'{where}, {cell.topology}{fields}', reports[base], reports[cell.name]))
  lines += [LIMITS]
  for cell in every:
    if cell.config == 'paper_27b' and cell.topology.startswith('v5p') and cell.name in reports:
      lines += costliest(cell, reports[cell.name])
  return '\n'.join(lines) + '\n'


def costliest(cell: Cell, report: dict[str, Any]) -> list[str]:
  """The ten costliest operations of a cell as a table, and seconds by source file."""
  if not report['fits']:
    return []
  predicted = report['predicted']
  lines = ['', f'## {cell.config}, {cell.arm}, {cell.topology}: the ten costliest operations', '']
  lines += ['| seconds | share | limit | times | FLOPs | bytes | source | operation |', '|---' * 8 + '|']
  for op in predicted['costliest']:
    lines.append(
      f'| {op["seconds"]:.4f} | {100 * op["share"]:.1f} % | {op["limit"]} | {op["times"]} '
      f'| {op["flops"]:.3g} | {op["hbm_bytes"]:.3g} | {op["source"]} | {op["op_name"].split("/")[-1]} |'
    )
  parts = list(predicted['parts'].items())[:8]
  lines += ['', 'Seconds by source file: ' + ', '.join(f'{n} {p["seconds"]:.3f}' for n, p in parts) + '.']
  return lines


HEAD = """# mHC at the paper's sizes: predicted cost over the plain residual model

Written by `python -m experiments.overhead` from the reports in `docs/compile/`, each of them what
`python -m experiments.compile --json` prints: the real train step (forward, backward, AdamW), compiled by
the TPU's own compiler for a described slice. **Nothing here was measured on a TPU.** Memory is the
compiler's. FLOPs and bytes are counted in its program with loops multiplied out, per device and step. The
time of a step is the sum over its operations of max(FLOPs / peak, bytes / bandwidth), collectives at the
links' bandwidth, nothing overlapped; the roofline overlaps everything; cycles are the compiler's own estimate
of everything but collectives. Percentages: mHC over residual, same mesh, same recomputation. Attention's
scores move through the memory here; "without scores" leaves layers/attention.py out of both arms, as if a
fused kernel made it free, which raises the percentage.
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


def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0, or 1 where a cell does not fit."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.overhead',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--only', default='', metavar='TEXT', help='cells whose name contains this')
  parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('docs'), help='default docs')
  args = parser.parse_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  chosen = [cell for cell in cells() if args.only in cell.name]
  require(bool(chosen), f'no cell has {args.only!r} in its name: {", ".join(c.name for c in cells())}')
  folder, reports = args.out / 'compile', {}
  for index, cell in enumerate(chosen):
    before = (folder / f'{cell.name}.json').exists()
    print(f'{index + 1}/{len(chosen)} {cell.name}: {"kept" if before else "compiling"}', file=sys.stderr)
    reports[cell.name] = run(cell, folder)
  everything = {
    c.name: json.loads((folder / f'{c.name}.json').read_text())
    for c in cells()
    if (folder / f'{c.name}.json').exists()
  }
  (args.out / 'scale.md').write_text(page(everything, cells()))
  return 0 if all(report['fits'] for report in reports.values()) else 1


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
