"""The progress of a sweep: one bar over all of its runs, in FLOPs done, read from their folders."""

import concurrent.futures
import os
import sys
import time

from tqdm import tqdm

from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.run_folder import last_flops
from mhc_jax.workdir import ENDED, read_status


def watch(futures: list[concurrent.futures.Future], planned: list[Run], folder: str) -> None:
  """One bar over all runs, in FLOPs done, read from their metrics; after Ctrl-C no new group starts."""
  total = sum(run.derived['flops'] for run in planned)
  plain, printed = not sys.stderr.isatty(), 0.0
  began, at_start = time.monotonic(), sum(_flops_done(run, folder) for run in planned)
  form = '{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}'
  with tqdm(total=total, initial=at_start, desc='sweep', bar_format=form, disable=plain) as bar:
    while True:
      waiting = concurrent.futures.wait([f for f in futures if not f.done()], 1).not_done
      done = [f for f in futures if f.done() and not f.cancelled()]
      if any(f.exception() or _interrupted(f.result()) for f in done):
        for future in waiting:
          future.cancel()
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


def _interrupted(ended: list[tuple[str, str]]) -> bool:
  return any(state == 'interrupted' for _, state in ended)


def _flops_done(run: Run, folder: str) -> float:
  """FLOPs of a run so far, from the last line of its metrics."""
  status = read_status(os.path.join(folder, run.run_id))
  if status['state'] in (*ENDED, 'failed'):
    return run.derived['flops']
  return min(last_flops(os.path.join(folder, run.run_id)), run.derived['flops'])
