"""`mhc bench step`: seconds of the train_step of every arm over residual's, and the share of diagnostics.

`--against COMMIT` takes them over their own of that commit instead.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import jax
import numpy as np

from mhc_jax.errors import ConfigError

from . import arm_steps
from .arm_steps import ARMS, STEPS, arm_functions
from .timing import interleaved, summary

NAMES = ('width', 'depth', 'batch', 'seq_len', 'streams', 'dtype', 'diagnostics_every', 'repeats', 'calls')


def bench_step(args: argparse.Namespace) -> dict[str, object]:
  """Seconds of the train_step of every arm, its ratio to residual's, and the share of diagnostics."""
  settings = {name: getattr(args, name) for name in NAMES}
  if args.against:
    return {'settings': settings, **bench_against(args)}
  functions = {(arm, what): f for arm in ARMS for what, f in arm_functions(arm, args).items()}
  seconds = {key: np.asarray(v) for key, v in interleaved(functions, args.repeats, args.calls).items()}
  base, every = seconds['residual', 'step'], args.diagnostics_every
  arms = {
    arm: {
      'seconds': summary(seconds[arm, 'step']),
      'ratio_to_residual': summary(seconds[arm, 'step'] / base),
      'diagnostics_percent': summary(100 * seconds[arm, 'diagnostics'] / (every * seconds[arm, 'step'])),
    }
    for arm in ARMS
  }
  return {'settings': settings, 'device': jax.devices()[0].device_kind, 'arms': arms}


def bench_against(args: argparse.Namespace) -> dict[str, object]:
  """Per update of each arm, now over then: seconds, CPU-seconds, and the losses of 100 updates.

  A process of each side, in rounds of `calls` updates that alternate, after those 100. Raises ConfigError for
  a commit that is not here.
  """
  with contextlib.ExitStack() as stack:
    then = stack.enter_context(worktree(args.against))
    sides = {
      'then': stack.enter_context(process(then, args)),
      'now': stack.enter_context(process(os.getcwd(), args)),
    }
    losses = {(arm, side): ask(sides[side], arm, STEPS)['losses'] for arm in ARMS for side in sides}
    rounds = [
      {(arm, side): ask(sides[side], arm, args.calls) for arm in ARMS for side in sides}
      for _ in range(args.repeats)
    ]
  arms = {}
  for arm in ARMS:
    arms[arm] = {
      'largest_difference_of_losses': float(
        np.max(np.abs(np.subtract(losses[arm, 'now'], losses[arm, 'then'])))
      )
    }
    for what in ('seconds', 'cpu_seconds'):
      per_update = {
        side: np.array([answers[arm, side][what] for answers in rounds]) / args.calls for side in sides
      }
      arms[arm] |= {f'{what}_{side}': summary(values) for side, values in per_update.items()}
      arms[arm][f'{what}_now_over_then'] = summary(per_update['now'] / per_update['then'])
  return {'against': args.against, 'arms': arms}


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[str]:
  """A folder with the files of that commit, removed at the end."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'then')
    made = subprocess.run(
      ['git', 'worktree', 'add', '--detach', path, commit], capture_output=True, text=True
    )
    if made.returncode:
      raise ConfigError(f'--against {commit}: {made.stderr.strip().splitlines()[-1]}')
    try:
      yield path
    finally:
      subprocess.run(['git', 'worktree', 'remove', '--force', path], check=True)


@contextlib.contextmanager
def process(folder: str, args: argparse.Namespace) -> Iterator[subprocess.Popen]:
  """A process that answers ask() with the package of that folder."""
  settings = {
    name: getattr(args, name) for name in ('streams', 'width', 'depth', 'dtype', 'batch', 'seq_len')
  }
  command = [sys.executable, '-P', arm_steps.__file__, json.dumps(settings)]
  environment = os.environ | {'PYTHONPATH': folder}
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
  with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as child:
    try:
      yield child
    finally:
      child.stdin.close()


def ask(child: subprocess.Popen, arm: str, calls: int) -> dict[str, object]:
  """So many updates of an arm in a process; what arm_steps.answers says of them."""
  child.stdin.write(json.dumps({'arm': arm, 'calls': calls}) + '\n')
  child.stdin.flush()
  line = child.stdout.readline()
  if not line:
    raise ConfigError(f'the train_step of {arm} failed in a process of its own: see its message above')
  return json.loads(line)
