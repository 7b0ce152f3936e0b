"""config.json of published checkpoints, in both directions, and which models fit which class.

A class of transformers computes one model: where ours computes anything else, it does not fit; where a
published config.json says anything that is not computed here, it is refused.
"""

import dataclasses
from typing import Any

import numpy as np

from mhc_jax.errors import ConfigError, require
from mhc_jax.model_config import ModelConfig
from mhc_jax.presets import connection_spec
from mhc_jax.sublayer_config import MLAConfig, MoEConfig
from mhc_jax.weights.tensors import Flat

# Layout -> the class that loads it. The last is read by `mhc import` alone.
CLASSES = {
  'llama': 'LlamaForCausalLM',
  'deepseek_v3': 'DeepseekV3ForCausalLM',
  'mhc': 'MhcForCausalLM',
}
MOST_EXACT_EPS = 1e-6  # what DeepSeek-V3's class has for the latent's norm, whatever its config says

# Fields of these that the layouts of transformers carry or that change no number; any other must be off.
_CARRIED = {
  ModelConfig: {
    *('width', 'depth', 'heads', 'kv_heads', 'head_dim', 'ffn_width', 'vocab_size', 'rope_theta', 'norm_eps'),
    *('connection', 'output_gain', 'dtype', 'remat', 'kernels', 'scan', 'scan_unroll', 'dense_layers'),
    *('base_width', 'base_depth', 'base_rank', 'mla', 'moe'),
  },
  MLAConfig: {'kv_rank', 'head_dim', 'rope_dim', 'value_dim', 'q_rank'},
  MoEConfig: {'experts', 'active', 'shared', 'ffn_width', 'scale', 'bias_rate'},
}
_OFF = {('MoEConfig', 'router'): 'sigmoid'}  # where that is not None


def why_not(layout: str, c: ModelConfig) -> str | None:
  """Why the model does not fit the layout, as the end of a sentence; None where it does."""
  if layout == 'mhc':
    return None
  if not _is_plain(c):
    return f'its connection, of {c.connection.streams} stream(s), is not the residual that the class adds'
  for section in (c, c.mla, c.moe):
    for field in dataclasses.fields(section) if section else ():
      value, off = getattr(section, field.name), _OFF.get((type(section).__name__, field.name))
      if field.name not in _CARRIED[type(section)] and value not in (None, False, off):
        what = field.name if dataclasses.is_dataclass(value) else f'{field.name}={value}'
        return f'{what} is nothing that the class computes'
  if layout == 'llama':
    return 'it has latent attention or experts' if c.mla or c.moe else None
  if c.mla is None:
    return 'its attention is not latent (model.mla.kv_rank)'
  if c.norm_eps != MOST_EXACT_EPS:
    return f'the class has 1e-6 for the norm of the latent, the model norm_eps={c.norm_eps}'
  if c.moe and (c.moe.experts < 2 or not c.moe.shared):
    return 'the class needs two routed experts and a shared one'
  return None


def _is_plain(c: ModelConfig) -> bool:
  """Whether every choice of the connection is the residual's; its start values count no more."""
  plain = connection_spec('residual')
  return dataclasses.replace(c.connection, init=plain.init) == plain


def choose(layout: str | None, c: ModelConfig) -> str:
  """The layout that was asked for, or the first that fits; ConfigError where that one does not."""
  require(
    c.mtp is None, 'model.mtp.depth: the module that predicts further tokens has no published names here'
  )
  if layout is None:
    return next(name for name in CLASSES if why_not(name, c) is None)
  reason = why_not(layout, c)
  require(reason is None, f'--layout {layout}: the run does not fit {CLASSES[layout]}: {reason}')
  return layout


def config_of(layout: str, c: ModelConfig, window: int, bos: int, dtype: str) -> dict[str, Any]:
  """config.json of a model that fits. window: tokens that it was trained to see; bos: begins a document."""
  config = {
    'architectures': [CLASSES[layout]],
    'model_type': layout if layout != 'mhc' else 'mhc_jax',
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': bos,
    'dtype': dtype,
    'eos_token_id': None,
    'hidden_act': 'silu',
    'hidden_size': c.width,
    'intermediate_size': c.ffn_width,
    'max_position_embeddings': window,
    'num_attention_heads': c.heads,
    'num_hidden_layers': c.depth,
    'num_key_value_heads': c.kv_heads,
    'pad_token_id': None,
    'rms_norm_eps': c.norm_eps,
    'rope_parameters': {'rope_theta': c.rope_theta, 'rope_type': 'default'},
    'rope_theta': c.rope_theta,  # where older versions look
    'tie_word_embeddings': False,
    'torch_dtype': dtype,  # likewise
    'use_cache': True,
    'vocab_size': c.vocab_size,
  }
  if c.mla is None:
    config |= {'head_dim': c.head_dim, 'mlp_bias': False}
  else:
    config |= _latent(c)
  if layout == 'mhc':
    config['hc_mult'] = c.connection.streams
  return dict(sorted(config.items()))


def _latent(c: ModelConfig) -> dict[str, Any]:
  config = {
    'head_dim': c.mla.rope_dim,
    'kv_lora_rank': c.mla.kv_rank,
    'q_lora_rank': c.mla.q_rank,
    'qk_head_dim': c.head_dim,
    'qk_nope_head_dim': c.mla.head_dim,
    'qk_rope_head_dim': c.mla.rope_dim,
    'rope_interleave': False,
    'v_head_dim': c.mla.value_dim,
    'first_k_dense_replace': c.dense_layers if c.moe else c.depth,
    'n_group': 1,
    'norm_topk_prob': True,
    'topk_group': 1,
    'num_nextn_predict_layers': 0,
  }
  moe = c.moe or MoEConfig(2, 1, 1, c.ffn_width, 1.0, 'sigmoid', 0.0)  # which no layer has
  return config | {
    'moe_intermediate_size': moe.ffn_width,
    'n_routed_experts': moe.experts,
    'n_shared_experts': moe.shared,
    'num_experts_per_tok': moe.active,
    'routed_scaling_factor': moe.scale,
  }


# What a config.json must say, where it says it; its first value is what the class has where it does not.
_MUST: dict[str, dict[str, tuple[Any, ...]]] = {
  'llama': {'attention_bias': (False,), 'mlp_bias': (False,)},
  'deepseek_v3': {
    'attention_bias': (False,),
    'n_group': (8, 1),
    'topk_group': (4, 1),
    'norm_topk_prob': (True,),
    'moe_layer_freq': (1,),
    'scoring_func': ('sigmoid',),
    'topk_method': ('noaux_tc',),
    'rms_norm_eps': (MOST_EXACT_EPS,),
  },
}
_IN_BOTH = {
  'hidden_act': ('silu',),
  'attention_dropout': (0.0,),
  'rope_scaling': (None,),
  'partial_rotary_factor': (1.0,),
}
# What says nothing about the numbers, or is looked at elsewhere.
_SAYS_NOTHING = {
  *(
    'architectures',
    'model_type',
    'transformers_version',
    'torch_dtype',
    'dtype',
    '_name_or_path',
    'auto_map',
  ),
  *('bos_token_id', 'eos_token_id', 'pad_token_id', 'use_cache', 'initializer_range', 'pretraining_tp'),
  *('output_router_logits', 'router_aux_loss_coef', 'aux_loss_alpha', 'seq_aux', 'ep_size', 'qk_head_dim'),
  *('max_position_embeddings', 'num_nextn_predict_layers', 'num_mtp_layers', 'hc_mult'),
}
_READ = {
  *('hidden_size', 'intermediate_size', 'num_attention_heads', 'num_hidden_layers', 'num_key_value_heads'),
  *('vocab_size', 'rms_norm_eps', 'rope_theta', 'rope_parameters', 'tie_word_embeddings', 'head_dim'),
}
_READ_LATENT = {
  *('kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'rope_interleave'),
  *('q_lora_rank', 'first_k_dense_replace', 'moe_intermediate_size', 'n_routed_experts', 'n_shared_experts'),
  *('num_experts_per_tok', 'routed_scaling_factor'),
}


def fields_of(said: dict[str, Any]) -> dict[str, Any]:
  """config.json of another's checkpoint -> fields of our configuration's section `model`, dotted.

  Raises ConfigError for a class that is not read, and for whatever it says that is not computed here.
  """
  kind = said.get('model_type')
  if kind not in _MUST:
    raise ConfigError(
      f'config.json is of model_type {kind!r}: read are {", ".join(_MUST)} and exports of runs'
    )
  _check(said, kind)
  heads, width = _of(said, 'num_attention_heads'), _of(said, 'hidden_size')
  require(heads >= 1 and width % heads == 0, f'config.json: {heads} heads do not divide {width}')
  fields = {
    'width': width,
    'depth': _of(said, 'num_hidden_layers'),
    'heads': heads,
    'ffn_width': _of(said, 'intermediate_size'),
    'vocab_size': _of(said, 'vocab_size'),
    'norm_eps': float(said.get('rms_norm_eps', 1e-6)),
    'rope_theta': _theta(said),
  }
  groups = said.get('num_key_value_heads')
  groups = heads if groups is None else groups
  if kind == 'llama':
    size = said.get('head_dim')
    require(
      size in (None, width // heads), f'config.json: head_dim={size} is not hidden_size / num_attention_heads'
    )
    return fields | {'kv_heads': groups}
  require(groups == heads, f'config.json: num_key_value_heads={groups} is not num_attention_heads={heads}')
  return fields | _latent_fields(said, fields['depth'])


def _latent_fields(said: dict[str, Any], depth: int) -> dict[str, Any]:
  fields = {
    'mla.kv_rank': _of(said, 'kv_lora_rank'),
    'mla.head_dim': _of(said, 'qk_nope_head_dim'),
    'mla.rope_dim': _of(said, 'qk_rope_head_dim'),
    'mla.value_dim': _of(said, 'v_head_dim'),
    'mla.q_rank': None if said.get('q_lora_rank', 1536) is None else _of(said, 'q_lora_rank'),
  }
  dense = _of(said, 'first_k_dense_replace')
  if dense >= depth:
    return fields
  return fields | {
    'moe.experts': _of(said, 'n_routed_experts'),
    'moe.active': _of(said, 'num_experts_per_tok'),
    'moe.shared': _of(said, 'n_shared_experts'),
    'moe.ffn_width': _of(said, 'moe_intermediate_size'),
    'moe.scale': float(said.get('routed_scaling_factor', 2.5)),
    'dense_layers': dense,
  }


def _of(said: dict[str, Any], name: str) -> int:
  value = said.get(name)
  require(
    isinstance(value, int) and not isinstance(value, bool),
    f'config.json: {name}={value!r} is no whole number',
  )
  return value


def _check(said: dict[str, Any], kind: str) -> None:
  """Raises ConfigError for the first field that says what is not computed here."""
  must = _MUST[kind] | _IN_BOTH
  for name, values in must.items():
    value = said.get(name, values[0])
    allowed = values[1:] or values
    default = name == 'rope_scaling' and isinstance(value, dict) and _is_default(value)
    require(value in allowed or default, f'config.json says {name}={value}: computed is {allowed[0]} alone')
  known = must.keys() | _SAYS_NOTHING | _READ | (_READ_LATENT if kind == 'deepseek_v3' else set())
  for name, value in said.items():
    if name not in known and value not in (None, False, [], {}):
      raise ConfigError(f'config.json says {name}={value!r}, which is not computed here')


def _is_default(rope: dict[str, Any]) -> bool:
  plain = rope.get('rope_type', rope.get('type', 'default')) == 'default'
  return plain and rope.get('partial_rotary_factor', 1.0) == 1.0


def _theta(said: dict[str, Any]) -> float:
  rope = said.get('rope_parameters') or {}
  require(_is_default(rope), f'config.json says rope_parameters={rope}: computed is the default rope alone')
  return float(rope.get('rope_theta', said.get('rope_theta', 10000.0)))


def settled(theirs: Flat, said: dict[str, Any]) -> Flat:
  """The tensors as the layouts of `config_of` have them: the head untied, rotary pairs half a head apart.

  Both are exact. DeepSeek-V3's rotary numbers are pairs of neighbours unless its config says otherwise; here,
  and in Llama, number k turns with k + half. Raises ConfigError for a tied head with other weights.
  """
  if said.get('tie_word_embeddings') and 'model.embed_tokens.weight' in theirs:
    embedding = theirs['model.embed_tokens.weight']
    head = theirs.get('lm_head.weight', embedding)
    require(
      np.array_equal(head, embedding), 'config.json ties lm_head.weight to an embedding that it differs from'
    )
    theirs = theirs | {'lm_head.weight': embedding}
  if said['model_type'] == 'deepseek_v3' and said.get('rope_interleave', True):
    heads, rope = said['num_attention_heads'], said['qk_rope_head_dim']
    queries = ('self_attn.q_proj.weight', 'self_attn.q_b_proj.weight')
    ends = {**dict.fromkeys(queries, heads), 'self_attn.kv_a_proj_with_mqa.weight': 1}
    for name in theirs:
      groups = next((count for end, count in ends.items() if name.endswith(end)), None)
      if groups:
        theirs = theirs | {name: _half_split(theirs[name], groups, rope)}
  return theirs


def _half_split(value: np.ndarray, groups: int, rope: int) -> np.ndarray:
  """Of each group's rows the last `rope`: the even ones first, then the odd ones."""
  require(
    value.ndim == 2 and len(value) % groups == 0 and len(value) // groups >= rope,
    'its rotary rows are missing',
  )
  rows = np.arange(len(value)).reshape(groups, -1)
  rotary = rows[:, -rope:]
  rows = np.concatenate([rows[:, :-rope], rotary[:, 0::2], rotary[:, 1::2]], 1)
  return value[rows.reshape(-1)]
