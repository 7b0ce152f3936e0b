"""Read a sweep's folder: every planned run, finished or not, as one table; results.csv.

Where: runs/<sweep>/ -> Sweep -> study.py. Reads plan.json, config.json, status.json, metrics.jsonl;
nothing is inferred from names. A run that is missing or broken is a row, never an error.
"""

import dataclasses
import json
import math
from pathlib import Path

import pandas as pd

from mhc_jax.errors import ConfigError

LOSS = 'validation/loss'


@dataclasses.dataclass(frozen=True)
class Run:
  """One planned run with what it left behind; rows are the lines of metrics.jsonl."""

  run_id: str
  arm: str
  state: str  # missing, running, interrupted, finished, diverged, failed
  config: dict | None
  status: dict
  rows: list[dict]
  trouble: str | None  # what could not be read


@dataclasses.dataclass(frozen=True)
class Sweep:
  """All runs of a plan, the table of results (one row per planned run), and warnings."""

  name: str
  folder: Path
  runs: dict[str, Run]
  table: pd.DataFrame
  warnings: list[str]


def _json(path: Path) -> tuple[dict | None, str | None]:
  """(content, None), or (None, what is wrong)."""
  if not path.is_file():
    return None, f'{path.name} is missing'
  try:
    value = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError):
    return None, f'{path.name} is not JSON'
  return (value, None) if isinstance(value, dict) else (None, f'{path.name} is not an object')


def _rows(path: Path) -> tuple[list[dict], str | None]:
  """Rows of metrics.jsonl up to the first broken line (a killed run may leave half a line)."""
  rows = []
  if path.is_file():
    for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        return rows, f'metrics.jsonl breaks off at line {number}'
  return rows, None


def read_run(folder: Path, run_id: str, arm: str) -> Run:
  """One run's files; a folder without config.json counts as missing."""
  path = folder / run_id
  config, config_trouble = _json(path / 'config.json')
  if config is None:
    absent = not (path / 'config.json').exists()
    trouble = None if absent else config_trouble
    return Run(run_id, arm, 'missing' if absent else 'failed', None, {}, [], trouble)
  status, trouble = _json(path / 'status.json')
  rows, rows_trouble = _rows(path / 'metrics.jsonl')
  if status is None:
    return Run(run_id, arm, 'failed', config, {}, rows, trouble)
  state = status.get('state') or 'failed'
  return Run(run_id, config.get('arm') or arm, state, config, status, rows, rows_trouble)


def read_sweep(folder: Path) -> Sweep:
  """The whole sweep; raises ConfigError when there is no plan to read."""
  if not folder.is_dir():
    raise ConfigError(f'{folder}: no such folder; give the folder of a sweep, like runs/quick')
  plan, trouble = _json(folder / 'plan.json')
  if plan is None or not isinstance(plan.get('runs'), list):
    raise ConfigError(
      f'{folder}: {trouble or "plan.json lists no runs"}; a sweep writes it '
      '(python -m experiments.sweep NAME)'
    )
  if not all(isinstance(item, dict) and {'run_id', 'arm'} <= set(item) for item in plan['runs']):
    raise ConfigError(f'{folder}: plan.json is broken: a run without run_id or arm')
  planned = {item['run_id']: item['arm'] for item in plan['runs']}
  if not planned:
    raise ConfigError(f'{folder}: plan.json lists no runs')
  runs = {run_id: read_run(folder, run_id, arm) for run_id, arm in planned.items()}
  table = pd.DataFrame([row_of(run) for run in runs.values()])
  warnings = mixtures(runs)
  warnings += [f'run {r.run_id} ({r.arm}): {r.trouble}' for r in runs.values() if r.trouble]
  extra = sorted(p.parent.name for p in folder.glob('*/config.json') if p.parent.name not in planned)
  if extra:
    warnings.append(f'{len(extra)} run folders are not in plan.json and are left out: {_few(extra)}')
  return Sweep(plan.get('sweep') or folder.name, folder, runs, table, warnings)


def _few(names: list[str], most: int = 6) -> str:
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def _at(tree: dict | None, *path: str) -> object:
  """A nested value, or None where the tree ends early (files of an unfinished run may)."""
  for key in path:
    if not isinstance(tree, dict):
      return None
    tree = tree.get(key)
  return tree


def _finite(value: object) -> float:
  return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def row_of(run: Run) -> dict[str, object]:
  """One line of results.csv: identity, sizes, costs, losses, outcome."""
  model, derived = _at(run.config, 'model'), _at(run.status, 'derived')
  row: dict[str, object] = {'run_id': run.run_id, 'arm': run.arm, 'state': run.state}
  for name in ('width', 'depth', 'heads', 'kv_heads', 'ffn_width', 'dtype'):
    row[name] = _at(model, name)
  row |= _connection(_at(model, 'connection'))
  fixed_rank = _at(run.config, 'optimizer', 'manifold') == 'fixed_rank'
  row |= {
    'weights_rank': _at(model, 'weights', 'rank'),
    'projected_rank': _at(run.config, 'optimizer', 'manifold_value') if fixed_rank else None,
    'seed': _at(run.config, 'seed'),
    'lr': _at(run.config, 'optimizer', 'lr'),
    'schedule': _at(run.config, 'optimizer', 'schedule'),
    'batch_size': _at(run.config, 'data', 'batch_size'),
    'seq_len': _at(run.config, 'data', 'seq_len'),
    'data': _at(run.config, 'data', 'name'),
    'data_digest': _at(derived, 'data_digest') or _at(run.config, 'data', 'digest'),
    'duration': json.dumps(_at(run.config, 'duration'), sort_keys=True),
    'tokens': _finite(_at(derived, 'tokens')),
    'flops': _finite(_at(derived, 'flops')),
    'flops_per_token': _finite(_at(derived, 'flops_per_token')),
    'steps_done': _at(run.status, 'step'),
    'num_steps': _at(run.status, 'num_steps'),
    'validation_loss': _finite(_at(run.status, 'final', 'validation/loss')),
    'validation_bits_per_byte': _finite(_at(run.status, 'final', 'validation/bits_per_byte')),
    'train_loss': _finite(_at(run.status, 'final', 'train/loss')),
    'initial_loss': next((_finite(r.get(LOSS)) for r in run.rows if r.get('step') == 0), math.nan),
    'diverged_at': _at(run.status, 'diverged_at'),
    'error': _at(run.status, 'error') or run.trouble,
    'seconds': _finite(_at(run.status, 'seconds')),
    'tokens_per_second': median([row.get('time/tokens_per_second') for row in run.rows]),
    'device_kind': _at(run.status, 'device_kind'),
    'device_count': _at(run.status, 'device_count'),
    'git_revision': _at(run.status, 'git_revision'),
  }
  params = _at(derived, 'params') or {}
  row |= {f'params_{name}': count for name, count in params.items()}
  for name in ('total', 'matmul', 'non_embedding'):
    row.setdefault(f'params_{name}', math.nan)
  return row


def _connection(given: object) -> dict[str, object]:
  """What names a connection, and `variant`: all of it that a sweep over streams or ranks leaves alone."""
  row = {f'connection_{k}': _at(given, k) for k in ('name', 'preset', 'constraint', 'streams', 'rank')}
  row |= {f'connection_{k}': _at(given, k, 'kind') for k in ('read_gate', 'write_gate')}
  same = {k: v for k, v in row.items() if k not in ('connection_streams', 'connection_rank')}
  same |= {k: _at(given, k) for k in ('constraint_params', 'dynamic', 'activation', 'generator', 'scope')}
  return row | {'variant': json.dumps(same, sort_keys=True)}


def median(values: list) -> float:
  """Median of the finite numbers among values, NaN without any."""
  kept = sorted(v for v in map(_finite, values) if not math.isnan(v))
  if not kept:
    return math.nan
  return 0.5 * (kept[(len(kept) - 1) // 2] + kept[len(kept) // 2])


def mixtures(runs: dict[str, Run]) -> list[str]:
  """Warnings where runs that started differ in code, package versions, corpus or hardware."""
  seen: dict[str, dict[str, list[str]]] = {}
  for run in runs.values():
    if run.config is None:
      continue
    facts = {
      'git revision': _at(run.status, 'git_revision'),
      'data digest': _at(run.status, 'derived', 'data_digest') or _at(run.config, 'data', 'digest'),
      'device': _at(run.status, 'device_kind'),
    }
    versions = _at(run.status, 'versions') or {}
    facts |= {f'version of {package}': version for package, version in versions.items()}
    for fact, value in facts.items():
      if value is not None:
        seen.setdefault(fact, {}).setdefault(str(value), []).append(run.run_id)
  return [
    f'mixed {fact}: ' + '; '.join(f'{value} ({len(ids)} runs)' for value, ids in values.items())
    for fact, values in seen.items()
    if len(values) > 1
  ]


def curve(run: Run, name: str, against: str = 'tokens') -> tuple[list[float], list[float]]:
  """(x, y) of one metric over training, without rows where it is absent or not finite."""
  pairs = [(_finite(row.get(against)), _finite(row.get(name))) for row in run.rows]
  pairs = [p for p in pairs if not any(map(math.isnan, p))]
  return [p[0] for p in pairs], [p[1] for p in pairs]


def last_list(run: Run, name: str) -> list[float] | None:
  """The last logged list of a per-sublayer metric that holds a number, NaN for the others; or None."""
  for row in reversed(run.rows):
    values = [_finite(v) for v in row[name]] if isinstance(row.get(name), list) else []
    if not all(map(math.isnan, values)):
      return values
  return None
