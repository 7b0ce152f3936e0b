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
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if value is None and types.NoneType in inner:
      return None
    return checked(name, value, next(each for each in inner if each is not types.NoneType))
  require(value is not None or kind is Any, f'{name} must have a value, got None')
  if origin is typing.Annotated:
    value, limits = checked(name, value, inner[0]), inner[1]
    wanted = f'{name} must lie between {limits.low} and {limits.high}, got {value}'
    require(limits.low <= value <= limits.high, wanted)
    return value
  if kind is Any:
    if isinstance(value, list | tuple):
      return [checked(name, each, _kind_of(name, each)) for each in value]
    return None if value is None else checked(name, value, _kind_of(name, value))
  if origin is tuple:
    require(isinstance(value, list | tuple), f'{name} takes a list, got {shown(value)}')
    kinds = (inner[0],) * len(value) if inner[1:] == (...,) else inner
    require(len(kinds) == len(value), f'{name} takes {len(kinds)} values, got {shown(value)}')
    return tuple(checked(name, each, kind) for each, kind in zip(value, kinds, strict=True))
  return _plain(name, value, kind)


def _plain(name: str, value: Any, kind: type) -> bool | int | float | str:
  require(_is(value, kind), f'{name} takes {kind.__name__}, got {shown(value)}')
  if kind is int:
    require(value <= INT32, f'{name}={shown(value)}: at most {INT32}')
    require(value >= -INT32, f'{name}={shown(value)}: at least -{INT32}')
  if kind is float:
    require(abs(value) <= FLOAT32, f'{name} must be finite and at most {FLOAT32:.1e}, got {shown(value)}')
  if kind is str:
    require('\0' not in value, f'{name} holds a character 0')
    require(len(value) <= LONGEST_TEXT, f'{name} has {len(value)} characters; at most {LONGEST_TEXT}')
  return kind(value)


def _is(value: Any, kind: type) -> bool:
  if kind is bool:
    return isinstance(value, bool | np.bool_)
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  return whole if kind is int else isinstance(value, kind) or (kind is float and whole)


def _kind_of(name: str, value: Any) -> type:
  kind = next((kind for kind in (bool, int, float, str) if _is(value, kind)), None)
  require(kind is not None, f'{name} takes numbers, texts and lists of them, got {shown(value)}')
  return kind


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


def checked_arguments(name: str, function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
  """Arguments for a function, of the kinds that its signature states.

  Raises ConfigError for unknown names, which tells the known ones, and for values of another kind.
  """
  known = inspect.signature(function).parameters
  free = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
  unknown = [key for key in given if key not in known]
  if unknown and not free:
    takes = f'it takes {", ".join(known)}' if known else 'it takes none'
    raise ConfigError(f'{name}: unknown parameters {shown(unknown)}; {takes}')
  hints = _hints(function)
  return {key: checked(f'{name}.{key}', value, hints.get(key, Any)) for key, value in given.items()}
