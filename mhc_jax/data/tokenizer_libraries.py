"""Tokenizers of libraries: Hugging Face's `tokenizers`, tiktoken and sentencepiece (extra `text`).

Main path: text -> **token ids** -> token streams. Documents are bytes; a byte that is no UTF-8 becomes U+FFFD
for the tokenizer and still counts as the one byte that it is. Nothing in a text means anything special: a
document that spells a special token has its letters.
"""

import functools
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterable
from types import ModuleType

import fsspec
import numpy as np

from mhc_jax import storage
from mhc_jax.data.find_files import expanded
from mhc_jax.data.remote import filesystem
from mhc_jax.data.source import each
from mhc_jax.data.tokenizer import BYTES, Tokenizer, as_bytes
from mhc_jax.errors import ConfigError, require
from mhc_jax.storage import is_remote

# The first of these that a vocabulary has begins documents. One without any gets an id of its own, the last.
BEGINNINGS = (
  *('<|bos|>', '<s>', '<bos>', '<|begin_of_text|>', '[BOS]', '<|startoftext|>', '[CLS]'),
  *('<|endoftext|>', '<|end_of_text|>', '</s>', '<eos>', '[SEP]'),
)


def tokenizer_of(name: str | None) -> Tokenizer:
  """The tokenizer that data.tokenizer names; a process reads each version of it once.

  None or 'bytes'; a tokenizer.json of Hugging Face's `tokenizers`, a path here or in gs://, s3:// or hf://;
  'tiktoken:ENCODING'; 'sentencepiece:MODEL_FILE'. Raises ConfigError for one that is not there, or whose
  package is not.
  """
  if name in (None, BYTES.name):
    return BYTES
  kind, separator, place = name.partition(':')
  if kind == 'tiktoken' and separator:
    return _of_tiktoken(place)
  make = _of_tokenizers
  if kind == 'sentencepiece' and separator:
    make, name = _of_sentencepiece, place
  return make(name, _version(name))


def vocab_size_of(name: str | None) -> int | None:
  """The tokenizer's vocab_size; None where its file is not on this machine: nothing is fetched for it."""
  if name in (None, BYTES.name):
    return BYTES.vocab_size
  kind, separator, place = name.partition(':')
  path = place if kind == 'sentencepiece' and separator else name
  here = not (is_remote(path) or kind == 'tiktoken') and os.path.isfile(expanded(path, 'data.tokenizer'))
  return tokenizer_of(name).vocab_size if here else None


def file_of(name: str | None) -> tuple[str, bytes] | None:
  """(its usual name, content) of the one file that data.tokenizer names; None for bytes and tiktoken.

  Raises ConfigError where it is not there.
  """
  kind, separator, place = (name or BYTES.name).partition(':')
  if name in (None, BYTES.name) or (kind == 'tiktoken' and separator):
    return None
  pieces = kind == 'sentencepiece' and separator
  path = place if pieces else name
  _version(path)
  return ('tokenizer.model' if pieces else 'tokenizer.json'), _read(path)


def _version(path: str) -> tuple[int, ...]:
  if is_remote(path):
    return ()
  try:
    status = os.stat(expanded(path, f'data.tokenizer={path!r}'))
  except (OSError, ValueError):
    raise ConfigError(
      f'data.tokenizer={path!r}: no such file; takes bytes, a tokenizer.json, tiktoken:ENCODING or'
      ' sentencepiece:MODEL_FILE (`mhc tokenizer train` makes a tokenizer.json)'
    ) from None
  return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: str) -> bytes:
  files, inside = filesystem(path) if is_remote(path) else (fsspec.filesystem('file'), expanded(path, path))
  try:
    with storage.errors_of(path):
      return files.cat_file(inside)
  except OSError as error:
    if is_remote(path):
      raise
    raise ConfigError(f'data.tokenizer={path!r}: cannot read it ({error.strerror})') from error


def _package(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError:
    raise ConfigError(f'data.tokenizer needs the package {name}: pip install "mhc_jax[text]"') from None


@functools.lru_cache(maxsize=16)
def _of_tokenizers(path: str, version: tuple[int, ...]) -> Tokenizer:
  """A tokenizer.json: its ids, but no special tokens added, nothing cut off and nothing padded."""
  library, content = _package('tokenizers'), _read(path)
  try:
    made = library.Tokenizer.from_str(content.decode())
    canonical = json.dumps(json.loads(content), sort_keys=True, separators=(',', ':'))
  except Exception as error:  # the library raises Exception itself
    what = ' '.join(f'{error}'.split())[:200]
    raise ConfigError(
      f"data.tokenizer={path!r}: no tokenizer.json of Hugging Face's tokenizers: {what}"
    ) from None
  made.no_truncation()
  made.no_padding()
  made.encode_special_tokens = True  # as plain text
  vocabulary = made.get_vocab(with_added_tokens=True)
  require(bool(vocabulary), f'data.tokenizer={path!r}: its vocabulary is empty')
  size, bos = _with_beginning(max(vocabulary.values()) + 1, vocabulary.get)
  texts = functools.partial(made.encode_batch_fast, add_special_tokens=False)

  def many(texts_K: list[str]) -> list[list[int]]:
    return [found.ids for found in texts(texts_K)]

  def stops(text: str) -> list[int]:
    return [stop for _, stop in made.encode(text, add_special_tokens=False).offsets]

  def decode(ids: Iterable[int]) -> str:
    return made.decode([int(i) for i in ids if i != bos], skip_special_tokens=False)

  name = _name('tokenizers', size, bos, canonical.encode())
  return _tokenizer(name, size, bos, many, decode, lambda text: _bytes_of_spans(text, stops))


@functools.lru_cache(maxsize=16)
def _of_tiktoken(encoding: str) -> Tokenizer:
  library = _package('tiktoken')
  try:
    made = library.get_encoding(encoding)
  except ValueError as error:  # an unknown name
    raise ConfigError(f"data.tokenizer='tiktoken:{encoding}': {' '.join(f'{error}'.split())[:300]}") from None
  except Exception as error:  # what its download raises
    what = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise ConfigError(
      f"data.tokenizer='tiktoken:{encoding}': cannot be fetched ({what}); connect this machine, or set"
      ' TIKTOKEN_CACHE_DIR to a folder that has it'
    ) from None
  size, bos = _with_beginning(made.n_vocab, made._special_tokens.get)
  ranks = hashlib.sha256()
  for token, rank in sorted(made._mergeable_ranks.items(), key=lambda item: item[1]):
    ranks.update(b'%d %s\n' % (rank, token.hex().encode()))
  facts = json.dumps([made._pat_str, sorted(made._special_tokens.items()), ranks.hexdigest()])

  def many(texts_K: list[str]) -> list[list[int]]:
    return made.encode_ordinary_batch(texts_K, num_threads=os.cpu_count() or 1)

  def lengths(text: bytes) -> np.ndarray:
    def stops(clean: str) -> np.ndarray:
      tokens = made.decode_tokens_bytes(made.encode_ordinary(clean))
      return np.cumsum([len(token) for token in tokens])

    return _bytes_of_spans(text, stops, in_bytes=True)

  def decode(ids: Iterable[int]) -> str:
    return made.decode([int(i) for i in ids if i != bos and i < made.n_vocab])

  return _tokenizer(_name('tiktoken', size, bos, facts.encode()), size, bos, many, decode, lengths)


@functools.lru_cache(maxsize=16)
def _of_sentencepiece(path: str, version: tuple[int, ...]) -> Tokenizer:
  library, content = _package('sentencepiece'), _read(path)
  try:
    made = library.SentencePieceProcessor(model_proto=content)
  except Exception as error:
    what = ' '.join(f'{error}'.split())[:200]
    raise ConfigError(f'data.tokenizer: {path} is no model of sentencepiece: {what}') from None
  size = made.get_piece_size()
  ends = [made.bos_id(), made.eos_id()]
  bos = next((token for token in ends if token >= 0), size)
  size = max(size, bos + 1)

  def many(texts_K: list[str]) -> list[list[int]]:
    return made.encode(texts_K, out_type=int, num_threads=os.cpu_count() or 1)

  def stops(text: str) -> list[int]:
    found = made.encode(text, return_type='offset_mapping', return_bytes=True)
    return [stop for _, stop in found['offsets']]

  def decode(ids: Iterable[int]) -> str:
    return made.decode([int(i) for i in ids if i != bos])

  name = _name('sentencepiece', size, bos, content)
  return _tokenizer(name, size, bos, many, decode, lambda text: _bytes_of_spans(text, stops, in_bytes=True))


def _name(library: str, size: int, bos: int, content: bytes) -> str:
  return f'{library}-{size}-{bos}-{hashlib.sha256(content).hexdigest()[:16]}'


def _with_beginning(size: int, id_of: Callable[[str], int | None]) -> tuple[int, int]:
  """(vocab_size, bos), by BEGINNINGS."""
  found = next((id_of(token) for token in BEGINNINGS if id_of(token) is not None), None)
  return (size + 1, size) if found is None else (size, found)


def _tokenizer(
  name: str,
  size: int,
  bos: int,
  many: Callable[[list[str]], list[list[int]]],
  decode: Callable[[Iterable[int]], str],
  lengths: Callable[[bytes], np.ndarray],
) -> Tokenizer:
  """A Tokenizer from what turns texts into lists of ids."""

  def encode(text: bytes | str) -> np.ndarray:
    return np.array(many([_clean(as_bytes(text))])[0], np.uint32)

  def encode_many(text: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = many([_clean(document) for document in each(text, ends)])
    ids = [np.array(one, np.uint32) for one in found]
    return np.concatenate([np.zeros(0, np.uint32), *ids]), np.cumsum(
      [len(one) for one in ids], dtype=np.int64
    )

  return Tokenizer(name, size, bos, encode, decode, encode_many, lengths)


def _clean(document: bytes) -> str:
  """The document as text; U+FFFD for each byte that is no UTF-8."""
  try:
    return document.decode()
  except UnicodeDecodeError:
    return _escaped(document.decode('utf-8', errors='surrogateescape'))


def _escaped(text: str) -> str:
  return text.translate(dict.fromkeys(range(0xDC80, 0xDD00), 0xFFFD))


def _bytes_of_spans(
  document: bytes, stops_of: Callable[[str], Iterable[int]], in_bytes: bool = False
) -> np.ndarray:
  """How many bytes of the document each token stands for, int64.

  stops_of: cleaned text -> where in it each token stops, in characters or (in_bytes) its UTF-8 bytes. A token
  stands for what lies between the furthest stop before it and its own; the last one for the rest too.
  """
  raw = document.decode('utf-8', errors='surrogateescape')
  codes = np.frombuffer(raw.encode('utf-32-le', errors='surrogatepass'), np.uint32)
  invalid = (codes >= 0xDC80) & (codes < 0xDD00)
  sizes = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
  sources = np.where(invalid, 1, sizes)
  stops = np.asarray(list(stops_of(_escaped(raw))), np.int64)
  if not len(stops):
    return stops
  if in_bytes:
    reached = np.concatenate([[0], np.cumsum(_per_clean_byte(sizes, invalid))])[stops]
  else:
    reached = np.concatenate([[0], np.cumsum(sources)])[stops]
  reached = np.maximum.accumulate(reached)
  reached[-1] = len(document)
  return np.diff(reached, prepend=0)


def _per_clean_byte(sizes: np.ndarray, invalid: np.ndarray) -> np.ndarray:
  """Source bytes that each UTF-8 byte of the cleaned text stands for: of U+FFFD's three, the last for one."""
  ones = np.ones(int(sizes.sum()), np.int64)
  ends = np.cumsum(sizes)
  for before in (2, 3):
    ones[ends[invalid] - before] = 0
  return ones
