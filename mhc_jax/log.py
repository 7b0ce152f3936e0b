"""What a run writes about itself: metrics.jsonl, TensorBoard, status.json and its progress line.

Files are the only interface to analysis. metrics.jsonl has one row per logged step, strictly increasing;
non-finite numbers are written as null. The row of step 0 comes before any update: validation and diagnostics,
no train/. In a remote workdir (storage.py) it is as of the last checkpoint.
"""

import json
import os
import sys
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from mhc_jax import storage
from mhc_jax.storage import finite


def say(line: str) -> None:
  """One line for the user, on stderr."""
  print(line, file=sys.stderr, flush=True)


class MetricsLog:
  """Appends rows to metrics.jsonl and, if asked for, to TensorBoard, from a step on."""

  def __init__(self, workdir: str, last_step: int | None, tensorboard: bool):
    """Drops rows after last_step (None: all), which a killed process wrote after its checkpoint."""
    self._workdir, folder = workdir, storage.scratch(workdir)
    storage.download('metrics.jsonl', workdir)
    path = os.path.join(folder, 'metrics.jsonl')
    kept = [] if last_step is None else _rows_until(path, last_step)
    partial = f'{path}.partial'
    with open(partial, 'w', encoding='utf-8') as file:
      file.writelines(kept)
    os.replace(partial, path)
    self._file = open(path, 'a', encoding='utf-8')
    self._board = _TensorBoard(folder, last_step) if tensorboard else None

  def write(self, row: dict[str, Any]) -> None:
    """Appends one row; lists (one value per sublayer) go to TensorBoard as their maximum."""
    self._file.write(json.dumps(finite(row)) + '\n')
    self._file.flush()
    if self._board is not None:
      self._board.write({name: np.max(v) for name, v in row.items() if '/' in name}, row['step'])

  def sync(self) -> None:
    """Forces the rows to disk, or up to a remote workdir, before a checkpoint that counts on them."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._upload()

  def close(self) -> None:
    """Closes the files; those of a remote workdir are uploaded a last time."""
    self._file.close()
    if self._board is not None:
      self._board.close()
    self._upload()

  def _upload(self) -> None:
    storage.upload('metrics.jsonl', self._workdir)
    if self._board is not None:
      storage.upload(self._board.name, self._workdir)


class _TensorBoard:
  """An event file written in this thread: SummaryWriter hangs when its own thread meets a full disk."""

  def __init__(self, folder: str, last_step: int | None):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter

    os.makedirs(os.path.join(folder, 'tensorboard'), exist_ok=True)
    self._event = Event
    self.name = f'tensorboard/events.out.tfevents.{time.time_ns()}.{os.getpid()}'
    self._records = RecordWriter(os.path.join(folder, self.name))
    self._add(Event(wall_time=time.time(), file_version='brain.Event:2'))
    if last_step is not None:  # hides what an earlier process wrote after its checkpoint
      log = SessionLog(status=SessionLog.START)
      self._add(Event(wall_time=time.time(), step=last_step + 1, session_log=log))

  def _add(self, event: Any) -> None:
    self._records.write(event.SerializeToString())

  def write(self, scalars: dict[str, float], step: int) -> None:
    from tensorboardX.summary import scalar

    for name, value in scalars.items():
      self._add(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
    self._records.flush()

  def close(self) -> None:
    self._records.close()


def _rows_until(path: str, last_step: int) -> list[str]:
  if not os.path.exists(path):
    return []
  kept = []
  with open(path, encoding='utf-8') as file:
    for line in file:
      if not line.endswith('\n') or json.loads(line)['step'] > last_step:
        break  # a half-written line is always the last
      kept.append(line)
  return kept


class Progress:
  """A bar with loss, tokens/s and time left on a terminal; elsewhere a plain line every few seconds."""

  def __init__(self, name: str, start: int, total: int, quiet: bool):
    self._name, self._total, self._start = name, total, start
    self._began = self._printed = time.monotonic()
    self._plain = not sys.stderr.isatty() and not quiet
    hidden = quiet or self._plain
    self._bar = tqdm(desc=name, initial=start, total=total, unit='step', disable=hidden)

  def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
    """Shows that `step` updates are done."""
    speed = '' if tokens_per_second is None else f', {tokens_per_second:,.0f} tokens/s'
    if not self._bar.disable:
      self._bar.set_postfix_str(f'loss {loss:.4f}{speed}', refresh=False)
      self._bar.update(step - self._bar.n)
    now = time.monotonic()
    if self._plain and (now - self._printed > 10 or step == self._total):
      self._printed = now
      left = (now - self._began) / max(step - self._start, 1) * (self._total - step)
      print(
        f'{self._name}: step {step}/{self._total}, loss {loss:.4f}{speed}, {left:.0f} s left',
        file=sys.stderr,
        flush=True,
      )

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
