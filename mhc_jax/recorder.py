"""Where a run is, and what it writes about itself: rows, status.json, its progress line.

train -> **recorder** -> metrics.jsonl, status.json. A checkpoint carries the Position; the Recorder judges,
times and writes what the loop has computed, and computes nothing itself.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mhc_jax import cost
from mhc_jax import optimizer as optim
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.chips import chip_of
from mhc_jax.clusters import bytes_sent
from mhc_jax.dashboards import Dashboards
from mhc_jax.divergence import Divergence
from mhc_jax.kernels.choice import kernels_for
from mhc_jax.lease import Lease
from mhc_jax.log import Progress
from mhc_jax.memory import memory_in_use
from mhc_jax.metrics_log import MetricsLog
from mhc_jax.plan import Run
from mhc_jax.run_folder import crc32, write_status
from mhc_jax.storage import finite
from mhc_jax.train_step import TrainState
from mhc_jax.workdir import revision, versions


@dataclasses.dataclass
class Position:
  """How far a run has come: all that a checkpoint carries."""

  state: TrainState | None = None  # None until it is initialised or restored
  step: int = 0  # the last update whose metrics have been looked at
  seconds: float = 0.0  # of training, over all restarts
  data_seconds: float = 0.0  # of these, that updates waited for their batches
  joules: float | None = None  # of these seconds, where something counts them
  final: dict[str, float] = dataclasses.field(default_factory=dict)  # the newest losses
  divergence: dict[str, Any] = dataclasses.field(default_factory=dict)  # what divergence.py counts
  skipped: int = 0  # updates whose batch had nothing to predict
  rows_crc32: int | None = None  # of the rows so far, on process 0


class Recorder:
  """Writes one run's rows and status, on process 0, and says after each update whether it diverged."""

  def __init__(self, plan: Run, workdir: str, mesh: Mesh, before: dict[str, Any], held: Lease | None = None):
    """before: what status.json says. held: the workdir's lease, asked before anything is written there:
    LeaseLostError where another process has it."""
    self._plan, self._workdir, self._mesh, self.held = plan, workdir, mesh, held
    self._writes = jax.process_index() == 0  # all but checkpoints, of which every process writes its part
    self._revision = join_revisions(before.get('git_revision'), revision())
    self._chip = chip_of(mesh.devices.flat[0].device_kind)
    self._flops = cost.train_flops_per_token(plan.model, plan.resolved['data']['seq_len'], causal=True)
    self.energy: str | None = before.get('energy')  # what counts joules
    self.population = before.get('population') or 1  # the most runs, itself included, that it trained beside
    self._log: MetricsLog | None = None  # until it is opened
    self._boards: Dashboards | None = None

  def open(self, at: Position, resumed: bool, quiet: bool, boards: Dashboards) -> None:
    """Opens the files for a run that stands at `at`; rows of later steps are dropped."""
    c = self._plan.resolved
    warmup = optim.warmup_steps(self._plan.optimizer, self._plan.num_steps)
    self._divergence = Divergence(c['divergence']['patience'], warmup, at.divergence)
    at.divergence = self._divergence.saved
    if self._writes:
      last_step, every = at.step if resumed else None, c['log']['every_steps']
      self._log = MetricsLog(self._workdir, last_step, c['log']['tensorboard'], every, at.rows_crc32)
      self._boards = boards
      boards.begin(self._plan.run_id, self._workdir, c)
    self._progress = Progress(c['arm'], at.step, self._plan.num_steps, quiet or not self._writes)

  def close(self) -> None:
    """Closes the files, and leaves the progress line as it stands."""
    self._progress.close()
    if self._writes:
      upload = False
      try:
        self.confirm()
        upload = True
      finally:
        self._log.close(upload)

  def confirm(self) -> None:
    """Makes sure that the workdir is still this process's."""
    if self.held is not None:
      self.held.renew()

  def update(
    self,
    at: Position,
    step: int,
    metrics: dict[str, jax.Array] | None,
    measure: Callable[[int], dict[str, Any]] | None = None,
    seconds: float = 0.0,
    waited: float = 0.0,
    joules: float | None = None,
  ) -> bool:
    """Moves `at` to `step` and writes its row where one is due; True if the run has diverged.

    metrics: of the update, None at step 0. measure: evaluation and diagnostics by the state after `step`,
    called where the update itself is sound; a validation loss that is not finite is divergence too. seconds:
    of the device for this update, 0 where that is not known; of these it waited so many for its batch.
    joules: of the same, where they are counted.
    """
    per_step = self._plan.derived['tokens_per_step']
    row: dict[str, Any] = {'step': step, 'tokens': step * per_step}
    row['flops'] = step * per_step * self._plan.derived['flops_per_token']
    if messages := self._plan.derived.get('cluster_messages'):
      row['cluster/bytes'] = bytes_sent(messages, self._plan.cluster, step, self._plan.num_steps)
    at.step, diverged, measured = step, False, {}
    if metrics is not None:
      values = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
      if values.pop('targets') > 0:
        diverged = self._divergence.diverged(step, values)
        at.final['train/loss'] = values['loss']
      else:
        at.skipped += 1
      row |= {f'train/{name}': value for name, value in values.items()} | self._timing(at, seconds, waited)
      if joules is not None:
        at.joules = (at.joules or 0.0) + joules
      row |= {'device/joules': at.joules} if self.energy else {}
      self._progress.update(step, values['loss'], row.get('time/tokens_per_second'))
    if measure is not None and not diverged:
      measured = measure(step)
      losses = {name: value for name, value in measured.items() if name.startswith('validation/')}
      at.final |= losses
      diverged = not np.isfinite(list(losses.values())).all()
    if self._writes and (measured or diverged or 'log' in self._plan.due(step)):
      if self.held is not None:
        self.held.check()
      row |= measured | memory_in_use(self._mesh)
      self._log.write(row)
      if step > self._log.given:
        self._boards.row(self._plan.run_id, row)
    return diverged

  def _timing(self, at: Position, seconds: float, waited: float) -> dict[str, float | None]:
    """Seconds spent on updates so far and waiting for batches meanwhile, over all restarts, and speed of this
    update: tokens per second, the same per device, and MFU.

    MFU: what a causal model's own FLOPs are of the devices' peak in bfloat16, whatever the dtype; None for
    chips without a known one. Left out: compilation (the first update after each start, which has no speed),
    evaluation and checkpoints.
    """
    at.seconds += seconds
    at.data_seconds += waited
    row = {'time/seconds': at.seconds, 'time/data_seconds': at.data_seconds}
    if not seconds:
      return row
    speed = self._plan.derived['tokens_per_step'] / seconds
    each = speed / self._mesh.size
    peak = self._chip and self._chip.flops / self._chip.devices
    mfu = peak and each * self._flops / peak
    return row | {
      'time/tokens_per_second': speed,
      'time/tokens_per_second_per_device': each,
      'time/mfu': mfu,
    }

  def save(self, at: Position, state: TrainState, checkpoints: Checkpoints) -> None:
    """Rows first, then the state: a checkpoint never knows more than the metrics on disk."""
    if self.held is not None:
      self.held.renew(progress=True)
    if self._writes:
      self._log.sync()
      at.rows_crc32 = self._log.crc
    names = ('seconds', 'data_seconds', 'divergence', 'final', 'skipped', 'rows_crc32')
    extra = {name: getattr(at, name) for name in names}
    extra |= {} if at.joules is None else {'joules': at.joules}
    checkpoints.save(at.step, state, extra)
    self.status(at, 'running')

  def status(self, at: Position, state: str, error: str | None = None) -> dict[str, Any]:
    """Writes status.json and returns what it says."""
    self.confirm()
    if self._boards and state != 'running':
      self._boards.end(self._plan.run_id, state)
    devices = self._mesh.devices
    status = {
      'state': state,
      'step': at.step,
      'num_steps': self._plan.num_steps,
      'error': error,
      'diverged_at': at.step if state == 'diverged' else None,
      'continued_diverged': at.divergence.get('ignored', False),
      'skipped_updates': at.skipped,
      'git_revision': self._revision,
      'versions': versions(),
      'device_kind': devices.flat[0].device_kind,
      'device_count': devices.size,
      'kernels': kernels_for(self._plan.model.kernels, self._mesh),
      'population': self.population,
      'seconds': at.seconds,
      'energy': self.energy,
      'derived': self._plan.derived,
      'final': at.final if state == 'finished' else None,
      'config_crc32': crc32(finite(self._plan.resolved)),
      'rows_crc32': self._log.crc if self._log else None,
    }
    return write_status(self._workdir, status) if self._writes else status


def join_revisions(before: str | None, now: str | None) -> str | None:
  """'a then b': the revisions that worked on a run, in order. A mixture differs from each of them."""
  if before is None or now is None:
    return before or now
  return before if before.split(' then ')[-1] == now else f'{before} then {now}'
