"""Text as batches of token windows: config -> **data** -> model.

corpus.py (what is read and kept as tokens) -> windows.py (how it is cut) -> batches.py (in what order).
"""

from mhc_jax.data.batches import bytes_per_token, train_batches, train_order, validation_batches
from mhc_jax.data.corpus import Corpus, corpus_of, data_folder, is_here, load_corpus, open_source
from mhc_jax.data.tokenizer import BYTES, Tokenizer
from mhc_jax.data.tokenizer_libraries import tokenizer_of, vocab_size_of
from mhc_jax.data.windows import Windows, as_batch, check_enough_tokens, windows

__all__ = [
  'BYTES',
  'Corpus',
  'Tokenizer',
  'Windows',
  'as_batch',
  'bytes_per_token',
  'check_enough_tokens',
  'corpus_of',
  'data_folder',
  'is_here',
  'load_corpus',
  'open_source',
  'tokenizer_of',
  'train_batches',
  'train_order',
  'validation_batches',
  'vocab_size_of',
  'windows',
]
