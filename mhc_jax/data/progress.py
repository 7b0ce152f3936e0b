"""How far the reading or preparing of a corpus is."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from mhc_jax.data.source import Documents
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


def reading(batches: Iterable[Documents], what: str, total: int, unit: str) -> Iterator[Documents]:
  """Batches of documents, with how much of a source is read and how long the rest takes."""
  began = said = time.monotonic()
  first = None
  with tqdm(desc=what, total=total, unit=unit, unit_scale=True, disable=None, delay=1) as bar:
    for batch in batches:
      yield batch
      if first is None:  # resumed: what was read before says nothing about the speed
        first = bar.initial = bar.n = batch.done
        began = time.monotonic()
      bar.update(batch.done - bar.n)
      now = time.monotonic()
      if bar.disable and now - said > _SECONDS:
        said = now
        left = (now - began) / max(batch.done - first, 1) * (total - batch.done)
        say(f'{what}: {batch.done / max(total, 1):.0%} of {total:,}{unit}, about {left:,.0f} s left')
