"""Single values of a configuration against the type that is asked for: one check for every way in.

Fields of a config file, overrides, config.json, connections and the parameters of constraints all pass it.
"""

import dataclasses
import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mhc_jax.errors import ConfigError, require

INT32 = 2**31 - 1  # the largest: what counts steps, tokens and places in arrays
FLOAT32 = float(np.finfo(np.float32).max)
LONGEST_TEXT = 4096  # characters; a path has at most so many


@dataclasses.dataclass(frozen=True)
class Within:
  """In Annotated: the least and the largest number, both included."""

  low: float
  high: float


def checked(name: str, value: Any, kind: Any) -> Any:
  """The value in plain Python where it is of that kind; ConfigError, naming it, otherwise.

  kind: bool, int, float or str; one of them with Within in Annotated, or | None; a tuple of them, which lists
  are taken for; Any: whatever of these the value is. An int will do for a float, a bool for a bool alone, and
  NumPy's as Python's where they are the same number. Ints fit int32, floats are finite in float32.
  """
  none, limits, kind = _parts(kind)
  if value is None:
    require(none, f'{name} must have a value, got None')
    return None
  many = isinstance(value, list | tuple)
  if kind is Any:
    plain = [_plain(name, each, _kind_of(name, each)) for each in (value if many else [value])]
    return plain if many else plain[0]
  if isinstance(kind, type):
    return _plain(name, value, kind, limits)
  inner = typing.get_args(kind)
  inner = inner[:1] * len(value) if many and inner[1:] == (...,) else inner
  require(many and len(inner) == len(value), f'{name} takes a list of {len(inner)}, got {shown(value)}')
  return tuple(checked(name, each, kind) for each, kind in zip(value, inner, strict=True))


@functools.cache
def _parts(kind: Any) -> tuple[bool, Within | None, Any]:
  """(whether None is of the kind, its limits, the kind without the two)."""
  inner = typing.get_args(kind)
  if types.NoneType in inner:
    return True, *_parts(next(each for each in inner if each is not types.NoneType))[1:]
  if typing.get_origin(kind) is typing.Annotated:
    return False, inner[1], inner[0]
  return kind is Any, None, kind


def _plain(name: str, value: Any, kind: type, limits: Within | None = None) -> bool | int | float | str:
  if not _is(value, kind):
    raise ConfigError(f'{name} takes {kind.__name__}, got {shown(value)}')
  if kind is int and abs(value) > INT32:
    raise ConfigError(f'{name}={shown(value)}: {"at most " if value > 0 else "at least -"}{INT32}')
  if kind is float and not abs(value) <= FLOAT32:
    raise ConfigError(f'{name} must be finite and at most {FLOAT32:.1e}, got {shown(value)}')
  if kind is str and (len(value) > LONGEST_TEXT or '\0' in value):
    raise ConfigError(f'{name} takes up to {LONGEST_TEXT} characters, none of code 0, got {shown(value)}')
  if limits and not limits.low <= value <= limits.high:
    raise ConfigError(f'{name} must lie between {limits.low} and {limits.high}, got {value}')
  return kind(value)


def _is(value: Any, kind: type) -> bool:
  if isinstance(value, bool | np.bool_):
    return kind is bool
  whole = isinstance(value, numbers.Integral)
  return whole if kind is int else isinstance(value, kind) or (kind is float and whole)


def _kind_of(name: str, value: Any) -> type:
  for kind in (bool, int, float, str):
    if _is(value, kind):
      return kind
  raise ConfigError(f'{name} takes numbers, texts and lists of them, got {shown(value)}')


def shown(value: Any) -> str:
  """repr, cut where it is long, or what of it can be said."""
  try:
    text = repr(value)
  except Exception:  # of an integer with too many digits, or somebody's own class
    text = f'a {type(value).__name__}'
  return text if len(text) < 80 else f'{text[:80]}...'


@functools.cache
def _hints(of: Any) -> dict[str, Any]:
  return typing.get_type_hints(of, include_extras=True)


def check_dataclass(name: str, given: Any) -> None:
  """Raises ConfigError unless the fields of a dataclass, but for dataclasses, are of the kinds it states."""
  for field, kind in _hints(type(given)).items():
    if not dataclasses.is_dataclass(kind):
      checked(f'{name}.{field}', getattr(given, field), kind)


@functools.cache
def _parameters(of: Callable) -> Mapping[str, inspect.Parameter]:
  return inspect.signature(of).parameters


def checked_arguments(name: str, function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments for a function, of the kinds that its signature states.

  Raises ConfigError for unknown names, which tells the known ones, and for values of another kind.
  """
  known = _parameters(function)
  unknown = [key for key in given if key not in known]
  if unknown and inspect.Parameter.VAR_KEYWORD not in {parameter.kind for parameter in known.values()}:
    takes = f'it takes {", ".join(known)}' if known else 'it takes none'
    raise ConfigError(f'{name}: unknown parameters {shown(unknown)}; {takes}')
  hints = _hints(function)
  return {key: checked(f'{name}.{key}', value, hints.get(key, Any)) for key, value in given.items()}
