"""The progress of a sweep: one bar over all of its runs, read from their folders at little cost.

On a terminal a bar, elsewhere a line now and then: runs ended, FLOPs done, which shapes compile, time left.
"""

import contextlib
import dataclasses
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

from mhc_jax.log import duration, say
from mhc_jax.plan import Run
from mhc_jax.run_folder import last_row
from mhc_jax.storage import is_remote
from mhc_jax.workdir import ENDED, read_status, read_statuses

LOOK_SECONDS = 1.0  # between looks, where they cost little
REMOTE_SECONDS = 15.0  # a store counts requests
COST = 200  # a look may take one part in so many of the time until the next: half a percent of a core
LINE_SECONDS = 15.0  # between lines where there is no terminal


@dataclasses.dataclass
class Seen:
  """What is known of one run's folder."""

  run: Run
  shape: int  # which of the plan's shapes it has
  state: str = 'missing'
  flops: float = 0.0
  row: dict[str, Any] = dataclasses.field(default_factory=dict)  # numbers in the last row of its metrics
  stamps: tuple[int, ...] = ()  # when its files were last written
  started: float | None = None  # when a process took it, where that was since the watching began
  base: tuple[float, float] = (0.0, 0.0)  # FLOPs, seconds of training before
  work: tuple[float, float, float] = (0.0, 0.0, 0.0)  # FLOPs, seconds of training, other seconds since then

  @property
  def over(self) -> bool:
    """Whether it ended or failed."""
    return self.state in (*ENDED, 'failed')


@dataclasses.dataclass(frozen=True)
class Summary:
  """All runs at one look."""

  ended: int
  flops: float  # done, those of failed runs in full
  compiling: list[Run]  # taken, without an update in their metrics yet
  training: list[Seen]
  shapes: int  # that runs of the plan have
  shapes_left: int  # that no run has been trained with since the watching began
  seconds: float | None  # left for one worker; None without evidence


class Folders:
  """The runs of a sweep as their folders tell. A look reads what has changed since the last one."""

  def __init__(self, planned: list[Run], folder: str):
    self._folder, self._began, self._stamp = folder, time.time(), 0
    self._remote = is_remote(folder)
    shapes: dict[Any, int] = {}
    self.runs = {run.run_id: Seen(run, shapes.setdefault(run.shapes, len(shapes))) for run in planned}
    self._open: set[str] = set(self.runs if self._remote else ())  # there and not ended
    self._summary: Summary | None = None

  def look(self) -> Summary:
    """Reads what is new."""
    if self._remote:
      run_ids = list(self._open)
      statuses = read_statuses([os.path.join(self._folder, run_id) for run_id in run_ids])
      changed = [
        run_id for run_id, status in zip(run_ids, statuses, strict=True) if self._read(run_id, status)
      ]
    else:
      self._find()
      changed = [run_id for run_id in self._open if self._read(run_id)]
    self._open -= {run_id for run_id in changed if self.runs[run_id].state in ENDED}
    if changed or self._summary is None:
      self._summary = _summary(list(self.runs.values()))
    return self._summary

  def _find(self) -> None:
    """Folders of runs that were not there before: only then does the folder above change."""
    with contextlib.suppress(OSError):
      stamp = os.stat(self._folder).st_mtime_ns
      if stamp != self._stamp:
        self._stamp = stamp
        there = [name for name in os.listdir(self._folder) if name in self.runs]
        self._open |= {name for name in there if self.runs[name].state not in ENDED}

  def _read(self, run_id: str, status: dict[str, Any] | None = None) -> bool:
    """Whether there was anything new; status: what a store has, whose rows would cost a request each."""
    seen, workdir = self.runs[run_id], os.path.join(self._folder, run_id)
    stamps = tuple(_written(os.path.join(workdir, name)) for name in FILES)
    if stamps == seen.stamps and status is None:
      return False
    first, seen.stamps = not seen.stamps, stamps
    whole = seen.run.derived['flops']
    if status is None:
      seen.state, seen.row = read_status(workdir)['state'], last_row(workdir)
    else:
      seen.state, step = status['state'], status.get('step', 0)
      seen.row = {
        'step': step,
        'flops': whole * step / seen.run.num_steps,
        'time/seconds': status.get('seconds') or 0,
      }
    seen.flops = whole if seen.over else min(max(0.0, seen.row.get('flops', 0.0)), whole)
    done = seen.flops, seen.row.get('time/seconds', 0.0)
    if stamps[0] >= self._began * 1e9:
      seen.started = stamps[0] / 1e9
    elif first:
      seen.base = done
    if seen.row:
      seen.base = min(seen.base, done)  # a killed run goes on from its checkpoint, before its last row
    flops, seconds = done[0] - seen.base[0], done[1] - seen.base[1]
    if seen.started and seen.state != 'failed' and flops > 0 and seconds > 0:
      seen.work = flops, seconds, max(0.0, stamps[-1] / 1e9 - seen.started - seconds)
    return True


def _summary(runs: list[Seen]) -> Summary:
  left = [seen for seen in runs if not seen.over]
  worked = sorted((seen for seen in runs if seen.work[1]), key=lambda seen: seen.started)
  first: dict[int, Seen] = {}
  for seen in worked:
    first.setdefault(seen.shape, seen)
  training = [seen for seen in left if seen.work[1]]
  shapes_left = len({seen.shape for seen in left} - first.keys())
  seconds = None
  if worked:
    # A shape that is left costs what those before cost besides training, another run what others cost.
    others = [seen.work[2] for seen in worked if first[seen.shape] is not seen]
    rate = sum(seen.work[0] for seen in worked) / sum(seen.work[1] for seen in worked)
    seconds = sum(seen.run.derived['flops'] - seen.flops for seen in left) / rate
    seconds += shapes_left * _mean([seen.work[2] for seen in first.values()])
    seconds += max(0, len(left) - shapes_left - len(training)) * _mean(others)
  return Summary(
    ended=sum(seen.state in ENDED for seen in runs),
    flops=sum(seen.flops for seen in runs),
    compiling=[seen.run for seen in left if seen.started and not seen.work[1]],
    training=training,
    shapes=len({seen.shape for seen in runs}),
    shapes_left=shapes_left,
    seconds=seconds,
  )


FILES = ('config.json', 'status.json', 'metrics.jsonl')


def _written(path: str) -> int:
  """When a file was last written, in ns; 0 without one."""
  try:
    return os.stat(path).st_mtime_ns
  except OSError:
    return 0


def _mean(values: list[float]) -> float:
  return math.fsum(values) / len(values) if values else 0.0


class Bar:
  """What a user sees of the folders: a bar on a terminal, elsewhere lines."""

  def __init__(self, planned: list[Run], folder: str, workers: int):
    self._folders, self._workers = Folders(planned, folder), workers
    self._total = sum(run.derived['flops'] for run in planned) or 1.0
    self._plain = not sys.stderr.isatty()
    self._least = REMOTE_SECONDS if is_remote(folder) else LOOK_SECONDS
    form = '{desc}: {percentage:3.0f}%|{bar}| {elapsed}{postfix}'
    self._bar = tqdm(total=self._total, desc='sweep', bar_format=form, disable=self._plain)
    self._printed, self._said = -math.inf, ''

  def show(self, last: bool = False) -> float:
    """Looks, and shows it; returns the seconds until the next look."""
    began, now = time.thread_time(), time.monotonic()
    found = self._folders.look()
    doing, left = self._doing(found), self._time_left(found)
    runs = f'{found.ended}/{len(self._folders.runs)} runs'
    self._bar.set_postfix_str(f'{runs}, {doing}, {left}', refresh=False)
    self._bar.update(found.flops - self._bar.n)
    pause = LINE_SECONDS / 3 if doing != self._said else LINE_SECONDS
    if self._plain and (last or now - self._printed > pause):
      self._printed, self._said = now, doing
      more = '' if last else f', {doing}, {left}'
      say(f'sweep: {runs}, {found.flops / self._total:.0%} of the FLOPs{more}')
    return max(self._least, COST * (time.thread_time() - began))

  def _time_left(self, found: Summary) -> str:
    if found.seconds is None:
      return 'estimating the time left'
    runs_left = len(self._folders.runs) - found.ended
    return f'about {duration(found.seconds / max(1, min(self._workers, runs_left)))} left'

  def _doing(self, found: Summary) -> str:
    """What is going on; constant while the same goes on, but for a single run's step and loss."""
    if found.compiling or not found.training:
      names = ' and '.join(sorted({name_of(run) for run in found.compiling})[:2])
      return (
        f'compiling {names}'.rstrip() + f', {found.shapes - found.shapes_left} of {found.shapes} shapes done'
      )
    if len(found.training) > 1:
      return f'{len(found.training)} runs in training'
    [seen] = found.training
    loss = f', loss {seen.row["train/loss"]:.3f}' if 'train/loss' in seen.row else ''
    return f'{name_of(seen.run)} at step {seen.row.get("step", 0)}/{seen.run.num_steps}{loss}'

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()


def name_of(run: Run) -> str:
  """A run for a reader: its arm, width and depth."""
  return f'{run.resolved["arm"]} {run.model.width}x{run.model.depth}'


def watch(at_work: Callable[[float], bool], planned: list[Run], folder: str, workers: int = 1) -> None:
  """One bar over all runs while anybody is at work.

  at_work: waits so many seconds for a worker to end, at most; whether any is left.
  """
  bar, pause = Bar(planned, folder, workers), 0.0
  with contextlib.closing(bar):
    while True:
      working = at_work(pause)
      pause = bar.show(last=not working)
      if not working:
        return


@contextlib.contextmanager
def watched(planned: list[Run], folder: str) -> Iterator[None]:
  """The same bar over runs that this process trains, from a thread: it goes on while something compiles."""
  bar, over = Bar(planned, folder, 1), threading.Event()

  def look() -> None:
    while not over.wait(bar.show()):
      pass

  thread = threading.Thread(target=look, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    bar.show(last=True)
    bar.close()
