"""Training: the loop around train_step, resuming, and the command for one run.

config -> data -> model -> train_step -> checkpoint -> metrics.jsonl: the only place that wires the parts.

  python -m mhc_jax.train --config configs/laptop.py --workdir runs/laptop
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mhc_jax import distributed, storage
from mhc_jax import optimizer as optim
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.command import end_with_message
from mhc_jax.config_file import parse
from mhc_jax.constraints.base import Constraint
from mhc_jax.data import (
  Corpus,
  Windows,
  check_enough_tokens,
  load_corpus,
  train_batches,
  windows,
)
from mhc_jax.diagnostics import with_spectra
from mhc_jax.divergence import Divergence
from mhc_jax.errors import FULL_DISK, ConfigError
from mhc_jax.evaluate import validation_arrays, validation_loss
from mhc_jax.log import MetricsLog, Progress
from mhc_jax.plan import Run, resolve
from mhc_jax.sharding import make_mesh, put_batch
from mhc_jax.storage import write_json
from mhc_jax.train_step import Batch, programs
from mhc_jax.workdir import ENDED, check_workdir, claim, git_revision, read_status, versions


def load_data(run: Run, corpus: Corpus) -> tuple[Windows, Windows]:
  """(training windows, validation windows); raises ConfigError where the corpus is too small."""
  data = run.resolved['data']
  train = windows(corpus.train, data['seq_len'], data['cross_documents'])
  check_enough_tokens(train, run.derived['tokens'], data['repeat'])
  return train, windows(corpus.validation, data['seq_len'], data['cross_documents'])


def run(
  config: ConfigDict,
  workdir: str,
  corpus: Corpus | None = None,
  quiet: bool = False,
  constraint: Constraint | None = None,
) -> dict[str, Any]:
  """Trains one run in workdir, or goes on where it stopped; returns its status (status.json).

  constraint: a Constraint of the caller's own, in place of the one that the configuration names.

  Raises ConfigError for a mistake in the configuration, with nothing written; OSError on a full disk.
  """
  storage.to_path(workdir)  # these refuse mistakes before a corpus is prepared
  resolve(config, '', constraint)
  mesh = make_mesh(config.mesh.to_dict())
  if config.model.dtype == 'float64' and not jax.config.jax_enable_x64:
    raise ConfigError('model.dtype=float64 needs the environment variable JAX_ENABLE_X64=1')
  corpus = corpus or load_corpus(config.data.name, config.data.dir)
  plan = resolve(config, corpus.digest, constraint)
  train, validation = load_data(plan, corpus)
  check_workdir(workdir, plan)  # before anything is written
  distributed.require_same('configuration or corpus', plan.run_id)
  batches = validation_arrays(plan, validation, mesh)
  with claim(workdir, plan) as status:
    if status['state'] in ENDED:
      return status
    return Loop(plan, workdir, train, batches, corpus.bytes_per_token, mesh, quiet).run()


class Loop:
  """One run in progress: dispatches update k, then looks at the metrics of update k - 1."""

  def __init__(
    self,
    plan: Run,
    workdir: str,
    train: Windows,
    validation: list[Batch],
    bytes_per_token: float,
    mesh: Mesh,
    quiet: bool,
  ):
    self.plan, self.workdir, self.train, self.validation = plan, workdir, train, validation
    self.bytes_per_token, self.mesh, self.quiet = bytes_per_token, mesh, quiet
    self.c = plan.resolved
    self.writes = jax.process_index() == 0  # all but checkpoints, of which every process writes its part
    warmup = optim.warmup_steps(plan.optimizer, plan.num_steps)
    self.hparams = {
      'lr': jnp.float32(plan.optimizer.lr),
      'weight_decay': jnp.float32(plan.optimizer.weight_decay),
      'num_steps': jnp.int32(plan.num_steps),
      'warmup': jnp.int32(warmup),
    }
    self.warmup = warmup
    self.status = read_status(workdir)
    self.revision = _joined(self.status.get('git_revision'), git_revision())
    self.seconds, self.final = 0.0, {}
    self.step = self.status.get('step', 0)

  def run(self) -> dict[str, Any]:
    """Restores or initialises, trains to the end, and returns the status."""
    try:
      state = self._restore_and_train()
    except BaseException as error:
      # The same command goes on after Ctrl-C and a full disk; after anything else it needs a look.
      full = isinstance(error, OSError) and error.errno in FULL_DISK
      state = 'interrupted' if full or isinstance(error, KeyboardInterrupt) else 'failed'
      self._write_status(state, error=f'{type(error).__name__}: {error}')
      raise
    self._write_status(state)
    return self.status

  def _restore_and_train(self) -> str:
    with contextlib.ExitStack() as stack:
      stops_at = stack.enter_context(distributed.stop_on_signal())
      self.programs = programs(self.plan.model, self.plan.optimizer, self.mesh)
      checkpoints = Checkpoints(os.path.join(self.workdir, 'checkpoints'), self.c['checkpoint']['keep'])
      self.checkpoints = stack.enter_context(checkpoints)
      found = checkpoints.restore_latest(self.programs.abstract)
      self.step, self.state, extra = found or (
        0,
        self.programs.init(jax.random.key(self.c['seed'])),
        {},
      )
      self.seconds = extra.get('seconds', 0.0)
      self.final = extra.get('final', {})
      self.divergence = Divergence(self.c['divergence']['patience'], self.warmup, extra.get('divergence', {}))
      last_step = self.step if found else None
      if self.writes:
        self.log = MetricsLog(self.workdir, last_step, self.c['log']['tensorboard'])
        stack.callback(self.log.close)
      quiet = self.quiet or not self.writes
      self.progress = Progress(self.c['arm'], self.step, self.plan.num_steps, quiet)
      stack.callback(self.progress.close)
      self._write_status('running')
      state = self._train(stops_at)
      self.checkpoints.wait()
      if state in ENDED:
        self.checkpoints.remove_all_but_last()
      return state

  def _train(self, stops_at: Callable[[int], bool]) -> str:
    """The loop itself; returns how it ended. self.step: the last update whose metrics have been looked at."""
    num_steps, start = self.plan.num_steps, self.step
    self.clock, self.timed_step = time.monotonic(), start
    if start == 0:
      self._log(0, None)
    batches = train_batches(
      self.train,
      batch_size=self.c['data']['batch_size'],
      seed=self.c['seed'],
      repeat=self.c['data']['repeat'],
      num_steps=num_steps,
      start_step=start,
      rows=distributed.local_rows(self.c['data']['batch_size'], self.mesh),
    )
    waiting = None  # the update whose metrics have not been looked at
    with contextlib.closing(batches):
      for step, batch in enumerate(batches, start + 1):
        inputs = put_batch(batch, self.mesh)
        self.state, metrics = self.programs.step(self.state, inputs, self.hparams)
        if step == start + 1:  # it compiled: not counted as training time
          jax.block_until_ready(metrics)
          self.clock, self.timed_step = time.monotonic(), step
        if waiting and self._log(*waiting):
          return 'diverged'
        waiting = (step, metrics)
        stop = stops_at(step) and step < num_steps  # once: a signal may come at any moment
        save = self._due(step, 'checkpoint', 'every_steps') or step == num_steps or stop
        if save or self._due(step, 'evaluation', 'every_steps') or self._due_diagnostics(step):
          if self._log(*waiting):
            return 'diverged'
          waiting = None
        if save:
          self._save(step)
        if waiting is None:  # evaluation and saving are not training time
          self.clock = time.monotonic()
        if stop:
          return 'interrupted'
    return 'finished'

  def _due(self, step: int, section: str, name: str) -> bool:
    every = self.c[section][name]
    return every is not None and step % every == 0

  def _due_diagnostics(self, step: int) -> bool:
    every = self.c['log']['diagnostics_every_steps']
    return every is not None and (step % every == 0 or step == self.plan.num_steps)

  def _log(self, step: int, metrics: dict[str, jax.Array] | None) -> bool:
    """Writes the row of a step if one is due, with evaluation and diagnostics; True if diverged.

    Evaluation and diagnostics use the state after `step`, so they must be called before the next update.
    """
    last = step == self.plan.num_steps
    self.step = step
    row: dict[str, Any] = {
      'step': step,
      'tokens': step * self.plan.derived['tokens_per_step'],
      'flops': step * self.plan.derived['tokens_per_step'] * self.plan.derived['flops_per_token'],
    }
    diverged = False
    if metrics is not None:
      values = {name: np.asarray(value).tolist() for name, value in jax.device_get(metrics).items()}
      diverged = self.divergence.diverged(step, values)
      row |= {f'train/{name}': value for name, value in values.items()}
      self.final['train/loss'] = values['loss']
      row |= self._timing(step)
      self.progress.update(step, values['loss'], row.get('time/tokens_per_second'))
    found = {} if diverged else self._validation(step) | self._diagnostics(step)
    diverged = diverged or not math.isfinite(found.get('validation/loss', 0.0))
    if self.writes and (found or diverged or last or self._due(step, 'log', 'every_steps')):
      self.log.write(row | found)
    return diverged

  def _validation(self, step: int) -> dict[str, float]:
    if step != self.plan.num_steps and not self._due(step, 'evaluation', 'every_steps'):
      return {}
    losses = validation_loss(self.programs.evaluate, self.state.params, self.validation, self.bytes_per_token)
    self.final |= losses
    return losses

  def _diagnostics(self, step: int) -> dict[str, list[float]]:
    """On the first validation sequence, the same for all runs."""
    if not self._due_diagnostics(step):
      return {}
    sequence = {name: value[:1] for name, value in self.validation[0].items()}
    found = with_spectra(jax.device_get(self.programs.diagnose(self.state.params, sequence)))
    return {f'diagnostics/{name}': np.asarray(value).tolist() for name, value in found.items()}

  def _timing(self, step: int) -> dict[str, float]:
    """Seconds spent on updates so far, over all restarts, and tokens per second since the last look.

    Left out: compilation (the first update after each start, which has no speed), evaluation and checkpoints.
    """
    now = time.monotonic()
    passed, self.clock = now - self.clock, now
    self.seconds += passed
    tokens = (step - self.timed_step) * self.plan.derived['tokens_per_step']
    self.timed_step = step
    speed = {'time/tokens_per_second': tokens / max(passed, 1e-9)} if tokens else {}
    return {'time/seconds': self.seconds} | speed

  def _save(self, step: int) -> None:
    """Rows first, then the state: a checkpoint never knows more than the metrics on disk."""
    if self.writes:
      self.log.sync()
    extra = {'seconds': self.seconds, 'divergence': self.divergence.saved, 'final': self.final}
    self.checkpoints.save(step, self.state, extra)
    self._write_status('running')

  def _write_status(self, state: str, error: str | None = None) -> None:
    devices = self.mesh.devices
    self.status = {
      'state': state,
      'step': self.step,
      'num_steps': self.plan.num_steps,
      'error': error,
      'diverged_at': self.step if state == 'diverged' else None,
      'git_revision': self.revision,
      'versions': versions(),
      'device_kind': devices.flat[0].device_kind,
      'device_count': devices.size,
      'seconds': self.seconds,
      'derived': self.plan.derived,
      'final': self.final if state == 'finished' else None,
    }
    if self.writes:
      write_json(os.path.join(self.workdir, 'status.json'), self.status)


def _joined(before: str | None, now: str | None) -> str | None:
  """The revisions that worked on a run, in order: a mixture differs from each of them."""
  if before is None or now is None or before.split(' then ')[-1] == now:
    return before if now is None else (now if before is None else before)
  return f'{before} then {now}'


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code (0 finished or diverged, 130 interrupted)."""
  parser = argparse.ArgumentParser(
    prog='python -m mhc_jax.train',
    description='Train one model; the same command goes on where it stopped.',
    epilog='examples:\n'
    '  python -m mhc_jax.train --config configs/laptop.py --workdir runs/laptop\n'
    '  python -m mhc_jax.train --config configs/laptop.py:smoke --workdir runs/smoke \\\n'
    '    --config.model.connection.name=residual --config.optimizer.lr=2e-3\n'
    'any field of the config file can be set by --config.section.field=value',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True, help='a file of configs/, with :argument if it takes one')
  parser.add_argument('--workdir', required=True, help='folder of the run: config, metrics, checkpoints')
  distributed.add_flags(parser)
  args, overrides = parser.parse_known_args(argv)
  config = parse(args.config, overrides)
  cluster = distributed.find(args)
  if cluster and not distributed.is_supervised():
    command = [sys.executable, '-m', 'mhc_jax.train', *(sys.argv[1:] if argv is None else argv)]
    return distributed.supervise(cluster, command)
  distributed.initialize(cluster, args.heartbeat, args.local_devices)
  status = run(config, args.workdir)
  interrupted = status['state'] == 'interrupted'
  final = ', '.join(f'{name} {value:.4f}' for name, value in (status['final'] or {}).items())
  if jax.process_index() > 0:
    pass
  elif interrupted:
    print(f'interrupted after step {status["step"]}; the same command goes on', file=sys.stderr)
  else:
    print(f'{status["state"]} at step {status["step"]}/{status["num_steps"]}: {final or "no final loss"}')
  return 130 if interrupted else 0


if __name__ == '__main__':
  sys.exit(distributed.ended(lambda: end_with_message(main)))
