"""What a plan will take: the table of a dry run, in 100 columns, with seconds by a rate that was measured.

The rate is that of finished runs in the sweep's folder; else of the last sweep on this machine, which is
remembered in the user's cache folder; else of the gradients of a layer, timed now.
"""

import os
import statistics
import textwrap

from mhc_jax.log import duration
from mhc_jax.plan import Run, warnings_of
from mhc_jax.run_folder import load_json
from mhc_jax.speed import Speed, cache_file, calibrated, remembered
from mhc_jax.storage import write_json
from mhc_jax.workdir import read_status

COLUMNS = 100  # of a terminal that nobody has widened


def speed_of(planned: list[Run], folder: str) -> Speed:
  """The best evidence there is; calibrates, which takes seconds, only where there is none."""
  return measured(planned, folder) or remembered() or calibrated(planned)


def measured(planned: list[Run], folder: str) -> Speed | None:
  """By the finished runs of a folder: their updates, and what the first of each shape took besides."""
  flops = seconds = 0.0
  runs, besides = 0, {}
  for run in planned:
    workdir = os.path.join(folder, run.run_id)
    status = read_status(workdir)
    if status['state'] == 'finished' and (status.get('seconds') or 0) > 0:
      runs, flops, seconds = runs + 1, flops + run.derived['flops'], seconds + status['seconds']
      try:
        taken, ended = (os.stat(f'{workdir}/{name}.json').st_mtime for name in ('config', 'status'))
      except OSError:  # a store, or a folder that lost a file
        continue
      before = besides.get(run.shapes)
      if before is None or taken < before[0]:
        besides[run.shapes] = taken, ended - taken - status['seconds']
  if not runs:
    return None
  # A copied folder has lost its times, a resumed run has trained longer than since it was taken.
  known = [other for _, other in besides.values() if other > 0]
  source = f'measured on {runs} finished run{"s" * (runs > 1)} of this folder'
  return Speed(flops / seconds, statistics.median(known) if known else None, source, seconds)


def remember(planned: list[Run], folder: str) -> None:
  """Keeps what a sweep's finished runs showed, for plans that have none; failing is no matter.

  Not of less than a minute of training: so short ones are all overhead.
  """
  found = measured(planned, folder)
  if found is not None and found.seconds > 60:
    device = read_status(os.path.join(folder, planned[0].run_id)).get('device_kind')
    kept, _ = load_json(cache_file())
    rate = {'flops_per_second': found.flops, 'shape_seconds': found.shape_seconds}
    try:
      os.makedirs(os.path.dirname(cache_file()), exist_ok=True)
      write_json(cache_file(), (kept if isinstance(kept, dict) else {}) | {device: rate})
    except OSError:
      pass


def report(planned: list[Run], states: list[str], todo: list[int], workers: int, speed: Speed) -> str:
  """The plan as text: its table, what is the same in all runs, and what the runs to do will take."""
  rows = [_row(run, state, speed) for run, state in zip(planned, states, strict=True)]
  several = len(rows) > 1
  same = {name: rows[0][name] for name in rows[0] if several and len({row[name] for row in rows}) == 1}
  shown = [name for name in rows[0] if name not in same or name == 'run']
  hardly_meant = [line for run in planned for line in warnings_of(run)]
  lines = [f'warning: {line} ({hardly_meant.count(line)} runs)' for line in dict.fromkeys(hardly_meant)]
  away = sorted({run.resolved['data']['name'] for run in planned if not run.derived['data_digest']})
  for name in away:
    lines += wrapped(f'{name} is not on this machine: sizes are checked when the sweep starts')
  lines += table([{name: row[name] for name in shown} for row in rows])
  if several:
    alike = (f'{name} {value}' for name, value in same.items() if name != 'run' and value != '-')
    lines += wrapped(f'all: {", ".join(alike)}')
  return '\n'.join([*lines, *wrapped(time_of([planned[i] for i in todo], workers, speed))])


def time_of(runs: list[Run], workers: int, speed: Speed) -> str:
  """A sentence: how long these runs will take, and on what evidence."""
  shapes, flops = len({run.shapes for run in runs}), sum(run.derived['flops'] for run in runs)
  updates, known = flops / speed.flops, speed.shape_seconds is not None
  compiling = shapes * (speed.shape_seconds or 0.0)
  busy = max(1, min(workers, shapes))  # runs of equal shapes stay in one process
  what = f'{len(runs)} runs to do, of {shapes} shapes, {flops:.2g} FLOPs'
  if not runs:
    return what
  parts = f'{duration(updates / busy)} of updates at {speed.flops / 1e9:.1f} GFLOP/s ({speed.source})'
  each = f'{shapes} shapes at {duration(speed.shape_seconds or 0)} each'
  parts += f' and {duration(compiling / busy)} of compilation ({each})' if known else ''
  more = '' if known else ', and compilation, which has not been measured here'
  crew = f'{workers} worker{"s" * (workers > 1)}'
  return f'{what}: about {duration((updates + compiling) / busy)} with {crew}: {parts}{more}'


def _row(run: Run, state: str, speed: Speed) -> dict[str, str]:
  c, model = run.resolved, run.model
  known = bool(run.derived['data_digest'])
  return {
    'run': run.run_id if known else '-',
    'arm': c['arm'],
    'seed': f'{c["seed"]}',
    'size': f'{model.width}x{model.depth}',
    'n': f'{model.connection.streams}',
    'rank': f'{model.connection.rank or "-"}',
    'W rank': f'{model.weights_rank or "-"}',
    'lr': f'{c["optimizer"]["lr"]:.2g}',
    'params': short(run.derived['params']['total']),
    'tokens': short(run.derived['tokens']),
    'FLOPs': f'{run.derived["flops"]:.1e}',
    'time': duration(run.derived['flops'] / speed.flops),
    'state': state if known else '-',
  }


def short(count: float) -> str:
  """A count in three digits: 12.3k, 4.5M."""
  for unit in ('', 'k', 'M', 'G', 'T'):
    if count < 999.5 or unit == 'T':
      return f'{count:.3g}{unit}'
    count /= 1000
  raise AssertionError


def table(rows: list[dict[str, str]]) -> list[str]:
  """Lines of at most COLUMNS letters: where they would be longer, arms are cut, then counts are left out."""
  widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
  over = sum(widths.values()) + 2 * (len(widths) - 1) - COLUMNS
  if 'arm' in widths:
    widths['arm'] -= max(0, min(over, widths['arm'] - 16))
  for name in ('params', 'tokens', 'FLOPs'):
    if sum(widths.values()) + 2 * (len(widths) - 1) > COLUMNS:
      widths.pop(name, None)
  cells = [dict(zip(widths, widths, strict=True)), *rows]
  lines = ('  '.join(_cell(row[name], name, width) for name, width in widths.items()) for row in cells)
  return [line.rstrip() for line in lines]


def _cell(text: str, name: str, width: int) -> str:
  text = text if len(text) <= width else f'{text[: width - 1]}…'
  return text.ljust(width) if name in ('run', 'arm', 'state') else text.rjust(width)


def wrapped(text: str) -> list[str]:
  """The text in lines of at most COLUMNS letters."""
  return textwrap.wrap(text, COLUMNS)
