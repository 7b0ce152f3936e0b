"""Causal attention within documents: heads in groups that share keys and values (GQA, arXiv 2305.13245)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mhc_jax.derivatives import with_backward
from mhc_jax.kernels.attention import splash, triton, why_not
from mhc_jax.kernels.choice import kernels_for
from mhc_jax.layers import fp8, sparse
from mhc_jax.layers.parts import Output, Visible, linear_of, ones, rms_norm, rope
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain, token_local

FITTING = 2048  # tokens whose scores in float32 are not yet too large to keep


def why_formula(c: ModelConfig, mesh: Mesh | None, time: int) -> str | None:
  """For people: why attention over `time` tokens runs the formula below; None where it runs a kernel."""
  if c.sparse is not None:
    return 'model.sparse masks its scores'
  kind = kernels_for(c.kernels, mesh)
  if kind == 'gpu' and c.kernels == 'auto' and c.dtype == jnp.float32 and time <= FITTING:
    return "float32, which XLA's formula takes less time for on NVIDIA (docs/gpu.md)"
  return 'model.kernels chooses it here' if kind == 'xla' else why_not(time, c.dtype)


def visible(segments_BT: jax.Array, c: ModelConfig, mesh: Mesh | None) -> Visible:
  """What `attention` is told by the model, once for all layers."""
  if why_formula(c, mesh, segments_BT.shape[1]) is None:
    return Visible(segments_BT, None)
  mask_BTS = causal_mask(segments_BT)
  if c.sparse is not None and not c.indexed:
    mask_BTS &= sparse.near(mask_BTS.shape[1], c.sparse.window)[None]
  return Visible(segments_BT, mask_BTS)


@jax.named_scope('attention_scores')
def causal_mask(segments_BT: jax.Array) -> jax.Array:
  """(B, T, T) booleans: query t sees key s <= t of the same document."""
  time_T = jnp.arange(segments_BT.shape[1])
  causal_TT = time_T[:, None] >= time_T[None]
  return causal_TT[None] & (segments_BT[:, :, None] == segments_BT[:, None])


def attention_of(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  seen: Visible,
  c: ModelConfig,
  mesh: Mesh | None,
  index_BTS: jax.Array | None = None,
  record: bool = False,
) -> Output:
  """`attention` as the model has it, over all visible tokens or some of them (sparse.py).

  index_BTS: scores of sparse.Index, which choose the tokens of every query; the records then have its loss.
  record: of sparse attention to the first sequence also what diagnostics.py takes.
  """
  if c.sparse is None:
    return attention(q_BTHK, k_BSGK, v_BSGK, seen, c, mesh), {}
  mask_BTS, records, fixed = seen.mask_BTS, {}, jax.lax.stop_gradient((q_BTHK, k_BSGK))
  if index_BTS is not None:
    mask_BTS = sparse.attended(index_BTS, mask_BTS, c.sparse)
    target_BTS = constrain(weights(*fixed, mask_BTS, c.attention_scale), 'BTS', mesh)
    records['losses'] = {'index': jnp.sum(sparse.divergence(target_BTS, index_BTS, mask_BTS))}
  if record:
    first = slice(1)
    all_BTS = causal_mask(seen.segments_BT[first])
    weights_BTS = weights(*(x[first] for x in fixed), all_BTS, c.attention_scale)
    records |= sparse.recorded(weights_BTS, all_BTS, seen.mask_BTS[first], index_BTS, c.sparse)
  return attention(q_BTHK, k_BSGK, v_BSGK, seen._replace(mask_BTS=mask_BTS), c, mesh), records


@jax.named_scope('attention_scores')  # a part whose cost experiments/compile reports
def attention(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, seen: Visible, c: ModelConfig, mesh: Mesh | None
) -> jax.Array:
  """Causal attention within documents of H query heads in G groups: the formula, or a kernel (why_formula).

  Returns (B, T, H, size of a value) in v's dtype. Each device runs a kernel on its own sequences and heads;
  XLA, which cannot cut a kernel, cuts the formula.
  """
  if seen.mask_BTS is not None:
    return formula(q_BTHK, k_BSGK, v_BSGK, seen.mask_BTS, c.attention_scale)
  kind = kernels_for(c.kernels, mesh)
  kernel = triton if kind == 'gpu' else functools.partial(splash, interpret=kind == 'interpret')
  local = token_local(
    functools.partial(kernel, scale=c.attention_scale), mesh, ('BSHK', 'BSGK', 'BSGK', 'BS'), 'BSHK'
  )
  return local(q_BTHK, k_BSGK, v_BSGK, seen.segments_BT)


def formula(
  q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, mask_BTS: jax.Array, scale: float
) -> jax.Array:
  """softmax(scale q k^T) v, the definition; logits and softmax in float32. (B, T, H, size of a value)."""
  batch, time, heads, _ = q_BTHK.shape
  k_BGSK, v_BGSK = k_BSGK.swapaxes(1, 2), v_BSGK.swapaxes(1, 2)
  out_BGRTK = _attend(_grouped(q_BTHK, k_BSGK.shape[2]), k_BGSK, v_BGSK, mask_BTS, scale)
  return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads, -1)


def weights(q_BTHK: jax.Array, k_BSGK: jax.Array, mask_BTS: jax.Array, scale: float) -> jax.Array:
  """softmax(scale q k^T), the mean over heads, (B, T, S); float32 or more."""
  powers_BGRTS = _powers(_grouped(q_BTHK, k_BSGK.shape[2]), k_BSGK.swapaxes(1, 2), mask_BTS, scale)
  return jnp.mean(powers_BGRTS / powers_BGRTS.sum(-1, keepdims=True), (1, 2))


def _grouped(q_BTHK: jax.Array, groups: int) -> jax.Array:
  batch, time, heads, _ = q_BTHK.shape
  return q_BTHK.reshape(batch, time, groups, heads // groups, -1).transpose(0, 2, 3, 1, 4)


def _powers(q_BGRTK, k_BGSK, mask_BTS, scale):
  wide = jnp.promote_types(q_BGRTK.dtype, jnp.float32)
  logits_BGRTS = jnp.einsum('bgrtk,bgsk->bgrts', q_BGRTK, k_BGSK, preferred_element_type=wide)
  logits_BGRTS = jnp.where(mask_BTS[:, None, None], logits_BGRTS * scale, jnp.finfo(wide).min)
  return jnp.exp(logits_BGRTS - logits_BGRTS.max(-1, keepdims=True))


def _attend(q_BGRTK, k_BGSK, v_BGSK, mask_BTS, scale):
  """With a backward of its own, which passes over the scores three times; autodiff's passes eight times.

  exp(logits - max) is kept, without its division by its sums: what divides outputs of a size of a value does
  not divide scores.
  """
  return _attend_forward(q_BGRTK, k_BGSK, v_BGSK, mask_BTS, scale)[0]


def _attend_forward(q_BGRTK, k_BGSK, v_BGSK, mask_BTS, scale):
  powers_BGRTS = _powers(q_BGRTK, k_BGSK, mask_BTS, scale)
  inverse_BGRT1 = 1 / powers_BGRTS.sum(-1, keepdims=True)
  out_BGRTK = inverse_BGRT1 * jnp.einsum(
    'bgrts,bgsk->bgrtk', powers_BGRTS.astype(v_BGSK.dtype), v_BGSK, preferred_element_type=powers_BGRTS.dtype
  )
  return out_BGRTK.astype(v_BGSK.dtype), (q_BGRTK, k_BGSK, v_BGSK, powers_BGRTS, inverse_BGRT1, out_BGRTK)


def _attend_backward(scale, saved, g_BGRTK):
  """The softmax's own gradient sums weights times their gradients: that is out times its gradient."""
  q_BGRTK, k_BGSK, v_BGSK, powers_BGRTS, inverse_BGRT1, out_BGRTK = saved
  wide = inverse_BGRT1.dtype
  divided_BGRTK = (g_BGRTK.astype(wide) * inverse_BGRT1).astype(v_BGSK.dtype)
  d_v = jnp.einsum('bgrts,bgrtk->bgsk', powers_BGRTS.astype(v_BGSK.dtype), divided_BGRTK)
  d_weights_BGRTS = jnp.einsum('bgrtk,bgsk->bgrts', g_BGRTK, v_BGSK, preferred_element_type=wide)
  mean_BGRT1 = jnp.sum(g_BGRTK.astype(wide) * out_BGRTK, -1, keepdims=True)
  d_logits_BGRTS = powers_BGRTS * ((d_weights_BGRTS - mean_BGRT1) * inverse_BGRT1)
  d_logits_BGRTS = d_logits_BGRTS.astype(q_BGRTK.dtype)
  d_q = scale * jnp.einsum('bgrts,bgsk->bgrtk', d_logits_BGRTS, k_BGSK, preferred_element_type=wide)
  d_k = scale * jnp.einsum('bgrts,bgrtk->bgsk', d_logits_BGRTS, q_BGRTK, preferred_element_type=wide)
  return d_q.astype(q_BGRTK.dtype), d_k.astype(k_BGSK.dtype), d_v, None


_attend = with_backward(_attend, _attend_forward, _attend_backward, (4,))


class Attention(nn.Module):
  """RMSNorm and grouped-query attention: (B, T, D), or three for queries, keys and values, -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array | tuple[jax.Array, ...], seen: Visible) -> Output:
    c = self.config
    measured = [] if self.record else None
    linear = linear_of(c, self.mesh, measured)
    x_BTD, *others = x_BTD if isinstance(x_BTD, tuple) else (x_BTD,)

    def normed(x_BTD: jax.Array, name: str) -> jax.Array:
      x_BTD = rms_norm(x_BTD, self.param(name, ones, (c.width,)), c.norm_eps)
      return constrain(x_BTD, 'BSD', self.mesh)  # every time step on every device of `tensor`, in one gather

    x_BTD = normed(x_BTD, 'norm')
    keys_BSD, values_BSD = map(normed, others, ('key_norm', 'value_norm')) if others else (x_BTD, x_BTD)
    q_BTHK = linear((c.width, c.heads, c.head_dim), name='query')(x_BTD)
    k_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='key')(keys_BSD)
    v_BSGK = linear((c.width, c.kv_heads, c.head_dim), name='value')(values_BSD)
    q_BTHK = constrain(q_BTHK, 'BTHK', self.mesh)
    k_BSGK, v_BSGK = constrain(k_BSGK, 'BSGK', self.mesh), constrain(v_BSGK, 'BSGK', self.mesh)
    q_BTHK, k_BSGK = rope(q_BTHK, c.rope_theta), rope(k_BSGK, c.rope_theta)
    index_BTS = sparse.index_of(c, self.mesh, x_BTD)
    out_BTHK, records = attention_of(q_BTHK, k_BSGK, v_BSGK, seen, c, self.mesh, index_BTS, self.record)
    out_BTHK = constrain(out_BTHK, 'BTHK', self.mesh)
    out_BTE = out_BTHK.reshape(*x_BTD.shape[:2], c.heads * c.head_dim)
    y_BTD = linear((c.heads * c.head_dim, c.width), gain=c.output_gain, name='output')(out_BTE)
    return y_BTD, records | fp8.records(measured)
