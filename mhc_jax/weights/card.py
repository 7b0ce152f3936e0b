"""The model card: README.md of an export, from what the run's files say and nothing else."""

import json
from typing import Any

from mhc_jax import cost
from mhc_jax.config import NOT_IN_ID
from mhc_jax.model_config import ModelConfig
from mhc_jax.plan import PLACED
from mhc_jax.weights.layouts import CLASSES

_UNKNOWN = 'not known'


def text(
  resolved: dict[str, Any], model: ModelConfig, facts: dict[str, Any], layout: str, dtype: str, ids: str
) -> str:
  """README.md with the hub's header. facts: of exporting.facts_of; ids: how texts become ids."""
  data, losses = resolved['data'], facts['losses']
  kind, _, _ = data['name'].partition(':')
  corpus = kind if kind in PLACED else data['name']
  sizes = cost.parameters(model)
  losses = '; '.join(f'{name} {value:.4f}' for name, value in sorted(losses.items())) or _UNKNOWN
  connection = resolved['model']['connection']
  rows = {
    'class': f'`{CLASSES[layout]}`',
    'connection': f'{connection["name"]} ({connection["preset"]}), {model.connection.streams} stream(s)',
    'parameters': f'{sizes["total"]:,}, active in a token {sizes["active"]:,}',
    'data': f'{corpus}, digest `{data["digest"] or _UNKNOWN}`, windows of {data["seq_len"]} tokens',
    'trained on': f'{facts["tokens"]:,} tokens in {facts["step"]:,} updates of {data["batch_size"]} windows',
    'training FLOPs': f'{facts["flops"]:.3e}, as the project counts them',
    'losses': f'{losses}; losses are nats a token, that of training of the last batch',
    'began with': f'weights of digest `{facts["start"]}`' if facts['start'] else 'random weights',
    'numbers': f'{dtype}, from {facts["parameter_dtype"]} parameters',
    'run': f'`{facts["run_id"]}`, state {facts["state"]}',
    'code': f'mhc_jax, revision `{facts["git_revision"] or _UNKNOWN}`',
  }
  table = '\n'.join(f'| {name} | {value} |' for name, value in rows.items())
  limits = '\n'.join(f'- {line}' for line in _limits(model, facts, layout, dtype, data['seq_len']))
  return f"""---
library_name: {'transformers' if layout != 'mhc' else 'mhc_jax'}
tags:
- mhc_jax
---

# {resolved['arm']}, a model of {sizes['total']:,} parameters

| | |
|---|---|
{table}

## Licence

Not chosen. Whoever publishes this folder decides it, with the licences of the training data in mind, and
writes it into the header above (`license:`).

## How to load it

{_loading(layout)}

## Texts and ids

{ids}

## Known limits

{limits}

## Settings of the training

```json
{json.dumps(_settings(resolved), indent=1, sort_keys=True)}
```
"""


def _loading(layout: str) -> str:
  ours = """```
mhc import THIS_FOLDER --to runs/imported
mhc evaluate runs/imported
mhc train --workdir runs/imported    # goes on from these weights, with fresh moments
```"""
  if layout == 'mhc':
    return (
      'No class of transformers computes this model. `mhc import` does, exactly; `model.safetensors` has '
      "Llama's or DeepSeek-V3's names for sublayers and DeepSeek-V4's for connections (`hc_attn_fn`, "
      f'`hc_attn_base`, `hc_attn_scale`, ...).\n\n{ours}'
    )
  return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained('THIS_FOLDER')
```

Or, to go on training:

{ours}"""


def _limits(model: ModelConfig, facts: dict[str, Any], layout: str, dtype: str, window: int) -> list[str]:
  lines = [
    f'A research model: trained on windows of {window} tokens, never beyond, and on no instructions.',
    'Its output is text as the corpus has it, with whatever errors and biases the corpus has.',
    'There is no token for the end of a text.',
  ]
  if dtype != facts['parameter_dtype']:
    lines.append(f'Rounded to {dtype}: logits differ from those of the run.')
  if facts['folded']:
    lines.append(
      'Width and depth transfer is folded into the weights: an imported run has none, and its learning '
      'rates are those of its own size.'
    )
  if layout != 'mhc' and str(model.dtype.dtype) == 'bfloat16':
    lines.append(
      'Trained with activations in bfloat16; another dtype of activations gives slightly other logits.'
    )
  return lines


def _settings(resolved: dict[str, Any]) -> dict[str, Any]:
  """What decides the run's numbers, less what is off."""

  def kept(node: Any, path: tuple[str, ...]) -> Any:
    if not isinstance(node, dict):
      return node
    inner = {
      key: kept(value, (*path, key))
      for key, value in node.items()
      if (*path, key) not in (*NOT_IN_ID, ('data', 'name'))
    }
    return {key: value for key, value in inner.items() if value not in (None, {})}

  return kept(resolved, ())
