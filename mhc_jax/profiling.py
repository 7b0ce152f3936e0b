"""`mhc train --profile 10:15`: a trace of these updates by JAX's profiler, in the folder of the run.

Numbers are not touched: the program, its inputs and their order are the same, and a profiler that fails is
said and left out.
"""

import os
import re
from typing import Any

import jax

from mhc_jax import storage
from mhc_jax.errors import require
from mhc_jax.log import say


def updates_of(text: str) -> tuple[int, int]:
  """(first, last) of '10:15', both included; raises ConfigError for anything else."""
  found = re.fullmatch(r'([1-9]\d{0,8}):([1-9]\d{0,8})', text)
  require(
    found is not None and int(found[1]) <= int(found[2]),
    f'--profile takes the first and the last update to trace, like 10:15, got {text!r}',
  )
  return int(found[1]), int(found[2])


class Trace:
  """Of the updates first to last, or what of them is left where the run goes on behind the first."""

  def __init__(self, updates: tuple[int, int], workdir: str, num_steps: int):
    self._first, self._last = updates
    self._workdir, self._began = workdir, 0
    self._over = jax.process_index() > 0
    if self._first > num_steps:
      self._give_up(f'the run has {num_steps} updates')

  def begin(self, step: int, under_way: Any) -> int | None:
    """Called before updates are dispatched after `step`: starts the trace where it is due, and says how many
    updates at the most the dispatch may have; None where any number will do. under_way: waited for first."""
    if self._over:
      return None
    if step >= self._last and not self._began:
      self._give_up(f'update {self._last} was done before, by an earlier process')
      return None
    if step < self._first - 1:
      return self._first - 1 - step
    if not self._began:
      self._began = step + 1
      jax.block_until_ready(under_way)
      try:
        jax.profiler.start_trace(self._folder())
      except Exception as error:  # of a library, a service or a disk: whatever it is
        self._give_up(f'{type(error).__name__}: {error}')
        return None
    return self._last - step

  def end(self, step: int, waited_for: Any) -> None:
    """Called when updates up to `step` have been dispatched; the last of the trace are waited for."""
    if self._began and not self._over and step >= self._last:
      jax.block_until_ready(waited_for)
      self.close(step)

  def close(self, step: int) -> None:
    """Writes what there is: also where the run ends within."""
    if not self._began or self._over:
      return
    self._over = True
    try:
      jax.profiler.stop_trace()
      self._upload()
    except Exception as error:
      self._give_up(f'{type(error).__name__}: {error}')
      return
    folder = os.path.join(self._workdir, 'profile')
    say(
      f'updates {self._began} to {step} are traced in {folder}: `xprof --logdir {folder}` (pip install '
      'xprof) shows it, and TensorBoard; ui.perfetto.dev opens its .trace.json.gz'
    )

  def _folder(self) -> str:
    return os.path.join(storage.scratch(self._workdir), 'profile')

  def _upload(self) -> None:
    local = storage.scratch(self._workdir)
    for folder, _, names in os.walk(self._folder()):
      for name in names:
        storage.upload(os.path.relpath(os.path.join(folder, name), local), self._workdir)

  def _give_up(self, why: str) -> None:
    self._over = True
    say(f'warning: --profile: nothing is traced ({" ".join(why.split())}); the run goes on')
