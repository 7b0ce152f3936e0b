"""The transformer: embedding -> n streams -> scanned blocks -> one stream -> unembedding.

Flax Linen is a container of parameters here; the mathematics is in layers/ and hyper_connection.py.
Axes: N/M streams out/in, B batch, T/S time of queries/keys, D width, H heads, G key-value heads, K head dim,
F feed-forward width, E experts, R weight or latent rank, V vocabulary, L layers. Pre-norm blocks of two
sublayers, attention (grouped-query or latent) and feed-forward (SwiGLU or a mixture of them), each with its
own connection.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax import hyper_connection as hc
from mhc_jax.config import ModelConfig
from mhc_jax.layers import moe
from mhc_jax.layers.attention import attention, causal_mask
from mhc_jax.layers.norm import rms_norm
from mhc_jax.layers.rope import rope


def _normal(std: float):
  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.result_type(float))

  return init


def _ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, jnp.result_type(float))


def _zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.result_type(float))


class Linear(nn.Module):
  """x W with W of shape (in, *out), or W = U V of rank `rank` with the same variance 1 / in."""

  shape: tuple[int, ...]
  rank: int | None
  dtype: Any
  gain: float = 1.0  # multiplies the standard deviation at the start

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, outputs = self.shape[0], self.shape[1:]
    # Tokens flattened: XLA:CPU then folds the weight gradient's transposes into the product.
    y = x.reshape(-1, inputs)
    if self.rank is None:
      w = self.param('w', _normal(self.gain * inputs**-0.5), self.shape)
      y = y @ w.astype(self.dtype).reshape(inputs, -1)
    else:
      u = self.param('u', _normal(self.gain * inputs**-0.5), (inputs, self.rank))
      v = self.param('v', _normal(self.rank**-0.5), (self.rank, *outputs))
      y = (y @ u.astype(self.dtype)) @ v.astype(self.dtype).reshape(self.rank, -1)
    return y.reshape(*x.shape[:-1], *outputs)


class Attention(nn.Module):
  """RMSNorm and grouped-query attention: (B, T, D) -> (B, T, D)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    c = self.config
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype)
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    k_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='key')(x_BTD)
    v_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='value')(x_BTD)
    q_BTHK, k_BSGK = rope(q_BTHK, c.rope_theta), rope(k_BSGK, c.rope_theta)
    out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, c.attention_scale)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * c.head_dim)
    return linear((c.heads * c.head_dim, c.width), gain=c.output_gain, name='output')(out_BTE)


class LatentAttention(nn.Module):
  """RMSNorm and multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): (B, T, D) -> (B, T, D).

  Keys and values of all heads are made from one normalised latent of kv_rank numbers per token. Position is
  in rope_dim more numbers of every query and key; the key's are the same for all heads.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    c, m = self.config, self.config.mla
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype)
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    latent_norm_R = self.param('latent_norm', _ones, (m.kv_rank,))
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    q_BTHK, q_rope_BTHK = jnp.split(q_BTHK, [m.head_dim], -1)
    latent_BSR = linear((c.width, m.kv_rank + m.rope_dim), name='kv_down')(x_BTD)
    latent_BSR, k_rope_BSK = jnp.split(latent_BSR, [m.kv_rank], -1)
    latent_BSR = rms_norm(latent_BSR, latent_norm_R, c.norm_eps)
    kv_BSHK = linear((m.kv_rank, c.heads, m.head_dim + m.value_dim), name='kv_up')(latent_BSR)
    k_BSHK, v_BSHK = jnp.split(kv_BSHK, [m.head_dim], -1)
    k_rope_BSHK = jnp.broadcast_to(rope(k_rope_BSK[:, :, None], c.rope_theta), q_rope_BTHK.shape)
    q_BTHK = jnp.concatenate([q_BTHK, rope(q_rope_BTHK, c.rope_theta)], -1)
    k_BSHK = jnp.concatenate([k_BSHK, k_rope_BSHK], -1)
    out_BTHK = attention(q_BTHK, k_BSHK, v_BSHK, mask_BTS, c.attention_scale)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * m.value_dim)
    return linear((c.heads * m.value_dim, c.width), gain=c.output_gain, name='output')(out_BTE)


def _swiglu(x_BTD: jax.Array, width: int, c: ModelConfig, prefix: str = '') -> jax.Array:
  """SwiGLU (arXiv 2002.05202) of that width; its maps belong to the calling module."""
  linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype)
  gate_BTF = linear((c.width, width), name=f'{prefix}gate')(x_BTD)
  up_BTF = linear((c.width, width), name=f'{prefix}up')(x_BTD)
  hidden_BTF = jax.nn.silu(gate_BTF) * up_BTF
  return linear((width, c.width), gain=c.output_gain, name=f'{prefix}down')(hidden_BTF)


class FeedForward(nn.Module):
  """RMSNorm and SwiGLU: (B, T, D) -> (B, T, D)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    return _swiglu(x_BTD, c.ffn_width, c)


class MixtureOfExperts(nn.Module):
  """RMSNorm and experts (layers/moe.py): (B, T, D) -> (B, T, D), and what the routing did."""

  config: ModelConfig
  mesh: Mesh | None
  record: bool

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """load_E: tokens per routed expert; with `record` also margin_BT (moe.margin)."""
    c, m = self.config, self.config.moe
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    # Output-like, as the unembedding: wide in, E numbers out, whatever the width.
    router_DE = self.param('router', _normal(1 / (c.base_width or c.width)), (c.width, m.experts))
    bias_E = self.param('router_bias', _zeros, (m.experts,))
    into, out = (m.experts, c.width, m.ffn_width), (m.experts, m.ffn_width, c.width)
    weights = [
      self.param('expert_gate', _normal(c.width**-0.5), into),
      self.param('expert_up', _normal(c.width**-0.5), into),
      self.param('expert_down', _normal(c.output_gain * m.ffn_width**-0.5), out),
    ]
    wide = jnp.promote_types(c.dtype, jnp.float32)
    logits_BTE = jnp.einsum('btd,de->bte', x_BTD.astype(wide), router_DE.astype(wide)) / c.width_ratio
    routing = moe.route(logits_BTE, bias_E, m)
    y_BTD = moe.experts(x_BTD, routing, *(w.astype(c.dtype) for w in weights), self.mesh)
    if m.shared:
      y_BTD += _swiglu(x_BTD, m.shared * m.ffn_width, c, 'shared_')
    found = {'load_E': moe.expert_load(routing.index_BTA, m.experts)}
    if self.record:
      found['margin_BT'] = moe.margin(logits_BTE, bias_E, m)
    return y_BTD, found


class Block(nn.Module):
  """Two sublayers on the streams: x <- H_res x + H_post^T F(H_pre x) for F = attention, feed-forward."""

  config: ModelConfig
  record: bool  # also return each sublayer's coefficients and stream products, for diagnostics
  mesh: Mesh | None = None
  dense: bool = False  # a leading layer: no experts

  @nn.compact
  def __call__(self, carry, layer: jax.Array, mask_BTS: jax.Array):
    """carry: the streams, and in single-pass order the read map of the sublayer before, else None."""
    (x_NBTD, earlier_NBT), c, records = carry, self.config, []
    attend = (Attention if c.mla is None else LatentAttention)(c, name='attention')
    has_experts = c.moe is not None and not self.dense
    feed_forward = (
      MixtureOfExperts(c, self.mesh, self.record, name='feed_forward')
      if has_experts
      else FeedForward(c, name='feed_forward')
    )
    sublayers = {
      'attention': functools.partial(attend, mask_BTS=mask_BTS),
      'feed_forward': feed_forward,
    }
    for index, (name, sublayer) in enumerate(sublayers.items()):
      params = self._connection(f'{name}_connection', 2 * layer + index)
      own = hc.generate(params, x_NBTD, c.connection, 2 * layer + index)
      pre_NBT = earlier_NBT if c.connection.single_pass else own.pre_NBT
      records.append({})
      if self.record:
        coords = hc.coordinates(params, x_NBTD, c.connection)
        records[-1] |= {**own._asdict(), 'pre_NBT': pre_NBT, 'coords': coords}
      y_BTD = sublayer(hc.read(pre_NBT, x_NBTD))
      if sublayer is feed_forward and has_experts:
        y_BTD, found = y_BTD
        records[-1] |= found
      x_NBTD = hc.write(own.res_NMBT, own.post_NBT, x_NBTD, y_BTD / c.depth_ratio)
      earlier_NBT = own.pre_NBT if c.connection.single_pass else None
      if self.record:
        records[-1]['gram_NMBT'] = _gram(x_NBTD)
    return (x_NBTD, earlier_NBT), records

  def _connection(self, name: str, sublayer: jax.Array) -> dict[str, jax.Array]:
    c = self.config
    if not c.connection.has_params:
      return {}
    # phi is output-like (infinite fan-in, finite fan-out): its start falls as 1 / width, not 1 / sqrt(width).
    init = functools.partial(hc.init_params, spec=c.connection, width=c.width, phi_scale=c.width_ratio**-0.5)
    return self.param(name, lambda key: init(key, sublayer=sublayer))


def _gram(x_NBTD: jax.Array) -> jax.Array:
  """Inner products of the streams at every token, float32 or more."""
  x_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, jnp.float32))
  return jnp.einsum('nbtd,mbtd->nmbt', x_NBTD, x_NBTD)


class Transformer(nn.Module):
  """Token ids (B, T) and document numbers (B, T) -> logits (B, T, V) in float32, and records.

  Records: for attention and feed-forward a dict of what all layers found, (L, ...) each: always the loads of
  experts, load_LE, of the layers that have them, and coefficients and stream products where asked for.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array, record: bool = False):
    c = self.config
    # Flax numbers the keys of a module's own parameters: those that all arms have come first, to start alike.
    embedding_VD = self.param('embedding', _normal(1.0), (c.vocab_size, c.width))
    final_norm_D = self.param('final_norm', _ones, (c.width,))
    # Small at the start, so that the first loss is close to log V; constant in width (CompleteP).
    std = 1 / (c.base_width or c.width)
    unembedding_DV = self.param('unembedding', _normal(std), (c.width, c.vocab_size))
    head = self._ends('collapse', hc.init_collapse)
    copies = self._ends('expansion', hc.init_expand)
    x_BTD = embedding_VD[tokens_BT].astype(c.dtype)
    x_NBTD = hc.expand(x_BTD, c.connection.streams, c.connection.expansion, copies)
    first_NBT = hc.one_hot(0, x_NBTD) if c.connection.single_pass else None
    (x_NBTD, last_NBT), records = self._layers((x_NBTD, first_NBT), causal_mask(segments_BT), record)
    x_BTD = hc.collapse(x_NBTD, c.connection.collapse, head, c.connection, last_NBT)
    x_BTD = rms_norm(x_BTD, final_norm_D, c.norm_eps)
    wide = jnp.promote_types(c.dtype, jnp.float32)
    logits_BTV = jnp.einsum('btd,dv->btv', x_BTD, unembedding_DV.astype(c.dtype), preferred_element_type=wide)
    return logits_BTV / c.width_ratio, records

  def _ends(self, name: str, init) -> dict[str, jax.Array]:
    c = self.config
    return self.param(name, lambda key: init(c.connection, c.width)) if init(c.connection, c.width) else {}

  def _layers(self, carry, mask_BTS: jax.Array, record: bool):
    c = self.config
    # Only a loop with one block per iteration keeps XLA from merging the recomputation with the forward pass.
    prevent_cse = not c.scan or c.scan_unroll > 1
    block = nn.remat(Block, prevent_cse=prevent_cse) if c.remat == 'layer' else Block
    leading, records = nn.remat(Block) if c.remat == 'layer' else Block, []
    for layer in range(c.dense_layers if c.scan else c.depth):
      dense = layer < c.dense_layers
      carry, record_l = leading(c, record, self.mesh, dense, name=f'layer_{layer}')(carry, layer, mask_BTS)
      records.append(record_l)
    if not c.scan:
      return carry, _joined(records[: c.dense_layers], _stacked(records[c.dense_layers :]))
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=c.depth - c.dense_layers,
      unroll=min(c.scan_unroll, c.depth - c.dense_layers),
    )
    layers = jnp.arange(c.dense_layers, c.depth)
    carry, scanned_records = scanned(c, record, self.mesh, name='layers')(carry, layers, mask_BTS)
    return carry, _joined(records, scanned_records)


def _stacked(records: list[Any]) -> Any:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)


def _joined(leading: list[Any], rest: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Records of single leading layers before the stacked ones of the rest, in what they have in common."""
  if not leading:
    return rest
  return [
    rest_s
    | jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first_s, {name: rest_s[name] for name in first_s})
    for first_s, rest_s in zip(_stacked(leading), rest, strict=True)
  ]


def loss_sums(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array):
  """(sum of weighted cross-entropies in nats, sum of weights), in the logits' float32 or more."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, -1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  return jnp.sum((log_z_BT - target_BT) * weights_BT), jnp.sum(weights_BT)
