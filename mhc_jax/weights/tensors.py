"""Which parameter of ours is which published tensor: one table, read in both directions.

Names and shapes are those of transformers' Llama and DeepSeek-V3, which store maps as (out, in), of the index
of sparse attention V3.2's, and of connections DeepSeek-V4's (hc_attn_fn, hc_attn_base, hc_attn_scale, hc_ffn_
and hc_head_ likewise): rows of fn and base are pre | post | res, and H_res is stored as comb, which V4
applies transposed. What these do not have keeps our name, behind hc_attn_ or hc_ffn_, and our shape.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mhc_jax.errors import ConfigError, require
from mhc_jax.model_config import ModelConfig
from mhc_jax.parameters import path_name

Flat = dict[str, np.ndarray]  # arrays by path or by published name

# (our parameters, the published tensor, how). A row that is not there does not apply to the model.
# 'same': as it is; 'matrix': (in, *out) as (out, in); 'expert': a matrix of each of the experts; 'vectors':
# side by side; 'numbers': one after another; 'fn': a generator (n, C, K) as (K, n C). The last n^2 rows of
# 'mixing_fn' and 'mixing_vectors' are those of comb where H_res has a coordinate for every entry.
Row = tuple[tuple[str, ...], str, str]
ENDS: tuple[Row, ...] = (
  (('embedding',), 'model.embed_tokens.weight', 'same'),
  (('final_norm',), 'model.norm.weight', 'same'),
  (('unembedding',), 'lm_head.weight', 'matrix'),
  (('collapse/phi',), 'hc_head_fn', 'fn'),
  (('collapse/b',), 'hc_head_base', 'vectors'),
  (('collapse/alpha',), 'hc_head_scale', 'numbers'),
)
INDEXER = '.indexer.'  # in the names of an index's tensors
_MAPS = {
  'attention/query': 'self_attn.q_proj',
  'attention/key': 'self_attn.k_proj',
  'attention/value': 'self_attn.v_proj',
  'attention/output': 'self_attn.o_proj',
  'attention/kv_down': 'self_attn.kv_a_proj_with_mqa',
  'attention/kv_up': 'self_attn.kv_b_proj',
  'attention/q_down': 'self_attn.q_a_proj',
  'attention/q_up': 'self_attn.q_b_proj',
  'attention/index/query': 'self_attn.indexer.wq',
  'attention/index/query_up': 'self_attn.indexer.wq_b',
  'attention/index/key': 'self_attn.indexer.wk',
  'attention/index/weights': 'self_attn.indexer.weights_proj',
  'feed_forward/gate': 'mlp.gate_proj',
  'feed_forward/up': 'mlp.up_proj',
  'feed_forward/down': 'mlp.down_proj',
  'feed_forward/shared_gate': 'mlp.shared_experts.gate_proj',
  'feed_forward/shared_up': 'mlp.shared_experts.up_proj',
  'feed_forward/shared_down': 'mlp.shared_experts.down_proj',
}
# What the table does not name of these keeps our name behind theirs: a new connection needs no row.
_KEPT = {
  'attention_connection': 'hc_attn',
  'feed_forward_connection': 'hc_ffn',
  'expansion': 'hc_expansion',
  'collapse': 'hc_head',
}


def _connection(ours: str, theirs: str) -> tuple[Row, ...]:
  parts = ('pre', 'post', 'res')
  return (
    ((f'{ours}/phi',), f'{theirs}_fn', 'mixing_fn'),
    (tuple(f'{ours}/b_{part}' for part in parts), f'{theirs}_base', 'mixing_vectors'),
    (tuple(f'{ours}/alpha_{part}' for part in parts), f'{theirs}_scale', 'numbers'),
  )


LAYER: tuple[Row, ...] = (
  (('attention/norm',), 'input_layernorm.weight', 'same'),
  (('attention/latent_norm',), 'self_attn.kv_a_layernorm.weight', 'same'),
  (('attention/key_norm',), 'self_attn.k_input_layernorm.weight', 'same'),
  (('attention/value_norm',), 'self_attn.v_input_layernorm.weight', 'same'),
  (('attention/query_norm',), 'self_attn.q_a_layernorm.weight', 'same'),
  (('attention/index/key_norm',), 'self_attn.indexer.k_norm.weight', 'same'),
  (('attention/index/key_norm_bias',), 'self_attn.indexer.k_norm.bias', 'same'),
  (('feed_forward/norm',), 'post_attention_layernorm.weight', 'same'),
  *(((f'{ours}/w',), f'{theirs}.weight', 'matrix') for ours, theirs in _MAPS.items()),
  *(((f'{ours}/{part}',), f'{theirs}.{part}', 'same') for ours, theirs in _MAPS.items() for part in 'uv'),
  (('feed_forward/router',), 'mlp.gate.weight', 'matrix'),
  (('feed_forward/router_bias',), 'mlp.gate.e_score_correction_bias', 'same'),
  *(
    ((f'feed_forward/expert_{name}',), f'mlp.experts.{{expert}}.{name}_proj.weight', 'expert')
    for name in ('gate', 'up', 'down')
  ),
  *_connection('attention_connection', 'hc_attn'),
  *_connection('feed_forward_connection', 'hc_ffn'),
)


class Tensor(NamedTuple):
  """A published tensor: where its numbers lie in our parameters, and how they are turned."""

  name: str
  places: tuple[tuple[str, tuple[int, ...]], ...]  # (path, index into its first axes)
  how: str
  factor: float  # of the published numbers over ours


def folds(c: ModelConfig) -> dict[str, float]:
  """Factors that width and depth transfer (CompleteP) leaves in the computation, by parameter.

  Published classes know none: here logits and the router's are divided by width_ratio, sublayers by
  depth_ratio, and attention is scaled by attention_scale instead of 1 / sqrt(head_dim).
  """
  scale = 1.0 if c.base_width is None else c.attention_scale * math.sqrt(c.head_dim)
  outputs = (
    'attention/output/w',
    'feed_forward/down/w',
    'feed_forward/shared_down/w',
    'feed_forward/expert_down',
  )
  return {
    'unembedding': 1 / c.width_ratio,
    'feed_forward/router': 1 / c.width_ratio,
    **dict.fromkeys(('attention/query/w', 'attention/q_up/w'), scale),
    **dict.fromkeys(outputs, 1 / c.depth_ratio),
  }


def tensors_of(shapes: Mapping[str, tuple[int, ...]], c: ModelConfig, folded: bool) -> list[Tensor]:
  """The published tensors of a model whose parameters have these shapes.

  folded: with what transfer leaves in the computation (folds). Raises ConfigError for a parameter that the
  table does not have: nothing is left out.
  """
  factors, tensors, used = folds(c) if folded else {}, [], set()

  def add(rows: tuple[Row, ...], prefix: str, index: tuple[int, ...], before: str) -> None:
    for ours, name, how in rows:
      paths = [prefix + path for path in ours if prefix + path in shapes]
      if not paths:
        continue
      used.update(paths)
      factor = factors.get(ours[0], 1.0)
      if how == 'expert':
        for expert in range(shapes[paths[0]][len(index)]):
          places = ((paths[0], (*index, expert)),)
          tensors.append(Tensor(before + name.format(expert=expert), places, 'matrix', factor))
      else:
        tensors.append(Tensor(before + name, tuple((path, index) for path in paths), how, factor))
    named = {prefix + path for ours, _, _ in rows for path in ours}
    for path in shapes:
      group, _, name = path.removeprefix(prefix).partition('/')
      if path.startswith(prefix) and path not in named and group in _KEPT:
        used.add(path)
        tensors.append(Tensor(f'{before}{_KEPT[group]}_{name}', ((path, index),), 'same', 1.0))

  add(ENDS, '', (), '')
  for layer in range(c.depth):
    stacked = c.scan and layer >= c.dense_layers
    prefix, index = ('layers/', (layer - c.dense_layers,)) if stacked else (f'layer_{layer}/', ())
    add(LAYER, prefix, index, f'model.layers.{layer}.')
  unknown = sorted(shapes.keys() - used)
  require(not unknown, f'the parameter {"".join(unknown[:1])} has no published name: such a model stays here')
  return tensors


def flat(params: Any) -> dict[str, Any]:
  """A tree of parameters by path."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def published(params: Any, c: ModelConfig, folded: bool) -> Flat:
  """Parameters -> published tensors by name, contiguous, in the parameters' dtype.

  folded: see tensors_of. What is folded is multiplied in float64 and rounded once.
  """
  ours = {path: np.asarray(leaf) for path, leaf in flat(params).items()}
  tensors = tensors_of({path: leaf.shape for path, leaf in ours.items()}, c, folded)
  theirs = {}
  for tensor in tensors:
    value = _turned(tensor.how, _views(ours, tensor), c)
    if tensor.factor != 1.0:
      value = (value.astype(np.float64) * tensor.factor).astype(value.dtype)
    theirs[tensor.name] = np.ascontiguousarray(value).reshape(
      value.shape
    )  # which has no numbers without axes
  return theirs


def parameters_of(theirs: Flat, like: Any, c: ModelConfig) -> Any:
  """Published tensors -> parameters like `like`: the inverse of `published` without folds.

  Raises ConfigError for a tensor that is missing, unknown, of another shape, or of more digits than `like`.
  """
  shapes = flat(like)
  tensors = tensors_of({path: leaf.shape for path, leaf in shapes.items()}, c, folded=False)
  names = {tensor.name for tensor in tensors}
  for what, others in (('lacks', names - theirs.keys()), ('has also', theirs.keys() - names)):
    if others:
      more = f' and {len(others) - 1} more' * (len(others) > 1)
      raise ConfigError(f'the checkpoint {what} the tensor {min(others)}{more}: it is of another model')
  ours = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()}
  for tensor in tensors:
    views, value = _views(ours, tensor), theirs[tensor.name]
    shape = _turned(tensor.how, views, c).shape
    require(
      value.shape == shape,
      f'the tensor {tensor.name} has the shape {list(value.shape)}, the model needs {list(shape)}',
    )
    require(
      value.dtype.itemsize <= views[0].dtype.itemsize,
      f'the tensor {tensor.name} is {value.dtype}: read with JAX_ENABLE_X64=1 --config.model.dtype=float64',
    )
    _turn_back(tensor.how, value, views, c)
  return jax.tree_util.tree_map_with_path(lambda path, _: ours[path_name(path)], like)


def _views(ours: Flat, tensor: Tensor) -> list[np.ndarray]:
  return [ours[path][(*index, ...)] for path, index in tensor.places]


def _order(how: str, count: int, c: ModelConfig) -> np.ndarray:
  """Row of comb's layout -> row of ours, and the other way round: a transposition is its own inverse.

  A constraint with `transpose` (V4's) has comb's coordinates itself.
  """
  rows, n, spec = np.arange(count), c.connection.units, c.connection
  entries = spec.parts['res'] if 'res' in spec.parts else 0
  joint = how == 'mixing_vectors' or (spec.scope == 'joint' and count == sum(spec.parts.values()))
  is_comb = spec.constraint.params.get('transpose') is True
  if how.startswith('mixing') and entries == n * n and joint and not is_comb:
    rows[-entries:] = rows[-entries:].reshape(n, n).T.reshape(-1)
  return rows


def _turned(how: str, parts: list[np.ndarray], c: ModelConfig) -> np.ndarray:
  """Our arrays as the published tensor."""
  match how:
    case 'same':
      return parts[0]
    case 'matrix':
      return parts[0].reshape(len(parts[0]), -1).T
    case 'numbers':
      return np.stack(parts)
    case 'vectors' | 'mixing_vectors':
      value = np.concatenate(parts)
    case 'fn' | 'mixing_fn':
      value = parts[0].transpose(2, 0, 1).reshape(parts[0].shape[2], -1)
  return value[_order(how, len(value), c)]


def _turn_back(how: str, value: np.ndarray, views: list[np.ndarray], c: ModelConfig) -> None:
  """Writes the published tensor into views of our arrays."""
  match how:
    case 'same':
      views[0][...] = value
    case 'matrix':
      views[0][...] = value.T.reshape(views[0].shape)
    case 'numbers':
      for view, number in zip(views, value, strict=True):
        view[...] = number
    case 'vectors' | 'mixing_vectors':
      value = value[_order(how, len(value), c)]
      for view, part in zip(views, np.split(value, np.cumsum([len(v) for v in views])[:-1]), strict=True):
        view[...] = part
    case 'fn' | 'mixing_fn':
      streams, width, outputs = views[0].shape
      value = value[_order(how, len(value), c)].reshape(outputs, streams, width)
      views[0][...] = value.transpose(1, 2, 0)
