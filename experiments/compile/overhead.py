"""What mHC costs over the plain residual model at the paper's sizes, predicted for TPUs that are not there.

  mhc overhead                  # every cell, each some minutes; finished ones are skipped
  mhc overhead --only paper_27b # cells whose name contains this
  mhc overhead --only paper_3b-v5p --out there --config.model.remat=products   # a field for both arms

Each cell is one report of `mhc compile`, kept as docs/compile/CELL.json; docs/scale.md is written from all
that are there. Both arms of a comparison have the same config, mesh and recomputation.
"""

import argparse
import dataclasses
import pathlib
import sys
from typing import Any

import jax

from mhc_jax.command import end_with_message
from mhc_jax.config_file import parse
from mhc_jax.errors import require
from mhc_jax.paths import user_path
from mhc_jax.storage import read_json, write_json
from mhc_jax.workdir import revision

from . import kernels, population
from .scale_page import page
from .tpu import compile_step

ARMS = ('residual', 'mhc')


@dataclasses.dataclass(frozen=True)
class Cell:
  """One compilation: a config by name, arm, streams, slice and fields."""

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
    """The same as on the command line of `mhc compile`."""
    streams = [] if self.arm == 'residual' else [f'--config.model.connection.streams={self.streams}']
    return [*streams, *(f'--config.{field}' for field in self.fields)]


# Both arms of a comparison have these fields, recomputation too: model.remat=products where memory allows.
# Slices of as many chips as the configs' own on v5p; v6e ends at 256 chips, whose 32 GB need microbatches.
SLICES = {
  'paper_3b': {'v5p': ('v5p:4x4x4', ()), 'v6e': ('v6e:8x8', ('model.remat=layer',))},
  'paper_9b': {'v5p': ('v5p:4x4x8', ()), 'v6e': ('v6e:8x16', ('model.remat=layer',))},
  'paper_27b': {
    'v5p': ('v5p:8x8x8', ()),
    'v6e': ('v6e:16x16', ('mesh.tensor=1', 'optimizer.microbatches=5', 'model.remat=layer')),
  },
  'paper_3b_1t': {
    'v5p': ('v5p:8x8x8', ()),
    'v6e': ('v6e:16x16', ('mesh.data=1', 'optimizer.microbatches=2', 'model.remat=layer')),
  },
}
# What else the page shows: the options of `mhc compile --kernels`, `--connection`, `--small`, `--population`.
TABLES = {
  'kernels-v5p': {'topology': 'v5p:2x2x1'},
  'connection-v5p': {'topology': 'v5p:2x2x1', 'connection': 'mhc'},
  'small-v5e': {'topology': 'v5e:2x2', 'small': True},
  'population-v5e': {'topology': 'v5e:2x2', 'population': True},
}
STREAMS_AT = 'paper_9b'  # n = 2 and 8 besides 4, on v5p


def cells() -> list[Cell]:
  """Every cell, the cheapest first."""
  at_four = [
    Cell(config, arm, 1 if arm == 'residual' else 4, *where)
    for config, slices in SLICES.items()
    for where in slices.values()
    for arm in ARMS
  ]
  return [*at_four, *(Cell(STREAMS_AT, 'mhc', n, *SLICES[STREAMS_AT]['v5p']) for n in (2, 8))]


def compile_cell(cell: Cell, path: pathlib.Path) -> dict[str, Any]:
  """The report of a cell, kept in the file of that name."""
  config = parse(f'{cell.config}:{cell.arm}', cell.overrides)
  report = {'cell': cell.name, **compile_step(config, cell.topology)}
  path.parent.mkdir(parents=True, exist_ok=True)
  write_json(str(path), report)
  jax.clear_caches()
  return report


def current(paths: dict[str, pathlib.Path]) -> dict[str, dict[str, Any]]:
  """The reports that are there, but for those of the older rule, without seconds.serial."""
  found = {name: read_json(path) for name, path in paths.items() if path.exists()}
  return {
    name: report
    for name, report in found.items()
    if not report['fits'] or 'serial' in report['predicted']['seconds']
  }


def _measured(name: str) -> dict[str, Any]:
  options = kernels.DEFAULTS | TABLES[name]
  return {'options': options, 'programs': kernels.measured(options)}


def complete(path: pathlib.Path, name: str) -> None:
  """A table's programs, each some minutes, one after another, but for those that its file has."""
  options = kernels.DEFAULTS | TABLES[name]
  table = read_json(path) or {'git_revision': revision(), 'options': options, 'programs': {}}
  for program in population.grid():
    if program not in table['programs']:
      table['programs'] |= kernels.measured(options | {'only': program})
      write_json(str(path), table)


def page_of(reports: dict[str, dict[str, Any]], tables: dict[str, dict[str, Any]]) -> str:
  """docs/scale.md from the reports of the cells and the tables that are there."""
  pairs, detailed = {}, {}
  for cell in cells():
    base = dataclasses.replace(cell, arm='residual', streams=1).name
    if cell.arm != 'residual' and {cell.name, base} <= reports.keys():
      model = cell.config.removeprefix('paper_').replace('_', '-').upper()
      fields = f' ({", ".join(cell.fields)})' * bool(cell.fields)
      pairs[f'{model}, n = {cell.streams}, {cell.topology}{fields}'] = reports[base], reports[cell.name]
    if cell.config == 'paper_27b' and cell.topology.startswith('v5p') and cell.name in reports:
      detailed[f'{cell.config}, {cell.arm}, {cell.topology}'] = reports[cell.name]
  revisions = sorted({str(report['git_revision']) for report in reports.values()})
  missing = [cell.name for cell in cells() if cell.name not in reports]
  return page(pairs, detailed, tables, revisions, missing)


def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0, or 1 where a cell does not fit."""
  parser = argparse.ArgumentParser(
    prog='mhc overhead', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', default='', metavar='TEXT', help='cells whose name contains this')
  parser.add_argument(
    '--out', type=user_path, default=pathlib.Path('docs'), help='folder of compile/ and scale.md (docs)'
  )
  args, fields = parser.parse_known_args(argv)
  wrong = [field for field in fields if not field.startswith('--config.')]
  require(not wrong, f'what is {", ".join(wrong)}? Fields of the config are --config.section.field=value')
  require(not fields or args.out != pathlib.Path('docs'), 'other fields need a folder of their own: --out')
  jax.config.update('jax_platforms', 'cpu')
  chosen = [cell for cell in cells() if args.only in cell.name]
  chosen_tables = [] if fields else [name for name in TABLES if args.only in name]
  require(
    bool(chosen or chosen_tables),
    f'no cell has {args.only!r} in its name: {", ".join(c.name for c in cells())}',
  )
  paths = {cell.name: args.out / 'compile' / f'{cell.name}.json' for cell in cells()}
  reports = current(paths)
  for index, cell in enumerate(chosen):
    what = 'kept' if cell.name in reports else 'compiling'
    print(f'{index + 1}/{len(chosen)} {cell.name}: {what}', file=sys.stderr)
    if cell.name not in reports:
      more = tuple(field.removeprefix('--config.') for field in fields)
      cell_of = dataclasses.replace(cell, fields=(*cell.fields, *more))
      reports[cell.name] = compile_cell(cell_of, paths[cell.name])
  tables = {name: args.out / 'compile' / f'{name}.json' for name in TABLES}
  for name in chosen_tables:
    if TABLES[name].get('population'):
      complete(tables[name], name)
    elif not tables[name].exists():
      print(f'{name}: compiling', file=sys.stderr)
      write_json(str(tables[name]), {'git_revision': revision(), **_measured(name)})
  kept = {name: read_json(path) for name, path in tables.items() if path.exists()}
  (args.out / 'scale.md').write_text(page_of(reports, kept))
  return 0 if all(reports[cell.name]['fits'] for cell in chosen) else 1


if __name__ == '__main__':
  sys.exit(end_with_message(main))
