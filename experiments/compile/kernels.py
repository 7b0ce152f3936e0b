"""Cycles of the project's TPU kernels, from the compiler's static schedule, for chips that are not there.

  mhc compile --kernels                          # the boundary pair and every constraint's kernel, on v5p
  mhc compile --kernels --topology v6e:2x2 --width 7168
  mhc compile --connection mhc --width 2560      # one sublayer's connection, XLA's program and the kernels
  mhc compile --small --topology v5e:2x2         # a step of residual and mhc at width 64 and depth 4
  mhc compile --population --topology v5e:2x2    # steps of 1 to 32 members at four widths, an hour or two

libtpu writes its schedules to a folder that is named before it starts: a process of its own makes them.
"""

import argparse
import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax import hyper_connection as hc
from mhc_jax.chips import CHIPS, Chip
from mhc_jax.connection import ConnectionSpec
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.errors import require
from mhc_jax.kernels import boundary, lanes
from mhc_jax.kernels.choice import Chip as KernelChip
from mhc_jax.kernels.choice import chip_of
from mhc_jax.presets import PRESETS, connection_spec
from mhc_jax.sharding import make_mesh

from .. import quick
from . import bundles, population, tpu
from .abstract_step import trace_step
from .chips import compute_seconds
from .hlo_cost import count, is_kernel
from .hlo_text import parse_module

# GHz, from the peak rates: products of 128 x 128 (v6e: 256 x 256) units, 8 a chip of v4 and v5p, 4 of others.
CLOCKS = {'v4': 1.05, 'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75}

SMALL = (64, 4)  # width and depth
DEFAULTS = {'connection': None, 'small': False, 'population': False}
DEFAULTS |= {'streams': 4, 'width': 2560, 'tokens': 4096, 'only': ''}

Program = tuple[Callable, tuple]  # a function and the shapes of its arguments


def boundary_arguments(spec: ConnectionSpec, width: int, tokens: int) -> tuple[Any, Any]:
  """(parameters of a sublayer, kernels.boundary.Pending) as shapes, streams in bfloat16."""
  params = jax.eval_shape(lambda key: hc.init_params(key, spec, width, 0), jax.random.key(0))
  streams = jax.ShapeDtypeStruct((spec.streams, 1, tokens, width), jnp.bfloat16)

  def pending(x_NBTD: jax.Array) -> boundary.Pending:
    pre = jnp.ones((spec.streams, 1, tokens)) if spec.single_pass else None
    return boundary.start(hc.Pending(x_NBTD, pre_NBT=pre), spec)

  return params, jax.eval_shape(pending, streams)


def xla_boundary(spec: ConnectionSpec, params: Any, pending: boundary.Pending) -> tuple[jax.Array, ...]:
  """A sublayer's connection by XLA: (x', h, weights of the next boundary)."""
  x_NBTD, h_BTD, own = hc.boundary(params, boundary.definition(pending, spec), spec, 0)
  return x_NBTD, h_BTD, *(c for c in own[1:] if c is not None)


def kernel_boundary(
  spec: ConnectionSpec, chip: KernelChip, params: Any, pending: boundary.Pending
) -> tuple[jax.Array, ...]:
  """The same by the kernels."""
  return boundary.boundary(params, pending, spec, jnp.int32(0), chip)


def with_backward(function: Callable) -> Callable:
  """function and its gradient for all arguments, cotangents of the results given."""

  def both(arguments: tuple, cotangents: Any) -> tuple[Any, Any]:
    outputs, pull = jax.vjp(function, *arguments)
    return outputs, pull(cotangents)

  return both


def both_ways(function: Callable, arguments: tuple) -> dict[str, Program]:
  """function forward, and with its backward."""
  outputs = jax.eval_shape(function, *arguments)
  return {
    'forward': (function, arguments),
    'forward and backward': (with_backward(function), (arguments, outputs)),
  }


def kernel_programs(chip: KernelChip, streams: int, width: int, tokens: int) -> Iterator[tuple[str, Program]]:
  """(name, program) of the boundary pair and of every constraint with coordinates."""
  spec = connection_spec('mhc', streams=streams)
  said = boundary.why_not(spec, width, tokens, jnp.bfloat16, chip)
  require(said is None, f'no kernels of the boundary: {said}')
  pair = both_ways(
    lambda *arguments: kernel_boundary(spec, chip, *arguments), boundary_arguments(spec, width, tokens)
  )
  yield 'boundary', pair['forward and backward']
  for name, make in CONSTRAINTS.items():
    constraint = make()
    coordinates = constraint.num_coordinates(streams)
    if coordinates and lanes.why_not(constraint, streams) is None:
      coords = (jax.ShapeDtypeStruct((coordinates, tokens), jnp.float32),)
      matrix = lambda x, constraint=constraint: lanes.matrix_kernel(constraint, x, streams, 'tpu')  # noqa: E731
      yield name, both_ways(matrix, coords)['forward and backward']


def connection_programs(
  chip: KernelChip, name: str, streams: int, width: int, tokens: int
) -> Iterator[tuple[str, Program]]:
  """(name, program) of one sublayer's connection: XLA's program and, where they do it, the kernels."""
  spec = connection_spec(name, streams=streams)
  arguments = boundary_arguments(spec, width, tokens)
  ways = {'xla': lambda *a: xla_boundary(spec, *a)}
  if boundary.why_not(spec, width, tokens, jnp.bfloat16, chip) is None:
    ways['pallas'] = lambda *a: kernel_boundary(spec, chip, *a)
  for which, function in ways.items():
    for part, program in both_ways(function, arguments).items():
      yield f'{which}, {part}', program


def small_steps(device: jax.Device) -> Iterator[tuple[str, Callable]]:
  """(arm, lowering) of the train step of experiments/quick.py's largest model on one chip."""
  mesh = make_mesh({'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1}, [device])
  for arm in ('residual', 'mhc'):
    config = quick.config(arm, *SMALL, seed=0)
    yield arm, lambda config=config: trace_step(config, mesh)[0].lower()


def lowering(program: Program, device: jax.Device) -> Callable:
  """What lowers a program for one chip."""
  where = NamedSharding(Mesh(np.array([device]), ('d',)), P())
  function, arguments = program
  arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), arguments)
  return lambda: jax.jit(function).lower(*arguments)


def compiled_program(lower: Callable, device: jax.Device, folder: str, chip: Chip) -> dict[str, Any]:
  """Bytes, predicted seconds and cycles of one program, and of each of its kernels by name.

  What lies in the folder is of programs before: kernels of one name would be taken for each other.
  """
  for path in glob.glob(f'{folder}/*'):
    os.remove(path)
  compiled = lower().compile()
  module = parse_module(compiled.as_text())
  counted = count(module)
  instructions = {name: i for c in module.computations.values() for name, i in c.instructions.items()}
  kernels = {
    row.name: {'times': row.times, 'bytes': row.bytes, 'cycles': dumped_cycles(folder, row.name)}
    for row in counted.operations
    if row.opcode == 'custom-call' and is_kernel(instructions[row.name])
  }
  # The compiler estimates one core's time for all of an operation: its cycles are halved by two cores.
  estimated = sum(row.times * (row.cycles or 0) for row in counted.operations) / device.num_cores
  return {
    'bytes': counted.total('bytes'),
    'xla_bytes': (compiled.cost_analysis() or {}).get('bytes accessed'),
    'seconds': sum(row.times * compute_seconds(row, chip) for row in counted.operations),
    'cycles': estimated + sum(kernel['times'] * kernel['cycles'] for kernel in kernels.values()),
    'kernels': kernels,
  }


def dumped_cycles(folder: str, kernel: str) -> int:
  """Cycles of one run of a kernel on one core, from the dumped schedule.

  Equal kernels are compiled and dumped once, by the name of one of them: the same but for its number. Of
  several such, the most cycles.
  """
  paths: list[str] = []
  unnumbered = re.sub(r'[.]\d+$', '', kernel)
  for name in (f'{kernel}-', f'{unnumbered}.'):
    found = glob.glob(f'{folder}/*-{glob.escape(name)}*final_bundles.txt')
    paths = paths or [path for path in found if 'schedule-analysis' not in path]
  require(bool(paths), f'libtpu dumped no schedule of {kernel}')
  return max(bundles.cycles(pathlib.Path(path).read_text()) for path in paths)


def measured(options: dict[str, Any]) -> dict[str, Any]:
  """All chosen programs compiled, in a process whose libtpu dumps its schedules: name -> compiled_program."""
  with tempfile.TemporaryDirectory() as folder:
    dump = f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true'
    flags = f'{os.environ.get("LIBTPU_INIT_ARGS", "")} {dump}'.strip()
    command = [sys.executable, '-m', __spec__.name, folder, json.dumps(DEFAULTS | options)]
    done = subprocess.run(
      command, env={**os.environ, 'LIBTPU_INIT_ARGS': flags}, stdout=subprocess.PIPE, text=True
    )
  require(done.returncode == 0, f'compiling the kernels failed: exit code {done.returncode}')
  return json.loads(done.stdout)


def main(folder: str, options: dict[str, Any]) -> None:
  """The process of its own: prints measured()'s result as JSON."""
  jax.config.update('jax_platforms', 'cpu')
  device = tpu.described_devices(options['topology'])[0]
  on_chip = chip_of('pallas', Mesh(np.array([device]), ('d',)))
  sizes = options['streams'], options['width'], options['tokens']
  if options['small'] or options['population']:
    chosen = (population.steps if options['population'] else small_steps)(device)
  else:
    programs = (
      connection_programs(on_chip, options['connection'], *sizes)
      if options['connection']
      else kernel_programs(on_chip, *sizes)
    )
    chosen = ((name, lowering(program, device)) for name, program in programs)
  chip, found = CHIPS[options['topology'].partition(':')[0]], {}
  for name, lower in chosen:
    if options['only'] in name:
      print(f'{name}', file=sys.stderr)
      try:
        found[name] = compiled_program(lower, device, folder, chip)
      except Exception as error:  # Mosaic's has no public name; the others are still of use
        found[name] = {'error': ' '.join(f'{type(error).__name__}: {error}'.split())[:300]}
  print(json.dumps(found))


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of `mhc compile --kernels` and `--connection`."""
  parser.add_argument('--kernels', action='store_true', help='cycles of each TPU kernel, from the schedule')
  parser.add_argument('--connection', choices=PRESETS, help="one sublayer's connection: bytes, time, cycles")
  parser.add_argument(
    '--small', action='store_true', help='a step of width 64 and depth 4: cycles of two arms'
  )
  parser.add_argument(
    '--population', action='store_true', help='steps of several members in one program: cycles of two arms'
  )
  parser.add_argument('--streams', type=int, default=4, help='of these two (4)')
  parser.add_argument('--width', type=int, default=2560, help='of these two (2560)')
  parser.add_argument('--tokens', type=int, default=4096, help='of these two (4096)')
  parser.add_argument('--only', default='', metavar='TEXT', help='of these two: names that contain this')


def text(programs: dict[str, Any], options: argparse.Namespace) -> str:
  """Tables for people: programs, then their kernels."""
  chip = CHIPS[options.topology.partition(':')[0]]
  clock, unit = CLOCKS.get(chip.name), options.tokens * options.width * 2
  where = f'{options.topology}, n = {options.streams}, {options.tokens} tokens of width {options.width}'
  lines = [f'Predictions, not measurements; {where}. A C-unit: a bfloat16 vector of the width per token.', '']
  lines.append(f'{"program":34} {"C-units":>8} {"XLA counts":>10} {"us":>8} {"cycles":>10} {"us":>8}')
  failed = {name: found['error'] for name, found in programs.items() if 'error' in found}
  programs = {name: found for name, found in programs.items() if name not in failed}
  for name, found in programs.items():
    xla, cycles = found['xla_bytes'] or float('nan'), found['cycles']
    lines.append(
      f'{name:34} {found["bytes"] / unit:8.2f} {xla / unit:10.2f} {1e6 * found["seconds"]:8.1f} '
      f'{cycles:10.0f} ' + (f'{cycles / clock / 1e3:8.1f}' if clock else '')
    )
  lines += ['', f'{"kernel":34} {"C-units":>8} {"":10} {"us":>8} {"cycles":>10} {"us":>8} {"over":>6}']
  for name, found in programs.items():
    for kernel, row in found['kernels'].items():
      us = 1e6 * row['bytes'] / (chip.bandwidth / chip.devices)
      line = f'{f"{name}: {kernel}":34} {row["bytes"] / unit:8.2f} {"":10} {us:8.1f} {row["cycles"]:10}'
      if clock:
        scheduled = row['cycles'] / clock / 1e3
        line += f' {scheduled:8.1f} {scheduled / us:6.2f}'
      lines.append(line)
  return '\n'.join([*lines, *(f'{name} has no figures: {error}' for name, error in failed.items())])


if __name__ == '__main__':
  main(sys.argv[1], json.loads(sys.argv[2]))
