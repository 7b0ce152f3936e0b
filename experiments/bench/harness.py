"""What the harness around the runs costs: planning, resuming, reporting and watching plans of many runs.

The plans are quick's configurations at many seeds. Their results are written, not trained: a finished run's
files with losses of a known law. Each command runs as its user has it, imports included.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from mhc_jax.log import say
from mhc_jax.plan import Run
from mhc_jax.run_folder import crc32, write_status
from mhc_jax.storage import finite, write_json
from mhc_jax.workdir import revision, versions

from ..planning import configs_of, plan
from ..progress import Bar

LOOKS = 20
_TOP = __package__.removesuffix('experiments.bench')  # 'mhc_jax.' where the project is installed


def bench_harness(args: argparse.Namespace) -> dict[str, Any]:
  """Wall seconds of each command for plans of about args.runs runs, and the bar's share of a core."""
  return {'unit': 'wall seconds, of the bar percent of a core', 'rows': [_measure(n) for n in args.runs]}


def _measure(wanted: int) -> dict[str, float]:
  distinct = len(configs_of('quick', (), 1))
  seeds = max(1, round(wanted / distinct))
  options = ['quick', '--seeds', f'{seeds}']
  with tempfile.TemporaryDirectory() as out:
    command = ['experiments.sweep', *options, '--out', out]
    row = {'runs': distinct * seeds, 'plan': _seconds(*command, '--dry-run')}
    _, planned = plan('quick', (), seeds)
    folder = os.path.join(out, 'quick')
    for run in planned:
      write_finished(run, os.path.join(folder, run.run_id))
    row['resume'] = _seconds(*command)
    row['report'] = _seconds('analysis.report', folder, '--resamples', '100')
    row['bar %'] = watching(planned, folder)
  say(', '.join(f'{name} {value:.3g}' for name, value in row.items()))
  return row


def _seconds(module: str, *arguments: str) -> float:
  began = time.monotonic()
  command = [sys.executable, '-m', f'{_TOP}{module}', *arguments]
  subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  return time.monotonic() - began


def write_finished(run: Run, workdir: str) -> None:
  """A finished run's files, with losses of a law in its FLOPs and noise by its id."""
  os.makedirs(workdir)
  rng, derived = np.random.default_rng(int(run.run_id, 16)), run.derived
  loss = (1.2 + 1.6 * (derived['flops'] / 1e10) ** -0.2) * np.exp(0.003 * rng.standard_normal())
  losses = {'validation/loss': loss, 'validation/bits_per_byte': loss / np.log(2)}
  rows = []
  for step in sorted({run.num_steps, *range(0, run.num_steps, run.resolved['log']['every_steps'])}):
    row = {'step': step, 'tokens': step * derived['tokens_per_step']}
    row['flops'] = row['tokens'] * derived['flops_per_token']
    row['validation/loss'] = loss + (5.5 - loss) * np.exp(-6 * step / run.num_steps)
    rows.append(row | ({'train/loss': row['validation/loss'], 'train/grad_norm': 1.0} if step else {}))
  with open(os.path.join(workdir, 'metrics.jsonl'), 'w', encoding='utf-8') as file:
    file.writelines(f'{json.dumps(finite(row))}\n' for row in rows)
  write_json(os.path.join(workdir, 'config.json'), run.resolved)
  status = {'state': 'finished', 'step': run.num_steps, 'num_steps': run.num_steps, 'error': None}
  status |= {'git_revision': revision(), 'versions': versions(), 'device_kind': 'cpu', 'device_count': 1}
  status |= {'seconds': derived['flops'] / 1e10, 'derived': derived}
  status |= {'final': losses | {'train/loss': loss}, 'config_crc32': crc32(finite(run.resolved))}
  write_status(workdir, status)


def watching(planned: list[Run], folder: str) -> float:
  """Percent of a core that the bar takes while every run of the folder may still change."""
  for run in planned:
    write_status(os.path.join(folder, run.run_id), {'state': 'running'})
  bar = Bar(planned, folder, 1)
  bar.show()  # the first one reads all
  began, until_next = time.thread_time(), 0.0
  for _ in range(LOOKS):
    until_next += bar.show()
  return 100 * (time.thread_time() - began) / until_next
