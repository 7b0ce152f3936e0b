"""Training: the loop around train_step, resuming, and the command for one run.

config -> data -> model -> train_step -> checkpoint -> metrics.jsonl: the only place that wires the parts.

  mhc train --config laptop --workdir runs/laptop
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mhc_jax import distributed, settings, storage
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
  tokenizer_of,
  train_batches,
  windows,
)
from mhc_jax.diagnostics import with_spectra
from mhc_jax.errors import FULL_DISK, require
from mhc_jax.evaluate import validation_arrays, validation_loss
from mhc_jax.lease import Lease, LeaseLostError
from mhc_jax.log import say, tolerant_streams
from mhc_jax.memory import check_memory
from mhc_jax.paths import expand
from mhc_jax.plan import Run, resolve, warnings_of
from mhc_jax.recorder import Position, Recorder
from mhc_jax.sharding import local_rows, make_mesh, put_batch
from mhc_jax.train_step import Batch, Programs, programs
from mhc_jax.workdir import ENDED, check_workdir, claim


@dataclasses.dataclass(frozen=True)
class Data:
  """What a run trains and is evaluated on."""

  train: Windows
  validation: list[Batch]  # on the devices
  bytes_per_token: float


def load_data(run: Run, corpus: Corpus) -> tuple[Windows, Windows]:
  """(training windows, validation windows); raises ConfigError where the corpus is too small."""
  data = run.resolved['data']
  tokenizer = tokenizer_of(data['tokenizer'])
  require(
    corpus.tokenizer is tokenizer, f'the corpus is in tokens of {corpus.tokenizer.name}, not {tokenizer.name}'
  )
  how = tokenizer.bos, data['seq_len'], data['cross_documents']
  train = windows(corpus.train, *how)
  check_enough_tokens(train, run.derived['tokens'], data['repeat'])
  return train, windows(corpus.validation, *how)


@tolerant_streams()
@settings.held()
def run(
  config: ConfigDict,
  workdir: str,
  corpus: Corpus | None = None,
  quiet: bool = False,
  constraint: Constraint | None = None,
  *,
  continue_diverged: bool = False,
  stops_at: Callable[[int], bool] | None = None,
  held: Lease | None = None,
) -> dict[str, Any]:
  """Trains one run in workdir, or goes on where it stopped; returns its status (status.json).

  constraint: a Constraint of the caller's own, in place of the one that the configuration names.
  continue_diverged: a run that was called diverged goes on, and only what is not finite ends it again.
  stops_at: the caller's distributed.stop_on_signal, where it covers several runs.
  held: the lease of workdir, where the caller has it.

  Raises ConfigError for a mistake in the configuration, with nothing written; OSError on a full disk;
  LeaseLostError where another process has taken the workdir, into which nothing is written then.
  """
  workdir = expand(workdir)
  storage.to_path(workdir)  # these refuse mistakes before a corpus is prepared
  planned = resolve(config, '', constraint)
  mesh = make_mesh(config.mesh.to_dict())
  settings.check_precision(config.model.dtype)
  check_memory(planned)
  corpus = corpus or load_corpus(config.data.name, config.data.dir, tokenizer_of(config.data.tokenizer))
  plan = resolve(config, corpus.digest, constraint)
  train, validation = load_data(plan, corpus)
  check_workdir(workdir, plan)  # before anything is written
  distributed.require_same('configuration or corpus', plan.run_id)
  data = Data(train, validation_arrays(plan.resolved, validation, mesh), corpus.tokenizer.bytes_per_token)
  with claim(workdir, plan, held) as (status, held):
    goes_on = continue_diverged and status['state'] == 'diverged'
    if status['state'] in ENDED and not goes_on:
      return status
    if not quiet and jax.process_index() == 0:
      for line in warnings_of(plan):
        say(f'warning: {line}')
    at = Position(step=status.get('step', 0))
    record = Recorder(plan, workdir, mesh, status.get('git_revision'), held)
    stop = contextlib.nullcontext(stops_at) if stops_at else distributed.stop_on_signal()
    try:
      with stop as stops_at:
        state = _restore_and_train(plan, workdir, data, mesh, at, record, quiet, goes_on, stops_at)
    except LeaseLostError:
      raise
    except BaseException as error:
      # The same command goes on after Ctrl-C and a full disk; after anything else it needs a look.
      full = isinstance(error, OSError) and error.errno in FULL_DISK
      state = 'interrupted' if full or isinstance(error, KeyboardInterrupt) else 'failed'
      record.status(at, state, error=f'{type(error).__name__}: {error}')
      raise
    return record.status(at, state)


def _restore_and_train(
  plan: Run,
  workdir: str,
  data: Data,
  mesh: Mesh,
  at: Position,
  record: Recorder,
  quiet: bool,
  goes_on: bool,
  stops_at: Callable[[int], bool],
) -> str:
  """From the newest checkpoint, or from the start, to the end; moves `at`, returns how it ended."""
  c = plan.resolved
  if not quiet and jax.process_index() == 0:
    say(
      f'{c["arm"]}: {plan.num_steps} updates on {mesh.size} x {mesh.devices.flat[0].device_kind}, compiling'
    )
  with contextlib.ExitStack() as stack:
    compiled = programs(plan.model, plan.optimizer, mesh)
    folder = os.path.join(workdir, 'checkpoints')
    checkpoints = stack.enter_context(Checkpoints(folder, c['checkpoint']['keep']))
    saved = checkpoints.restore_latest(compiled.abstract)
    at.step, at.state, extra = saved or (0, compiled.init(jax.random.key(c['seed'])), {})
    for name, value in extra.items():
      setattr(at, name, value)
    if goes_on:
      at.divergence |= {'ignored': True}
    record.open(at, resumed=saved is not None, quiet=quiet)
    stack.callback(record.close)
    record.status(at, 'running')
    batches = train_batches(
      data.train,
      batch_size=c['data']['batch_size'],
      seed=c['seed'],
      repeat=c['data']['repeat'],
      num_steps=plan.num_steps,
      start_step=at.step,
      rows=local_rows(c['data']['batch_size'], mesh),
    )
    stack.callback(batches.close)
    inputs = (put_batch(batch, mesh) for batch in batches)
    measure = functools.partial(_measure, plan, compiled, data, at)
    state = loop(plan, compiled, inputs, measure, at, record, checkpoints, stops_at)
    checkpoints.wait()
    if state in ENDED:
      record.confirm()
      checkpoints.remove_all_but_last()
    return state


def loop(
  plan: Run,
  compiled: Programs,
  inputs: Iterable[Batch],
  measure: Callable[[int], dict[str, Any]],
  at: Position,
  record: Recorder,
  checkpoints: Checkpoints,
  stops_at: Callable[[int], bool],
) -> str:
  """The updates after at.step; returns how they ended: 'finished', 'diverged' or 'interrupted'.

  Update k is dispatched before the metrics of update k - 1 are looked at, but where the state after k - 1 is
  wanted: for evaluation, diagnostics and checkpoints.
  """
  hparams = {
    'lr': jnp.float32(plan.optimizer.lr),
    'weight_decay': jnp.float32(plan.optimizer.weight_decay),
    'num_steps': jnp.int32(plan.num_steps),
    'warmup': jnp.int32(optim.warmup_steps(plan.optimizer, plan.num_steps)),
  }
  start, waiting = at.step, None  # waiting: the update whose metrics have not been looked at
  if start == 0:
    record.update(at, 0, None, measure)
  for step, batch in enumerate(inputs, start + 1):
    at.state, metrics = compiled.step(at.state, batch, hparams)
    if step == start + 1:  # it compiled: not counted as training time
      jax.block_until_ready(metrics)
      record.start_clock(step)
    if waiting and record.update(at, *waiting):
      return 'diverged'
    waiting, due = (step, metrics), plan.due(step)
    stop = stops_at(step) and step < plan.num_steps  # once: a signal may come at any moment
    if stop or due - {'log'}:
      if record.update(at, *waiting, measure):
        return 'diverged'
      waiting = None
      if stop or 'checkpoint' in due:
        record.save(at, checkpoints)
      record.start_clock()  # evaluation and saving are not training time
    if stop:
      return 'interrupted'
  return 'finished'


def _measure(plan: Run, compiled: Programs, data: Data, at: Position, step: int) -> dict[str, Any]:
  """What is due after `step` of validation losses, and of diagnostics on the first validation sequence."""
  row, due = {}, plan.due(step)
  if 'evaluation' in due:
    row |= validation_loss(compiled.evaluate, at.state.params, data.validation, data.bytes_per_token)
  if 'diagnostics' in due:
    sequence = {name: value[:1] for name, value in data.validation[0].items()}
    measures = with_spectra(jax.device_get(compiled.diagnose(at.state.params, sequence)))
    row |= {f'diagnostics/{name}': np.asarray(value).tolist() for name, value in measures.items()}
  return row


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code (0 finished or diverged, 130 interrupted)."""
  parser = argparse.ArgumentParser(
    prog='mhc train',
    description='Train one model; the same command goes on where it stopped.',
    epilog='examples:\n'
    '  mhc train --config laptop --workdir runs/laptop\n'
    '  mhc train --config laptop:smoke --workdir runs/smoke \\\n'
    '    --config.model.connection.name=residual --config.optimizer.lr=2e-3\n'
    'any field of the config file can be set by --config.section.field=value',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', required=True, help='a file of configs/, with :argument if it takes one')
  parser.add_argument('--workdir', required=True, help='folder of the run: config, metrics, checkpoints')
  parser.add_argument(
    '--continue-diverged',
    action='store_true',
    help='go on with a run that was called diverged, from its last checkpoint; only NaN and inf end it then',
  )
  distributed.add_flags(parser)
  args, overrides = parser.parse_known_args(argv)
  config = parse(args.config, overrides)
  cluster = distributed.find(args)
  if cluster and not distributed.is_supervised():
    command = [sys.executable, '-m', 'mhc_jax.train', *(sys.argv[1:] if argv is None else argv)]
    return distributed.supervise(cluster, command)
  distributed.initialize(cluster, args)
  status = run(config, args.workdir, continue_diverged=args.continue_diverged)
  interrupted = status['state'] == 'interrupted'
  final = ', '.join(f'{name} {value:.4f}' for name, value in (status.get('final') or {}).items())
  if jax.process_index() > 0:
    pass
  elif interrupted:
    say(f'interrupted after step {status["step"]}; the same command goes on')
  else:
    print(f'{status["state"]} at step {status["step"]}/{status["num_steps"]}: {final or "no final loss"}')
  return 130 if interrupted else 0


if __name__ == '__main__':
  sys.exit(distributed.ended(lambda: end_with_message(main)))
