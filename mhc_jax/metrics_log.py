"""What a run writes about itself while it trains: metrics.jsonl and TensorBoard.

Files are the only interface to analysis. metrics.jsonl has one row per logged step, strictly increasing;
non-finite numbers are written as null. The row of step 0 comes before any update: validation and diagnostics,
no train/. In a remote workdir (storage.py) it is as of the last checkpoint.
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from mhc_jax import storage
from mhc_jax.log import say
from mhc_jax.run_folder import MOST_ROW_BYTES, last_row, rows_until
from mhc_jax.storage import finite


def scalars(row: dict[str, Any]) -> dict[str, float]:
  """What dashboards draw of a row: lists, one value per sublayer, as their maximum; nothing that is None."""
  return {name: float(np.max(v)) for name, v in row.items() if '/' in name and v is not None}


class MetricsLog:
  """Appends rows to metrics.jsonl and, if asked for, to TensorBoard, from a step on."""

  def __init__(
    self, workdir: str, last_step: int | None, tensorboard: bool, every: int = 1, crc: int | None = None
  ):
    """Drops rows after last_step (None: all), which a killed process wrote after its checkpoint.

    Says what of the rows before, due `every` so many updates, is damaged, gone or, by their crc, changed.
    """
    self._workdir, folder = workdir, storage.scratch(workdir)
    storage.download('metrics.jsonl', workdir)
    path = os.path.join(folder, 'metrics.jsonl')
    kept, lost = ([], None) if last_step is None else rows_until(path, last_step, every, crc)
    if lost:
      say(f'warning: {lost}')
    self.given = last_row(folder, MOST_ROW_BYTES).get('step', -1)  # rows up to here went to dashboards before
    partial = f'{path}.partial'
    with open(partial, 'w', encoding='utf-8') as file:
      file.writelines(kept)
    os.replace(partial, path)
    self._file = open(path, 'a', encoding='utf-8')
    self.crc = zlib.crc32(''.join(kept).encode())  # of all rows
    self._board = None
    if tensorboard:
      self._show(lambda: _TensorBoard(folder, last_step))

  def write(self, row: dict[str, Any]) -> None:
    """Appends one row, to TensorBoard what `scalars` has of it."""
    line = json.dumps(finite(row)) + '\n'
    self.crc = zlib.crc32(line.encode(), self.crc)
    self._file.write(line)
    self._file.flush()
    if self._board is not None:
      self._show(self._board.write, scalars(row), row['step'])

  def _show(self, do: Callable[..., '_TensorBoard'], *arguments: Any) -> None:
    """A step of TensorBoard's; where it fails, whatever the reason, the run goes on without."""
    try:
      self._board = do(*arguments)
    except Exception as error:
      self._board = None
      say(f'warning: TensorBoard gets no more ({type(error).__name__}: {error}); metrics.jsonl has every row')

  def sync(self) -> None:
    """Forces the rows to disk, or up to a remote workdir, before a checkpoint that counts on them."""
    self._file.flush()
    os.fsync(self._file.fileno())
    self._upload()

  def close(self, upload: bool = True) -> None:
    """Closes the files; those of a remote workdir are uploaded a last time, unless it is another's by now."""
    self._file.close()
    if self._board is not None:
      self._show(self._board.close)
    if upload:
      self._upload()

  def _upload(self) -> None:
    storage.upload('metrics.jsonl', self._workdir)
    if self._board is not None:
      self._show(self._board.upload, self._workdir)


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

  def write(self, scalars: dict[str, float], step: int) -> '_TensorBoard':
    from tensorboardX.summary import scalar

    for name, value in scalars.items():
      self._add(self._event(wall_time=time.time(), step=step, summary=scalar(name, value)))
    self._records.flush()
    return self

  def close(self) -> '_TensorBoard':
    self._records.close()
    return self

  def upload(self, workdir: str) -> '_TensorBoard':
    storage.upload(self.name, workdir)
    return self
