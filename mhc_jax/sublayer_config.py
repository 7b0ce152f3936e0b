"""What sublayers are made of, as sections of the configuration: latent attention, sparse attention, experts,
multi-token prediction. model_config.py joins them.
"""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mhc_jax.errors import require
from mhc_jax.presets import BY_DEPTH

ROUTERS = ('sigmoid', 'sinkhorn')
SPARSE = ('window', 'topk')


@dataclasses.dataclass(frozen=True)
class MLAConfig:
  """Sizes of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""

  kv_rank: int  # of the latent from which keys and values are made
  head_dim: int  # of queries and keys, without the rotary part
  rope_dim: int  # of the rotary part; one rotary key serves all heads
  value_dim: int
  q_rank: int | None = None  # of the latent from which queries are made; None: queries have full rank


@dataclasses.dataclass(frozen=True)
class SparseConfig:
  """Which of the tokens before it a query attends to (layers/sparse.py)."""

  kind: str  # one of SPARSE
  topk: int | None = None  # tokens of a query
  window: int | None = None  # the last so many, the query's own included; with topk they are among those
  index_heads: int | None = None
  index_dim: int | None = None  # of an index head
  index_rope_dim: int | None = None  # the first so many of them have the position
  stage: str | None = None  # 'warmup': attention over all, and the index alone learns


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """A mixture of experts (DeepSeek-V3, arXiv 2412.19437) in place of the feed-forward sublayer."""

  experts: int  # routed ones
  active: int  # routed ones that a token goes to
  shared: int  # experts that every token goes to: one SwiGLU of `shared` times the width
  ffn_width: int  # of one expert
  scale: float  # of the routed experts' sum, whose weights add up to 1
  router: str  # 'sigmoid' or 'sinkhorn'
  bias_rate: float  # by which an expert's bias moves after each update


@dataclasses.dataclass(frozen=True)
class MTPConfig:
  """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) by one module."""

  depth: int  # tokens beyond the next: 1
  weight: float  # lambda, of its loss


def or_else(value: Any, default: Any) -> Any:
  """The value, or what stands where the configuration leaves it out."""
  return default if value is None else value


def build_mla(c: ConfigDict) -> MLAConfig | None:
  """model.mla -> MLAConfig; heads of width / heads, half of that for the rotary part."""
  m = c.mla
  if m.kv_rank is None:
    return None
  head_dim = or_else(m.head_dim, c.width // c.heads)
  rope_dim = or_else(m.rope_dim, max(2, head_dim // 4 * 2))
  mla = MLAConfig(m.kv_rank, head_dim, rope_dim, or_else(m.value_dim, head_dim), m.q_rank)
  for name, value in dataclasses.asdict(mla).items():
    require(value is None or value >= 1, f'model.mla.{name} must be at least 1, got {value}')
  require(rope_dim % 2 == 0, f'model.mla.rope_dim must be even, got {rope_dim}')
  return mla


def build_sparse(c: ConfigDict, mla: MLAConfig | None) -> SparseConfig | None:
  """model.sparse -> SparseConfig. Sizes of the index that are not given are, relative to attention's,
  DeepSeek-V3.2's (arXiv 2512.02556)."""
  s = c.sparse
  if s.kind is None:
    return None
  require(s.kind in SPARSE, f'model.sparse.kind must be one of {", ".join(SPARSE)}, got {s.kind!r}')
  for name in ('topk', 'window', 'index_heads', 'index_dim'):
    require(s[name] is None or s[name] >= 1, f'model.sparse.{name} must be at least 1, got {s[name]}')
  if s.kind == 'window':
    require(s.window is not None, 'model.sparse.kind=window needs model.sparse.window, a number of tokens')
    given = [name for name, value in s.items() if value is not None and name not in ('kind', 'window')]
    require(not given, f'model.sparse.{"".join(given[:1])} needs model.sparse.kind=topk')
    return SparseConfig('window', window=s.window)
  require(s.topk is not None, 'model.sparse.kind=topk needs model.sparse.topk, a number of tokens')
  require(
    s.window is None or s.window <= s.topk,
    f'model.sparse.window={s.window} is over model.sparse.topk={s.topk}, among which its tokens are',
  )
  require(s.stage in (None, 'warmup'), f'model.sparse.stage must be warmup or None, got {s.stage!r}')
  size = or_else(s.index_dim, mla.head_dim if mla else c.width // c.heads)
  rope_dim = or_else(s.index_rope_dim, max(2, size // 4 * 2))
  require(
    rope_dim % 2 == 0 and 0 <= rope_dim <= size,
    f'model.sparse.index_rope_dim must be even and at most index_dim={size}, got {rope_dim}',
  )
  heads = or_else(s.index_heads, max(1, c.heads // 2))
  return SparseConfig('topk', s.topk, s.window, heads, size, rope_dim, s.stage)


def build_moe(c: ConfigDict) -> MoEConfig | None:
  """model.moe -> MoEConfig. Counts not given are the paper's (arXiv 2512.24880).

  It does not state the scale: 2.5 is DeepSeek-V3's, close to the square root of 6, which gives the mean of 6
  independent experts the variance of one. bias_rate is that of arXiv 2408.15664.
  """
  m = c.moe
  if m.experts is None:
    return None
  active, shared = or_else(m.active, min(6, m.experts)), or_else(m.shared, 2)
  require(
    1 <= active <= m.experts,
    f'model.moe.active must lie between 1 and model.moe.experts={m.experts}, got {active}',
  )
  require(shared >= 0, f'model.moe.shared must not be negative, got {shared}')
  moe = MoEConfig(
    experts=m.experts,
    active=active,
    shared=shared,
    ffn_width=or_else(m.ffn_width, -(-8 * c.width // (24 * (active + shared))) * 8),
    scale=or_else(m.scale, 2.5),
    router=or_else(m.router, ROUTERS[0]),
    bias_rate=or_else(m.bias_rate, 1e-3),
  )
  require(moe.ffn_width >= 1, f'model.moe.ffn_width must be at least 1, got {moe.ffn_width}')
  require(moe.scale > 0, f'model.moe.scale must be positive, got {moe.scale}')
  require(moe.bias_rate >= 0, f'model.moe.bias_rate must not be negative, got {moe.bias_rate}')
  require(moe.router in ROUTERS, f'model.moe.router must be one of {", ".join(ROUTERS)}, got {moe.router!r}')
  require(
    moe.router != 'sinkhorn' or active < m.experts,
    f'model.moe.router=sinkhorn needs model.moe.active={active} below model.moe.experts={m.experts}',
  )
  return moe


def build_mtp(c: ConfigDict) -> MTPConfig | None:
  """model.mtp -> MTPConfig; the weight is V3's of its first 10T tokens."""
  m = c.mtp
  if m.depth is None:
    return None
  require(m.depth == 1, f'model.mtp.depth: one module, 1, is what there is, got {m.depth}')
  mtp = MTPConfig(m.depth, or_else(m.weight, 0.3))
  require(
    mtp.weight > 0, f'model.mtp.weight must be positive, got {mtp.weight}: without, leave depth at None'
  )
  require(
    c.connection.name not in BY_DEPTH,
    f'model.mtp.depth does not go with the connection {c.connection.name}, which has no stream for its block',
  )
  warmup = c.sparse.stage == 'warmup'
  require(not warmup, 'model.sparse.stage=warmup moves the index alone: leave model.mtp.depth out')
  return mtp


def dense_layers(c: ConfigDict, moe: MoEConfig | None) -> int:
  """Leading layers without experts; raises ConfigError where a model cannot have so many."""
  require(moe is not None or c.dense_layers is None, 'model.dense_layers needs model.moe.experts')
  dense = 0 if moe is None else or_else(c.dense_layers, 1)
  require(
    moe is None or 0 <= dense < c.depth,
    f'model.dense_layers must lie between 0 and model.depth - 1 = {c.depth - 1}, got {dense}',
  )
  return dense
