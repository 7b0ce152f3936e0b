"""Seconds of several functions in interleaved repeats.

A B C A B C ..., so that a machine whose speed drifts does not favour one of them.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def interleaved(
  functions: dict[Any, Callable[[], object]], repeats: int, calls: int
) -> dict[Any, list[float]]:
  """Seconds per call of each function: `repeats` rounds of `calls` calls each, after one round unmeasured."""
  seconds: dict[Any, list[float]] = {name: [] for name in functions}
  for round_ in range(repeats + 1):
    for name, function in functions.items():
      began = time.perf_counter()
      for _ in range(calls):
        result = function()
      jax.block_until_ready(result)
      if round_:
        seconds[name].append((time.perf_counter() - began) / calls)
  return seconds


def summary(values: list[float] | np.ndarray) -> dict[str, float]:
  """Median and spread of the repeats."""
  return {'median': float(np.median(values)), 'min': float(min(values)), 'max': float(max(values))}
