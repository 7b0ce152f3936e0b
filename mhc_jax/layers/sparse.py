"""Attention to some of the tokens before: a window, or those that an index chooses.

DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): a small index scores all earlier
tokens for every query, attention is over the k with the largest scores, and the index learns from a loss of
its own, the divergence of its softmax from attention's weights. The choice has no gradient. What is chosen
masks dense scores: exact with any program, and no faster; cost.py counts what is executed and what would be
needed. The compressed keys of DeepSeek-V4 (CSA, HCA) are not here. Axes: J heads of the index.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from mhc_jax.layers.parts import Linear, ones, rope, zeros
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain
from mhc_jax.sublayer_config import SparseConfig


def index_of(
  c: ModelConfig, mesh: Mesh | None, x_BSD: jax.Array, latent_BSR: jax.Array | None = None
) -> jax.Array | None:
  """The scores of the sublayer's Index, (B, T, S); None in a model without one."""
  if not c.indexed:
    return None
  return Index(c, mesh, name='index')(x_BSD, latent_BSR)


class Index(nn.Module):
  """Scores of every token for every query, the future and other documents included: (B, T, S) in float32.

  Queries come from attention's query latent where there is one, else as keys from the sublayer's normed
  input. Neither gets a gradient from here. The first index_rope_dim numbers of both have the position.
  """

  config: ModelConfig
  mesh: Mesh | None = None

  @nn.compact
  def __call__(self, x_BSD: jax.Array, latent_BSR: jax.Array | None) -> jax.Array:
    c, s = self.config, self.config.sparse
    linear = functools.partial(Linear, rank=None, dtype=c.dtype, mesh=self.mesh)
    x_BSD, latent_BSR = lax.stop_gradient((x_BSD, latent_BSR))
    heads = (s.index_heads, s.index_dim)
    if latent_BSR is None:
      q_BTJK = linear((c.width, *heads), name='query')(x_BSD)
    else:
      q_BTJK = linear((latent_BSR.shape[-1], *heads), name='query_up')(latent_BSR)
    key_norm = self.param('key_norm', ones, heads[1:]), self.param('key_norm_bias', zeros, heads[1:])
    k_BSK = layer_norm(linear((c.width, s.index_dim), name='key')(x_BSD), *key_norm, c.norm_eps)
    # Output-like, as a connection's phi: wide in, J numbers out, so its start falls as 1 / width.
    weight_BTJ = linear((c.width, s.index_heads), gain=c.width_ratio**-0.5, name='weights')(x_BSD)
    q_BTJK, k_BSJK = (
      jnp.concatenate([rope(x[..., : s.index_rope_dim], c.rope_theta), x[..., s.index_rope_dim :]], -1)
      for x in (q_BTJK, k_BSK[:, :, None])
    )
    # Each device of `tensor` its own queries against all keys: no choice sees another device's scores.
    q_BTJK, weight_BTJ = constrain(q_BTJK, 'BTJK', self.mesh), constrain(weight_BTJ, 'BTJ', self.mesh)
    k_BSK = constrain(k_BSJK[:, :, 0], 'BSK', self.mesh)
    return constrain(index_scores(q_BTJK, k_BSK, weight_BTJ), 'BTS', self.mesh)


@jax.named_scope('index_scores')
def index_scores(q_BTJK: jax.Array, k_BSK: jax.Array, weight_BTJ: jax.Array) -> jax.Array:
  """I_ts = sum_j w_tj relu(q_tj . k_s) / sqrt(J K), (B, T, S) in float32 or more (2512.02556, eq. 1)."""
  wide = jnp.promote_types(q_BTJK.dtype, jnp.float32)
  products_BTJS = jnp.einsum('btjk,bsk->btjs', q_BTJK, k_BSK, preferred_element_type=wide)
  scale = (q_BTJK.shape[2] * q_BTJK.shape[3]) ** -0.5
  return jnp.einsum('btj,btjs->bts', weight_BTJ.astype(wide) * scale, jax.nn.relu(products_BTJS))


def attended(index_BTS: jax.Array, visible_BTS: jax.Array, sparse: SparseConfig) -> jax.Array:
  """What attention is over, and the loss of the index: the chosen tokens, in the warm-up all visible ones."""
  if sparse.stage == 'warmup':
    return visible_BTS
  return chosen(index_BTS, visible_BTS, sparse.topk, sparse.window)


@jax.named_scope('index_choice')
def chosen(index_BTS: jax.Array, visible_BTS: jax.Array, topk: int, window: int | None = None) -> jax.Array:
  """(B, T, S) booleans: of each query's visible tokens the `topk` with the largest scores, or all if fewer.

  Exactly so many: of equal scores, which relu makes often, the earliest tokens. window: the last so many,
  the query's own token included, are among them whatever their scores.
  """
  time = visible_BTS.shape[-1]
  if topk >= time:
    return visible_BTS
  score_BTS = jnp.where(visible_BTS, lax.stop_gradient(index_BTS), -jnp.inf)
  if window is not None:
    score_BTS = jnp.where(visible_BTS & near(time, window)[None], jnp.inf, score_BTS)
  least_BT1 = lax.top_k(score_BTS, topk)[0][..., -1:]
  above_BTS, equal_BTS = score_BTS > least_BT1, score_BTS == least_BT1
  left_BT1 = topk - jnp.sum(above_BTS, -1, keepdims=True)
  return visible_BTS & (above_BTS | (equal_BTS & (jnp.cumsum(equal_BTS, -1) <= left_BT1)))


def near(time: int, window: int) -> jax.Array:
  """(T, T) booleans: key s is one of the last `window` tokens at query t, or later."""
  time_T = jnp.arange(time)
  return time_T[:, None] - time_T[None] < window


@jax.named_scope('index_loss')
def divergence(target_BTS: jax.Array, index_BTS: jax.Array, mask_BTS: jax.Array) -> jax.Array:
  """KL(target || softmax of the scores), both over the tokens of the mask, (B, T) in nats (eq. 3 and 4).

  target: attention's weights, the mean over heads, whose rows have the sum 1; 0 outside of the mask.
  """
  log_BTS = jax.nn.log_softmax(jnp.where(mask_BTS, index_BTS, jnp.finfo(index_BTS.dtype).min))
  target_log_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1))
  return jnp.sum(jnp.where(mask_BTS, target_BTS * (target_log_BTS - log_BTS), 0), -1)


def recorded(
  weights_BTS: jax.Array,
  visible_BTS: jax.Array,
  mask_BTS: jax.Array,
  index_BTS: jax.Array | None,
  sparse: SparseConfig,
) -> dict[str, jax.Array]:
  """What diagnostics.py takes, (B, T) each, of attention to all visible tokens with these weights.

  recall_BT: the share of them that the attended tokens have; best_BT: that the same number of tokens can have
  at the most; random_BT: that it has on average of tokens by chance. With an index entropy_BT, of its softmax
  over the visible tokens, in nats. mask: a window's, else what is visible.
  """
  records = {}
  if index_BTS is not None:
    index_BTS = index_BTS[: len(weights_BTS)]
    mask_BTS = chosen(index_BTS, visible_BTS, sparse.topk, sparse.window)
    log_BTS = jax.nn.log_softmax(jnp.where(visible_BTS, index_BTS, jnp.finfo(index_BTS.dtype).min))
    records['entropy_BT'] = -jnp.sum(jnp.where(visible_BTS, jnp.exp(log_BTS) * log_BTS, 0), -1)
  count_BT1 = jnp.sum(mask_BTS, -1, keepdims=True)
  sorted_BTS = -jnp.sort(-weights_BTS, -1)
  first_BTS = jnp.arange(mask_BTS.shape[-1])[None, None] < count_BT1
  return records | {
    'recall_BT': jnp.sum(weights_BTS * mask_BTS, -1),
    'best_BT': jnp.sum(sorted_BTS * first_BTS, -1),
    'random_BT': count_BT1[..., 0] / jnp.sum(visible_BTS, -1),
  }


def layer_norm(x: jax.Array, weight_K: jax.Array, bias_K: jax.Array, eps: float) -> jax.Array:
  """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in x's dtype."""
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  normed = jax.nn.standardize(wide, axis=-1, epsilon=eps)
  return (normed * weight_K[None, None] + bias_K[None, None]).astype(x.dtype)
