"""Logits and the cross-entropy of the next token; in pieces of the time axis where logits are large.

Pieces make each piece's gradients while its logits exist, so that no logits are kept or made twice. They cost
what adding up the unembedding's gradient costs, a pass over it for each piece.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain, partition

# Bytes of the float32 logits on one device, of a microbatch, beyond which they are made in pieces of at most
# that: a few per cent of an accelerator's memory, and few passes over the unembedding's gradient.
LARGEST = 2**30


def logits_of(x_BTD: jax.Array, unembedding_DV: jax.Array, c: ModelConfig, mesh: Mesh | None) -> jax.Array:
  """(B, T, V) in float32 or more."""
  wide = jnp.promote_types(c.dtype, jnp.float32)
  logits_BTV = jnp.einsum('btd,dv->btv', x_BTD, unembedding_DV.astype(c.dtype), preferred_element_type=wide)
  return constrain(logits_BTV, 'BTV', mesh) / c.width_ratio


def loss_sums(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array):
  """(sum of weighted cross-entropies in nats, sum of weights), in the logits' float32 or more."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, -1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
  return jnp.sum((log_z_BT - target_BT) * weights_BT), jnp.sum(weights_BT)


def cross_entropy_sums(
  x_BTD: jax.Array,
  unembedding_DV: jax.Array,
  labels: tuple[jax.Array, jax.Array],
  c: ModelConfig,
  mesh: Mesh | None,
) -> tuple[jax.Array, jax.Array]:
  """loss_sums of logits_of; labels: targets and weights, (B, T). Weights have no gradient where in pieces."""
  batch, time, vocab = *x_BTD.shape[:2], unembedding_DV.shape[1]
  pieces = pieces_of(batch, time, vocab, mesh)
  if pieces == 1:
    return loss_sums(logits_of(x_BTD, unembedding_DV, c, mesh), *labels)
  weights_BT = labels[1].astype(jnp.promote_types(c.dtype, jnp.float32))
  layout = Layout(pieces, c.width_ratio, mesh)
  total = _in_pieces(x_BTD, unembedding_DV.astype(c.dtype), labels[0], weights_BT, layout)
  return total, jnp.sum(labels[1])


def pieces_of(batch: int, time: int, vocab: int, mesh: Mesh | None) -> int:
  """Into how many pieces of time each device cuts its logits: the least that keeps one at LARGEST or below.

  It divides the time steps of the device.
  """
  split = _axes(batch, time, vocab, mesh)
  if mesh is not None:
    batch, time, vocab = (
      size // math.prod(mesh.shape[axis] for axis in axes)
      for size, axes in zip((batch, time, vocab), split, strict=True)
    )
  needed = math.ceil(4 * batch * time * vocab / LARGEST)
  return next((pieces for pieces in range(needed, time) if time % pieces == 0), time)


def _axes(batch: int, time: int, vocab: int, mesh: Mesh | None) -> list[tuple[str, ...]]:
  """The axes of the mesh that split rows, time and vocabulary of logits."""
  if mesh is None or mesh.size == 1:
    return [()] * 3
  return partition('BTV', {'B': batch, 'T': time, 'V': vocab}, mesh)


class Layout(NamedTuple):
  """How the loss is computed in pieces: how many, what logits are divided by, and where."""

  pieces: int
  ratio: float
  mesh: Mesh | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _in_pieces(x_BTD, unembedding_DV, targets_BT, weights_BT, layout):
  return _run(x_BTD, unembedding_DV, targets_BT, weights_BT, layout, False)[0]


def _in_pieces_forward(x_BTD, unembedding_DV, targets_BT, weights_BT, layout):
  total, gradients = _run(x_BTD, unembedding_DV, targets_BT, weights_BT, layout, True)
  types = (jnp.zeros((), x_BTD.dtype), jnp.zeros((), unembedding_DV.dtype))
  return total, (gradients, types)


def _in_pieces_backward(layout, saved, cotangent):
  """The loss is one number: its gradients are known up to a factor before it is used."""
  del layout
  gradients, types = saved
  x_BTD, unembedding_DV = jax.tree.map(lambda g, like: (g * cotangent).astype(like.dtype), gradients, types)
  return x_BTD, unembedding_DV, None, None


_in_pieces.defvjp(_in_pieces_forward, _in_pieces_backward)


def _run(x_BTD, unembedding_DV, targets_BT, weights_BT, layout, with_gradients):
  """(sum of weighted cross-entropies, its gradients by x and the unembedding or None), on all devices.

  Every device has its rows' logits of its part of the vocabulary; only sums over it cross devices, and at the
  end the gradients.
  """
  rows, times, vocab = _axes(*targets_BT.shape, unembedding_DV.shape[1], layout.mesh)
  local = functools.partial(
    _local, pieces=layout.pieces, ratio=layout.ratio, axes=(rows, times, vocab), with_gradients=with_gradients
  )
  if layout.mesh is None or layout.mesh.size == 1:
    return local(x_BTD, unembedding_DV, targets_BT, weights_BT)
  tokens = P(rows, times)
  # The gradient by x leaves with its time split where the vocabulary was: as the streams are.
  gradients = (P(rows, (*times, *vocab)), P(None, vocab)) if with_gradients else None
  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(tokens, P(None, vocab), tokens, tokens),
    out_specs=(P(), gradients),
    check_vma=False,
  )(x_BTD, unembedding_DV, targets_BT, weights_BT)


def _local(x_BTD, unembedding_DV, targets_BT, weights_BT, *, pieces, ratio, axes, with_gradients):
  """The same on one device, whose sums over axes of the mesh come from the others."""
  rows, times, vocab = axes
  wide = weights_BT.dtype
  size = unembedding_DV.shape[1]
  first = (lax.axis_index(vocab) if vocab else 0) * size

  def piece(carry, tokens):
    total, gradient_DV = carry
    x_BTD, targets_BT, weights_BT = tokens
    logits_BTV = jnp.einsum('btd,dv->btv', x_BTD, unembedding_DV, preferred_element_type=wide) / ratio
    top_BT = _over(lax.pmax, jnp.max(logits_BTV, -1), vocab)
    hit_BTV = (targets_BT - first)[..., None] == jnp.arange(size)[None, None]
    powers_BTV = jnp.exp(logits_BTV - top_BT[..., None])
    target_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), -1)
    sum_BT, target_BT = _over(lax.psum, (jnp.sum(powers_BTV, -1), target_BT), vocab)
    total += jnp.sum((top_BT + jnp.log(sum_BT) - target_BT) * weights_BT)
    if not with_gradients:
      return (total, None), None
    # In x's type, as the chip's products take it.
    error_BTV = ((powers_BTV / sum_BT[..., None] - hit_BTV) * (weights_BT / ratio)[..., None]).astype(
      x_BTD.dtype
    )
    gradient_DV += jnp.einsum('btd,btv->dv', x_BTD, error_BTV, preferred_element_type=wide)
    return (total, gradient_DV), jnp.einsum(
      'btv,dv->btd', error_BTV, unembedding_DV, preferred_element_type=wide
    )

  def cut(x):
    return x.reshape(x.shape[0], pieces, -1, *x.shape[2:]).swapaxes(0, 1)

  start = (jnp.zeros((), wide), jnp.zeros(unembedding_DV.shape, wide) if with_gradients else None)
  (total, gradient_DV), x_PBTD = lax.scan(piece, start, jax.tree.map(cut, (x_BTD, targets_BT, weights_BT)))
  total = _over(lax.psum, total, (*rows, *times))
  if not with_gradients:
    return total, None
  gradient_BTD = x_PBTD.swapaxes(0, 1).reshape(x_BTD.shape)
  if vocab:
    gradient_BTD = lax.psum_scatter(gradient_BTD, vocab, scatter_dimension=1, tiled=True)
  return total, (gradient_BTD, _over(lax.psum, gradient_DV, (*rows, *times)))


def _over(collective, values, axes):
  return collective(values, axes) if axes else values
