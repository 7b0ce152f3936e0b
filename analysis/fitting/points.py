"""Read anybody's CSV of (N, D, loss) into Points, refusing what would fit silently wrong.

Where: the front of `mhc fit` and `mhc reproduce`.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from .laws import Points
from .models import clusters, doubtful, sizes
from .table import COVARIATES, check_columns, read_numbers, read_table

# Roles that --columns can assign. Numbers: N parameters, D tokens, C FLOPs, W width, H depth,
# loss in nats per token, sigma its relative noise. Labels: arm, seed, cluster, size. axis:NAME is a rank or
# another number r with a multiplier r^phi of its own; an empty cell is a run at r = 1.
NUMBERS = (*COVARIATES, 'loss', 'sigma')
LABELS = ('arm', 'seed', 'cluster', 'size')
AXIS = 'axis:'


def parse_columns(text: str) -> dict[str, str]:
  """'N=params,loss="loss, val"' -> {'N': 'params', 'loss': 'loss, val'}; raises ConfigError."""
  out: dict[str, str] = {}
  for part in re.findall(r'(?:"[^"]*"|[^,"]|"(?=[^"]*$))+', text):
    role, equals, column = part.partition('=')
    column = column[1:-1] if re.fullmatch(r'".*"', column) else column
    if not equals or not column:
      raise ConfigError(f'--columns: {part!r} is not ROLE=COLUMN (example: N=params,loss="loss, val")')
    if role not in NUMBERS + LABELS and not role.startswith(AXIS):
      raise ConfigError(f'--columns: unknown role {role!r}; roles: {", ".join(NUMBERS + LABELS)}, axis:NAME')
    if role in out:
      raise ConfigError(f'--columns: {role} is given twice, as {out[role]!r} and {column!r}')
    if column in out.values():
      other = next(r for r, c in out.items() if c == column)
      raise ConfigError(f'--columns: column {column!r} is given for {other} and for {role}')
    out[role] = column
  if 'loss' not in out:
    raise ConfigError('--columns: say which column is the loss (loss=COLUMN)')
  if not {'N', 'D', 'C', 'W'} & set(out):
    raise ConfigError('--columns: say at least one of N=, D=, C=')
  return out


def read_points(path: Path, columns: dict[str, str], table: pd.DataFrame | None = None) -> Points:
  """Points of a CSV, with what `completed` adds.

  cluster and size: their columns, or as models.py has it. Raises ConfigError.
  """
  table = read_table(path) if table is None else table
  check_columns(path, table, columns)
  value = read_numbers(path, table, {r: c for r, c in columns.items() if r in NUMBERS})
  log_x = completed({r: np.log(v) for r, v in value.items() if r in COVARIATES})
  axes = {r.removeprefix(AXIS): _axis(path, table, r, c) for r, c in columns.items() if r.startswith(AXIS)}
  n = len(table)
  label = {r: _label(path, table, r, c) for r, c in columns.items() if r in LABELS}
  arm = label.get('arm', np.full(n, 'all'))
  size, notes = label.get('size'), ()
  if size is None:
    size, notes = sizes(log_x, arm, {r for r in value if r in COVARIATES})
  return Points(
    log_x,
    value['loss'],
    arm,
    clusters(label, size),
    size,
    table.index.to_numpy(),  # the line in the file
    sigma=value.get('sigma'),
    axes=axes,
    notes=(*notes, *doubtful(value, arm)),
  )


def _axis(path: Path, table: pd.DataFrame, role: str, column: str) -> np.ndarray:
  """log r of every row; 0 where the cell is empty."""
  filled = table.assign(**{column: [cell if cell.strip() else '1' for cell in table[column]]})
  return np.log(read_numbers(path, filled, {role: column})[role])


def _label(path: Path, table: pd.DataFrame, role: str, column: str) -> np.ndarray:
  for line, cell in table[column].items():
    if not cell.strip():
      raise ConfigError(f'{path}: line {line}: {role} (column {column!r}) is empty')
  return table[column].to_numpy(str)


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
