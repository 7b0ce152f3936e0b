"""Training: the loop around train_step, resuming, and the command for one run.

config -> data -> model -> train_step -> checkpoint -> metrics.jsonl: the only place that wires the parts.

  mhc train --config laptop --workdir runs/laptop
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mhc_jax import distributed, energy, estimate, print_config, profiling, runtime, settings, storage
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.command import end_with_message
from mhc_jax.config import base_config
from mhc_jax.config_file import override, parse
from mhc_jax.constraints.base import Constraint
from mhc_jax.dashboards import Dashboards, Sink
from mhc_jax.data import (
  Corpus,
  Windows,
  check_enough_tokens,
  corpus_of,
  tokenizer_of,
  train_batches,
  windows,
)
from mhc_jax.errors import BusyError, ConfigError, require
from mhc_jax.evaluate import validation_arrays, validation_bytes_per_token
from mhc_jax.lease import Lease
from mhc_jax.log import Progress, say, tolerant_streams
from mhc_jax.loop import Data, Member, Single, alone, is_full, loop
from mhc_jax.memory import check_memory
from mhc_jax.paths import expand
from mhc_jax.plan import Run, configuration_of, resolve, warnings_of
from mhc_jax.population import Population, alike, on_one_device
from mhc_jax.profiling import Trace
from mhc_jax.recorder import Position, Recorder
from mhc_jax.sharding import left_out, local_rows, make_mesh, put_batch
from mhc_jax.train_step import Batch, Programs, programs
from mhc_jax.workdir import ENDED, check_workdir, claim, read_config


def load_data(run: Run, corpus: Corpus) -> tuple[Windows, Windows]:
  """(training windows, validation windows); raises ConfigError where the corpus is too small."""
  data = run.resolved['data']
  tokenizer = tokenizer_of(data['tokenizer'])
  require(
    corpus.tokenizer.name == tokenizer.name,
    f'the corpus is in tokens of {corpus.tokenizer.name}, not {tokenizer.name}',
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
  profile: tuple[int, int] | None = None,
  sink: Sink | None = None,
) -> dict[str, Any]:
  """Trains one run in workdir, or goes on where it stopped; returns its status (status.json).

  constraint: a Constraint of the caller's own, in place of the one that the configuration names.
  continue_diverged: a run that was called diverged goes on, and only what is not finite ends it again.
  stops_at: the caller's distributed.stop_on_signal, where it covers several runs.
  held: the lease of workdir, where the caller has it.
  profile: the first and the last update that JAX's profiler traces, into workdir/profile.
  sink: gets every row of metrics.jsonl that no earlier process wrote, with the run_id in it, in a thread.

  Raises ConfigError for a mistake in the configuration, with nothing written; OSError on a full disk;
  LeaseLostError where another process has taken the workdir, into which nothing is written then.
  """
  workdir = expand(workdir)
  storage.to_path(workdir)  # these refuse mistakes before a corpus is prepared
  planned = resolve(config, '', constraint)
  mesh = make_mesh(planned.resolved['mesh'])
  settings.check_precision(config.model.dtype)
  check_memory(planned)
  corpus = corpus or corpus_of(config.data)
  plan = resolve(config, corpus.digest, constraint)
  train, validation = load_data(plan, corpus)
  check_workdir(workdir, plan)  # before anything is written
  distributed.require_same('configuration or corpus', plan.run_id)
  arrays = validation_arrays(plan.resolved, validation, mesh)
  data = Data(train, arrays, validation_bytes_per_token(plan.resolved, validation, corpus))
  stop = contextlib.nullcontext(stops_at) if stops_at else distributed.stop_on_signal()
  member = _claim(plan, workdir, mesh, continue_diverged, held)
  if member.status is None:
    if not quiet and jax.process_index() == 0:
      for line in warnings_of(plan):
        say(f'warning: {line}')
    with _failing([member]), stop as stops_at:
      _train([member], data, mesh, stops_at, quiet, profile=profile, sink=sink)
  if member.error:
    raise member.error
  return member.status


@tolerant_streams()
@settings.held()
def run_population(
  configs: list[ConfigDict],
  workdirs: list[str],
  corpus: Corpus,
  quiet: bool = False,
  *,
  continue_diverged: bool = False,
  stops_at: Callable[[int], bool] | None = None,
  held: list[Lease | None] | None = None,
) -> list[dict[str, Any]]:
  """Trains runs that are population.alike, each as `run` would, in one program; the status of each.

  A run that another process holds is left out, with the state 'busy'; so is one that has ended. Where one
  fails, now or later, its status says why, and the others go on. held: the leases of the workdirs that the
  caller has; a run whose lease is lost meanwhile has the state 'lost'. Raises ConfigError for runs that are
  not alike or take several devices; OSError on a full disk.
  """
  plans = [resolve(config, corpus.digest) for config in configs]
  require(len({alike(plan) for plan in plans}) == 1, 'the members of a population must have equal shapes')
  require(plans[0].loose is None, 'clusters are no member of a population: train them alone (mhc train)')
  require(on_one_device(plans[0]), 'a population takes one device: set mesh.data and the others to 1')
  settings.check_precision(configs[0].model.dtype)
  check_memory(plans[0])
  mesh = make_mesh({})
  members: list[Member] = []
  found: list[Member | dict[str, Any]] = []
  with _failing(members):
    for plan, workdir, its in zip(plans, workdirs, held or [None] * len(plans), strict=True):
      try:
        splits = load_data(plan, corpus)
        found.append(_claim(plan, expand(workdir), mesh, continue_diverged, its))
        members += [found[-1]] if found[-1].status is None else []
      except (ConfigError, OSError) as error:
        if is_full(error):
          raise
        state = 'busy' if isinstance(error, BusyError) else 'failed'
        found.append({'state': state, 'error': f'{type(error).__name__}: {error}'})
    if members:
      train, validation = splits
      arrays = validation_arrays(plans[0].resolved, validation, mesh)
      data = Data(train, arrays, validation_bytes_per_token(plans[0].resolved, validation, corpus))
      with contextlib.nullcontext(stops_at) if stops_at else distributed.stop_on_signal() as stops_at:
        _train(members, data, mesh, stops_at, quiet, side_by_side=True)
  return [item.status if isinstance(item, Member) else item for item in found]


def _claim(plan: Run, workdir: str, mesh: Mesh, continue_diverged: bool, held: Lease | None) -> Member:
  """The run as a member that holds the lock of its folder; or, where the run has ended, its status alone."""
  with contextlib.ExitStack() as lock:
    status, held = lock.enter_context(claim(workdir, plan, held))
    goes_on = continue_diverged and status['state'] == 'diverged'
    ended = status['state'] in ENDED and not goes_on
    record = Recorder(plan, workdir, mesh, status, held)
    at = Position(step=status.get('step', 0))
    kept = contextlib.ExitStack() if ended else lock.pop_all()
    return Member(plan, workdir, record, at, kept, goes_on, status=status if ended else None)


@contextlib.contextmanager
def _failing(members: list[Member]) -> Iterator[None]:
  """An error that the block raises ends all of its members that have not ended."""
  try:
    yield
  except BaseException as error:
    for member in members:
      if member.status is None:
        member.fail(error)
    if is_full(error) or not isinstance(error, Exception):
      raise


def _train(
  members: list[Member],
  data: Data,
  mesh: Mesh,
  stops_at: Callable[[int], bool],
  quiet: bool,
  side_by_side: bool = False,
  profile: tuple[int, int] | None = None,
  sink: Sink | None = None,
) -> None:
  """Members from their newest checkpoints, or from the start, to their ends.

  side_by_side: as a population, also on CPU; elsewhere a run on one device is one of a single member.
  """
  if not quiet and jax.process_index() == 0:
    first, device = members[0].plan, mesh.devices.flat[0].device_kind
    many = f' and {len(members) - 1} runs like it' if len(members) > 1 else ''
    say(f'{first.resolved["arm"]}{many}: {first.num_steps} updates on {mesh.size} x {device}, compiling')
    if line := left_out(first.resolved, mesh):
      say(line)
  boards = Dashboards(sink)
  try:
    _train_opened(members, data, mesh, stops_at, quiet, side_by_side, profile, boards)
  finally:
    boards.close()


def _train_opened(
  members: list[Member],
  data: Data,
  mesh: Mesh,
  stops_at: Callable[[int], bool],
  quiet: bool,
  side_by_side: bool,
  profile: tuple[int, int] | None,
  boards: Dashboards,
) -> None:
  first = members[0].plan
  compiled = programs(first.model, first.optimizer, mesh, first.loose)
  common = _common_step(members) if len(members) > 1 else None
  for member in members:
    member.record.population = max(member.record.population, len(members))
    with alone(member):
      _open(member, compiled, common, quiet or len(members) > 1, boards)
  opened = [member for member in members if member.status is None]
  if not opened:
    return
  accelerated = mesh.devices.flat[0].platform != 'cpu' and on_one_device(first)
  if side_by_side or (accelerated and first.loose is None):
    updates = Population(opened, compiled, data.train, mesh)
  else:
    (member,) = opened
    updates = Single(member, compiled, _inputs(member, data.train, mesh))
  progress = None
  if len(members) > 1 and not quiet:
    steps = sum(member.step for member in opened), sum(member.plan.num_steps for member in opened)
    progress = Progress(f'{len(opened)} runs', *steps, quiet)
  kind = opened[0].plan.resolved['log']['energy']
  counted = energy.meter(kind, list(mesh.local_devices), jax.process_count())
  for member in opened:
    member.record.energy = counted and counted.source
  trace = Trace(profile, opened[0].workdir, opened[0].plan.num_steps) if profile else None
  try:
    loop(opened, updates, compiled, data, stops_at, progress, trace, counted)
  finally:
    if trace:
      trace.close(opened[0].step)


def _common_step(members: list[Member]) -> int | None:
  """The newest step that all have saved as their last or the one before: a kill comes between checkpoints.

  From there they go on side by side, as they would have; without one, each goes on from its own.
  """
  found = []
  for member in members:
    with contextlib.suppress(ConfigError, OSError):  # whoever cannot be read says so when it is opened
      found.append(set(Checkpoints(os.path.join(member.workdir, 'checkpoints')).steps()[-2:]))
  return max(set.intersection(*found), default=None) if len(found) == len(members) else None


def _open(member: Member, compiled: Programs, at_most: int | None, quiet: bool, boards: Dashboards) -> None:
  """Restores a member's state, that of a step if one is given, or makes its first, and opens its files."""
  c, at = member.plan.resolved, member.at
  folder = os.path.join(member.workdir, 'checkpoints')
  keep = c['checkpoint']['keep']
  member.checkpoints = member.files.enter_context(Checkpoints(folder, keep, member.record.held))
  saved = member.checkpoints.restore_latest(compiled.abstract, at_most=at_most)
  require(
    saved is not None or c['start'] is None,
    f'{member.workdir} lacks the weights that start={c["start"]} names: `mhc import` makes such a folder',
  )
  at.step, at.state, extra = saved or (0, compiled.init(jax.random.key(c['seed'])), {})
  for name, value in extra.items():
    setattr(at, name, value)
  if member.goes_on:
    at.divergence |= {'ignored': True}
  member.step = at.step
  member.record.open(at, at.step > 0, quiet, boards)  # imported weights are a checkpoint of step 0
  member.files.callback(member.record.close)
  member.record.status(at, 'running')


def _inputs(member: Member, train: Windows, mesh: Mesh) -> Iterator[Batch]:
  """The batches after a member's step, on the mesh."""
  c = member.plan.resolved
  batches = train_batches(
    train,
    batch_size=c['data']['batch_size'],
    seed=c['seed'],
    repeat=c['data']['repeat'],
    num_steps=member.plan.num_steps,
    start_step=member.step,
    rows=local_rows(c['data']['batch_size'], mesh),
  )
  member.files.callback(batches.close)
  return (put_batch(batch, mesh) for batch in batches)


def _config(name: str | None, overrides: list[str], resolved: dict[str, Any] | None = None) -> ConfigDict:
  """The config of that name, or of the resolved run, or the defaults, with overrides."""
  if name is not None:
    return parse(name, overrides)
  config = base_config() if resolved is None else configuration_of(resolved)
  override(config, overrides)
  return config


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='mhc train',
    description='Train one model; the same command goes on where it stopped.',
    epilog='examples:\n'
    '  mhc train --config laptop --workdir runs/laptop\n'
    '  mhc train --config laptop:smoke --workdir runs/smoke \\\n'
    '    --config.model.connection.name=residual --config.optimizer.lr=2e-3\n'
    '  mhc train --workdir runs/laptop         # goes on with what the folder holds\n'
    'any field can be set by --config.section.field=value; mhc --print-config lists them, log.wandb among\n'
    'them, the project of Weights & Biases that rows go to; one axis of mesh can be -1, all devices left',
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--config', help='a file of configs/, with :argument if it takes one')
  parser.add_argument('--workdir', help='folder of the run: config, metrics, checkpoints')
  parser.add_argument(
    '--print-config',
    action='store_true',
    help='print every field, its value, default and meaning, and stop; without --config the defaults',
  )
  parser.add_argument(
    '--continue-diverged',
    action='store_true',
    help='go on with a run that was called diverged, from its last checkpoint; only NaN and inf end it then',
  )
  parser.add_argument(
    '--estimate',
    action='store_true',
    help='print parameters, FLOPs, memory by terms and predicted time, and stop; nothing is trained',
  )
  parser.add_argument(
    '--profile',
    metavar='FIRST:LAST',
    help="updates that JAX's profiler traces, like 10:15, into WORKDIR/profile",
  )
  runtime.add_flag(parser)
  distributed.add_flags(parser)
  return parser


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code (0 finished or diverged, 130 interrupted)."""
  args, overrides = _parser().parse_known_args(argv)
  if args.print_config:
    print(print_config.text(_config(args.config, overrides)))
    return 0
  goes_on = args.config is None and args.workdir is not None
  resolved = read_config(expand(args.workdir)) if goes_on else None
  require(
    args.config is not None or resolved is not None,
    'name a config: --config laptop (mhc train --help); without one goes on what --workdir holds already',
  )
  if args.estimate:
    print(estimate.text(resolve(_config(args.config, overrides, resolved), '')))
    return 0
  require(args.workdir is not None, 'name the folder of the run: --workdir runs/laptop')
  profile = profiling.updates_of(args.profile) if args.profile else None
  runtime.prepare(args)
  config = _config(args.config, overrides, resolved)
  cluster = distributed.find(args)
  if cluster and not distributed.is_supervised():
    command = [sys.executable, '-m', 'mhc_jax.train', *(sys.argv[1:] if argv is None else argv)]
    return distributed.supervise(cluster, command)
  distributed.initialize(cluster, args)
  status = run(config, args.workdir, continue_diverged=args.continue_diverged, profile=profile)
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
