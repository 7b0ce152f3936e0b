"""The transformer: embedding -> n streams -> scanned blocks -> one stream -> unembedding.

Flax Linen is a container of parameters here; the mathematics is in layers/ and hyper_connection.py.
Axes: N/M streams out/in, B batch, T/S time of queries/keys, D width, H heads, G key-value heads, K head dim,
F feed-forward width, R weight rank, V vocabulary, L layers. Pre-norm blocks of two sublayers, attention and
feed-forward (SwiGLU), each with its own connection.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax import hyper_connection as hc
from mhc_jax.config import ModelConfig
from mhc_jax.layers.attention import attention, causal_mask
from mhc_jax.layers.norm import rms_norm
from mhc_jax.layers.rope import rope
from mhc_jax.recompute import block_layers, scan_blocks
from mhc_jax.sharding import constrain, splits_time, token_local


def _normal(std: float):
  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.result_type(float))

  return init


def _ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, jnp.result_type(float))


class Linear(nn.Module):
  """x W with W of shape (in, *out), or W = U V of rank `rank` with the same variance 1 / in."""

  shape: tuple[int, ...]
  rank: int | None
  dtype: Any
  gain: float = 1.0  # multiplies the standard deviation at the start
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, outputs = self.shape[0], self.shape[1:]
    # Tokens flattened: XLA:CPU then folds the weight gradient's transposes into the product. Where time is
    # split, it would cost a gather.
    y = x if splits_time(self.mesh) else x.reshape(-1, inputs)
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
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    c = self.config
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype, mesh=self.mesh)
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)  # every time step on every device of `tensor`, in one gather
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    k_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='key')(x_BTD)
    v_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='value')(x_BTD)
    q_BTHK = constrain(q_BTHK, 'BTHK', self.mesh)
    k_BSGK, v_BSGK = constrain(k_BSGK, 'BSGK', self.mesh), constrain(v_BSGK, 'BSGK', self.mesh)
    q_BTHK, k_BSGK = rope(q_BTHK, c.rope_theta), rope(k_BSGK, c.rope_theta)
    out_BTHK = attention(q_BTHK, k_BSGK, v_BSGK, mask_BTS, c.attention_scale)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * c.head_dim)
    return linear((c.heads * c.head_dim, c.width), gain=c.output_gain, name='output')(out_BTE)


class FeedForward(nn.Module):
  """RMSNorm and SwiGLU (arXiv 2002.05202): (B, T, D) -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    c = self.config
    linear = functools.partial(Linear, rank=c.weights_rank, dtype=c.dtype, mesh=self.mesh)
    x_BTD = rms_norm(x_BTD, self.param('norm', _ones, (c.width,)), c.norm_eps)
    x_BTD = constrain(x_BTD, 'BSD', self.mesh)
    gate_BTF = linear((c.width, c.ffn_width), name='gate')(x_BTD)
    up_BTF = linear((c.width, c.ffn_width), name='up')(x_BTD)
    hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, 'BTF', self.mesh)
    return linear((c.ffn_width, c.width), gain=c.output_gain, name='down')(hidden_BTF)


class Block(nn.Module):
  """Two sublayers on the streams: x <- H_res x + H_post^T F(H_pre x) for F = attention, feed-forward."""

  config: ModelConfig
  record: bool  # also return each sublayer's coefficients and stream products, for diagnostics
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, carry, layer: jax.Array, mask_BTS: jax.Array):
    """carry: the streams, and in single-pass order the read map of the sublayer before, else None."""
    (x_NBTD, earlier_NBT), c, records, mesh = carry, self.config, [], self.mesh
    sublayers = {
      'attention': functools.partial(Attention(c, mesh, name='attention'), mask_BTS=mask_BTS),
      'feed_forward': FeedForward(c, mesh, name='feed_forward'),
    }
    generate = token_local(
      lambda params, x_NBTD, sublayer: hc.generate(params, x_NBTD, c.connection, sublayer),
      mesh,
      (None, 'NBTD', None),
      hc.Coefficients('NBT', 'NBT', 'NMBT'),
    )
    coordinates = token_local(
      lambda params, x_NBTD: hc.coordinates(params, x_NBTD, c.connection), mesh, (None, 'NBTD'), 'KBT'
    )
    for index, (name, sublayer) in enumerate(sublayers.items()):
      params = self._connection(f'{name}_connection', 2 * layer + index)
      own = generate(params, x_NBTD, 2 * layer + index)
      pre_NBT = earlier_NBT if c.connection.single_pass else own.pre_NBT
      if self.record:
        records.append({**own._asdict(), 'pre_NBT': pre_NBT, 'coords': coordinates(params, x_NBTD)})
      h_BTD = constrain(hc.read(pre_NBT, x_NBTD), 'BTD', mesh)
      y_BTD = constrain(sublayer(h_BTD), 'BTD', mesh) / c.depth_ratio
      x_NBTD = constrain(hc.write(own.res_NMBT, own.post_NBT, x_NBTD, y_BTD), 'NBTD', mesh)
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
  """Token ids (B, T) and document numbers (B, T) -> logits (B, T, V) in float32, and records."""

  config: ModelConfig
  mesh: Mesh | None = None  # where activations are laid out; None: wherever XLA puts them

  @nn.compact
  def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array, record: bool = False):
    c, mesh = self.config, self.mesh
    # Flax numbers the keys of a module's own parameters: those that all arms have come first, to start alike.
    embedding_VD = self.param('embedding', _normal(1.0), (c.vocab_size, c.width))
    final_norm_D = self.param('final_norm', _ones, (c.width,))
    # Small at the start, so that the first loss is close to log V; constant in width (CompleteP).
    std = 1 / (c.base_width or c.width)
    unembedding_DV = self.param('unembedding', _normal(std), (c.width, c.vocab_size))
    head = self._ends('collapse', hc.init_collapse)
    copies = self._ends('expansion', hc.init_expand)
    x_BTD = constrain(embedding_VD[tokens_BT].astype(c.dtype), 'BTD', mesh)
    x_NBTD = hc.expand(x_BTD, c.connection.streams, c.connection.expansion, copies)
    x_NBTD = constrain(x_NBTD, 'NBTD', mesh)
    first_NBT = hc.one_hot(0, x_NBTD) if c.connection.single_pass else None
    (x_NBTD, last_NBT), records = self._layers((x_NBTD, first_NBT), causal_mask(segments_BT), record)
    collapse = token_local(
      lambda head, x_NBTD, pre_NBT: hc.collapse(x_NBTD, c.connection.collapse, head, c.connection, pre_NBT),
      mesh,
      (None, 'NBTD', 'NBT'),
      'BTD',
    )
    x_BTD = rms_norm(collapse(head, x_NBTD, last_NBT), final_norm_D, c.norm_eps)
    wide = jnp.promote_types(c.dtype, jnp.float32)
    logits_BTV = jnp.einsum('btd,dv->btv', x_BTD, unembedding_DV.astype(c.dtype), preferred_element_type=wide)
    return constrain(logits_BTV, 'BTV', mesh) / c.width_ratio, records

  def _ends(self, name: str, init) -> dict[str, jax.Array]:
    c = self.config
    return self.param(name, lambda key: init(c.connection, c.width)) if init(c.connection, c.width) else {}

  def _layers(self, carry, mask_BTS: jax.Array, record: bool):
    c = self.config
    if c.remat == 'block' and not self.is_initializing():  # which makes the parameters, as for any remat
      return self._blocks(carry, mask_BTS, record)
    # Only a loop with one block per iteration keeps XLA from merging the recomputation with the forward pass.
    prevent_cse = not c.scan or c.scan_unroll > 1
    block = nn.remat(Block, prevent_cse=prevent_cse) if c.remat == 'layer' else Block
    if not c.scan:
      records = []
      for layer in range(c.depth):
        carry, record_l = block(c, record, self.mesh, name=f'layer_{layer}')(carry, layer, mask_BTS)
        records.append(record_l)
      return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=c.depth,
      unroll=min(c.scan_unroll, c.depth),
    )
    return scanned(c, record, self.mesh, name='layers')(carry, jnp.arange(c.depth), mask_BTS)

  def _blocks(self, carry, mask_BTS: jax.Array, record: bool):
    c, block = self.config, Block(self.config, record, self.mesh, parent=None)

    def layer(carry, inputs):
      params, index = inputs
      return block.apply({'params': params}, carry, index, mask_BTS)

    inputs_L = (self.get_variable('params', 'layers'), jnp.arange(c.depth))
    return scan_blocks(layer, carry, inputs_L, block_layers(c.connection.streams, c.depth))


def loss_sums(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array):
  """(sum of weighted cross-entropies in nats, sum of weights), in the logits' float32 or more."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, -1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  return jnp.sum((log_z_BT - target_BT) * weights_BT), jnp.sum(weights_BT)
