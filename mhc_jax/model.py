"""The transformer: embedding -> n streams -> scanned blocks -> one stream -> unembedding.

Flax Linen is a container of parameters here; the mathematics is in layers/ and hyper_connection.py.
Axes: N/M streams out/in, B batch, T/S time of queries/keys, D width, H heads, G key-value heads, K head dim,
F feed-forward width, E experts, R weight or latent rank, V vocabulary, L layers. Pre-norm blocks of two
sublayers, attention (grouped-query or latent) and feed-forward (SwiGLU or a mixture of them), each with its
own connection.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from mhc_jax import dense_reads, fractions
from mhc_jax import hyper_connection as hc
from mhc_jax.connection import ConnectionSpec
from mhc_jax.kernels import boundary as kernels
from mhc_jax.kernels import lanes
from mhc_jax.kernels.choice import chip_of
from mhc_jax.layers.attention import Attention, visible
from mhc_jax.layers.feed_forward import FeedForward
from mhc_jax.layers.latent_attention import LatentAttention
from mhc_jax.layers.moe import MixtureOfExperts
from mhc_jax.layers.parts import Visible, normal, ones, rms_norm
from mhc_jax.layers.unembedding import cross_entropy_sums, logits_of
from mhc_jax.model_config import ModelConfig
from mhc_jax.recompute import OUTPUTS, block_layers, policy, scan_blocks
from mhc_jax.sharding import constrain, local_parts, token_local


class Block(nn.Module):
  """Two sublayers on the streams: x <- H_res x + H_post^T F(H_pre x) for F = attention, feed-forward."""

  config: ModelConfig
  record: int  # of how many sequences to return each sublayer's coefficients and stream products too
  mesh: Mesh | None = None
  dense: bool = False  # a leading layer: no experts

  @nn.compact
  def __call__(self, pending: hc.Pending | kernels.Pending, layer: jax.Array, seen: Visible):
    """pending: of the layer before. Kernels do a write with the reads after it, so theirs is to come."""
    c, records, mesh = self.config, [], self.mesh
    sublayers = {
      'attention': Attention if c.mla is None else LatentAttention,
      'feed_forward': FeedForward if c.moe is None or self.dense else MixtureOfExperts,
    }
    for index, (name, sublayer) in enumerate(sublayers.items()):
      spec = c.connection.of_sublayer(index)
      params = self._connection(f'{name}_connection', 2 * layer + index, spec)
      fused = isinstance(pending, kernels.Pending)
      where = params, pending, 2 * layer + index, c, mesh
      x_NBTD, x_BTD, own = fused_boundary(*where) if fused else boundary(*where, spec, self.record > 0)
      if fused and index:  # kept, so that only the boundary before it is run again
        x_BTD = checkpoint_name(x_BTD, OUTPUTS)
      records.append({})
      if self.record:
        records[-1] |= self._recorded(params, pending, own)
      *inputs, residual_BTD = jnp.split(x_BTD, spec.read_ways, -1) if spec.read_ways > 1 else (x_BTD, x_BTD)
      x_BTD = tuple(inputs) if spec.read_ways > 1 else x_BTD
      y_BTD, sublayer_records = sublayer(c, mesh, self.record > 0, name=name)(x_BTD, seen)
      records[-1] |= sublayer_records
      y_BTD = checkpoint_name(constrain(y_BTD, 'BTD', mesh), OUTPUTS) / c.depth_ratio
      if fused:
        pending = kernels.Pending(x_NBTD, y_BTD, own)
        continue
      if spec.read_gate.kind == 'dense':  # goes on in a stream that has nothing yet
        y_BTD = y_BTD + residual_BTD
      x_NBTD = hc.write(own.res_NMBT, own.post_NBT, x_NBTD, y_BTD, spec.fractions)
      x_NBTD = constrain(x_NBTD, 'NBTD', mesh)
      pending = hc.Pending(x_NBTD, pre_NBT=own.pre_NBT if spec.single_pass else None)
      if self.record:
        records[-1]['gram_NMBT'] = _gram(pending.x_NBTD[:, : self.record])
    return pending, records

  def _recorded(
    self, params: dict[str, jax.Array], pending: hc.Pending, own: hc.Coefficients
  ) -> dict[str, jax.Array | None]:
    """The coefficients, with those that the read used, and the coordinates of H_res."""
    spec, first = self.config.connection, slice(self.record)
    pre_NBT = pending.pre_NBT if spec.single_pass else own.pre_NBT
    pre_NBT = None if spec.read_gate.kind == 'dense' else pre_NBT  # two kinds in a layer
    found = {
      'pre_NBT': None if pre_NBT is None else pre_NBT[:, first],
      'post_NBT': None if own.post_NBT is None else own.post_NBT[:, first],
      'res_NMBT': None if own.res_NMBT is None else own.res_NMBT[:, :, first],
    }
    if 'res' in spec.parts:
      coordinates = token_local(
        lambda params, x_NBTD: hc.coordinates(params, x_NBTD, spec)['res'], self.mesh, (None, 'NBTD'), 'KBT'
      )
      found['coords_KBT'] = coordinates(params, pending.x_NBTD)[:, first]
    return found

  def _connection(self, name: str, sublayer: jax.Array, spec: ConnectionSpec) -> dict[str, jax.Array]:
    c = self.config
    if not spec.has_params:
      return {}
    # phi is output-like (infinite fan-in, finite fan-out): its start falls as 1 / width, not 1 / sqrt(width).
    init = functools.partial(hc.init_params, spec=spec, width=c.width, phi_scale=c.width_ratio**-0.5)
    return self.param(name, lambda key: init(key, sublayer=sublayer))


def boundary(
  params: dict[str, jax.Array],
  pending: hc.Pending,
  sublayer: jax.Array,
  c: ModelConfig,
  mesh: Mesh | None,
  spec: ConnectionSpec,
  record: bool = False,
) -> tuple[jax.Array, jax.Array, hc.Coefficients]:
  """(streams, the sublayer's input, its coefficients), of streams to which all is written."""
  matrix = None if record else constraint_kernel(c, mesh)
  generate = token_local(
    lambda params, x_NBTD, sublayer: hc.generate(params, x_NBTD, spec, sublayer, matrix),
    mesh,
    (None, 'NBTD', None),
    hc.Coefficients('NBT', 'NBT', 'NMBT'),
  )
  own = generate(params, pending.x_NBTD, sublayer)
  pre_NBT = pending.pre_NBT if spec.single_pass else own.pre_NBT
  x_BTD = hc.read(pre_NBT, pending.x_NBTD, spec.fractions * spec.read_ways)
  x_BTD = dense_reads.finished(params, x_BTD, pending.x_NBTD, spec, sublayer // spec.write_period)
  return pending.x_NBTD, constrain(x_BTD, 'BTD', mesh), own


def constraint_kernel(c: ModelConfig, mesh: Mesh | None) -> Callable[..., jax.Array] | None:
  """What computes the constraint's matrix in boundaries by XLA: a kernel (lanes.py), None without one."""
  if c.dtype == jnp.float64:
    return None
  return lanes.kernel_for(c.connection.constraint, c.connection.units, chip_of(c.kernels, mesh))


def fused_boundary(
  params: dict[str, jax.Array],
  pending: kernels.Pending,
  sublayer: jax.Array,
  c: ModelConfig,
  mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """kernels.boundary on a mesh: each device its own tokens."""
  chip = chip_of(c.kernels, mesh)

  def run(params, sublayer, *pending):
    return kernels.boundary(params, kernels.Pending(*pending), c.connection, sublayer, chip)

  local = token_local(run, mesh, (None, None, 'NBTD', 'BTD', 'MBT'), ('NBTD', 'BTD', 'MBT'))
  return local(params, sublayer, *pending)


def why_no_kernels(c: ModelConfig, batch: int, time: int, mesh: Mesh | None) -> str | None:
  """Why XLA's program does the boundaries of `batch` windows of `time` tokens; None where kernels do."""
  chip = chip_of(c.kernels, mesh)
  if chip is None:
    return 'model.kernels chooses it here'
  if chip.platform == 'gpu' and c.kernels == 'auto':
    return "XLA's takes less time on NVIDIA (docs/gpu.md)"
  tokens = batch * time // local_parts('BT', {'B': batch, 'T': time}, mesh)
  return kernels.why_not(c.connection, c.width, tokens, c.dtype, chip)


def _gram(x_NBTD: jax.Array) -> jax.Array:
  """Inner products of the streams at every token, float32 or more."""
  x_NBTD = x_NBTD.astype(jnp.promote_types(x_NBTD.dtype, jnp.float32))
  return jnp.einsum('nbtd,mbtd->nmbt', x_NBTD, x_NBTD)


def _ends(module: nn.Module, name: str, init: Callable) -> dict[str, jax.Array]:
  c = module.config
  if not init(c.connection, c.width, None):
    return {}
  return module.param(name, lambda key: init(c.connection, c.width, key))


def _collapsed(
  head: dict[str, jax.Array], x_NBTD: jax.Array, pre_NBT: jax.Array | None, c: ModelConfig, mesh: Mesh | None
) -> jax.Array:
  collapse = token_local(
    lambda head, x_NBTD, pre_NBT: hc.collapse(x_NBTD, c.connection.collapse, head, c.connection, pre_NBT),
    mesh,
    (None, 'NBTD', 'NBT'),
    'BTD',
  )
  return collapse(head, x_NBTD, pre_NBT)


def two_ahead(targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Targets and weights of the token after the next, from those of the next.

  It counts where the next token and itself belong to the document; the window's last token has none.
  """
  after_BT, counts_BT = (jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1))) for x_BT in (targets_BT, weights_BT))
  return after_BT, weights_BT * counts_BT


class MultiToken(nn.Module):
  """Multi-token prediction of depth 1 (DeepSeek-V3, arXiv 2412.19437, eq. 21-23), up to the logits.

  Reads the streams after the last layer and the next token's embedding. As in DeepSeek-V4, all streams pass
  through: x_n <- e_proj norm(e) + h_proj norm(x_n), one block with connections of its own, then a collapse
  and a norm of its own. The block's feed-forward sublayer is dense, also in a model with experts.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(
    self, pending: hc.Pending, next_BTD: jax.Array, seen: Visible
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Also auxiliary losses of the block's sublayers, mtp_NAME."""
    c, mesh = self.config, self.mesh
    norms = [self.param(f'{name}_norm', ones, (c.width,)) for name in ('embedding', 'state', 'final')]
    std = (2 * c.width) ** -0.5  # the two are one map of 2 C numbers
    e_proj_DD, h_proj_DD = (self.param(name, normal(std), (c.width,) * 2) for name in ('e_proj', 'h_proj'))
    e_BTD = rms_norm(next_BTD, norms[0], c.norm_eps) @ e_proj_DD.astype(c.dtype)
    m = c.connection.fractions
    x_NBTD = fractions.merge(pending.x_NBTD, m)
    normed_NBTD = jax.vmap(lambda x_BTD: rms_norm(x_BTD, norms[1], c.norm_eps))(x_NBTD)
    x_NBTD = fractions.split(e_BTD[None] + normed_NBTD @ h_proj_DD.astype(c.dtype), m)
    pending = pending._replace(x_NBTD=constrain(x_NBTD, 'NBTD', mesh))
    kept = {'policy': policy(c.remat)} if c.remat in ('layer', 'products') else {}
    block = Block if c.remat == 'none' else nn.remat(Block, **kept)
    pending, records = block(c, 0, mesh, True, name='block')(pending, c.depth, seen)
    x_NBTD = constrain(hc.settled(pending, m), 'NBTD', mesh)
    head = _ends(self, 'collapse', hc.init_collapse)
    x_BTD = rms_norm(_collapsed(head, x_NBTD, pending.pre_NBT, c, mesh), norms[2], c.norm_eps)
    losses = {name: loss for record in records for name, loss in record.get('losses', {}).items()}
    return x_BTD, {f'mtp_{name}': loss for name, loss in losses.items()}


class Transformer(nn.Module):
  """Token ids (B, T) and document numbers (B, T) -> logits (B, T, V) in float32, and records.

  labels: targets and weights, (B, T), of the tokens that follow; then loss_sums of the logits in their place
  (layers/unembedding.py).

  Records: for attention and feed-forward a dict of what all layers found, (L, ...) each: always the loads of
  experts, load_E, of the layers that have them, and `losses`, auxiliary losses by name as sums over tokens in
  nats, of which train_step adds the gradients; of the first `record` sequences also coefficients and stream
  products.
  """

  config: ModelConfig
  mesh: Mesh | None = None  # where activations are laid out; None: wherever XLA puts them

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    segments_BT: jax.Array,
    record: int = 0,
    labels: tuple[jax.Array, jax.Array] | None = None,
  ):
    c, mesh = self.config, self.mesh
    # Flax numbers the keys of a module's own parameters: those that all arms have come first, to start alike.
    embedding_VD = self.param('embedding', normal(1.0), (c.vocab_size, c.width))
    final_norm_D = self.param('final_norm', ones, (c.width,))
    # Small at the start, so that the first loss is close to log V; constant in width (CompleteP).
    std = 1 / (c.base_width or c.width)
    unembedding_DV = self.param('unembedding', normal(std), (c.width, c.vocab_size))
    head = _ends(self, 'collapse', hc.init_collapse)
    copies = _ends(self, 'expansion', lambda spec, width, _: hc.init_expand(spec, width))
    x_BTD = constrain(embedding_VD[tokens_BT].astype(c.dtype), 'BTD', mesh)
    spec, first_NBT = c.connection, None
    x_NBTD = hc.expand(x_BTD, spec.streams, spec.expansion, copies, spec.fractions)
    x_NBTD = constrain(x_NBTD, 'NBTD', mesh)
    if spec.single_pass:
      first_NBT = hc.one_hot(0, spec.streams, tokens_BT.shape, c.dtype)
    pending = hc.Pending(x_NBTD, pre_NBT=first_NBT)
    # Diagnostics are those of the definition.
    if not (record or self.is_initializing() or why_no_kernels(c, *tokens_BT.shape, mesh)):
      pending = kernels.start(pending, spec)
    pending, records = self._layers(pending, visible(segments_BT, c, mesh), record)
    if isinstance(pending, kernels.Pending):
      pending = kernels.definition(pending, spec)
    x_NBTD = constrain(hc.settled(pending, spec.fractions), 'NBTD', mesh)
    x_BTD = rms_norm(_collapsed(head, x_NBTD, pending.pre_NBT, c, mesh), final_norm_D, c.norm_eps)
    if c.mtp is not None and (labels is not None or self.is_initializing()):
      next_BT = tokens_BT if labels is None else labels[0]
      next_BTD = constrain(embedding_VD[next_BT].astype(c.dtype), 'BTD', mesh)
      module = MultiToken(c, mesh, name='mtp')
      ahead_BTD, losses = module(pending._replace(x_NBTD=x_NBTD), next_BTD, visible(segments_BT, c, mesh))
      if labels is not None:
        total, _ = cross_entropy_sums(ahead_BTD, unembedding_DV, two_ahead(*labels), c, mesh)
        losses |= {'mtp': c.mtp.weight * total}
      records = [*records[:-1], records[-1] | {'losses': records[-1].get('losses', {}) | losses}]
    if labels is not None:
      return cross_entropy_sums(x_BTD, unembedding_DV, labels, c, mesh), records
    return logits_of(x_BTD, unembedding_DV, c, mesh), records

  def _layers(self, carry, seen: Visible, record: int):
    c = self.config
    # Only a loop with one block per iteration keeps XLA from merging the recomputation with the forward pass.
    prevent_cse = not c.scan
    kept = {'policy': policy(c.remat)} if c.remat in ('layer', 'products') else {}
    block = nn.remat(Block, prevent_cse=prevent_cse, **kept) if kept else Block
    leading, records = Block if c.remat == 'none' else nn.remat(Block, **kept), []
    for layer in range(c.dense_layers if c.scan else c.depth):
      dense = layer < c.dense_layers
      carry, record_l = leading(c, record, self.mesh, dense, name=f'layer_{layer}')(carry, layer, seen)
      records.append(record_l)
    if not c.scan:
      return carry, _joined(records[: c.dense_layers], _stacked(records[c.dense_layers :]))
    if not self.is_initializing():  # which makes the parameters, stacked, by a loop of single layers
      if c.remat == 'block':
        carry, block_records = self._blocks(carry, seen, record)
        return carry, _joined(records, block_records)
      if c.depth - c.dense_layers <= c.scan_unroll:
        carry, written = self._written_out(carry, seen, record, kept)
        return carry, _joined(records, written)
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),
      length=c.depth - c.dense_layers,
    )
    layers = jnp.arange(c.dense_layers, c.depth)
    carry, scanned_records = scanned(c, record, self.mesh, name='layers')(carry, layers, seen)
    return carry, _joined(records, scanned_records)

  def _written_out(self, carry, seen: Visible, record: int, kept: dict[str, Any]):
    """One layer after another: nothing that the backward pass needs is copied into stacks of all layers."""
    c, block = self.config, Block(self.config, record, self.mesh, parent=None)
    layers = range(c.dense_layers, c.depth)

    def run(params, carry, layer):
      return block.apply({'params': params}, carry, layer, seen)

    if kept:
      run = jax.checkpoint(run, prevent_cse=len(layers) > 1, static_argnums=2, **kept)
    stacked, structure = jax.tree.flatten(self.get_variable('params', 'layers'))
    rows = [jax.lax.split(leaf, [1] * len(layers)) for leaf in stacked]  # whose gradient is one concatenation
    records = []
    for index, layer in enumerate(layers):
      params = structure.unflatten([row[index].squeeze(0) for row in rows])
      carry, record_l = run(params, carry, layer)
      records.append(record_l)
    return carry, _stacked(records)

  def _blocks(self, carry, seen: Visible, record: int):
    c, block = self.config, Block(self.config, record, self.mesh, parent=None)

    def layer(carry, inputs):
      params, index = inputs
      return block.apply({'params': params}, carry, index, seen)

    layers = jnp.arange(c.dense_layers, c.depth)
    inputs_L = (self.get_variable('params', 'layers'), layers)
    return scan_blocks(layer, carry, inputs_L, block_layers(c.connection.streams, len(layers)))


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
