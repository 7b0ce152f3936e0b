"""`mhc tokenizer train`: a byte-level BPE tokenizer trained on a corpus, as a tokenizer.json.

mhc tokenizer train --data 'parquet:texts/*.parquet' --vocab 4096 --out texts.json
mhc train --config laptop --workdir runs/mine --config.data.name='parquet:texts/*.parquet' \\
  --config.data.tokenizer=texts.json

The same text, size and version of `tokenizers` give the same file. Of the training split alone: validation is
not looked at.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from mhc_jax import storage
from mhc_jax.command import end_with_message
from mhc_jax.config_file import parse
from mhc_jax.data import data_folder, open_source, tokenizer_of
from mhc_jax.data.progress import reading
from mhc_jax.data.source import Source, each
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.paths import expand

BOS = '<|bos|>'
SAMPLE_BYTES = 1e9  # more text changes little of a vocabulary
# GPT-4's cut of text into words, but with single digits.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def train(source: Source, vocab_size: int, sample_bytes: float = SAMPLE_BYTES) -> str:
  """The tokenizer.json of vocab_size tokens, BOS among them, from the first sample_bytes of training text."""
  library = _library()
  made = library.Tokenizer(library.models.BPE())
  made.pre_tokenizer = library.pre_tokenizers.Sequence(
    [
      library.pre_tokenizers.Split(library.Regex(_WORDS), 'isolated'),
      library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )
  made.decoder = library.decoders.ByteLevel()
  trainer = library.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[BOS],
    initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(_texts(source, sample_bytes), trainer)
  return made.to_str(pretty=True)


def _texts(source: Source, sample_bytes: float) -> Iterator[list[str]]:
  read = 0
  batches = source.read(None, False)
  for batch in reading(batches, f'reading {source.slug}', min(source.size, round(sample_bytes)), source.unit):
    pairs = zip(each(batch.text, batch.ends), batch.held_out.tolist(), strict=True)
    texts = [text for text, held in pairs if not held]
    yield [text.decode('utf-8', errors='replace') for text in texts]
    read += sum(map(len, texts))
    if read >= sample_bytes:
      return


def _library() -> ModuleType:
  try:
    return importlib.import_module('tokenizers')
  except ImportError:
    raise ConfigError('mhc tokenizer needs the package tokenizers: pip install "mhc_jax[text]"') from None


def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='mhc tokenizer', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  train_parser = parser.add_subparsers(dest='command', required=True).add_parser(
    'train', help='train a tokenizer on a corpus'
  )
  train_parser.add_argument('--data', help='the corpus, as data.name has it')
  train_parser.add_argument('--config', help='a config file whose corpus is meant')
  train_parser.add_argument('--column', help='of a table (default text)')
  train_parser.add_argument('--data-dir', help='where corpora are kept')
  train_parser.add_argument('--vocab', type=int, default=4096, help='number of tokens (default 4096)')
  train_parser.add_argument('--sample', type=float, default=SAMPLE_BYTES, help='bytes of text (default 1e9)')
  train_parser.add_argument('--out', required=True, help='the tokenizer.json that is written')
  args = parser.parse_args(argv)
  require((args.data is None) != (args.config is None), 'give exactly one of --data and --config')
  require(258 <= args.vocab <= 2**24, f'--vocab {args.vocab}: from 258 (bytes, BOS, a merge) to {2**24}')
  require(args.sample >= 1, f'--sample {args.sample:g}: at least one byte')
  _library()
  out = expand(args.out)
  name, folder, column = args.data, args.data_dir, args.column
  if args.config:
    data = parse(args.config, []).data
    name, folder, column = data.name, folder or data.dir, column or data.column
  if not storage.is_remote(out):
    require(os.path.isdir(os.path.dirname(os.path.abspath(out))), f'--out {out}: there is no such folder')
  text = train(open_source(name, data_folder(folder), column), args.vocab, args.sample)
  found = len(json.loads(text)['model']['vocab'])
  storage.write_text(out, text)
  if found < args.vocab:
    say(f'warning: the text yields {found} tokens, fewer than --vocab {args.vocab}')
  print(f'{out}: {tokenizer_of(out).name}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
