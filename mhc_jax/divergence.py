"""When a run has diverged."""

import statistics
from typing import Any

import numpy as np

_FIRST = 20  # losses that tell where the loss begins and how it scatters from batch to batch
_MARGIN = 4.0  # times that scatter, of single batches, where many losses are smoothed; for one, 12 times
_LEAST, _MOST = 0.02, 0.5  # of the first loss: the margin lies between, however losses scatter


class Divergence:
  """Says when a run has diverged; its state travels in the checkpoint."""

  def __init__(self, patience: int, warmup: int, saved: dict[str, Any]):
    self._patience, self._warmup = patience, warmup
    self.saved = {'first': [], 'last': [], 'ignored': False} | saved
    if 'initial_loss' in saved:  # a checkpoint of before the noise was counted: its bar was the first loss
      self.saved |= {'first': [self.saved.pop('initial_loss')] * _FIRST}
      del self.saved['above']

  def diverged(self, step: int, metrics: dict[str, float | list[float]]) -> bool:
    """True for anything non-finite, or where the median of `patience` losses after warmup exceeds the bar.

    Where the state says `ignored`, only what is not finite counts.
    """
    if not all(np.isfinite(value).all() for value in metrics.values()):
      return True
    first, last = self.saved['first'], self.saved['last']
    if len(first) < _FIRST:
      first.append(metrics['loss'])
    if step <= self._warmup or self.saved['ignored']:
      return False
    last.append(metrics['loss'])
    del last[: -self._patience]
    if len(last) < self._patience or (smoothed := statistics.median(last)) <= min(first):
      return False
    return bool(smoothed > bar(first, self._patience))


def bar(first: list[float], patience: int) -> float:
  """What the median of `patience` losses must exceed, from the first losses of the run, in nats.

  The beginning, which is their median, and a margin by their noise, which their successive differences tell.
  A loss that climbs at once lifts the median: so it counts no higher than the first loss and noise allow.
  """
  noise = np.sqrt(np.mean(np.diff(first) ** 2) / 2) if len(first) > 1 else 0.0
  least, most = _LEAST * abs(first[0]), _MOST * abs(first[0])
  begin = min(np.median(first), first[0] + min(2 * noise, most))
  return begin + min(max(_MARGIN * (1 + 2 / patience) * noise, least), most)
