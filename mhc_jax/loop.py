"""The loop around train_step: of one run, or of the members of a population, each a run of its own.

plan, population -> **loop** -> recorder, checkpoint. Updates are dispatched, up to where a state is wanted;
their metrics are looked at while the next ones compute. Every member has rows, an end and a failure of its
own.
"""

import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.checkpoint import Checkpoints
from mhc_jax.data import Windows
from mhc_jax.diagnostics import diagnose
from mhc_jax.energy import Laps, Meter
from mhc_jax.errors import FULL_DISK
from mhc_jax.evaluate import mean_loss
from mhc_jax.lease import LeaseLostError
from mhc_jax.log import Progress
from mhc_jax.memory import explained
from mhc_jax.plan import Run
from mhc_jax.population import Population, places_for
from mhc_jax.profiling import Trace
from mhc_jax.recorder import Position, Recorder
from mhc_jax.run_folder import ENDED
from mhc_jax.train_step import Batch, Programs, TrainState, hparams_of


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and is evaluated on."""

  train: Windows
  validation: list[Batch]  # on the devices
  bytes_per_token: float


@dataclasses.dataclass(eq=False)
class Member:
  """A run that trains in this process; of its folder it holds the lock until it ends."""

  plan: Run
  workdir: str
  record: Recorder
  at: Position
  lock: contextlib.ExitStack  # let go after the last word in status.json
  goes_on: bool = False  # though it was called diverged
  step: int = 0  # the last update that was dispatched; at.step: that was looked at
  diverged: bool = False  # and still to be ended
  checkpoints: Checkpoints | None = None
  files: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
  status: dict[str, Any] | None = None  # once it has ended here
  error: BaseException | None = None  # that ended it

  def end(self, state: str) -> None:
    """Lets everything go and says how it ended: 'finished', 'diverged' or 'interrupted'."""
    self.checkpoints.wait()
    if state in ENDED:
      self.record.confirm()
      self.checkpoints.remove_all_but_last()
    self.files.close()
    self.status = self.record.status(self.at, state)
    self.lock.close()

  def fail(self, error: BaseException) -> None:
    """Lets everything go because of an error. Raises OSError where not even that can be said."""
    error = explained(error, self.plan)
    # The same command goes on after Ctrl-C and a full disk; after anything else it needs a look.
    state = 'interrupted' if isinstance(error, KeyboardInterrupt) or is_full(error) else 'failed'
    self.error, self.status = error, {'state': state}
    with self.lock:
      with contextlib.suppress(BaseException), self.files:
        raise error  # so that what closes knows of it
      try:
        self.status = self.record.status(self.at, state, error=f'{type(error).__name__}: {error}')
      except LeaseLostError as lost:  # the run is another process's, and its folder stays as it is
        self.error, self.status = lost, {'state': 'lost', 'error': f'{type(lost).__name__}: {lost}'}


def is_full(error: BaseException) -> bool:
  """Whether it says that a disk is full."""
  return isinstance(error, OSError) and error.errno in FULL_DISK


@contextlib.contextmanager
def alone(member: Member) -> Iterator[None]:
  """What fails in the block is this member's failure, and others go on; a full disk is everybody's."""
  try:
    yield
  except Exception as error:
    if is_full(error):
      raise
    member.fail(error)


class Single:
  """The updates of one run, on any mesh, a dispatch each, its batches from the host."""

  most = 1
  waited = 0.0  # seconds for the batch of the last dispatch

  def __init__(self, member: Member, compiled: Programs, inputs: Iterator[Batch]):
    self._member, self._compiled, self._inputs = member, compiled, inputs
    plan = member.plan
    self._hparams = jax.tree.map(jnp.asarray, hparams_of(plan.optimizer, plan.num_steps, plan.loose))
    self._begun = False

  def keep(self, live: list[Member]) -> bool:
    """As Population.keep."""
    fresh, self._begun = not self._begun, True
    return fresh

  def advance(self, count: int) -> dict[str, jax.Array]:
    """Dispatches one update; its metrics."""
    at, began = self._member.at, time.monotonic()
    batch = next(self._inputs)
    self.waited = time.monotonic() - began
    at.state, metrics = self._compiled.step(at.state, batch, self._hparams)
    return metrics

  def took(self, seconds: float) -> None:
    """As Population.took."""

  def fetch(self, metrics: dict[str, jax.Array], count: int) -> list[list[dict[str, Any]]]:
    """As Population.fetch."""
    return [[jax.device_get(metrics)]]

  def state(self, member: Member) -> TrainState:
    """The run's."""
    return member.at.state

  def sums(self, validation: list[Batch]) -> Callable[[Member], tuple[list[tuple[Any, Any]], Any]]:
    """As Population.sums."""
    params = self._member.at.state.params
    found = [self._compiled.evaluate(params, batch) for batch in validation]
    sums, records = jax.device_get([sums for sums, _ in found]), found[0][1]
    return lambda member: (sums, records if 'gram_NMBT' in records[0] else None)


@dataclasses.dataclass(frozen=True)
class _Dispatch:
  """Updates whose metrics have not been looked at."""

  members: list[Member]
  before: list[int]  # each one's step before them
  count: int
  metrics: dict[str, jax.Array]
  fresh: bool  # it compiled: not counted as training time
  waited: float  # seconds for its batches


def loop(
  members: list[Member],
  updates: Single | Population,
  compiled: Programs,
  data: Data,
  stops_at: Callable[[int], bool],
  progress: Progress | None = None,
  trace: Trace | None = None,
  meter: Meter | None = None,
) -> None:
  """All updates of members whose files are open; each ends by itself: finished, diverged or interrupted.

  Updates are dispatched before the metrics of those before are looked at, but where the state after these is
  wanted: for evaluation, diagnostics and checkpoints. progress: of all members, in updates. trace: of some.
  meter: of the energy that they take together.
  """
  sent = None
  fresh = _begin(members, updates, compiled, data)
  clock = Laps(meter)
  while running := _running(members):
    live = _live(members)
    fresh |= updates.keep(live)  # nothing is under way where it is others than before
    count = 1 if fresh else min(updates.most, *(member.plan.until_due(member.step) for member in running))
    if trace:
      count = min(count, trace.begin(running[0].step, sent and sent.metrics) or count)
    before = [member.step for member in live]
    now_sent = _Dispatch(live, before, count, updates.advance(count), fresh, updates.waited)
    for member in live:
      member.step += count
    if trace:
      trace.end(live[0].step, now_sent.metrics)
    if fresh:
      jax.block_until_ready(now_sent.metrics)
      fresh = False
      clock.begin()
    if sent:
      _look(sent, updates, clock)
    sent, running = now_sent, _running(live)
    # Asked once: a signal may come at any moment.
    stop = bool(running) and stops_at(max(member.step for member in running))
    if stop or any(member.plan.due(member.step) - {'log'} for member in running):
      _look(sent, updates, clock, _measure(updates, compiled, data))
      _save_and_end(live, updates, stop)
      sent = None
      clock.begin()  # evaluation and saving are not training time
    if progress:
      done = [member.at for member in members]
      losses = [at.final['train/loss'] for at in done if 'train/loss' in at.final]
      progress.update(sum(at.step for at in done), statistics.fmean(losses or [math.nan]), None)
  for member in _live(members):
    with alone(member):
      member.end('diverged')


def _live(members: list[Member]) -> list[Member]:
  return [member for member in members if member.status is None]


def _running(members: list[Member]) -> list[Member]:
  return [member for member in _live(members) if not member.diverged]


def _begin(members: list[Member], updates: Single | Population, compiled: Programs, data: Data) -> bool:
  """Rows of step 0, and the end of whoever was at its end; True: the next dispatch compiles."""
  for member in members:
    if member.step >= member.plan.num_steps:
      with alone(member):
        member.end('finished')
  if live := _live(members):
    updates.keep(live)
    measure = _measure(updates, compiled, data)
    for member in live:
      if member.step == 0:
        with alone(member):
          member.record.update(member.at, 0, None, functools.partial(measure, member))
  return True


def _look(
  sent: _Dispatch,
  updates: Single | Population,
  clock: Laps,
  measure: Callable[[Member, int], dict[str, Any]] | None = None,
) -> None:
  """Waits for a dispatch, a lap of the clock, and writes its rows, the last by `measure`.

  A member's seconds and joules are its share, so that those of all runs add up to the device's.
  """
  rows = updates.fetch(sent.metrics, sent.count)
  seconds, joules = (0.0, None) if sent.fresh else clock.lap()
  seconds /= sent.count
  if joules is not None:
    joules /= sent.count * len(sent.members)
  waited = 0.0 if sent.fresh else sent.waited / sent.count / len(sent.members)
  if not sent.fresh:
    updates.took(seconds)
  for place, (member, before) in enumerate(zip(sent.members, sent.before, strict=True)):
    if member.status is not None or member.diverged:
      continue
    with alone(member):
      for k in range(sent.count):
        then = functools.partial(measure, member) if measure and k == sent.count - 1 else None
        share = seconds / len(sent.members)
        if member.record.update(member.at, before + k + 1, rows[k][place], then, share, waited, joules):
          member.diverged = True
          break


def _save_and_end(live: list[Member], updates: Single | Population, stop: bool) -> None:
  """What follows the rows of an update whose state was wanted by somebody.

  Where fewer places will do for those that are left, they are saved before anybody ends: the same places then
  hold the same members after a kill.
  """
  left = [member for member in _running(live) if not (stop or member.step == member.plan.num_steps)]
  fewer = bool(left) and places_for(len(left)) < places_for(len(live))
  for member in _running(live):
    with alone(member):
      if stop or fewer or 'checkpoint' in member.plan.due(member.step):
        member.record.save(member.at, updates.state(member), member.checkpoints)
  for member in left if fewer else ():
    with alone(member):
      member.checkpoints.wait()
  for member in _live(live):
    with alone(member):
      if member.diverged or member.step == member.plan.num_steps:
        member.end('diverged' if member.diverged else 'finished')
      elif stop:
        member.end('interrupted')


def _measure(
  updates: Single | Population, compiled: Programs, data: Data
) -> Callable[[Member, int], dict[str, Any]]:
  """What is due of validation losses, and of diagnostics on the first validation sequence, of members as they
  stand now: all are evaluated at once, where one asks for it.
  """
  sums = functools.cache(lambda: updates.sums(data.validation))

  def measure(member: Member, step: int) -> dict[str, Any]:
    row, due, records = {}, member.plan.due(step), None
    if 'evaluation' in due:
      found, records = sums()(member)
      row |= mean_loss(found, data.bytes_per_token)
    if 'diagnostics' in due:
      if records is None:
        sequence = {name: value[:1] for name, value in data.validation[0].items()}
        _, records = compiled.record(updates.state(member).params, sequence)
      measures = diagnose(jax.device_get(records), member.plan.model)
      row |= {f'diagnostics/{name}': np.asarray(value).tolist() for name, value in measures.items()}
    return row

  return measure
