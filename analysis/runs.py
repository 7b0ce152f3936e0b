"""Read a sweep's folder: every planned run, finished or not, as one table; results.csv.

Where: runs/<sweep>/ -> Sweep -> study.py. Reads plan.json, config.json, status.json, metrics.jsonl;
nothing is inferred from names. A run that is missing or broken is a row, never an error.
"""

import dataclasses
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError
from mhc_jax.run_folder import ENDED, crc32, is_number, load_config, load_plan, load_rows, load_status

# Columns of results.csv: a field of config.json or status.json each.
MODEL = {name: f'model.{name}' for name in ('width', 'depth', 'heads', 'kv_heads', 'ffn_width', 'dtype')}
CONNECTION = {f'connection_{name}': f'model.connection.{name}' for name in ('name', 'preset', 'constraint')}
CONNECTION |= {f'connection_{name}': f'model.connection.{name}' for name in ('streams', 'rank', 'fractions')}
CONNECTION |= {f'connection_{gate}': f'model.connection.{gate}.kind' for gate in ('read_gate', 'write_gate')}
TRAINING = {'seed': 'seed', 'lr': 'optimizer.lr', 'schedule': 'optimizer.schedule'}
TRAINING |= {'batch_size': 'data.batch_size', 'seq_len': 'data.seq_len', 'data': 'data.name'}
DEVICE = {name: name for name in ('device_kind', 'device_count', 'git_revision')}
DEVICE |= {'jax_version': 'versions.jax'}
LONGEST, LONGEST_NAME = 200, 48  # letters of a message, and of an arm


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
  """All runs of a plan, the table of results (one row per planned run), and warnings.

  facts: code, corpus, hardware and packages -> how many of the runs that started have which.
  """

  name: str
  folder: Path
  runs: dict[str, Run]
  table: pd.DataFrame
  facts: dict[str, dict[str, int]]
  warnings: list[str]


CURES = {
  'config.json': 'restore it, or delete the folder and run the sweep again',
  'status.json': 'run the sweep again: it goes on from the checkpoint and writes it anew',
  'metrics.jsonl': 'final losses do not need it, its curves lack what is lost',
}


def read_run(folder: Path, run_id: str, arm: str) -> Run:
  """One run's files; a folder without config.json counts as missing."""
  path = folder / run_id
  config, trouble = load_config(str(path))
  status, status_trouble = load_status(str(path))
  if config is None:
    if status['state'] != 'missing':
      trouble = trouble or 'config.json is missing'
    state = 'missing' if trouble in (None, 'config.json is missing') else 'failed'
    return Run(run_id, clean(arm, LONGEST_NAME), state, None, {}, [], trouble)
  config_crc = crc32(config)
  config, status, state = clean(config), clean(status), status['state']
  last = status.get('step', 0)  # of the others the row of the last step may not have been written
  last = last if state in ENDED else last - 1
  every = (config.get('log') or {}).get('every_steps')
  crc = status.get('rows_crc32') if state in ENDED else None  # else rows may come after it
  rows, trouble = load_rows(str(path), last, every, state in (*ENDED, 'failed'), crc)
  if status.get('config_crc32') not in (None, config_crc):
    trouble = trouble or 'config.json does not match its checksum in status.json'
  if state in ('missing', 'damaged'):
    trouble = status_trouble or ('status.json is missing' if rows else None)
    state, status = 'failed' if trouble else 'running', {}  # it is written once a run has compiled
  arm = clean(config.get('arm') or arm, LONGEST_NAME)
  return Run(run_id, arm, state, config, status, rows, trouble)


def read_sweep(folder: Path) -> Sweep:
  """The whole sweep; raises ConfigError when there is no plan to read."""
  if not folder.is_dir():
    raise ConfigError(f'{folder}: no such folder; give the folder of a sweep, like runs/quick')
  name, planned = load_plan(str(folder))
  runs = {run_id: read_run(folder, run_id, arm) for run_id, arm in planned.items()}
  table = pd.DataFrame([row_of(run) for run in runs.values()])
  facts = _facts(runs.values())
  warnings = [
    f'mixed {fact}: ' + '; '.join(f'{value} ({count} runs)' for value, count in counts.items())
    for fact, counts in facts.items()
    if len(counts) > 1
  ]
  for r in runs.values():
    if r.trouble:
      warnings.append(f'run {r.run_id} ({r.arm}): {r.trouble}: {CURES[r.trouble.split()[0]]}')
  extra = sorted(clean(p.parent.name) for p in folder.glob('*/config.json') if p.parent.name not in planned)
  if extra:
    warnings.append(f'{len(extra)} run folders are not in plan.json and are left out: {_few(extra)}')
  return Sweep(clean(name or folder.name), folder, runs, table, facts, warnings)


def clean(value: Any, longest: int = LONGEST) -> Any:
  """The value with texts that can be shown anywhere: no control or format characters, not too many letters.

  Texts that differ stay different: such a character is written as its escape, a cut text has a checksum.
  """
  if isinstance(value, dict):
    return {clean(key): clean(item) for key, item in value.items()}
  if isinstance(value, list):
    return [clean(item) for item in value]
  if not isinstance(value, str):
    return value
  text, hidden = value, ('Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp')
  if not (text.isascii() and text.isprintable()):
    text = ''.join(
      c.encode('unicode_escape').decode() if unicodedata.category(c) in hidden else c for c in text
    )
  if len(text) > longest:
    checksum = hashlib.sha256(text.encode()).hexdigest()[:6]
    text = f'{text[: longest - 8]}… {checksum}'
  return text


def _few(names: list[str], most: int = 6) -> str:
  return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')


def flat(tree: dict | None, prefix: str = '') -> dict[str, object]:
  """The leaves of nested fields by their dotted path; an empty one is a leaf."""
  out: dict[str, object] = {}
  for key, value in (tree or {}).items():
    inside = isinstance(value, dict) and value
    out |= flat(value, f'{prefix}{key}.') if inside else {prefix + key: value}
  return out


def _finite(value: object) -> float:
  return float(value) if is_number(value) else math.nan


def row_of(run: Run) -> dict[str, object]:
  """One line of results.csv: identity, sizes, costs, losses, outcome."""
  config, status = flat(run.config), flat(run.status)

  def picked(fields: dict[str, str], tree: dict[str, object]) -> dict[str, object]:
    return {column: tree.get(path) for column, path in fields.items()}

  def number(path: str) -> float:
    return _finite(status.get(path))

  def logged(name: str) -> pd.Series:
    return pd.Series([_finite(row.get(name)) for row in run.rows], dtype=float)

  fixed_rank = config.get('optimizer.manifold') == 'fixed_rank'
  row = {'run_id': run.run_id, 'arm': run.arm, 'state': run.state}
  row |= picked(MODEL | CONNECTION, config) | {'variant': _variant(run.config)}
  row['connection_fractions'] = row['connection_fractions'] or 1  # older runs know no fractions
  row |= {
    'weights_rank': config.get('model.weights.rank'),
    'projected_rank': config.get('optimizer.manifold_value') if fixed_rank else None,
    **picked(TRAINING, config),
    'data_digest': status.get('derived.data_digest') or config.get('data.digest'),
    'duration': json.dumps((run.config or {}).get('duration'), sort_keys=True),
    **{name: number(f'derived.{name}') for name in ('tokens', 'flops', 'flops_per_token')},
    'steps_done': status.get('step'),
    'num_steps': status.get('num_steps'),
    'validation_loss': number('final.validation/loss'),
    'validation_bits_per_byte': number('final.validation/bits_per_byte'),
    'train_loss': number('final.train/loss'),
    'initial_loss': next(
      (_finite(r.get('validation/loss')) for r in run.rows if r.get('step') == 0), math.nan
    ),
    'diverged_at': status.get('diverged_at'),
    'error': status.get('error') or run.trouble,
    'seconds': number('seconds'),
    'data_seconds': float(logged('time/data_seconds').max()),
    'tokens_per_second': float(logged('time/tokens_per_second').median()),
    'mfu': float(logged('time/mfu').median()),
    'joules_per_token': _joules_per_token(run.rows),
    'energy': status.get('energy'),
    'peak_bytes_in_use': float(logged('device/peak_bytes_in_use').max()),
    **picked(DEVICE, status),
  }
  counts = 'derived.params.'
  row |= {f'params_{k.removeprefix(counts)}': v for k, v in status.items() if k.startswith(counts)}
  return row | {
    name: row.get(name, math.nan) for name in ('params_total', 'params_matmul', 'params_non_embedding')
  }


def _joules_per_token(rows: list[dict]) -> float:
  """Of the updates between the first and the last row that count joules; NaN for fewer than two."""
  pairs = [(_finite(row.get('tokens')), _finite(row.get('device/joules'))) for row in rows]
  pairs = [pair for pair in pairs if not math.isnan(sum(pair))]
  tokens, joules = (pairs[-1][i] - pairs[0][i] if pairs else 0.0 for i in (0, 1))
  return joules / tokens if tokens > 0 else math.nan


def _variant(config: dict | None) -> str:
  """All of a connection that a sweep over streams or ranks leaves alone."""
  leaves = flat(config)
  same = {
    k: leaves.get(v) for k, v in CONNECTION.items() if k not in ('connection_streams', 'connection_rank')
  }
  connection = ((config or {}).get('model') or {}).get('connection') or {}
  same['connection_fractions'] = same['connection_fractions'] or 1
  same |= {k: connection.get(k) for k in ('constraint_params', 'dynamic', 'activation', 'generator', 'scope')}
  return json.dumps(same, sort_keys=True)


def _facts(runs: Iterable[Run]) -> dict[str, dict[str, int]]:
  """What runs that started may differ in -> value -> number of runs."""
  facts: dict[str, dict[str, int]] = {}
  for run in runs:
    status, versions = flat(run.status), 'versions.'
    known = {'git revision': status.get('git_revision')}
    known['data digest'] = status.get('derived.data_digest') or flat(run.config).get('data.digest')
    known['device'] = status.get('device_kind')
    known |= {
      f'version of {k.removeprefix(versions)}': v for k, v in status.items() if k.startswith(versions)
    }
    for fact, value in known.items():
      if value is not None:
        counts = facts.setdefault(fact, {})
        counts[str(value)] = counts.get(str(value), 0) + 1
  return facts


def curve(run: Run, name: str, against: str = 'tokens') -> tuple[list[float], list[float]]:
  """(x, y) of one metric over training, without rows where it is absent or not finite."""
  pairs = [(_finite(row.get(against)), _finite(row.get(name))) for row in run.rows]
  pairs = [p for p in pairs if not any(map(math.isnan, p))]
  return [p[0] for p in pairs], [p[1] for p in pairs]


def array(value: object, axes: int) -> np.ndarray | None:
  """A logged number, list or stack of square matrices, NaN for null; None where no number is in it."""
  try:
    out = np.array(value, float)
  except (TypeError, ValueError):  # lists of unequal lengths
    return None
  if out.ndim != axes or (axes == 3 and out.shape[1] != out.shape[2]):
    return None
  return out if np.isfinite(out).any() else None


def last_list(run: Run, name: str) -> list[float] | None:
  """The last logged list of a per-sublayer metric that holds a number, NaN for the others; or None."""
  values = (array(row.get(name), 1) for row in reversed(run.rows))
  return next((one.tolist() for one in values if one is not None), None)
