"""Anybody's CSV as text, and its cells as numbers: what a cell means is said here and nowhere else.

Where: under points.py, the front of `mhc fit` and `mhc reproduce`. Labels stay as they are written (None, NA
and 1.0 are names like any other); numbers are read by `number` alone.
"""

import codecs
import csv
import difflib
import io
import re
from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.errors import ConfigError

from ..output import unescaped

SEPARATORS = {',': 'a comma', ';': 'a semicolon', '\t': 'a tab', '|': 'a bar'}
MARKS = {  # the longer first: UTF-32's begins like UTF-16's
  codecs.BOM_UTF8: 'utf-8',
  codecs.BOM_UTF32_LE: 'utf-32',
  codecs.BOM_UTF32_BE: 'utf-32',
  codecs.BOM_UTF16_LE: 'utf-16',
  codecs.BOM_UTF16_BE: 'utf-16',
}
SCALES = {'': 0, 'k': 3, 'm': 6, 'b': 9, 't': 12}  # powers of ten
SMALLEST, LARGEST = 1e-50, 1e50  # of numbers: their powers are finite
COVARIATES = ('N', 'D', 'C', 'W', 'H')  # counts, which may be written with thousands separators
UNITS = 'params?|parameters?|tokens?|flops?|nats?|nats/token|nats per token'
# Digits with underscores, or in groups of three with commas; a fraction; an exponent of C or Fortran; a
# letter for thousand to trillion; a unit.
NUMBER = re.compile(
  r'([+-]?)((?:[0-9]+(?:_[0-9]+)*|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]*)?)'
  rf'(?:[eEdD]([+-]?[0-9]+))?\s*([kmbt]?)\s*(?:{UNITS})?',
  re.IGNORECASE,
)
DECIMAL_COMMA = re.compile(
  r'\s*[+-]?(?:[0-9]*,(?![0-9]{3}(?![0-9]))[0-9]*|0,[0-9]+|[0-9]{4,},[0-9]+)(?![0-9,])'
)
NO_NUMBER = {
  '',
  'nan',
  'na',
  'n/a',
  '#n/a',
  'none',
  'null',
  '-',
  'inf',
  '+inf',
  '-inf',
  'infinity',
  '-infinity',
}


def number(cell: str) -> float:
  """'1.5B', '1,500,000', '5.0D+07', '5_000 tokens' -> float; nan for a missing one, else ValueError."""
  text = cell.strip()
  if text.lower() in NO_NUMBER:
    return float('nan')
  match = NUMBER.fullmatch(text)
  if not match or not re.search('[0-9]', match[2]):
    raise ValueError(cell)
  sign, digits, exponent, scale = match.groups()
  if ',' in digits and (exponent or scale):  # 1,500B: 1.5 or 1500?
    raise ValueError(cell)
  digits = digits.replace(',', '').replace('_', '')
  return float(f'{sign}{digits}e{int(exponent or 0) + SCALES[scale.lower()]}')


def read_table(path: Path) -> pd.DataFrame:
  """The CSV's cells as text, its index the line of the file on which a row begins; no blank rows.

  It may be UTF-8 or, by its mark, UTF-16 or UTF-32, with commas, semicolons or tabs, and begin with comments
  (lines with #).
  Raises ConfigError for a missing, empty or unreadable file.
  """
  text = _decoded(path)
  head = 0
  for line in io.StringIO(text, newline=''):
    if line.strip() and not line.lstrip().startswith('#'):
      break
    head += 1
  separator, rows = _separated(path, text, head)
  if len(rows) < 2:
    raise ConfigError(f'{path}: no rows')
  (first, header), *rows = rows
  if all(re.fullmatch(r'[\s+-]*[0-9.][0-9.eE+-]*\s*', name) for name in header):
    raise ConfigError(f'{path}: line {first} must name the columns and holds numbers')
  for line, cells in rows:
    if any(cell.strip() for cell in cells[len(header) :]):
      raise ConfigError(
        f'{path}: line {line} has {len(cells)} cells and the header {len(header)}: quote a cell that holds '
        f'{SEPARATORS[separator]}'
      )
  width = len(header)
  header = [unescaped(name) for name in header]
  cells = [[unescaped(cell) for cell in (cells + [''] * width)[:width]] for _, cells in rows]
  return pd.DataFrame(cells, [line for line, _ in rows], header, dtype=object)


def _decoded(path: Path) -> str:
  """The file's text; ConfigError names the encoding that it does not have."""
  if not path.is_file():
    raise ConfigError(f'{path}: no such file')
  try:
    content = path.read_bytes()
  except OSError as e:
    raise ConfigError(f'{path}: {e.strerror}') from e
  encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), 'utf-8')
  try:
    text = content.decode(encoding).removeprefix('\ufeff')
  except UnicodeDecodeError as e:
    line = content[: e.start].count(b'\n') + 1
    raise ConfigError(f'{path}: line {line} is not {encoding.upper()}: save the file as UTF-8') from e
  if '\0' in text:
    raise ConfigError(f'{path}: not a text file, or UTF-16 without its mark: save it as UTF-8')
  return text


def _separated(path: Path, text: str, head: int) -> tuple[str, list[tuple[int, list[str]]]]:
  """The separator and (line, cells) of every row that is not blank, the header first.

  The separator is what cuts the header into several columns; where two do, that which cuts all rows so.
  """
  read = {}
  for separator in SEPARATORS:
    try:
      read[separator] = _rows(text, head, separator)
    except csv.Error as e:
      read[separator] = str(e)
  whole = {s: rows for s, rows in read.items() if isinstance(rows, list)}
  if not whole:
    raise ConfigError(f'{path}: not a CSV table ({" ".join(str(read[","]).split())})')
  several = [s for s, rows in whole.items() if rows and len(rows[0][1]) > 1]
  if len(several) > 1:
    several = [s for s in several if _even(whole[s])] or several
  if len(several) > 1:
    words = ' or '.join(SEPARATORS[s] for s in several)
    raise ConfigError(
      f'{path}: the separator may be {words}: write the file with commas, and quote the others'
    )
  separator = (several or list(whole))[0]
  return separator, whole[separator]


def _rows(text: str, head: int, separator: str) -> list[tuple[int, list[str]]]:
  lines = io.StringIO(text, newline='')
  for _ in range(head):
    next(lines)
  reader = csv.reader(lines, delimiter=separator, strict=True)
  out, begin = [], head + 1
  for cells in reader:
    if any(cell.strip() for cell in cells):
      out.append((begin, cells))
    begin = head + reader.line_num + 1
  return out


def _even(rows: list[tuple[int, list[str]]]) -> bool:
  """Whether every row has as many cells as the header, but for empty ones at its end."""
  width = len(rows[0][1])
  return all(len(cells) >= width and not any(map(str.strip, cells[width:])) for _, cells in rows)


def check_columns(path: Path, table: pd.DataFrame, columns: dict[str, str]) -> None:
  """Raises ConfigError for a role whose column is absent, or in the header twice."""
  names = list(table.columns)
  for role, column in columns.items():
    if column not in names:
      near = difflib.get_close_matches(column.strip().lower(), [n.strip().lower() for n in names], 1, 0.0)
      nearest = next(n for n in names if n.strip().lower() == near[0])
      raise ConfigError(
        f'{path}: no column {column!r} for {role}; the nearest is {nearest!r} (case and spaces count)'
      )
    if names.count(column) > 1:
      places = ' and '.join(str(k) for k, name in enumerate(names, 1) if name == column)
      raise ConfigError(f'{path}: columns {places} are both called {column!r}: rename one')


def read_numbers(path: Path, table: pd.DataFrame, columns: dict[str, str]) -> dict[str, np.ndarray]:
  """Role -> its column as positive numbers; raises ConfigError that names line, column and cell.

  A comma is a decimal mark where some cell of these columns leaves no other reading and none has a point;
  else it groups thousands, which only N, D, C, W and H can have.
  """
  cells = [cell for column in columns.values() for cell in table[column]]
  decimal = any(map(DECIMAL_COMMA.match, cells)) and not any('.' in cell for cell in cells)
  return {
    role: np.array(
      [_positive(path, line, role, column, cell, decimal) for line, cell in table[column].items()]
    )
    for role, column in columns.items()
  }


def _positive(path: Path, line: int, role: str, column: str, cell: str, decimal: bool) -> float:
  where = f'{path}: line {line}: {role} (column {column!r}) is {" ".join(cell.split()) or "empty"}'
  if ',' in cell and not decimal and role not in COVARIATES:
    raise ConfigError(f'{where}: its format has two readings; write it with a point')
  try:
    value = number(cell.replace(',', '.') if decimal and cell.count(',') == 1 else cell)
  except ValueError:
    raise ConfigError(f'{where}: its format is not known; write it like 1500000000, 1.5e9 or 1.5B') from None
  if not 0 < value < np.inf:
    raise ConfigError(f'{where}; it must be a positive number (drop failed runs before fitting)')
  if not SMALLEST <= value <= LARGEST:
    raise ConfigError(f'{where[:300]}; it must lie between {SMALLEST:g} and {LARGEST:g}: choose another unit')
  return value
