"""How far the reading or preparing of a corpus is."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from mhc_jax.log import say

_SECONDS = 30
_T = TypeVar('_T')


def progress(items: Iterable[_T], what: str, total: int) -> Iterator[_T]:
  """The items, with a bar on a terminal and elsewhere a line every 30 seconds."""
  bar = tqdm(items, what, total, disable=None, delay=1)
  said = time.monotonic()
  for done, item in enumerate(bar):
    if bar.disable and time.monotonic() - said > _SECONDS:
      said = time.monotonic()
      say(f'{what}: {done:,} of {total:,}')
    yield item
