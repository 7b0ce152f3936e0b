"""What a corpus is read from: batches of documents, from any place where an earlier reading stopped.

Main path: files, tables, data sets -> **documents** -> tokens on disk (`token_files.py`). Every kind of
corpus is one Source, so that reading ahead, progress, resuming and memory are the same for all.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

BATCH_BYTES = 8 << 20  # of text in a batch, one document more at the most
BATCH_DOCUMENTS = 1 << 16


class Documents(NamedTuple):
  """Several documents one after another."""

  text: np.ndarray  # uint8
  ends: np.ndarray  # int64, one per document: where it ends in text
  held_out: np.ndarray  # bool, one per document: whether it is validation
  at: Any  # JSON: where reading goes on after these
  done: int  # of the source's size, with these


class Piece(Protocol):
  """A document that is read when its turn comes."""

  def __len__(self) -> int: ...

  def read(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Source:
  """A corpus that can be read from any place on, and always in the same order."""

  slug: str  # name of a folder, without tokenizer and key
  key: str  # hex; another one where the text may be another
  size: int  # what `done` counts up to: bytes, or examples
  unit: str  # 'B' or ' documents'
  # (at, tails) -> batches. at None is the start. tails holds out the last 5 % of every document; it is asked
  # for where chosen documents came out as too few or too many of the text.
  read: Callable[[Any, bool], Iterator[Documents]]
  splits_itself: bool = False  # what is validation does not depend on tails


def of_pieces(slug: str, key: str, pieces: dict[str, Sequence[Piece]]) -> Source:
  """The source of pieces by split, train before validation."""
  train, validation = pieces['train'], pieces['validation']
  size = sum(map(len, train)) + sum(map(len, validation))

  def read(at: Any, tails: bool) -> Iterator[Documents]:
    start = at or 0
    in_order = [*((piece, False) for piece in train), *((piece, True) for piece in validation)]
    done = sum(len(piece) for piece, _ in in_order[:start])
    for batch in batched(((piece.read(), held) for piece, held in in_order[start:]), start):
      done += len(batch.text)
      yield batch._replace(done=done)

  return Source(slug, key, size, 'B', read, splits_itself=True)


def batched(documents: Iterable[tuple[bytes, bool]], start: int = 0) -> Iterator[Documents]:
  """(document, whether it is validation) as batches; `at` and `done` count documents, from start on."""
  texts: list[bytes] = []
  held: list[bool] = []
  size, count = 0, start
  for text, is_held in documents:
    texts.append(text)
    held.append(is_held)
    size += len(text)
    count += 1
    if size >= BATCH_BYTES or len(texts) >= BATCH_DOCUMENTS:
      yield _joined(texts, held, count)
      texts, held, size = [], [], 0
  if texts:
    yield _joined(texts, held, count)


def _joined(texts: list[bytes], held: list[bool], count: int) -> Documents:
  ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
  return Documents(np.frombuffer(b''.join(texts), np.uint8), ends, np.array(held, bool), count, count)


def each(text: np.ndarray, ends: np.ndarray) -> Iterator[bytes]:
  """The documents one by one."""
  whole, start = memoryview(np.ascontiguousarray(text)), 0
  for end in ends.tolist():
    yield bytes(whole[start:end])
    start = end
