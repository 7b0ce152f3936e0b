"""Read anybody's CSV of (N, D, loss) into Points, refusing what would fit silently wrong.

Where: the front of `mhc fit` and `mhc reproduce`.
"""

import difflib
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from .laws import Points
from .models import clusters, doubtful, sizes

# Roles that --columns can assign. Numbers: N parameters, D tokens, C FLOPs, W width, H depth,
# loss in nats per token, sigma its relative noise. Labels: arm, seed, cluster, size. axis:NAME is a rank or
# another number r with a multiplier r^phi of its own; an empty cell is a run at r = 1.
COVARIATES = ('N', 'D', 'C', 'W', 'H')
NUMBERS = (*COVARIATES, 'loss', 'sigma')
LABELS = ('arm', 'seed', 'cluster', 'size')
AXIS = 'axis:'


def parse_columns(text: str) -> dict[str, str]:
  """'N=params,D=tokens,loss=loss' -> {'N': 'params', ...}; raises ConfigError."""
  out = {}
  for part in text.split(','):
    role, equals, column = part.partition('=')
    if not equals or not column:
      raise ConfigError(f'--columns: {part!r} is not ROLE=COLUMN (example: N=params,loss=loss)')
    if role not in NUMBERS + LABELS and not role.startswith(AXIS):
      raise ConfigError(f'--columns: unknown role {role!r}; roles: {", ".join(NUMBERS + LABELS)}, axis:NAME')
    if role in out:
      raise ConfigError(f'--columns: {role} is given twice, as {out[role]!r} and {column!r}')
    out[role] = column
  if 'loss' not in out:
    raise ConfigError('--columns: say which column is the loss (loss=COLUMN)')
  if not {'N', 'D', 'C', 'W'} & set(out):
    raise ConfigError('--columns: say at least one of N=, D=, C=')
  return out


def read_table(path: Path) -> pd.DataFrame:
  """The CSV as a table without its blank lines, which the index counts.

  Raises ConfigError for a missing, empty or unreadable file.
  """
  if not path.is_file():
    raise ConfigError(f'{path}: no such file')
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('error', pd.errors.ParserWarning)  # rows longer than the header
      # Never takes a surplus column for an index; blank lines count, so that errors name the right one.
      table = pd.read_csv(path, index_col=False, skip_blank_lines=False).dropna(how='all')
  except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError, UnicodeDecodeError) as e:
    raise ConfigError(f'{path}: not a CSV table ({str(e).strip().splitlines()[0]})') from e
  if table.empty:
    raise ConfigError(f'{path}: no rows')
  return table


def _number(table: pd.DataFrame, role: str, column: str, path: Path) -> np.ndarray:
  values = pd.to_numeric(table[column], errors='coerce').to_numpy(float)
  bad = np.flatnonzero(~np.isfinite(values) | (values <= 0))
  if len(bad):
    cell = ' '.join(str(table[column].iloc[bad[0]]).split())
    raise ConfigError(
      f'{path}: line {table.index[bad[0]] + 2}: {role} (column {column!r}) is {cell}; '
      'it must be a positive number (drop failed runs before fitting)'
    )
  return values


def read_points(path: Path, columns: dict[str, str], table: pd.DataFrame | None = None) -> Points:
  """Points of a CSV, with what `completed` adds.

  cluster and size: their columns, or as models.py has it. Raises ConfigError.
  """
  table = read_table(path) if table is None else table
  for role, column in columns.items():
    if column not in table.columns:
      near = difflib.get_close_matches(column, map(str, table.columns), 1, 0.0)
      raise ConfigError(f'{path}: no column {column!r} for {role}; the nearest is {near[0]!r}')
  value = {r: _number(table, r, c, path) for r, c in columns.items() if r in NUMBERS}
  log_x = completed({r: np.log(v) for r, v in value.items() if r in COVARIATES})
  axes = {
    role.removeprefix(AXIS): np.log(_number(table.fillna({column: 1}), role, column, path))
    for role, column in columns.items()
    if role.startswith(AXIS)
  }
  n = len(table)
  for role, column in columns.items():
    if role in LABELS and table[column].isna().any():
      line = table.index[table[column].isna()][0] + 2
      raise ConfigError(f'{path}: line {line}: {role} (column {column!r}) is empty')
  label = {r: table[c].astype(str).to_numpy(str) for r, c in columns.items() if r in LABELS}
  arm = label.get('arm', np.full(n, 'all'))
  size, notes = (
    (label['size'], ()) if 'size' in label else sizes(log_x, arm, {r for r in value if r in COVARIATES})
  )
  return Points(
    log_x,
    value['loss'],
    arm,
    clusters(label, size),
    size,
    table.index.to_numpy() + 2,  # the line in the file
    sigma=value.get('sigma'),
    axes=axes,
    notes=(*notes, *doubtful(value, arm)),
  )


def completed(log_x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Log covariates with the one of N, D and C = 6 N D that is absent, and M = D / N."""
  out = dict(log_x)
  for known, other in (('N', 'D'), ('D', 'N')):
    if {known, 'C'} <= set(out) and other not in out:
      out[other] = out['C'] - out[known] - np.log(6)
  if {'N', 'D'} <= set(out):
    out.setdefault('C', out['N'] + out['D'] + np.log(6))
    out['M'] = out['D'] - out['N']
  return out


def drop_highest(points: Points, count: int) -> tuple[Points, list[str]]:
  """Without the `count` highest losses, and a sentence for each that was dropped."""
  order = np.argsort(points.loss, kind='stable')
  keep, dropped = np.sort(order[: len(order) - count]), order[len(order) - count :]
  return points.take(keep), [
    f'line {points.run[r]}: loss {points.loss[r]:.4g} is among the {count} highest (--drop-highest)'
    for r in dropped
  ]
