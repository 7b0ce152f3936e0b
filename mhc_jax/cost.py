"""Parameters and FLOPs of a model by term, hyper-connections included: pure functions of its sizes.

Conventions. A multiply-add is 2 FLOPs; training is 3 x forward (no recomputation counted). Attention is
counted in full, T x T, as it is executed without a kernel, a mask of it included (train_flops_per_token has
the ideal too); of the routed experts, those that a token goes to. Left out: norms, softmax, activations,
rotary embedding, sorting by expert, choices and divergence of an index, and residual additions (O(C) per
token and sublayer), rounding to FP8, except the connection's own norm. XLA's count of matrix products equals
the terms that are matrix products (tests/test_cost.py).
"""

import dataclasses
import math

import jax.numpy as jnp

from mhc_jax import dense_reads
from mhc_jax.generator import cp_shapes
from mhc_jax.layers.grouped_experts import buffer_rows
from mhc_jax.layers.unembedding import LARGEST
from mhc_jax.model_config import ModelConfig


def parameters(c: ModelConfig) -> dict[str, int]:
  """Number of parameters by group, and at the end the sums 'total', 'active', 'matmul', 'non_embedding'.

  'active': what a token meets, total less the routed experts that it does not go to and the embedding (the
  vocabulary counts once). 'matmul' (attention, feed-forward, unembedding; of routed experts the active ones;
  not an index of sparse attention) is the primary N of the scaling laws (Porian et al., arXiv 2406.19146);
  tokens_per_param counts by it. With multi-token prediction also 'mtp', all of its module; of the sums it is
  in 'total' alone, having no part in predicting the next token.
  """
  maps = products(c)
  spec, n = c.connection, c.connection.streams
  dynamic = spec.dynamic and bool(spec.parts)
  alphas = len({spec.alpha_of(part) for part in spec.parts})
  static = 0 if spec.phi_only else sum(spec.parts.values()) + alphas * dynamic
  norm = spec.norm_inputs * c.width // spec.fractions
  norm *= spec.norm_weight and spec.dynamic and spec.has_params
  head = {'learned': c.width * n**2, 'sources': c.width}.get(spec.collapse, 0)
  ends = {'learned': 1 + n, 'weights': n, 'sources': spec.norm_weight * c.width}.get(spec.collapse, 0)
  ends += n * c.width * (spec.expansion == 'learned') + sum(_dense_sizes(c, 'b_read'))
  ends += sum(_dense_sizes(c, 'post_norm')) if spec.depth_norm else 0
  dense = _dense_maps(c)
  groups = {
    'embedding': c.vocab_size * c.width,
    'unembedding': c.width * c.vocab_size,
    'attention': c.depth * sum(_size(shape, c.weights_rank) for shape in maps['attention']),
    'feed_forward': _dense(c) * sum(_size(shape, c.weights_rank) for shape in maps['feed_forward']),
    **_expert_parameters(c),
    **_index_parameters(c),
    'norm': (2 * c.depth + 1 + 2 * c.depth * (spec.read_ways > 1)) * c.width + _latent_norms(c),
    'hc_dynamic': 2 * c.depth * (_generator(c) * dynamic + _elementwise(c) + _query(c)) + head + dense,
    'hc_static': 2 * c.depth * (static + norm) + ends,
  }
  mtp = _mtp_parameters(c)
  total = sum(groups.values())
  inactive = groups['routed_experts'] * (c.moe.experts - c.moe.active) // c.moe.experts if c.moe else 0
  names = (
    'attention',
    'feed_forward',
    'unembedding',
    *('router', 'shared_experts', 'routed_experts') * bool(c.moe),
  )
  matmul = sum(groups[name] for name in names) - inactive
  return {
    **groups,
    **mtp,
    'total': total + sum(mtp.values()),
    'active': total - groups['embedding'] - inactive,
    'matmul': matmul,
    'non_embedding': total - groups['embedding'] - groups['unembedding'],
  }


def least_bytes(
  c: ModelConfig,
  tokens: int,
  parts: int = 1,
  devices: int = 1,
  moments: int = 2,
  copies: int = 1,
) -> int:
  """What training on `tokens` at once holds at the least, on all devices together.

  Parameters, gradients and the optimizer's `moments` of each (optimizer.least_moments), 4 bytes each, for
  each of `copies` workers (clusters.py), of what does not learn (ModelConfig.warms_up) parameters alone; and
  the streams and logits of one of `parts` microbatches, a piece of them per device. Every activation kept for
  the backward pass comes on top.
  """
  sizes = parameters(c)
  learning = sizes['index'] if c.warms_up else sizes['total']
  state = 4 * copies * (sizes['total'] + (1 + moments) * learning)
  streams = c.connection.streams * c.width * jnp.dtype(c.dtype).itemsize
  logits = min(tokens // parts * 4 * c.vocab_size, devices * LARGEST)
  return state + tokens // parts * streams + logits


def forward_flops_per_token(c: ModelConfig, seq_len: int) -> dict[str, float]:
  """Forward FLOPs per token by term, for windows of seq_len tokens."""
  maps, spec, n = products(c), c.connection, c.connection.streams
  flops = {
    'unembedding': 2 * c.width * c.vocab_size,
    'attention_maps': 2 * c.depth * sum(_size(s, c.weights_rank) for s in maps['attention']),
    'attention_scores': 2 * c.depth * seq_len * c.heads * (c.head_dim + c.value_dim),
    **_index_flops(c, seq_len),
    'feed_forward': 2 * _dense(c) * sum(_size(s, c.weights_rank) for s in maps['feed_forward']),
    **_expert_flops(c),
  }
  if not spec.has_params:
    return flops | _mtp_flops(c, seq_len, flops)
  inputs, outputs = spec.generator_shape
  units, part = spec.units, c.width // spec.fractions
  copies = units // inputs  # 'per_stream' applies one small map n times
  product = _generator(c)
  if spec.generator == 'cp':  # multiplied out
    res = spec.parts['res']
    product = inputs * part * (outputs - res + spec.rank) + spec.rank * res
  sublayers = 2 * c.depth
  flops |= {
    'hc_generator': sublayers * spec.dynamic * 2 * copies * product + _norm_flops(c),
    'hc_read': _reads(c) * 2 * spec.parts.get('pre', units) * part,
    'hc_mix': sublayers * (2 * units * units * part if 'res' in spec.parts else 0),
    'hc_write': sublayers * 2 * spec.parts.get('post', units) * part,
    'hc_elementwise': sublayers * 2 * _elementwise(c),
    'hc_dense': 2 * _dense_maps(c),
    'hc_sources': (2 * sublayers + 7 * (spec.collapse == 'sources')) * n * _query(c),
    'hc_constraint': sublayers * spec.constraint.flops(units),
  }
  if spec.collapse == 'learned':
    flops['hc_collapse'] = 2 * n * n * c.width + 5 * n * c.width
  return flops | _mtp_flops(c, seq_len, flops)


def train_flops_per_token(c: ModelConfig, seq_len: int, causal: bool = False) -> float:
  """3 x forward, less what has no gradient beside an index. causal: the ideal, attention's scores for the
  keys that a query attends to, half of seq_len or those of a window or a choice (mean_keys).
  """
  return _with_backward(c, _of_kernel(c, seq_len, causal))


def train_product_flops_per_token(c: ModelConfig, seq_len: int) -> float:
  """3 x forward of the matrix products outside the connection, causal: no program of the step does fewer."""
  terms = _of_kernel(c, seq_len, causal=True)
  return _with_backward(c, {name: flops for name, flops in terms.items() if not name.startswith('hc_')})


def mean_keys(c: ModelConfig, seq_len: int) -> float:
  """How many keys a query attends to, on average over a window of one document: min(t, most) for token t."""
  most = seq_len
  if c.sparse is not None and not c.warms_up:
    most = min(seq_len, c.sparse.topk or c.sparse.window)
  return (most + 1) / 2 if most == seq_len else most - most * (most - 1) / (2 * seq_len)


def _of_kernel(c: ModelConfig, seq_len: int, causal: bool) -> dict[str, float]:
  terms = forward_flops_per_token(c, seq_len)
  parts = {'attention_scores': mean_keys(c, seq_len) / seq_len, 'index_scores': (seq_len + 1) / (2 * seq_len)}
  return terms | {name: part * terms[name] for name, part in parts.items() if causal and name in terms}


def _with_backward(c: ModelConfig, terms: dict[str, float]) -> float:
  """Training by forward terms, 3 x each; an index's input has no gradient, in its warm-up nothing else."""
  if not c.indexed:
    return 3.0 * sum(terms.values())
  times = {name: 1.0 if c.warms_up else 3.0 for name in terms}
  times |= {'index_maps': 2.0, 'index_scores': 3.0}
  return sum(times[name] * flops for name, flops in terms.items())


def routed_flops_over_ideal(c: ModelConfig, shards: int) -> float:
  """FLOPs of the routed experts' whole buffers over those of the rows in use, which cost the ideal.

  For a mesh with that many `expert` shards and a grouped matrix product that does not skip rows in no group;
  one that does costs the ideal, one that is lowered densely (XLA:CPU) E / shards times this.
  """
  return shards * buffer_rows(1, c.moe.active, c.moe.experts // shards) / c.moe.active


def _dense(c: ModelConfig) -> int:
  """Number of layers with a dense feed-forward sublayer."""
  return c.depth if c.moe is None else c.dense_layers


def _expert_parameters(c: ModelConfig) -> dict[str, int]:
  """By group, {} without experts; the router's bias counts as the router's."""
  if c.moe is None:
    return {}
  layers, expert = c.depth - c.dense_layers, 3 * c.width * c.moe.ffn_width
  return {
    'router': layers * (c.width + 1) * c.moe.experts,
    'shared_experts': layers * c.moe.shared * expert,
    'routed_experts': layers * c.moe.experts * expert,
  }


def _expert_flops(c: ModelConfig) -> dict[str, int]:
  """Forward FLOPs per token by term, {} without experts. 'routed_experts' is the ideal: rows in use alone."""
  if c.moe is None:
    return {}
  layers, expert = c.depth - c.dense_layers, 3 * c.width * c.moe.ffn_width
  return {
    'router': 2 * layers * c.width * c.moe.experts,
    'shared_experts': 2 * layers * c.moe.shared * expert,
    'routed_experts': 2 * layers * c.moe.active * expert,
  }


def _index_parameters(c: ModelConfig) -> dict[str, int]:
  """By group, {} without an index."""
  if not c.indexed:
    return {}
  return {'index': c.depth * (sum(a * b for a, b in products(c)['index']) + 2 * c.sparse.index_dim)}


def _index_flops(c: ModelConfig, seq_len: int) -> dict[str, float]:
  """Forward FLOPs per token by term, {} without an index: its maps, and its scores for all of seq_len."""
  if not c.indexed:
    return {}
  scores = c.sparse.index_heads * (c.sparse.index_dim + 1)
  return {
    'index_maps': 2 * c.depth * sum(a * b for a, b in products(c)['index']),
    'index_scores': 2 * c.depth * seq_len * scores,
  }


def _mtp_block(c: ModelConfig) -> ModelConfig:
  """A model of one layer, as the block of multi-token prediction and what comes after it."""
  return dataclasses.replace(c, depth=1, dense_layers=0, moe=None, mtp=None)


def _mtp_parameters(c: ModelConfig) -> dict[str, int]:
  if c.mtp is None:
    return {}
  expansion = c.connection.streams * c.width * (c.connection.expansion == 'learned')
  return {'mtp': parameters(_mtp_block(c))['non_embedding'] - expansion + 2 * c.width**2 + 2 * c.width}


def _mtp_flops(c: ModelConfig, seq_len: int, flops: dict[str, float]) -> dict[str, float]:
  """'mtp': the module's products with weights and its logits; the rest of it is added to terms of layers."""
  if c.mtp is None:
    return {}
  own = forward_flops_per_token(_mtp_block(c), seq_len)
  beside = ('hc_', 'attention_scores', 'index_')
  shared = {name: flops[name] + own.pop(name) for name in flops if name.startswith(beside)}
  return shared | {'mtp': sum(own.values()) + 2 * (1 + c.connection.streams) * c.width**2}


def _generator(c: ModelConfig) -> int:
  """Parameters of one sublayer's phi."""
  spec = c.connection
  inputs, outputs = spec.generator_shape
  width = c.width // spec.fractions
  if spec.rank is None:
    return inputs * width * outputs
  if spec.generator == 'cp':
    gates = outputs - spec.parts['res']
    return inputs * width * gates + spec.rank * sum(cp_shapes(spec, width).values())
  return spec.rank * (inputs * width + outputs)


def _elementwise(c: ModelConfig) -> int:
  """Parameters of one sublayer's elementwise read."""
  return 2 * (c.connection.read_rank or 0) * c.connection.streams * c.width


def _reads(c: ModelConfig) -> int:
  """Weighted sums of the streams that sublayers, and a dense collapse, take their inputs from."""
  return c.depth * (1 + c.connection.read_ways) + (c.connection.collapse == 'dense')


def _norm_flops(c: ModelConfig) -> int:
  """Per token, of the norms of what coefficients are generated from: 3 a number, all streams a sublayer.

  A dense read norms the last stream alone, once a layer and at the end. With depth_norm it norms all, and
  what was read: 5 a number with its weights and the last stream added.
  """
  spec = c.connection
  if spec.read_gate.kind != 'dense':
    return 2 * c.depth * spec.dynamic * 3 * spec.streams * c.width
  ways = spec.read_ways * c.depth + 1
  return c.width * (3 * (c.depth + 1) * (1 + spec.streams * spec.depth_norm) + 5 * ways * spec.depth_norm)


def _latent_norms(c: ModelConfig) -> int:
  """Parameters of the norms of latents, in all layers."""
  return c.depth * (c.mla.kv_rank + (c.mla.q_rank or 0)) if c.mla else 0


def _dense_sizes(c: ModelConfig, name: str) -> list[int]:
  """Sizes of that parameter of dense reads, of all layers and of the collapse; [] without."""
  spec = c.connection
  ways = [spec.read_ways] * c.depth + [1] if spec.read_gate.kind == 'dense' else []
  return [math.prod(dense_reads.sizes(spec, c.width, way)[name]) for way in ways]


def _dense_maps(c: ModelConfig) -> int:
  """Parameters of the maps that make the weights of dense reads, the collapse's too."""
  return sum(_dense_sizes(c, 'read_down') + _dense_sizes(c, 'read_up'))


def _query(c: ModelConfig) -> int:
  """Parameters of one sublayer's query over its sources."""
  return c.width * (c.connection.read_gate.kind == 'sources')


def products(c: ModelConfig) -> dict[str, list[tuple[int, int]]]:
  """(in, out) of every linear map of one dense block."""
  queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
  attention = [(c.width, queries), (c.width, keys), (c.width, keys), (queries, c.width)]
  if c.mla is not None:
    up, values = c.heads * (c.mla.head_dim + c.mla.value_dim), c.heads * c.mla.value_dim
    latent = c.mla.kv_rank
    query = [(c.width, queries)]
    if c.mla.q_rank:
      query = [(c.width, c.mla.q_rank), (c.mla.q_rank, queries)]
    attention = [*query, (c.width, latent + c.mla.rope_dim), (latent, up), (values, c.width)]
  index = []
  if c.indexed:
    inputs, heads, size = (c.mla and c.mla.q_rank) or c.width, c.sparse.index_heads, c.sparse.index_dim
    index = [(inputs, heads * size), (c.width, size), (c.width, heads)]
  return {
    'attention': attention,
    'index': index,
    'feed_forward': [(c.width, c.ffn_width), (c.width, c.ffn_width), (c.ffn_width, c.width)],
  }


def _size(shape: tuple[int, int], rank: int | None) -> int:
  return shape[0] * shape[1] if rank is None else rank * (shape[0] + shape[1])
