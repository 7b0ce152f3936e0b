"""Where rows go besides metrics.jsonl and TensorBoard: Weights & Biases, and a callable of the caller's.

recorder -> **dashboards**. Neither can touch a run: rows wait in a queue for a thread, and W&B is in a
process of its own (wandb_process.py). What raises, hangs or falls behind is said once, and gets no more.
"""

import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from mhc_jax import storage, wandb_process
from mhc_jax.log import say
from mhc_jax.metrics_log import scalars
from mhc_jax.storage import finite

_MOST_WAITING = 10_000  # rows
_LAST_SECONDS = 10.0  # that a run which has ended waits for its rows to be taken
_UPLOAD_SECONDS = 60.0  # and for W&B to send them

Sink = Callable[[dict[str, Any]], None]


class Feed:
  """Items on their way to a function, in order, in a thread that nobody waits for."""

  def __init__(self, name: str, give: Sink):
    self._name, self._give = name, give
    self._items: queue.Queue[dict[str, Any] | None] = queue.Queue(_MOST_WAITING)
    self.over = False  # it gets no more
    self._thread = threading.Thread(target=self._work, name=name, daemon=True)
    self._thread.start()

  def put(self, item: dict[str, Any]) -> None:
    """Never waits and never raises."""
    if not self.over:
      try:
        self._items.put_nowait(item)
      except queue.Full:
        self.give_up(f'it is {_MOST_WAITING} rows behind')

  def _work(self) -> None:
    while (item := self._items.get()) is not None and not self.over:
      try:
        self._give(item)
      except BaseException as error:  # SystemExit too: whatever somebody's function may raise
        self.give_up(f'{type(error).__name__}: {error}')

  def close(self) -> bool:
    """Waits for what is left, a while; whether all of it was taken."""
    left = self._items.qsize()
    with contextlib.suppress(queue.Full):
      self._items.put_nowait(None)
    if not self.over:
      self._thread.join(_LAST_SECONDS)
      if self._thread.is_alive():
        self.give_up(f'it takes none, {left} were left at the end')
    return not self.over

  def give_up(self, why: str) -> None:
    """Says so, once."""
    if not self.over:
      self.over = True
      say(f'warning: {self._name} gets no more rows ({" ".join(why.split())}); metrics.jsonl has every row')


class Dashboards:
  """Those of the runs that a process trains at a time, one or the members of a population."""

  def __init__(self, sink: Sink | None = None):
    self._sink = Feed('the sink', sink) if sink else None
    self._wandb: _Wandb | None = None
    self._known: set[str] = set()  # runs that W&B has

  def begin(self, run_id: str, workdir: str, resolved: dict[str, Any]) -> None:
    """Announces a run; with W&B where log.wandb names a project."""
    project = resolved['log']['wandb']
    if project is None:
      return
    self._wandb = self._wandb or _Wandb()
    self._known.add(run_id)
    names = {'project': project, 'name': f'{resolved["arm"]} {run_id}', 'group': resolved['arm']}
    about = {'folder': storage.scratch(workdir), 'config': finite(resolved)}
    self._wandb.put({'begin': run_id, **names, **about})

  def row(self, run_id: str, row: dict[str, Any]) -> None:
    """A row of metrics.jsonl, which the sink gets with its run's id."""
    if self._sink:
      self._sink.put({'run_id': run_id, **finite(row)})
    if run_id in self._known:
      values = {**scalars(row), **{name: row[name] for name in ('tokens', 'flops')}}
      self._wandb.put({'row': run_id, 'step': row['step'], 'values': values})

  def end(self, run_id: str, state: str) -> None:
    """Says how a run has ended."""
    if run_id in self._known:
      self._wandb.put({'end': run_id, 'state': state})

  def close(self) -> None:
    """Gives what is left; waits a while at the most."""
    if self._sink:
      self._sink.close()
    if self._wandb:
      self._wandb.close()


class _Wandb:
  """The process that has W&B, and what it is told, a line of JSON each."""

  def __init__(self):
    self._process: subprocess.Popen | None = None
    self._feed = Feed('W&B', self._tell)
    found = importlib.util.find_spec('wandb')
    if found is None or found.origin is None:  # a folder wandb/, which W&B itself makes, is no package
      self._feed.give_up("it is not installed: pip install 'mhc_jax[wandb]'")

  def put(self, message: dict[str, Any]) -> None:
    self._feed.put(message)

  def _tell(self, message: dict[str, Any]) -> None:
    if self._process is None:
      # Of its own session: a Ctrl-C is this process's, which then has last rows for it.
      command = [sys.executable, '-P', wandb_process.__file__]
      pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'stderr': subprocess.DEVNULL}
      self._process = subprocess.Popen(command, **pipes, text=True, start_new_session=True)
    try:
      print(json.dumps(message), file=self._process.stdin, flush=True)
    except OSError:  # it has ended
      self._feed.give_up(self._process.stdout.read() or 'its process has ended')

  def close(self) -> None:
    taken, process = self._feed.close(), self._process
    if process is None:
      return
    with process:
      if taken:
        with contextlib.suppress(OSError):
          process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
          if process.wait(_UPLOAD_SECONDS):
            self._feed.give_up(process.stdout.read() or 'its process has ended')
          return
        self._feed.give_up('it has not sent all; `wandb sync` sends what its folder holds')
      # Or its thread is writing to a process that does not read. W&B has one more in its session.
      os.killpg(process.pid, signal.SIGKILL)
