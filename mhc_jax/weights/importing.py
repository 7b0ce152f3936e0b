"""Open weights as the folder of a run: of an export, of Llama's or of DeepSeek-V3's class.

mhc import published/laptop --to runs/imported
mhc evaluate runs/imported
mhc train --workdir runs/imported

mhc import llama/ --to runs/llama --config laptop --config.data.name='parquet:texts/*.parquet' \\
  --config.optimizer.lr=1e-4 --config.duration.steps=500

An export brings its run's configuration; other weights take data and training from --config (default laptop).
The run begins anew at update 0 with these weights and fresh moments, under a run id of its own. Attention
that was over all tokens becomes sparse by --config.model.sparse.kind=topk, its index at its own start.
"""

import argparse
import functools
import os
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mhc_jax import settings
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.command import end_with_message
from mhc_jax.config import base_config
from mhc_jax.config_file import override, parse
from mhc_jax.cost import parameters
from mhc_jax.errors import ConfigError, require
from mhc_jax.log import say
from mhc_jax.paths import expand
from mhc_jax.plan import Run, configuration_of, resolve
from mhc_jax.storage import write_json
from mhc_jax.train_step import TrainState, begin, init_state
from mhc_jax.weights import tokenizer_files
from mhc_jax.weights.files import OURS, digest_of, read_object, read_tensors, whole_folder
from mhc_jax.weights.layouts import fields_of, settled
from mhc_jax.weights.tensors import INDEXER, parameters_of, published

_DATA = tuple(f'--config.data.{name}=' for name in ('name', 'column', 'tokenizer'))


def adopt(folder: str, to: str, config: str | None = None, overrides: list[str] = ()) -> Run:
  """Makes the new folder `to` of a run that begins with the weights in `folder`; returns the run.

  config: of configs/, for weights that are no export. Raises ConfigError for weights that are not read
  exactly (layouts.fields_of, tensors.parameters_of), damaged files, or a folder that is there already.
  """
  said = read_object(folder, 'config.json')
  require(said is not None, f'{folder} has no config.json: it is no folder of published weights')
  with whole_folder(to, '--to') as partial:
    ours = read_object(folder, OURS)
    made, digest = _of_export(ours, config) if ours else (_of_others(said, config), '')
    _take_tokenizer(folder, partial, to, made)
    override(made, list(overrides))
    if any(text.startswith(_DATA) for text in overrides):
      digest = ''
    tensors = read_tensors(folder)
    made.start = digest_of(tensors)
    run = resolve(made, digest)
    settings.check_precision(run.resolved['model']['dtype'])
    state = _state(run, tensors if ours else settled(tensors, said))
    write_json(os.path.join(partial, 'config.json'), run.resolved)
    with Checkpoints(os.path.join(partial, 'checkpoints')) as checkpoints:
      checkpoints.save(0, state, {})
  return run


def _of_export(ours: dict[str, Any], config: str | None) -> tuple[ConfigDict, str]:
  """(the configuration of the run that was exported, the digest of its data), on one device."""
  require(config is None, '--config is for weights that are no export: these bring their own configuration')
  try:
    resolved = ours['config']
    made, digest = configuration_of(resolved), resolved['data']['digest']
  except ConfigError:
    raise
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    raise ConfigError(f'{OURS} is not what `mhc export` writes: {error!r}') from None
  require(isinstance(digest, str), f'{OURS}: its data has no digest')
  made.mesh = base_config().mesh
  return made, digest


def _of_others(said: dict[str, Any], config: str | None) -> ConfigDict:
  """Data and training of a config, with the model that config.json describes, as a residual network."""
  fields = fields_of(said)
  made = parse(config or 'laptop', [])
  made.unlock()
  made.model, made.transfer = base_config().model, base_config().transfer
  made.model.connection.name = 'residual'
  made.arm = None
  for name, value in fields.items():
    section, _, field = name.rpartition('.')
    (made.model[section] if section else made.model)[field] = value
  window = said.get('max_position_embeddings')
  if isinstance(window, int) and window >= 1:
    made.data.seq_len = min(made.data.seq_len, window)
  return made


def _take_tokenizer(folder: str, partial: str, to: str, made: ConfigDict) -> None:
  """Copies the tokenizer's file to the run, where the configuration then finds it; bytes need none."""
  file = tokenizer_files.find(folder)
  exported_bytes = os.path.isfile(os.path.join(folder, OURS)) and made.data.tokenizer is None
  tiktoken = (made.data.tokenizer or '').startswith('tiktoken:')
  if file and not exported_bytes and not tiktoken:
    shutil.copyfile(os.path.join(folder, file), os.path.join(partial, file))
    made.data.tokenizer = tokenizer_files.named(os.path.join(os.path.abspath(to), file))


def _state(run: Run, tensors: dict[str, Any]) -> TrainState:
  """The state of a run at update 0 with these weights; an index that they lack starts as it always does."""
  init = functools.partial(init_state, model=run.model, optimizer=run.optimizer)
  key = jax.random.key(run.resolved['seed'])
  like = jax.eval_shape(init, key).params
  if run.model.indexed and not any(INDEXER in name for name in tensors):
    fresh = published(jax.jit(init)(key).params, run.model, folded=False)
    tensors = tensors | {name: value for name, value in fresh.items() if INDEXER in name}
  params = jax.tree.map(jnp.asarray, parameters_of(tensors, like, run.model))
  return begin(params, run.model, run.optimizer, run.loose)


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='mhc import', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', help='published weights: safetensors and config.json')
  parser.add_argument('--to', required=True, help='folder of a run, which is made')
  parser.add_argument('--config', help='a file of configs/, for weights that are no export (default laptop)')
  args, overrides = parser.parse_known_args(argv)
  to = expand(args.to)
  run = adopt(expand(args.folder), to, args.config, overrides)
  size = parameters(run.model)['total']
  print(f'{to}: run {run.run_id}, {size:,} parameters; mhc evaluate {to}, mhc train --workdir {to}')
  if not run.resolved['data']['digest']:
    say(f'its data is {run.resolved["data"]["name"]}, as --config.data.name says')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
