"""How fast this machine trains: as the last sweep showed, or timed now on a layer. For predictions alone."""

import dataclasses
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.cost import train_flops_per_token
from mhc_jax.model import Transformer
from mhc_jax.model_config import ModelConfig
from mhc_jax.paths import cache_folder
from mhc_jax.plan import Run
from mhc_jax.run_folder import is_number, load_json
from mhc_jax.sharding import find_devices
from mhc_jax.train_step import gradients

CALIBRATION = 1e10  # FLOPs of the timed pass, at most: a second on a slow core


@dataclasses.dataclass(frozen=True)
class Speed:
  """Of one worker: training FLOPs per second, seconds per shape besides training if known, and where from."""

  flops: float
  shape_seconds: float | None
  source: str
  seconds: float = 0.0  # of training that it was measured over


def cache_file() -> str:
  """The file of this machine's rates; a home folder may be several machines'."""
  return os.path.join(cache_folder(), f'speed-{platform.node()}.json')


def remembered() -> Speed | None:
  """What the last sweep on this kind of device showed."""
  kept, _ = load_json(cache_file())
  rate = kept.get(find_devices()[0].device_kind) if isinstance(kept, dict) else None
  if not isinstance(rate, dict):
    return None
  flops, shape = rate.get('flops_per_second'), rate.get('shape_seconds')
  if not (is_number(flops) and flops > 0):
    return None
  return Speed(flops, shape if is_number(shape) else None, 'measured by the last sweep on this machine')


def calibrated(planned: list[Run]) -> Speed:
  """By gradients of one layer of a model of the plan: of the fewest streams, which compiles in seconds, and
  among these the one with most of the FLOPs."""
  shares: dict[Any, float] = {}
  for run in planned:
    shares[run.shapes] = shares.get(run.shapes, 0.0) + run.derived['flops']
  model, _, batch_size, seq_len, _ = max(
    shares, key=lambda shape: (-shape[0].connection.streams, shares[shape])
  )
  model = dataclasses.replace(model, depth=1, dense_layers=0, scan_unroll=1)
  per_token = train_flops_per_token(model, seq_len)
  rows = max(1, min(batch_size, int(CALIBRATION / per_token / seq_len)))
  tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, seq_len), np.int32)
  batch = {name: tokens for name in ('inputs', 'targets')}
  batch |= {'weights': np.ones(tokens.shape, np.float32), 'segments': np.zeros_like(tokens)}
  two = tokens[:1, :2]
  params = jax.eval_shape(Transformer(model).init, jax.random.key(0), two, two)['params']
  params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), params)
  grads = jax.jit(functools.partial(gradients, model=model))
  seconds = _median(lambda: jax.block_until_ready(grads(params, batch)))
  what = f'gradients of one {width_of(model)} layer of {rows} x {seq_len} tokens, timed now'
  return Speed(rows * seq_len * per_token / seconds, None, f'{what}; whole updates are slower')


def _median(call: Callable[[], object], seconds: float = 0.5) -> float:
  """Seconds of the calls that fit into so many seconds, after one that compiles."""
  call()
  times, began = [], time.perf_counter()
  while not times or time.perf_counter() - began < seconds:
    start = time.perf_counter()
    call()
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def width_of(model: ModelConfig) -> str:
  """A layer for a reader."""
  streams = model.connection.streams
  return f'{model.width} wide' + f', {streams}-stream' * (streams > 1)
