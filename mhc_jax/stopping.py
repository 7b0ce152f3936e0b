"""What ends a run before its last update: divergence, and signals."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Divergence:
  """Says when a run has diverged; its state travels in the checkpoint."""

  def __init__(self, patience: int, warmup: int, saved: dict[str, Any]):
    self._patience, self._warmup = patience, warmup
    self.saved = dict(saved) or {'initial_loss': None, 'above': 0}

  def diverged(self, step: int, metrics: dict[str, float | list[float]]) -> bool:
    """True for anything non-finite, or `patience` losses in a row above the first after warmup."""
    if not all(np.isfinite(value).all() for value in metrics.values()):
      return True
    if self.saved['initial_loss'] is None:
      self.saved['initial_loss'] = metrics['loss']
    above = step > self._warmup and metrics['loss'] > self.saved['initial_loss']
    self.saved['above'] = self.saved['above'] + 1 if above else 0
    return self.saved['above'] >= self._patience


@contextlib.contextmanager
def stop_on_signal() -> Iterator[list[int]]:
  """A list that SIGINT, SIGTERM and SIGUSR1 append to, so that the loop ends after a checkpoint.

  The same signal twice kills. A sweep tells its workers by SIGUSR1, which adds to a Ctrl-C that they got too.
  """
  received: list[int] = []

  def handler(number: int, _: Any) -> None:
    received.append(number)
    signal.signal(number, previous[number])

  try:
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
  except ValueError:  # not the main thread: its owner handles signals
    previous = {}
  try:
    yield received
  finally:
    for number, old in previous.items():
      signal.signal(number, old)
