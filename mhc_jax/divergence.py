"""When a run has diverged."""

from typing import Any

import numpy as np


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
