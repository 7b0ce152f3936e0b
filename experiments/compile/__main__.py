"""Compiles the real train_step for TPUs that are not there, and predicts its memory and speed.

  mhc compile --config laptop --topology v5p:2x2x1 --config.mesh.fsdp=4
  mhc compile --config paper_27b:mhc --json > 27b.json
  mhc compile --kernels --topology v5p:2x2x1   # cycles of the TPU kernels
  mhc compile --connection mhc --width 2560    # one sublayer's connection
  mhc compile --config paper_27b:mhc --gpu H100:64x8     # hosts x GPUs of NVIDIA

config -> model -> train_step -> **compile**. Needs no TPU, no corpus and no arrays: shapes and shardings over
a described topology go through the TPU's own compiler (libtpu, extra `tpu`) or XLA's for NVIDIA (extra
`gpu-compiler`); CPU is the running backend.
Memory is the compiler's; FLOPs, bytes and times are counted in its optimised program (hlo_cost.py,
step_time.py).
"""

import argparse
import json
import sys

import jax

from mhc_jax import settings
from mhc_jax.chips import TPUS
from mhc_jax.command import end_with_message
from mhc_jax.config_file import parse
from mhc_jax.errors import require

from . import gpu, kernels, tpu
from .report import text


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0 if the step fits, 1 if not."""
  parser = argparse.ArgumentParser(
    prog='mhc compile', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--config', help='a config by name or file, with :argument if it takes one')
  parser.add_argument(
    '--topology', help=f"chip:sides of a TPU slice, of {', '.join(TPUS)} (default: the config's)"
  )
  parser.add_argument('--gpu', help='chip:hosts x GPUs of NVIDIA instead, like H100:2x8, or H100:64')
  parser.add_argument('--json', action='store_true', help='print the whole report as JSON')
  kernels.add_arguments(parser)
  args, overrides = parser.parse_known_args(argv)
  jax.config.update('jax_platforms', 'cpu')
  if args.kernels or args.connection or args.small or args.population:
    return _kernels(args, overrides)
  require(args.config is not None, 'name a config: --config laptop, or ask for --kernels or a --connection')
  config = parse(args.config, overrides)
  require(not (args.gpu and args.topology), '--gpu and --topology exclude each other')
  if args.gpu:
    report = gpu.compile_step(config, args.gpu)
  else:
    topology = args.topology or config.topology
    require(topology is not None, 'name a slice: --topology v5p:8x8x8, or --gpu H100:2x8')
    report = tpu.compile_step(config, topology)
  print(json.dumps(report, indent=1) if args.json else text(report))
  return 0 if report['fits'] else 1


def _kernels(args: argparse.Namespace, overrides: list[str]) -> int:
  """`--kernels`, `--connection`, `--small` and `--population`."""
  require(
    not (args.config or args.gpu or overrides),
    '--kernels, --connection, --population and --small take no config and no --gpu',
  )
  args.topology = args.topology or 'v5p:2x2x1'
  tpu.check_topology(args.topology)
  found = kernels.measured(vars(args))
  print(json.dumps(found, indent=1) if args.json else kernels.text(found, args))
  return 1 if any('error' in program for program in found.values()) else 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
