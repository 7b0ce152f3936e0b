"""Speed as ratios measured in one run, printed as JSON.

  mhc bench step                 # train_step of each arm over residual
  mhc bench step --width 128 --repeats 9
  mhc bench step --against HEAD~1    # of each arm over itself at a commit
  mhc bench constraints          # each constraint over 20 Sinkhorn iterations
  mhc bench scaling              # communication and memory on 1 to 8 fake devices
  mhc bench memory               # memory of each recomputation, from the compiler
  mhc bench harness              # planning, resuming, reporting and watching many runs
  mhc bench device               # what the device that is here does: JSON and figure, in 10 minutes
  mhc bench peers                # one sublayer on CPU beside MaxText, tokamax, transformers and lucidrains

Repeats are interleaved: A B C A B C ..., so that a machine whose speed drifts does not favour an arm.
"""

import argparse
import json
import os
import sys

from mhc_jax import runtime, settings
from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from ..workers import ONE_THREAD
from .compiled import DEVICES, bench_memory, bench_scaling, fake_devices
from .constraints import bench_constraints
from .device import bench_device
from .harness import bench_harness
from .peers import bench_peers
from .step import bench_step

BENCHES = {
  'step': bench_step,
  'constraints': bench_constraints,
  'scaling': bench_scaling,
  'memory': bench_memory,
  'harness': bench_harness,
  'device': bench_device,
  'peers': bench_peers,
}


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='mhc bench', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('what', choices=BENCHES)
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
  parser.add_argument('--against', metavar='COMMIT', help='of the step bench: over each arm at that commit')
  parser.add_argument(
    '--runs', type=int, nargs='+', default=[50, 500, 5000], help='of the harness bench (default 50 500 5000)'
  )
  parser.add_argument('--small', action='store_true', help='of the device bench: sizes to try it with')
  parser.add_argument('--minutes', type=int, default=10, help='of the device bench (default 10)')
  parser.add_argument('--out', help='of the device and peers benches: folder of what they write')
  parser.add_argument('--widths', default='64,256,1024', help='of the peers bench')
  parser.add_argument(
    '--environments', default='bench_peers/environments', help='where it installs its peers, once'
  )
  args = parser.parse_args(argv)
  args.out = args.out or f'bench_{args.what}'
  args.depth = (24 if args.what == 'memory' else 4) if args.depth is None else args.depth
  for name, value in vars(args).items():
    least = 16 if name == 'tokens' else 1
    require(
      not isinstance(value, int) or isinstance(value, bool) or value >= least,
      f'--{name.replace("_", "-")} must be at least {least}',
    )
  if not args.against:  # each side's own processes do, or do not
    runtime.keep_memory()
  # As in a sweep's workers; XLA reads it when the first computation starts.
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  if args.what == 'scaling':
    fake_devices(max(DEVICES))
  print(json.dumps(BENCHES[args.what](args), indent=1))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
