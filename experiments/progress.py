"""The progress of a sweep: one bar over all of its runs, in FLOPs done, read from their folders."""

import os
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.run_folder import last_flops
from mhc_jax.workdir import ENDED, read_status


def watch(at_work: Callable[[float], bool], planned: list[Run], folder: str) -> None:
  """One bar over all runs, in FLOPs done, read from their metrics, while anybody is at work.

  at_work: waits some seconds at most, and says whether anybody is still.
  """
  total = sum(run.derived['flops'] for run in planned)
  plain, printed = not sys.stderr.isatty(), 0.0
  began, at_start = time.monotonic(), sum(_flops_done(run, folder) for run in planned)
  form = '{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}'
  with tqdm(total=total, initial=at_start, desc='sweep', bar_format=form, disable=plain) as bar:
    while True:
      waiting = at_work(1.0)
      states = [read_status(os.path.join(folder, run.run_id))['state'] for run in planned]
      ended, now = sum(state in ENDED for state in states), time.monotonic()
      flops = sum(_flops_done(run, folder) for run in planned)
      bar.set_postfix_str(f'{ended}/{len(planned)} runs', refresh=False)
      bar.update(flops - bar.n)
      if plain and (now - printed > 15 or not waiting):
        printed = now
        left = (now - began) * (total - flops) / (flops - at_start) if flops > at_start else None
        text = 'compiling' if left is None else f'about {left:.0f} s left'
        say(f'sweep: {ended}/{len(planned)} runs, {flops / total:.0%} of the FLOPs, {text}')
      if not waiting:
        return


def _flops_done(run: Run, folder: str) -> float:
  """FLOPs of a run so far, from the last line of its metrics."""
  status = read_status(os.path.join(folder, run.run_id))
  if status['state'] in (*ENDED, 'failed'):
    return run.derived['flops']
  return min(last_flops(os.path.join(folder, run.run_id)), run.derived['flops'])
