"""Mixture of experts without dropped tokens: routing, loss-free balancing, and the experts on a mesh.

After DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): a token goes to the experts with the largest score +
bias, and weighs them by their scores alone, normalised over the chosen. The bias has no gradient; after each
update it moves by a fixed step towards the experts with less than the mean load (arXiv 2408.15664).
Axes: S tokens, E experts, A chosen experts of a token, R rows (a token at one of its experts), D width,
F width of an expert.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from mhc_jax.layers import fp8
from mhc_jax.layers.feed_forward import swiglu
from mhc_jax.layers.grouped_experts import Routing, experts
from mhc_jax.layers.parts import Output, Visible, normal, ones, rms_norm, zeros
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain
from mhc_jax.sublayer_config import MoEConfig


def route(logits_BTE: jax.Array, bias_E: jax.Array, moe: MoEConfig) -> Routing:
  """Each token's `active` experts; weights add up to moe.scale. No token sees another one.

  'sigmoid': scores sigmoid(logit), and the largest score + bias are chosen; 'sinkhorn': scores of
  sinkhorn_scores, and the largest logit + bias are chosen, so that bias_rate is in other units.
  """
  if moe.router == 'sinkhorn':
    score_BTE, selection_BTE = sinkhorn_scores(logits_BTE, moe.active), logits_BTE
  else:
    score_BTE = selection_BTE = jax.nn.sigmoid(logits_BTE)
  selection_BTE = lax.stop_gradient(selection_BTE + bias_E[None, None])
  index_BTA = lax.top_k(selection_BTE, moe.active)[1]
  chosen_BTA = jnp.take_along_axis(score_BTE, index_BTA, -1)
  total_BT1 = chosen_BTA.sum(-1, keepdims=True) + 1e-20  # as DeepSeek: scores may underflow
  return Routing(index_BTA, moe.scale * chosen_BTA / total_BT1)


def sinkhorn_scores(logits_BTE: jax.Array, active: int, iterations: int = 20) -> jax.Array:
  """sigmoid(logit - price) with one price per token, such that a token's scores add up to `active`.

  Sinkhorn over a batch scales a plan of tokens x experts to `active` per token and an equal load per expert
  (Clark et al., arXiv 2202.01169). Its column step is a sum over all tokens, later ones included, and so not
  causal. What is left within one token is the transport between {chosen, left out} x experts with row sums
  (active, E - active) and column sums 1, the entropic top-k, whose solution this is; the columns' potentials
  over tokens must come from earlier batches, which is what the balancing bias is. So the causal version
  degenerates: a token's experts keep their order, the choice is the top-k of logit + bias as it is without
  Sinkhorn, and only the weights differ: through the price a chosen expert's weight depends on all logits.

  Sinkhorn's iteration on the price, price += logit(mean score) - logit(active / E), contracts by the share of
  the scores' variance that lies between experts; then one Newton step, whose derivative is that of the exact
  solution (where the scores' sum of p (1 - p) is over 1e-3). Row sums are off by less than 1e-6 for normal
  logits of standard deviation 2, E = 64 and active = 6.
  """
  share = active / logits_BTE.shape[-1]
  fixed_BTE, offset = lax.stop_gradient(logits_BTE), math.log(share / (1 - share))

  def step(_, price_BT1):
    mean_BT1 = jax.nn.sigmoid(fixed_BTE - price_BT1).mean(-1, keepdims=True)
    return price_BT1 + jnp.log(mean_BT1) - jnp.log1p(-mean_BT1) - offset

  price_BT1 = lax.fori_loop(0, iterations, step, fixed_BTE.mean(-1, keepdims=True) - offset)
  score_BTE = jax.nn.sigmoid(logits_BTE - price_BT1)
  slope_BT1 = lax.stop_gradient((score_BTE * (1 - score_BTE)).sum(-1, keepdims=True))
  excess_BT1 = score_BTE.sum(-1, keepdims=True) - active
  return jax.nn.sigmoid(logits_BTE - price_BT1 - excess_BT1 / jnp.maximum(slope_BT1, 1e-3))


def expert_load(index_BTA: jax.Array, experts: int) -> jax.Array:
  """Number of tokens that go to each expert, (E,) int32."""
  return jnp.sum(index_BTA[..., None] == jnp.arange(experts)[None, None, None], (0, 1, 2), dtype=jnp.int32)


def margin(logits_BTE: jax.Array, bias_E: jax.Array, moe: MoEConfig) -> jax.Array:
  """By how much a token's last chosen expert beats the first left out, (B, T); 0 where none is left out."""
  scores_BTE = jax.nn.sigmoid(logits_BTE) if moe.router == 'sigmoid' else logits_BTE
  best_BTA = lax.top_k(scores_BTE + bias_E[None, None], min(moe.active + 1, moe.experts))[0]
  return best_BTA[..., moe.active - 1] - best_BTA[..., -1]


# Each is the other's transpose. Written out because the transpose of a gather is a scatter that adds, which
# accelerators do row by row.


class MixtureOfExperts(nn.Module):
  """RMSNorm and experts (layers/moe.py): (B, T, D) -> (B, T, D), and what the routing did."""

  config: ModelConfig
  mesh: Mesh | None = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, seen: Visible) -> Output:
    """load_E: tokens per routed expert; with `record` also margin_BT (moe.margin)."""
    c, m = self.config, self.config.moe
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    # Output-like, as the unembedding: wide in, E numbers out, whatever the width.
    router_DE = self.param('router', normal(1 / (c.base_width or c.width)), (c.width, m.experts))
    bias_E = self.param('router_bias', zeros, (m.experts,))
    into, out = (m.experts, c.width, m.ffn_width), (m.experts, m.ffn_width, c.width)
    weights = [
      self.param('expert_gate', normal(c.width**-0.5), into),
      self.param('expert_up', normal(c.width**-0.5), into),
      self.param('expert_down', normal(c.output_gain * m.ffn_width**-0.5), out),
    ]
    wide = jnp.promote_types(c.dtype, jnp.float32)
    router = functools.partial(jnp.einsum, 'btd,de->bte', precision=jax.lax.Precision.HIGH)  # as generator.py
    logits_BTE = router(x_BTD.astype(wide), router_DE.astype(wide)) / c.width_ratio
    routing = route(logits_BTE, bias_E, m)
    in_type = [w.astype(c.dtype) for w in weights]
    in_fp8, measured = c.precision is not None, []
    routed_BTD = y_BTD = experts(x_BTD, routing, *(weights if in_fp8 else in_type), self.mesh, in_fp8)
    if m.shared:
      x_BSD, note = constrain(x_BTD, 'BSD', self.mesh), measured if self.record else None
      y_BTD += swiglu(x_BSD, m.shared * m.ffn_width, c, self.mesh, 'shared_', note)
    records = {'load_E': expert_load(routing.index_BTA, m.experts)}
    if self.record:
      records['margin_BT'] = margin(logits_BTE, bias_E, m)
    if self.record and in_fp8:
      error_BT = fp8.row_errors(routed_BTD, experts(x_BTD, routing, *in_type, self.mesh))
      measured.append({'row_error': error_BT.mean(), 'row_error_max': error_BT.max()})
      row, block, _ = fp8.TILES[c.precision]
      lost = jnp.stack([fp8.shares(w, block)['underflow'] for w in weights])
      measured[-1] |= fp8.shares(x_BTD, row) | {'weight_underflow': lost.mean()}
    return y_BTD, records | fp8.records(measured)
