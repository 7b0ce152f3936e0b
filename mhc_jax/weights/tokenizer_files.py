"""The files of a tokenizer beside published weights, as far as ours have any."""

import json
import os
from typing import Any

from mhc_jax.data import Tokenizer, tokenizer_of
from mhc_jax.data.tokenizer_libraries import file_of
from mhc_jax.storage import write_json

BOS = '<|bos|>'
_LIBRARY, _PIECES = 'tokenizer.json', 'tokenizer.model'


def write(folder: str, name: str | None, window: int) -> str:
  """Writes the files of the tokenizer that data.tokenizer names; returns how texts become ids, for people.

  window: tokens that the model was trained to see.
  """
  tokenizer, kept = tokenizer_of(name), file_of(name)
  begins = f'A document begins with the id {tokenizer.bos}, which no text contains and no loss term predicts.'
  if kept is None and name is not None and name != 'bytes':
    return f'Ids are those of `{name}`, which has no file of its own. {begins}'
  if kept is None:
    write_json(os.path.join(folder, _LIBRARY), bytes_as_json())
    _write_config(folder, BOS, window)
    return (
      'Ids 0 to 255 are the bytes of the text in UTF-8, and 256 begins a document: it comes first, before '
      f'every text. {_LIBRARY} says the same to the `tokenizers` library, and adds 256.'
    )
  file, content = kept
  with open(os.path.join(folder, file), 'wb') as out:
    out.write(content)
  if file == _LIBRARY:
    _write_config(folder, _token_of(content, tokenizer), window)
  return f'Ids are those of {file}, without special tokens. {begins}'


def find(folder: str) -> str | None:
  """The name of the file of a tokenizer in a published folder, None without one."""
  return next((name for name in (_LIBRARY, _PIECES) if os.path.isfile(os.path.join(folder, name))), None)


def named(path: str) -> str:
  """What data.tokenizer says for that file."""
  return f'sentencepiece:{path}' if path.endswith(_PIECES) else path


def bytes_as_json() -> dict[str, Any]:
  """The tokenizer of bytes for the `tokenizers` library: byte-level BPE without merges, 256 in front."""
  vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
  level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': False}
  begin = {'SpecialToken': {'id': BOS, 'type_id': 0}}
  first, second = ({'Sequence': {'id': name, 'type_id': index}} for index, name in enumerate('AB'))
  return {
    'version': '1.0',
    'truncation': None,
    'padding': None,
    'added_tokens': [
      {
        'id': 256,
        'content': BOS,
        **dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False),
        'special': True,
      }
    ],
    'normalizer': None,
    'pre_tokenizer': level,
    'post_processor': {
      'type': 'TemplateProcessing',
      'single': [begin, first],
      'pair': [begin, first, second],
      'special_tokens': {BOS: {'id': BOS, 'ids': [256], 'tokens': [BOS]}},
    },
    'decoder': level,
    'model': {
      'type': 'BPE',
      **dict.fromkeys(('dropout', 'unk_token', 'continuing_subword_prefix', 'end_of_word_suffix')),
      **dict.fromkeys(('fuse_unk', 'byte_fallback', 'ignore_merges'), False),
      'vocab': {**vocabulary, BOS: 256},
      'merges': [],
    },
  }


def _letters() -> list[str]:
  """The letter by which byte-level BPE (GPT-2) writes each byte: itself where it prints, else from 256 on."""
  prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(256, 512))
  return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


def _token_of(content: bytes, tokenizer: Tokenizer) -> str | None:
  """The text of the token that begins documents; None where it is an id beyond the file's."""
  tokens = json.loads(content)
  added = {token['id']: token['content'] for token in tokens.get('added_tokens') or ()}
  vocabulary = (tokens.get('model') or {}).get('vocab')
  if isinstance(vocabulary, dict):
    added = {index: text for text, index in vocabulary.items()} | added
  return added.get(tokenizer.bos)


def _write_config(folder: str, bos: str | None, window: int) -> None:
  config = {
    'bos_token': bos,
    'clean_up_tokenization_spaces': False,
    'model_max_length': window,
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  write_json(os.path.join(folder, 'tokenizer_config.json'), config)
