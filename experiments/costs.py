"""What a token of training takes, for every arm and size of an experiment: FLOPs, bytes, seconds.

  python -m experiments.costs study:cpu --out docs/results/study-cpu/costs.csv     # with nothing beside it
  python -m analysis.costs docs/results/study-cpu

One train_step on random tokens, on a CPU in one thread as workers of `mhc sweep` train. flops_per_token:
the model's (mhc_jax/cost.py). bytes_per_token: read and written by the operations of the program that XLA
compiled for this device, as compile/hlo_cost.py counts them: what caches spare is not taken off, and a loop
that runs until it has converged (exact projections) counts once. seconds_per_token: the median, with the
smallest and largest, of repeats in which the arms of a size take turns.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pandas as pd
from ml_collections import ConfigDict

from mhc_jax import cost
from mhc_jax.command import end_with_message
from mhc_jax.config_file import check_fields
from mhc_jax.errors import require
from mhc_jax.log import say
from mhc_jax.paths import user_path
from mhc_jax.sharding import make_mesh

from .bench.arm_steps import functions_of
from .bench.timing import interleaved, summary
from .compile.abstract_step import trace_step
from .compile.hlo_cost import count
from .compile.hlo_text import parse_module
from .planning import configs_of
from .workers import ONE_THREAD


def compiled_step(config: ConfigDict) -> tuple[Callable[[], object], dict[str, float]]:
  """A function that makes an update, and {flops_per_token, bytes_per_token} of the program that it runs."""
  config = check_fields(config)
  traced, _, _, model = trace_step(config, make_mesh({}))
  counted = count(parse_module(traced.lower().compile().as_text()))
  tokens = config.data.batch_size * config.data.seq_len
  return functions_of(config)['step'], {
    'flops_per_token': cost.train_flops_per_token(model, config.data.seq_len),
    'bytes_per_token': counted.total('bytes') / tokens,
  }


def costs(configs: list[ConfigDict], repeats: int, calls: int) -> pd.DataFrame:
  """A row for each arm and size, as at the top; of several runs of one, the first."""
  sizes: dict[tuple[int, int], dict[str, ConfigDict]] = {}
  for c in configs:
    sizes.setdefault((c.model.width, c.model.depth), {}).setdefault(c.arm, c)
  rows = []
  for (width, depth), arms in sizes.items():
    say(f'{width}x{depth}: compiling {len(arms)} arms')
    steps = {arm: compiled_step(c) for arm, c in arms.items()}
    timed = interleaved({arm: update for arm, (update, _) in steps.items()}, repeats, calls)
    for arm, seconds in timed.items():
      tokens = arms[arm].data.batch_size * arms[arm].data.seq_len
      taken = {f'seconds_per_token_{k}': v / tokens for k, v in summary(seconds).items()}
      kind = {'device_kind': jax.devices()[0].device_kind}
      rows.append({'arm': arm, 'width': width, 'depth': depth} | steps[arm][1] | taken | kind)
  return pd.DataFrame(rows)


def main(argv: list[str] | None = None) -> int:
  """Writes and prints the table."""
  parser = argparse.ArgumentParser(
    'python -m experiments.costs', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('experiment', help='as study:cpu, of mhc sweep --list')
  parser.add_argument('--repeats', type=int, default=7)
  parser.add_argument('--calls', type=int, default=5, help='updates of a repeat')
  parser.add_argument('--out', type=user_path, default=Path('runs/costs.csv'))
  a = parser.parse_args(argv)
  require(min(a.repeats, a.calls) > 0, '--repeats and --calls must be 1 or more')
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
  table = costs(configs_of(a.experiment), a.repeats, a.calls)
  a.out.parent.mkdir(parents=True, exist_ok=True)
  table.to_csv(a.out, index=False, float_format='%.5g')
  print(table.to_string(index=False, float_format='%.4g'))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
