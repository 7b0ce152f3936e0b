"""The files of run folders, read: typed and bounded content, and apart from it what is wrong with each.

recorder, sweep -> files -> **run_folder** -> train, sweep, evaluate, report. Nothing here raises for what a
file holds, but for a plan, without which there is no sweep. Trouble is a clause that begins with the file's
name; what to do about it is the caller's to say.
"""

import dataclasses
import json
import math
import os
import re
import stat
import zlib
from collections.abc import Callable
from typing import Any

from mhc_jax import storage
from mhc_jax.errors import ConfigError

ENDED = ('finished', 'diverged')
STATES = (*ENDED, 'running', 'interrupted', 'failed')
# Far above what is ever written, far below what hurts.
MOST_BYTES, MOST_PLANNED_BYTES, MOST_ROW_BYTES = 2**22, 2**25, 2**24
MOST_RUNS, MOST_DEPTH, MOST_DIGITS, MOST = 100_000, 32, 40, 2**53


class _DamagedError(ValueError):
  """What is wrong with a file, as the end of a sentence that begins with its name."""


def crc32(value: Any) -> int:
  """Of what a JSON value says, however its file is laid out."""
  return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def write_status(workdir: str, status: dict[str, Any]) -> dict[str, Any]:
  """Writes status.json with a checksum of its own, and returns what it says."""
  said = storage.finite({name: value for name, value in status.items() if name != 'crc32'})
  said['crc32'] = crc32(said)
  storage.write_json(os.path.join(workdir, 'status.json'), said)
  return said


Reader = Callable[[str], bytes | None]  # the content of a file, None where there is none


def load_json(
  path: str | os.PathLike[str], most: int = MOST_BYTES, read: Reader | None = None
) -> tuple[Any, str | None]:
  """(content, None), (None, None) where there is no file, or (None, what is wrong).

  Numbers that are not finite are None, as the writers have it. read: of what has been read already. Raises
  StorageError for a store out of reach.
  """
  name = os.path.basename(path)
  try:
    content = read(os.fspath(path)) if read else _content(os.fspath(path), most)
    return (None if content is None else _parsed(content)), None
  except _DamagedError as error:
    return None, f'{name} {error}'


def _content(path: str, most: int) -> bytes | None:
  with storage.errors_of(path):
    try:
      if not storage.is_remote(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would wait for its writer for ever
          raise _DamagedError('is not a file')
        if found.st_size > most:
          raise _DamagedError(f'has {found.st_size:,} bytes, and may have {most:,}')
      return storage.to_path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
      return None
    except OSError as error:
      if storage.is_remote(path):
        raise
      raise _DamagedError(f'cannot be read ({error.strerror})') from None


def _parsed(content: bytes) -> Any:
  def whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
      raise _DamagedError(f'holds a number of {len(digits)} digits')
    return int(digits)

  try:
    value = json.loads(content.decode(), parse_int=whole, parse_constant=lambda _: None)
    if value is None:  # what no file is, not what one holds
      raise _DamagedError('is not an object')
    return _bounded(value, MOST_DEPTH)
  except _DamagedError:
    raise
  except RecursionError:
    raise _DamagedError('is nested too deep') from None
  except ValueError:  # not JSON, or not UTF-8
    raise _DamagedError('is not JSON') from None


def _bounded(value: Any, depth: int) -> Any:
  """The value, 1e999 as None; what is nested deeper than `depth` is damage."""
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if not isinstance(value, dict | list):
    return value
  if not depth:
    raise _DamagedError('is nested too deep')
  if isinstance(value, dict):
    return {key: _bounded(item, depth - 1) for key, item in value.items()}
  return [_bounded(item, depth - 1) for item in value]


def _load_object(path: str, read: Reader | None = None) -> tuple[dict[str, Any] | None, str | None]:
  value, trouble = load_json(path, read=read)
  if trouble or value is None or isinstance(value, dict):
    return value, trouble
  return None, f'{os.path.basename(path)} is not an object'


def is_number(value: Any) -> bool:
  """Whether it is a number that can be computed with: finite, not beyond 1e50; True and False are none."""
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e50


def _number(value: Any) -> bool:
  """a number"""
  return is_number(value)


def _whole(value: Any) -> bool:
  """a whole number"""
  return isinstance(value, int) and not isinstance(value, bool)


def _count(value: Any) -> bool:
  """a whole number from 0 to 2^53"""
  return _whole(value) and 0 <= value <= MOST


def _size(value: Any) -> bool:
  """a whole number from 1 to 2^31"""
  return _count(value) and 0 < value <= 2**31


def _few(value: Any) -> bool:
  """a whole number from 1 to 10,000"""
  return _count(value) and 0 < value <= 10_000


def _text(value: Any) -> bool:
  """a text"""
  return isinstance(value, str)


def _section(value: Any) -> bool:
  """an object"""
  return isinstance(value, dict)


def _numbers(value: Any) -> bool:
  """an object of numbers"""
  return isinstance(value, dict) and all(item is None or is_number(item) for item in value.values())


def _texts(value: Any) -> bool:
  """an object of texts"""
  return isinstance(value, dict) and all(isinstance(item, str | None) for item in value.values())


def _state(value: Any) -> bool:
  """a state"""
  return isinstance(value, str) and value in STATES


# Of every field that somebody computes with, compares or prints: what it is, where it is not absent or None.
CONFIG: dict[str, Callable[[Any], bool]] = {
  **dict.fromkeys(('data', 'model', 'model.connection', 'optimizer', 'duration', 'log'), _section),
  **dict.fromkeys(('model.weights', 'model.moe', 'model.mla'), _section),
  **dict.fromkeys(('model.sparse', 'model.mtp', 'transfer', 'evaluation'), _section),
  **dict.fromkeys(('arm', 'data.name', 'data.digest', 'data.tokenizer', 'model.dtype'), _text),
  **dict.fromkeys((f'model.connection.{name}' for name in ('name', 'preset', 'constraint')), _text),
  **dict.fromkeys((f'model.connection.{name}_gate.kind' for name in ('read', 'write')), _text),
  **dict.fromkeys(('optimizer.schedule', 'optimizer.manifold'), _text),
  **dict.fromkeys(('optimizer.lr', 'optimizer.manifold_value'), _number),
  'seed': _whole,
  **dict.fromkeys(('model.dense_layers', 'model.moe.experts'), _count),
  **dict.fromkeys(('model.width', 'model.heads', 'model.kv_heads', 'model.ffn_width'), _size),
  **dict.fromkeys(('model.connection.rank', 'model.weights.rank', 'data.batch_size', 'data.seq_len'), _size),
  **dict.fromkeys(('evaluation.batch_size', 'evaluation.sequences', 'log.every_steps'), _size),
  **dict.fromkeys(('model.depth', 'model.connection.streams'), _few),
  'duration': _numbers,
}
STATUS: dict[str, Callable[[Any], bool]] = {
  'state': _state,
  **dict.fromkeys(('step', 'num_steps', 'diverged_at', 'device_count', 'population'), _count),
  **dict.fromkeys(('crc32', 'config_crc32', 'rows_crc32', 'skipped_updates'), _count),
  **dict.fromkeys(('error', 'git_revision', 'device_kind', 'kernels', 'derived.data_digest'), _text),
  **dict.fromkeys(('seconds', 'derived.tokens', 'derived.flops', 'derived.flops_per_token'), _number),
  'versions': _texts,
  'derived': _section,
  **dict.fromkeys(('derived.params', 'final'), _numbers),
}
NEEDED = {
  'config.json': ('data', 'model', 'model.connection', 'optimizer', 'duration'),
  'status.json': ('state',),
}


def _wrong(
  tree: dict[str, Any], fields: dict[str, Callable[[Any], bool]], needed: tuple[str, ...]
) -> str | None:
  """The first field that is not what it must be."""
  for path, fits in fields.items():
    value: Any = tree
    for key in path.split('.'):
      value = value.get(key) if isinstance(value, dict) else None
    if not fits(value) if value is not None else path in needed:
      shown = json.dumps(value)
      shown = shown if len(shown) <= 40 else f'{shown[:37]}...'
      return f'has {path}={shown}, which is not {fits.__doc__}'
  return None


def _load_typed(
  workdir: str, name: str, fields: dict, read: Reader | None = None
) -> tuple[dict[str, Any] | None, str | None]:
  value, trouble = _load_object(os.path.join(workdir, name), read)
  wrong = None if value is None else _wrong(value, fields, NEEDED[name])
  return (None, f'{name} {wrong}') if wrong else (value, trouble)


def load_config(workdir: str) -> tuple[dict[str, Any] | None, str | None]:
  """The resolved configuration in config.json, and what is wrong; (None, None) without a file."""
  return _load_typed(workdir, 'config.json', CONFIG)


def load_status(workdir: str, read: Reader | None = None) -> tuple[dict[str, Any], str | None]:
  """A run's status.json, and what is wrong; its state is 'missing' without a file, 'damaged' where it is."""
  status, trouble = _load_typed(workdir, 'status.json', STATUS, read)
  if trouble is None and status is not None:
    rest = {name: value for name, value in status.items() if name != 'crc32'}
    if status.get('crc32') in (None, crc32(rest)):  # None: of before it had one
      return status, None
    trouble = 'status.json does not match its checksum'
  return {'state': 'damaged' if trouble else 'missing'}, trouble


# metrics.jsonl


@dataclasses.dataclass(frozen=True)
class _Rows:
  """Sound lines as (number, line, row) with increasing steps, numbers of damaged lines, half a last one."""

  sound: list[tuple[int, bytes, dict[str, Any]]]
  damaged: list[int]
  half: int | None  # it may be in the writing


def _row(line: bytes) -> dict[str, Any] | None:
  """A row: a step, and numbers or lists of them, at most matrices by sublayer."""
  try:
    row = _parsed(line) if len(line) <= MOST_ROW_BYTES else None
  except _DamagedError:
    return None
  sound = isinstance(row, dict) and _count(row.get('step')) and all(_numeric(v) for v in row.values())
  return row if sound else None


def _numeric(value: Any, depth: int = 3) -> bool:
  if isinstance(value, list):
    return depth > 0 and all(_numeric(item, depth - 1) for item in value)
  return value is None or is_number(value)


def _read_rows(path: str) -> _Rows:
  sound, damaged, half = [], [], None
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      row = _row(line)
      if row is not None:
        sound.append((number, line, row))
      elif line.endswith(b'\n'):
        damaged.append(number)
      else:
        half = number
  kept = []
  for index, line in enumerate(sound):  # one step out of its place goes, not those after it
    step, before = line[2]['step'], kept[-1][2]['step'] if kept else -1
    after = sound[index + 1][2]['step'] if index + 1 < len(sound) else math.inf
    if step <= before or before < after <= step:
      damaged.append(line[0])
    else:
      kept.append(line)
  return _Rows(kept, sorted(damaged), half)


def _lost(rows: _Rows, last_step: int, every: int | None) -> str | None:
  """In words: damaged lines before those of later steps, and what is missing of the rows due at 0, every, ...

  every: None says nothing of rows that are missing.
  """
  beyond = next((number for number, _, row in rows.sound if row['step'] > last_step), math.inf)
  damaged, words = [number for number in rows.damaged if number < beyond], []
  if damaged:
    words.append(f'has {len(damaged)} damaged line{"s" * (len(damaged) > 1)} (line {damaged[0]})')
  if every is not None and last_step >= 0:
    steps = [row['step'] for _, _, row in rows.sound]
    due, present = last_step // every + 1, [s for s in steps if s % every == 0 and s <= last_step]
    if len(present) < due:
      first = next((k * every for k, s in enumerate(present) if s != k * every), len(present) * every)
      words.append(
        f'lacks {due - len(present)} of {due} rows up to step {last_step}, the first of step {first}'
      )
  return ' and '.join(words) or None


def rows_until(
  path: str, last_step: int, every: int | None, crc: int | None = None
) -> tuple[list[str], str | None]:
  """The lines of a local metrics.jsonl up to a step, for a run that goes on there; and what was lost of them.

  every: updates between two rows (log.every_steps). crc: of these lines when they were written, where it is
  known. Raises ConfigError for what cannot be read as a file.
  """
  rows = _Rows([], [], None)
  if os.path.lexists(path):
    if not os.path.isfile(path):
      raise ConfigError(f'{path} is not a file: move it away, and the same command goes on without it')
    try:
      rows = _read_rows(path)
    except OSError as error:
      raise ConfigError(f'{path} cannot be read: {error.strerror}') from None
  kept = [line.decode().rstrip('\r\n') + '\n' for _, line, row in rows.sound if row['step'] <= last_step]
  lost = _lost(rows, last_step, every)
  if lost:
    return kept, f'{path} {lost}: the run goes on, but its curves have a hole'
  changed = crc not in (None, zlib.crc32(''.join(kept).encode()))
  return (
    kept,
    f'{path} was changed after it was written: the run goes on, its curves keep that' * changed or None,
  )


def load_rows(
  workdir: str, last_step: int = -1, every: int | None = None, ended: bool = False, crc: int | None = None
) -> tuple[list[dict[str, Any]], str | None]:
  """Sound rows of metrics.jsonl, and what is wrong with it up to a step. No file is no rows.

  ended: nobody is writing any more, so half a line at the end is a loss too. crc: of all lines, if known.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  rows, name = _Rows([], [], None), 'metrics.jsonl'
  if not os.path.lexists(path) and ended and last_step > 0:
    return [], f'{name} is missing'
  if os.path.lexists(path):
    if not os.path.isfile(path):
      return [], f'{name} is not a file'
    try:
      rows = _read_rows(path)
    except OSError as error:
      return [], f'{name} cannot be read ({error.strerror})'
  lost = _lost(rows, math.inf if every is None else last_step, every)
  if lost is None and ended and rows.half is not None:
    lost = f'breaks off at line {rows.half}'
  lines = b''.join(line for _, line, _ in rows.sound)
  if lost is None and crc not in (None, zlib.crc32(lines)):
    lost = 'does not match its checksum in status.json'
  return [row for _, _, row in rows.sound], lost and f'{name} {lost}'


def last_row(workdir: str, most: int = 20_000) -> dict[str, Any]:
  """The last whole row of metrics.jsonl, {} without one or for one of over `most` bytes: how far a run is."""
  path = os.path.join(workdir, 'metrics.jsonl')
  try:
    if not os.path.isfile(path):
      return {}
    with open(path, 'rb') as file:
      file.seek(max(0, os.path.getsize(path) - most))
      lines = file.read().split(b'\n')[:-1]
  except OSError:
    return {}
  row = _row(lines[-1]) if lines else None
  numbers = (name for name, value in (row or {}).items() if is_number(value))
  return {name: row[name] for name in numbers}


# plan.json


def load_plan(folder: str) -> tuple[str | None, dict[str, str]]:
  """(the sweep's name, run id -> arm) of a sweep's plan.json.

  Raises ConfigError in one line where there is none, or it is not one: without it there is no sweep.
  """
  plan, trouble = load_json(os.path.join(folder, 'plan.json'), MOST_PLANNED_BYTES)
  if plan is None or not isinstance(plan, dict) or not isinstance(plan.get('runs'), list):
    trouble = trouble or ('plan.json is missing' if plan is None else 'plan.json lists no runs')
    raise ConfigError(f'{folder}: {trouble}; a sweep writes it (mhc sweep NAME)')
  runs: dict[str, str] = {}
  if not plan['runs'] or len(plan['runs']) > MOST_RUNS:
    many = f'{len(plan["runs"]):,} runs, and may list {MOST_RUNS:,}' if plan['runs'] else 'no runs'
    raise ConfigError(f'{folder}: plan.json lists {many}')
  broken = f'{folder}: plan.json is broken (mhc sweep NAME writes it again)'
  for item in plan['runs']:
    if not (
      isinstance(item, dict) and isinstance(item.get('run_id'), str) and isinstance(item.get('arm'), str)
    ):
      raise ConfigError(f'{broken}: a run without run_id or arm')
    run_id = item['run_id']
    if not re.fullmatch(r'[A-Za-z0-9_-]{1,100}', run_id):  # a name in this folder, and nothing else
      raise ConfigError(f'{broken}: {run_id[:40]!a} is no run_id')
    if run_id in runs:
      raise ConfigError(f'{broken}: it lists run {run_id} twice')
    runs[run_id] = item['arm']
  name = plan.get('sweep')
  return (name if isinstance(name, str) else None), runs


def load_options(folder: str) -> list[str]:
  """The options of the command that made a sweep's plan.json (overrides, seeds); none without a plan.

  Raises ConfigError where the file holds something else in their place.
  """
  plan, _ = load_json(os.path.join(folder, 'plan.json'), MOST_PLANNED_BYTES)
  options = (plan.get('options') if isinstance(plan, dict) else None) or []
  if not (isinstance(options, list) and all(_text(item) for item in options)):
    raise ConfigError(f'{folder}: plan.json is broken: its options are not a list of texts')
  return options
