"""Parameters and FLOPs of a model by term, hyper-connections included: pure functions of its sizes.

Conventions. A multiply-add is 2 FLOPs; training is 3 x forward (no recomputation counted). Attention is
counted in full, T x T, as it is executed. Left out: norms, softmax, activations, rotary embedding and
residual additions (O(C) per token and sublayer), except the connection's own norm. XLA's count of matrix
products equals the terms that are matrix products (tests/test_cost.py).
"""

from mhc_jax.config import ModelConfig
from mhc_jax.generator import cp_shapes


def parameters(c: ModelConfig) -> dict[str, int]:
  """Number of parameters by group, with 'total', 'matmul' and 'non_embedding' at the end.

  'matmul' (attention, feed-forward, unembedding) is the primary N of the scaling laws (Porian et al.,
  arXiv 2406.19146); tokens_per_param counts by it.
  """
  maps = _maps(c)
  spec, n = c.connection, c.connection.streams
  dynamic = spec.dynamic and bool(spec.parts)
  alphas = len({spec.alpha_of(part) for part in spec.parts})
  static = 0 if spec.phi_only else sum(spec.parts.values()) + alphas * dynamic
  norm = (spec.generator_shape[0] if spec.parts else n) * c.width
  norm *= spec.norm_weight and spec.dynamic and spec.has_params
  head = c.width * n**2 if spec.collapse == 'learned' else 0
  ends = {'learned': 1 + n, 'weights': n}.get(spec.collapse, 0) + n * c.width * (spec.expansion == 'learned')
  groups = {
    'embedding': c.vocab_size * c.width,
    'unembedding': c.width * c.vocab_size,
    'attention': c.depth * sum(_size(shape, c.weights_rank) for shape in maps['attention']),
    'feed_forward': c.depth * sum(_size(shape, c.weights_rank) for shape in maps['feed_forward']),
    'norm': (2 * c.depth + 1) * c.width,
    'hc_dynamic': 2 * c.depth * (_generator(c) * dynamic + _elementwise(c)) + head,
    'hc_static': 2 * c.depth * (static + norm) + ends,
  }
  total = sum(groups.values())
  matmul = groups['attention'] + groups['feed_forward'] + groups['unembedding']
  non_embedding = total - groups['embedding'] - groups['unembedding']
  return {**groups, 'total': total, 'matmul': matmul, 'non_embedding': non_embedding}


def forward_flops_per_token(c: ModelConfig, seq_len: int) -> dict[str, float]:
  """Forward FLOPs per token by term, for windows of seq_len tokens."""
  maps, spec, n = _maps(c), c.connection, c.connection.streams
  flops = {
    'unembedding': 2 * c.width * c.vocab_size,
    'attention_maps': 2 * c.depth * sum(_size(s, c.weights_rank) for s in maps['attention']),
    'attention_scores': 4 * c.depth * seq_len * c.heads * c.head_dim,
    'feed_forward': 2 * c.depth * sum(_size(s, c.weights_rank) for s in maps['feed_forward']),
  }
  if not spec.has_params:
    return flops
  inputs, outputs = spec.generator_shape
  copies = n // inputs  # 'per_stream' applies one small map n times
  product = _generator(c)
  if spec.generator == 'cp':  # multiplied out
    res = spec.parts['res']
    product = inputs * c.width * (outputs - res + spec.rank) + spec.rank * res
  sublayers = 2 * c.depth
  flops |= {
    'hc_generator': sublayers * spec.dynamic * (2 * copies * product + 3 * n * c.width),
    'hc_read': sublayers * 2 * n * c.width,
    'hc_mix': sublayers * (2 * n * n * c.width if 'res' in spec.parts else 0),
    'hc_write': sublayers * 2 * n * c.width,
    'hc_elementwise': sublayers * 2 * _elementwise(c),
    'hc_constraint': sublayers * spec.constraint.flops(n),
  }
  if spec.collapse == 'learned':
    flops['hc_collapse'] = 2 * n * n * c.width + 5 * n * c.width
  return flops


def train_flops_per_token(c: ModelConfig, seq_len: int) -> float:
  """3 x forward."""
  return 3.0 * sum(forward_flops_per_token(c, seq_len).values())


def _generator(c: ModelConfig) -> int:
  """Parameters of one sublayer's phi."""
  spec = c.connection
  inputs, outputs = spec.generator_shape
  if spec.rank is None:
    return inputs * c.width * outputs
  if spec.generator == 'cp':
    gates = outputs - spec.parts['res']
    return inputs * c.width * gates + spec.rank * sum(cp_shapes(spec, c.width).values())
  return spec.rank * (inputs * c.width + outputs)


def _elementwise(c: ModelConfig) -> int:
  """Parameters of one sublayer's elementwise read."""
  return 2 * (c.connection.read_rank or 0) * c.connection.streams * c.width


def _maps(c: ModelConfig) -> dict[str, list[tuple[int, int]]]:
  """(in, out) of every linear map of one block."""
  queries, keys = c.heads * c.head_dim, c.kv_heads * c.head_dim
  return {
    'attention': [(c.width, queries), (c.width, keys), (c.width, keys), (queries, c.width)],
    'feed_forward': [(c.width, c.ffn_width), (c.width, c.ffn_width), (c.ffn_width, c.width)],
  }


def _size(shape: tuple[int, int], rank: int | None) -> int:
  return shape[0] * shape[1] if rank is None else rank * (shape[0] + shape[1])
