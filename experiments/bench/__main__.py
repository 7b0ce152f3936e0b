"""Speed as ratios measured in one run, printed as JSON.

  python -m experiments.bench step                 # train_step of each arm over residual
  python -m experiments.bench step --width 128 --repeats 9
  python -m experiments.bench constraints          # each constraint over 20 Sinkhorn iterations
  python -m experiments.bench scaling              # communication and memory on 1 to 8 fake devices
  python -m experiments.bench memory               # memory of each recomputation, from the compiler

Repeats are interleaved: A B C A B C ..., so that a machine whose speed drifts does not favour an arm.
"""

import argparse
import json
import os
import sys

from mhc_jax.errors import ConfigError

from ..workers import ONE_THREAD
from . import compiled as bench_scaling
from .step import bench_step


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('what', choices=('step', 'constraints', 'scaling', 'memory'))
  parser.add_argument('--width', type=int, default=64)
  parser.add_argument('--depth', type=int, help='layers (default 4; of the memory bench, 24)')
  parser.add_argument('--batch', type=int, default=16, help='sequences')
  parser.add_argument('--seq-len', type=int, default=128)
  parser.add_argument('--streams', type=int, default=4)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--diagnostics-every', type=int, default=10, help='steps (default 10)')
  parser.add_argument('--tokens', type=int, default=16384, help='of the constraints bench')
  parser.add_argument('--repeats', type=int, default=7, help='rounds (default 7)')
  parser.add_argument('--calls', type=int, default=4, help='steps in a round (default 4)')
  args = parser.parse_args(argv)
  if args.repeats < 1 or args.calls < 1:
    raise ConfigError('--repeats and --calls must be at least 1')
  args.depth = args.depth or (24 if args.what == 'memory' else 4)
  # As in a sweep's workers; XLA reads it when the first computation starts.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  if args.what == 'constraints':
    from .constraints import bench_constraints  # which imports this file

    result = bench_constraints(args)
  elif args.what == 'scaling':
    bench_scaling.fake_devices(max(bench_scaling.DEVICES))
    result = bench_scaling.bench_scaling(args)
  elif args.what == 'memory':
    result = bench_scaling.bench_memory(args)
  else:
    result = bench_step(args)
  print(json.dumps(result, indent=1))
  return 0


if __name__ == '__main__':
  from mhc_jax.command import end_with_message

  sys.exit(end_with_message(main))
