"""Regular expressions of the user's: whether they are ones, and whether matching them ends."""

import math
import re
import warnings
from re import _parser
from typing import Any

from mhc_jax.errors import ConfigError, require
from mhc_jax.values import shown

LONGEST = 64  # characters of what is matched: a parameter's path
MOST_WAYS = 1e8


def check_pattern(name: str, pattern: str) -> None:
  """Raises ConfigError where it is no regular expression, or one whose matching may not end.

  Python tries one way after another: what its repeats and alternatives can be bounds their number.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of what a later Python will read in another way
      re.compile(pattern)
      ways = _log_ways(_parser.parse(pattern))
  except (re.error, OverflowError, RecursionError) as error:
    raise ConfigError(f'{name} {shown(pattern)} is not a regular expression: {error}') from None
  require(
    ways <= math.log10(MOST_WAYS),
    f'{name} {shown(pattern)} can match in 10^{ways:.0f} ways, at most {MOST_WAYS:.0e}: write few repeats, '
    'none inside another',
  )


def _log_ways(parsed: Any) -> float:
  """The logarithm, base 10, of at least the ways in which a parsed expression meets LONGEST characters."""
  total = 0.0
  for operator, argument in parsed:
    if str(operator).endswith('REPEAT'):
      low, high, inner = argument
      most = min(int(high), LONGEST // max(inner.getwidth()[0], 1))
      total += math.log10(most - min(int(low), most) + 1) + most * _log_ways(inner)
    elif str(operator) == 'BRANCH':
      total += math.log10(len(argument[1])) + max(map(_log_ways, argument[1]))
    else:
      parts = argument if isinstance(argument, tuple) else (argument,)
      total += sum(_log_ways(part) for part in parts if isinstance(part, _parser.SubPattern))
  return total
