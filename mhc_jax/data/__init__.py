"""Text as batches of token windows: config -> **data** -> model.

corpus.py (what to read) -> windows.py (how it is cut) -> batches.py (in what order).
"""

from mhc_jax.data.batches import train_batches, train_order, validation_batches
from mhc_jax.data.corpus import Corpus, is_here, load_corpus
from mhc_jax.data.tokenizer import BYTES, Tokenizer, tokenizer_of
from mhc_jax.data.windows import Windows, as_batch, check_enough_tokens, windows

__all__ = [
  'BYTES',
  'Corpus',
  'Tokenizer',
  'Windows',
  'as_batch',
  'check_enough_tokens',
  'is_here',
  'load_corpus',
  'tokenizer_of',
  'train_batches',
  'train_order',
  'validation_batches',
  'windows',
]
