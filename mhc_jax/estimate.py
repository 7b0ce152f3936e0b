"""`mhc train --estimate`: what a run is and what it will take, before anything is trained or read.

Counted: parameters, FLOPs, tokens, memory by terms (memory.py). Predicted: seconds, by the rate that the last
sweep on this machine showed; on an accelerator without one by its peak times an MFU that is assumed; else by
the gradients of one layer, which are compiled and timed for it, in seconds.
"""

import math

from mhc_jax.chips import CHIPS, UTILISATION, Chip, chip_of
from mhc_jax.log import duration
from mhc_jax.memory import gib, memory_of, terms
from mhc_jax.plan import Run, warnings_of
from mhc_jax.sharding import find_devices
from mhc_jax.speed import Speed, calibrated, remembered


def text(run: Run) -> str:
  """The estimate for people. The devices are those of config.topology where that is set, else those here."""
  c, derived, model = run.resolved, run.derived, run.model
  groups = ', '.join(f'{name} {size:,}' for name, size in _groups(derived['params']))
  found = sorted(terms(run).items(), key=lambda term: -term[1])
  total, have, where = sum(size for _, size in found), *_device(run)
  share = '' if have is None else f' of {gib(have)} ({where}): ' + ('fits' if total <= have else 'TOO MUCH')
  mesh = ' * '.join(f'{axis} {size}' for axis, size in c['mesh'].items() if size > 1) or 'one device'
  each = f'{derived["tokens_per_step"]:,} tokens: {derived["tokens"]:,} tokens'
  flops = f'{derived["flops"]:.3g} FLOPs ({derived["flops_per_token"]:.3g} a token)'
  lines = [
    *(f'warning: {line}' for line in warnings_of(run)),
    f'model       {c["arm"]}, {model.connection.streams} streams of width {model.width}, depth {model.depth}',
    f'parameters  {derived["params"]["total"]:,}: {groups}',
    f'training    {run.num_steps:,} updates of {each}, {flops}',
    f'mesh        {mesh}',
    f'memory      about {gib(total)} a device{share}',
    *(f'            {gib(size):>12}  {name}' for name, size in found),
    f'time        {_seconds(run)}',
  ]
  return '\n'.join(lines)


def _groups(params: dict[str, int]) -> list[tuple[str, int]]:
  sums = ('total', 'active', 'matmul', 'non_embedding')
  return [(name, size) for name, size in params.items() if name not in sums and size]


def _chip(run: Run) -> Chip | None:
  """That of config.topology, or of the devices here."""
  topology = run.resolved['topology']
  named = topology and CHIPS.get(topology.partition(':')[0])
  return named or chip_of(find_devices()[0].device_kind)


def _device(run: Run) -> tuple[float | None, str]:
  """(memory of one device, what it is called)."""
  chip, device = _chip(run), find_devices()[0]
  if run.resolved['topology'] and chip:
    return chip.memory / chip.devices, chip.name
  return memory_of(device), 'this machine' if device.platform == 'cpu' else device.device_kind


def _seconds(run: Run) -> str:
  chip, devices = _chip(run), math.prod(run.resolved['mesh'].values())
  speed = None if run.resolved['topology'] or devices > 1 else remembered()
  if speed is None and chip is not None:
    rate = UTILISATION * chip.flops / chip.devices * devices
    speed = Speed(rate, None, f'an assumed {UTILISATION:.0%} of the peak of {devices} x {chip.name}')
  speed = speed or calibrated([run])
  taken = duration(run.derived['flops'] / speed.flops)
  return f'about {taken} of updates at {speed.flops / 1e9:,.1f} GFLOP/s ({speed.source}), and compilation'
