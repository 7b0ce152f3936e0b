"""`mhc bench device`: what the device that is here does, and what hyper-connections cost on it.

Measured peak and bandwidth, attention, the boundary between sublayers, train steps of four connections,
members of populations and every constraint, kernels beside XLA's programs, float32 and bfloat16. It looks at
the clock before each row and skips what is left when its time is up, saying so; a row that fails says why,
and the others go on.
"""

import argparse
import concurrent.futures
import importlib.metadata
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from mhc_jax.kernels.choice import chip_of

from .device_parts import (
  FULL,
  SMALL,
  Part,
  attentions,
  boundaries,
  constraints,
  limits,
  populations,
  steps,
)

ROUNDS = 5
TOGETHER = 4  # rows that are compiled at once, and whose arrays are then on the device together


def bench_device(args: argparse.Namespace) -> dict[str, Any]:
  """The report, also written to args.out with a figure; reads args.small, minutes, out."""
  sizes, chip = SMALL if args.small else FULL, None
  if jax.default_backend() != 'cpu':
    chip = chip_of('pallas', None)  # whatever model.kernels=auto takes on it
  parts = itertools.chain(
    limits(sizes),
    attentions(sizes, chip),
    boundaries(sizes, chip),
    populations(sizes),
    steps(sizes, chip),
    constraints(sizes, chip),
  )
  ends, rows = time.monotonic() + 60 * args.minutes, []
  with ThreadPoolExecutor(TOGETHER) as pool:
    while batch := list(itertools.islice(parts, TOGETHER)):
      waiting = [None if time.monotonic() > ends else pool.submit(compiled, part) for part in batch]
      concurrent.futures.wait([future for future in waiting if future])
      for part, future in zip(batch, waiting, strict=True):
        row = {'skipped': f'{args.minutes} minutes were up'}
        if future:
          row = measure(part, *future.result(), rounds=1 if args.small else ROUNDS)
        rows.append(part.names | row)
        print(json.dumps(rows[-1]), file=sys.stderr)
      del waiting, future
      jax.clear_caches()  # of these rows' programs, and what they hold on the device
  device = jax.devices()[0]
  report = {
    'device': device.device_kind,
    'platform': device.platform,
    'kernels': None if chip is None else chip.platform,
    'versions': {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib')},
    'rows': related(rows),
  }
  folder = Path(args.out)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'device.json').write_text(json.dumps(report, indent=1) + '\n')
  draw(report, folder / 'device.png')
  return report


def compiled(part: Part) -> tuple[Callable[[], Any] | Exception, float]:
  """What runs the part, or what hinders it; seconds until its first call was done."""
  began = time.perf_counter()
  try:
    run = part.build()
    jax.block_until_ready(run())
  except Exception as error:  # of any kind: a card's memory, a kernel's compiler
    return error, time.perf_counter() - began
  return run, time.perf_counter() - began


def measure(part: Part, run: Callable[[], Any] | Exception, compile_s: float, rounds: int) -> dict[str, Any]:
  """The median of some rounds' seconds per call, and rates; or the error's first line."""
  try:
    if isinstance(run, Exception):
      raise run
    began = time.perf_counter()
    jax.block_until_ready(run())
    once = max(time.perf_counter() - began, 1e-6)
    calls, seconds = max(1, min(100, int(0.1 / once))), []
    for _ in range(rounds):
      began = time.perf_counter()
      for _ in range(calls):
        result = run()
      jax.block_until_ready(result)
      seconds.append((time.perf_counter() - began) / calls)
  except Exception as error:  # a card's memory may not do for two calls
    return {'error': f'{type(error).__name__}: {str(error).strip()[:300]}'}
  row: dict[str, Any] = {'ms': 1e3 * statistics.median(seconds), 'compile_s': compile_s}
  rates = {'tflops': part.flops / 1e12, 'gb_per_s': part.bytes / 1e9, 'tokens_per_s': part.tokens}
  rates['updates_per_s'] = part.updates
  return row | {name: 1e3 * work / row['ms'] for name, work in rates.items() if work}


def related(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The rows with each rate over what was measured as the device's limit, and times over their reference's.

  Kernels over XLA's program, steps over residual's. MFU: of the measured peak in that dtype. gain: updates of
  all members per second, over those of a member alone.
  """
  peak = {row['dtype']: row['tflops'] for row in rows if row['part'] == 'peak' and 'tflops' in row}
  bandwidth = next((row['gb_per_s'] for row in rows if row['part'] == 'bandwidth' and 'ms' in row), None)
  times = {key_of(row): row['ms'] for row in rows if 'ms' in row}
  for row in rows:
    if 'tflops' in row and row['dtype'] in peak and row['part'] != 'peak':
      row['mfu' if row['part'] == 'step' else 'of_peak'] = row['tflops'] / peak[row['dtype']]
    if 'gb_per_s' in row and bandwidth and row['part'] != 'bandwidth':
      row['of_bandwidth'] = row['gb_per_s'] / bandwidth
    for field, reference in (('arm', 'residual'), ('by', 'xla')):
      base = times.get(key_of(row | {field: reference})) if field in row else None
      if base and 'ms' in row:
        row[f'ratio_to_{reference}'] = row['ms'] / base
    alone = times.get(key_of(row | {'members': 1})) if 'members' in row else None
    if alone and 'ms' in row:
      row['gain'] = row['members'] * alone / row['ms']
  return rows


def key_of(row: dict[str, Any]) -> tuple:
  """Which row it is."""
  names = ('part', 'constraint', 'arm', 'by', 'width', 'depth', 'dtype', 'members')
  return tuple(row.get(name) for name in names)


def draw(report: dict[str, Any], path: Path) -> None:
  """One figure: steps over residual's, and parts by kernels over XLA's."""
  import matplotlib

  matplotlib.use('agg')
  from matplotlib import pyplot as plt

  rows = [row for row in report['rows'] if 'ms' in row]
  panels = {
    'train step over residual': [row for row in rows if row['part'] == 'step' and 'ratio_to_residual' in row],
    "kernels over XLA's program": [row for row in rows if 'ratio_to_xla' in row and row['by'] != 'xla'],
  }
  panels = {title: shown for title, shown in panels.items() if shown} or panels
  height = 2 + 0.2 * max(map(len, panels.values()))
  figure, axes = plt.subplots(
    1, len(panels), figsize=(6.5 * len(panels), height), constrained_layout=True, squeeze=False
  )
  for axis, (title, shown) in zip(axes[0], panels.items(), strict=True):
    names = [' '.join(str(x) for x in key_of(row) if x not in (None, 'step')) for row in shown]
    ratios = [row['ratio_to_residual' if title.endswith('residual') else 'ratio_to_xla'] for row in shown]
    axis.barh(range(len(shown)), ratios)
    axis.set_yticks(range(len(shown)), names, fontsize=7)
    axis.axvline(1, color='black', linewidth=0.8)
    axis.set_xlabel('time, ratio')
    axis.set_title(title)
    axis.invert_yaxis()
  figure.suptitle(f'{report["device"]}, jax {report["versions"]["jax"]}')
  figure.savefig(path, dpi=120)
  plt.close(figure)
