"""The last checkpoint of a run as open weights: safetensors, config.json, a tokenizer and a model card.

mhc export runs/laptop --to published/laptop
mhc export runs/residual --to published/residual --layout llama
mhc export runs/residual --to published/half --dtype bfloat16
"""

import argparse
import os
import sys
from typing import Any

import jax
import numpy as np

from mhc_jax import cost, settings
from mhc_jax.command import end_with_message
from mhc_jax.data import tokenizer_of
from mhc_jax.evaluate import restore
from mhc_jax.model_config import ModelConfig
from mhc_jax.paths import expand
from mhc_jax.plan import run_id
from mhc_jax.storage import write_json, write_text
from mhc_jax.weights import card, tokenizer_files
from mhc_jax.weights.files import OURS, SINGLE, whole_folder, write_tensors
from mhc_jax.weights.layouts import CLASSES, choose, config_of
from mhc_jax.weights.tensors import Flat, published
from mhc_jax.workdir import read_status

DTYPES = ('bfloat16',)  # what parameters can be rounded to


def export(workdir: str, to: str, layout: str | None = None, dtype: str | None = None) -> str:
  """Writes the newest undamaged checkpoint of a run into the new folder `to`; returns the layout (CLASSES).

  layout: None is the first that fits. dtype: None is the parameters' own, float32, or float64 of a float64
  run; 'bfloat16' rounds. A checkpoint of any mesh will do; parameters go through the memory of this machine.
  Raises ConfigError where there is no checkpoint, the run does not fit the layout, or `to` is there already.
  """
  with whole_folder(to, '--to') as folder:
    resolved, model, step, params, extra = restore(workdir, device=_memory())
    layout = choose(layout, model)
    folded = layout != 'mhc'
    tensors = published(params, model, folded)
    facts = facts_of(workdir, resolved, model, step, extra)
    facts['parameter_dtype'] = next(iter(tensors.values())).dtype.name
    facts['folded'] = folded and (model.width_ratio, model.depth_ratio, model.base_width) != (1.0, 1.0, None)
    dtype = dtype or facts['parameter_dtype']
    write_tensors(os.path.join(folder, SINGLE), _rounded(tensors, dtype))
    data, window = resolved['data'], resolved['data']['seq_len']
    bos = tokenizer_of(data['tokenizer']).bos
    write_json(os.path.join(folder, 'config.json'), config_of(layout, model, window, bos, dtype))
    ids = tokenizer_files.write(folder, data['tokenizer'], window)
    write_text(os.path.join(folder, 'README.md'), card.text(resolved, model, facts, layout, dtype, ids))
    if folded:
      resolved = resolved | {'transfer': dict.fromkeys(resolved['transfer'])}
    write_json(os.path.join(folder, OURS), {'layout': layout, **facts, 'config': resolved})
  return layout


def _memory() -> jax.Device | None:
  """This machine's memory, which holds what a mesh of accelerators held; None where JAX has no CPU."""
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS=cuda
    return None


def facts_of(
  workdir: str, resolved: dict[str, Any], model: ModelConfig, step: int, extra: dict[str, Any]
) -> dict[str, Any]:
  """What a model card says of the run up to that step, as plain values."""
  status, data = read_status(workdir), resolved['data']
  tokens = step * data['batch_size'] * data['seq_len']
  return {
    'run_id': run_id(resolved),
    'state': status['state'],
    'git_revision': status.get('git_revision'),
    'step': step,
    'tokens': tokens,
    'flops': tokens * cost.train_flops_per_token(model, data['seq_len']),
    'losses': extra.get('final') or {},
    'start': resolved.get('start'),
  }


def _rounded(tensors: Flat, dtype: str) -> Flat:
  return {name: value.astype(np.dtype(dtype), copy=False) for name, value in tensors.items()}


@settings.held()
def main(argv: list[str] | None = None) -> int:
  """The command line; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog='mhc export', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('workdir', help='folder of a run')
  parser.add_argument('--to', required=True, help='the folder that is made')
  parser.add_argument(
    '--layout',
    choices=CLASSES,
    help='llama (one stream), deepseek_v3 (one stream with latent attention), or mhc, which mhc import '
    'reads; by default the first that fits',
  )
  parser.add_argument('--dtype', choices=DTYPES, help='round to it; by default exact')
  args = parser.parse_args(argv)
  to = expand(args.to)
  layout = export(expand(args.workdir), to, args.layout, args.dtype)
  print(f'{to}: {CLASSES[layout]}, {"for mhc import" if layout == "mhc" else "loads in transformers"}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
