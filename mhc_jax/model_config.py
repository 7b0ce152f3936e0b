"""The model's part of the configuration: ConfigDict -> ModelConfig, with derived sizes and all checks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mhc_jax import hyper_connection
from mhc_jax.connection import ConnectionSpec
from mhc_jax.constraints.base import Constraint
from mhc_jax.data import tokenizer_of, vocab_size_of
from mhc_jax.errors import ConfigError, require
from mhc_jax.kernels.choice import KERNELS
from mhc_jax.presets import BLOCKS, BY_DEPTH, connection_spec
from mhc_jax.sublayer_config import (
  MLAConfig,
  MoEConfig,
  MTPConfig,
  SparseConfig,
  build_mla,
  build_moe,
  build_mtp,
  build_sparse,
  dense_layers,
  or_else,
)

REMAT = ('none', 'layer', 'products', 'block')
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16, 'float64': jnp.float64}
MOST_LAYERS = 10_000
MOST_WRITTEN = 512  # layers outside of a loop: compiling takes seconds for each
PRECISIONS = (None, 'fp8_v3', 'fp8_tensor')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and choices of one model."""

  width: int
  depth: int  # blocks; each has two sublayers
  heads: int
  kv_heads: int
  head_dim: int  # of queries and keys
  ffn_width: int  # of dense layers
  vocab_size: int
  connection: ConnectionSpec
  output_gain: float  # of the maps that write to the streams, at the start (HC: sqrt(n))
  weights_rank: int | None  # rank of every attention and feed-forward map; None is full
  dtype: Any  # of activations and streams; parameters stay float32
  remat: str  # one of REMAT
  kernels: str  # one of KERNELS
  scan: bool  # False: a Python loop over layers, the reference for tests
  scan_unroll: int
  rope_theta: float
  norm_eps: float
  base_width: int | None  # of the width transfer; None is off
  base_depth: int | None
  base_rank: float | None  # what weights_rank is at the base width; None is off
  mla: MLAConfig | None  # None: grouped-query attention
  moe: MoEConfig | None  # None: every layer is dense
  dense_layers: int  # leading layers outside the scan, with a dense feed-forward sublayer; 0 without moe
  precision: str | None = None  # of products with weights in sublayers: one of PRECISIONS (layers/fp8.py)
  sparse: SparseConfig | None = None  # None: attention over all tokens before
  mtp: MTPConfig | None = None  # None: the next token alone is predicted

  @property
  def width_ratio(self) -> float:
    """m_N = width / base width (CompleteP, arXiv 2505.01618), 1 without transfer."""
    return 1.0 if self.base_width is None else self.width / self.base_width

  @property
  def depth_ratio(self) -> float:
    """m_L = depth / base depth, 1 without transfer."""
    return 1.0 if self.base_depth is None else self.depth / self.base_depth

  @property
  def rank_ratio(self) -> float:
    """m_R = weights_rank / its value at the base width, 1 without transfer."""
    return 1.0 if self.base_rank is None else self.weights_rank / self.base_rank

  @property
  def factor_gain(self) -> float:
    """Of U in W = U V at the start, sqrt(m_R / m_N): see optimizer.py."""
    return (self.rank_ratio / self.width_ratio) ** 0.5 if self.weights_rank else 1.0

  @property
  def attention_scale(self) -> float:
    """1 / K with transfer, 1 / sqrt(K) without."""
    return self.head_dim ** (-0.5 if self.base_width is None else -1.0)

  @property
  def indexed(self) -> bool:
    """Whether an index chooses the tokens that attention is over."""
    return self.sparse is not None and self.sparse.kind == 'topk'

  @property
  def warms_up(self) -> bool:
    """Whether the index alone learns, from attention to all tokens."""
    return self.sparse is not None and self.sparse.stage == 'warmup'

  @property
  def value_dim(self) -> int:
    """Size of one head's value."""
    return self.head_dim if self.mla is None else self.mla.value_dim


def build_connection(c: ConfigDict, depth: int, constraint: Constraint | None = None) -> ConnectionSpec:
  """model.connection -> ConnectionSpec of a model of that depth.

  constraint: one of the caller's own in place of the named one. Raises ConfigError for unknown names and
  impossible sizes.
  """
  fields = {key: value for key, value in c.items() if key not in ('constraint_params', 'output_init_scaling')}
  if c.name in BY_DEPTH:
    blocks = BLOCKS if c.preset in ('block', 'inkling2') else 2 * depth
    blocks = depth if c.name == 'mudd' else blocks
    fields['write_period'] = period = or_else(c.write_period, -(-2 * depth // blocks))
    # The embedding, and every sublayer's output or sums of them.
    fields['streams'] = 1 + -(-2 * depth // max(period, 1))
  if constraint is not None:
    fields['constraint'] = constraint
  try:
    return connection_spec(constraint_params=c.constraint_params.to_dict(), **fields)
  except (TypeError, ValueError) as error:
    raise ConfigError(f'model.connection: {error}') from None


def build_model(config: ConfigDict, constraint: Constraint | None = None) -> ModelConfig:
  """config -> ModelConfig with derived sizes; raises ConfigError for impossible ones."""
  derived = derive_sizes(config)
  spec = build_connection(config.model.connection, config.model.depth, constraint)
  model = model_of(config.model.to_dict() | derived, derive_transfer(config), spec)
  check_connection(model)
  return model


def derive_sizes(config: ConfigDict) -> dict[str, Any]:
  """What model's fields mean where they are None, as plain values; raises ConfigError for impossible ones."""
  c = config.model
  _check_values(config)
  mla, moe, mtp = build_mla(c), build_moe(c), build_mtp(c)
  head_dim, kv_heads = _heads(c, mla)
  all_experts = None if moe is None else (moe.active + moe.shared) * moe.ffn_width
  ffn_width = or_else(c.ffn_width, all_experts or -(-8 * c.width // 24) * 8)
  require(ffn_width >= 1, f'model.ffn_width must be at least 1, got {ffn_width}')
  tokens = vocab_size_of(config.data.tokenizer)
  if tokens is None and c.vocab_size is None:
    tokens = tokenizer_of(config.data.tokenizer).vocab_size  # fetched, or an error that says what is missing
  vocabulary = or_else(c.vocab_size, tokens)
  require(
    tokens is None or vocabulary >= tokens,
    f'model.vocab_size={vocabulary} is below {tokens}, the number of tokens of the tokenizer',
  )
  if mla is None:
    largest = min(c.width, kv_heads * head_dim, ffn_width)
  else:
    sides = (mla.kv_rank, or_else(mla.q_rank, c.width), c.heads * head_dim, c.heads * mla.value_dim)
    largest = min(c.width, ffn_width, *sides)
  rank = c.weights.rank
  require(
    rank is None or 1 <= rank <= largest,
    f'model.weights.rank must lie between 1 and {largest}, the smallest side of a weight, got {rank}',
  )
  require(rank is None or moe is None, 'model.weights.rank does not go with model.moe.experts')
  dense, sparse = dense_layers(c, moe), build_sparse(c, mla)
  return {
    'kv_heads': kv_heads,
    'head_dim': head_dim,
    'ffn_width': ffn_width,
    'vocab_size': vocabulary,
    'mla': dataclasses.asdict(mla) if mla else c.mla.to_dict(),
    'moe': dataclasses.asdict(moe) if moe else c.moe.to_dict(),
    'mtp': dataclasses.asdict(mtp) if mtp else c.mtp.to_dict(),
    'dense_layers': dense if moe else None,
    'sparse': dataclasses.asdict(sparse) if sparse else c.sparse.to_dict(),
  }


def derive_transfer(config: ConfigDict) -> dict[str, Any]:
  """transfer with the base rank written out: by default the rank grows as the width."""
  given, width, rank = config.transfer.to_dict(), config.model.width, config.model.weights.rank
  if given['base_rank'] is None and rank is not None and given['base_width'] not in (None, width):
    given['base_rank'] = rank * given['base_width'] / width
  return given


def model_of(m: dict[str, Any], transfer: dict[str, Any], connection: ConnectionSpec) -> ModelConfig:
  """The ModelConfig of a resolved configuration's section `model`: fresh from derive_sizes or of config.json.

  The one place where the two meet: fields of equal name are taken as they are.
  """
  same = {field.name: m[field.name] for field in dataclasses.fields(ModelConfig) if field.name in m}
  return ModelConfig(
    **same
    | {
      'connection': connection,
      'output_gain': connection.streams**0.5 if m['connection']['output_init_scaling'] else 1.0,
      'weights_rank': m['weights']['rank'],
      'dtype': DTYPES[m['dtype']],
      'base_width': transfer['base_width'],
      'base_depth': transfer['base_depth'],
      'base_rank': transfer.get('base_rank'),  # not there in older runs
      'mla': _section(MLAConfig, m.get('mla')),
      'moe': _section(MoEConfig, m.get('moe')),
      'mtp': _section(MTPConfig, m.get('mtp')),
      'dense_layers': m.get('dense_layers') or 0,
      'sparse': _section(SparseConfig, m.get('sparse')),
    }
  )


def _section(kind: Any, values: dict[str, Any] | None) -> Any:
  """A section as its dataclass; None where it is off, or not there because the run is older than it."""
  needed = (field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
  return None if not values or any(values[name] is None for name in needed) else kind(**values)


def _check_values(config: ConfigDict) -> None:
  c = config.model
  for name in ('width', 'depth', 'heads', 'scan_unroll'):
    require(c[name] >= 1, f'model.{name} must be at least 1, got {c[name]}')
  require(c.depth <= MOST_LAYERS, f'model.depth={c.depth}: at most {MOST_LAYERS}')
  leading = or_else(c.dense_layers, 0)
  scanned = c.depth - leading
  written = leading + (scanned if scanned <= c.scan_unroll else 1) if c.scan else c.depth
  require(
    written <= MOST_WRITTEN,
    f'model.scan, scan_unroll and dense_layers write out {written} layers; at most {MOST_WRITTEN}',
  )
  require(c.dtype in DTYPES, f'model.dtype must be one of {", ".join(DTYPES)}, got {c.dtype!r}')
  require(
    c.precision in PRECISIONS, f'model.precision must be fp8_v3, fp8_tensor or None, got {c.precision!r}'
  )
  require(
    c.precision != 'fp8_tensor' or c.moe.experts is None,
    'model.precision=fp8_tensor does not go with model.moe.experts, which share no scale: fp8_v3 does',
  )
  require(c.remat in REMAT, f'model.remat must be one of {", ".join(REMAT)}, got {c.remat!r}')
  require(c.kernels in KERNELS, f'model.kernels must be one of {", ".join(KERNELS)}, got {c.kernels!r}')
  require(c.remat != 'block' or c.scan, 'model.remat=block needs model.scan=True')
  require(c.rope_theta > 0, f'model.rope_theta must be positive, got {c.rope_theta}')
  require(c.norm_eps >= 0, f'model.norm_eps must not be negative, got {c.norm_eps}')
  for name in ('base_width', 'base_depth'):
    base = config.transfer[name]
    require(base is None or base >= 1, f'transfer.{name} must be at least 1 or None, got {base}')
  base = config.transfer.base_rank
  require(base is None or 1e-3 <= base <= 1e9, f'transfer.base_rank must be a rank or None, got {base}')
  require(base is None or c.weights.rank is not None, 'transfer.base_rank needs model.weights.rank')
  for section, switch in (('mla', 'kv_rank'), ('moe', 'experts'), ('sparse', 'kind'), ('mtp', 'depth')):
    given = [name for name, value in c[section].items() if value is not None]
    on = c[section][switch] is not None
    require(on or not given, f'model.{section}.{"".join(given[:1])} needs model.{section}.{switch}')


def _heads(c: ConfigDict, mla: MLAConfig | None) -> tuple[int, int]:
  """(size of a head's query, number of heads of keys and values)."""
  if mla is not None:
    require(
      c.kv_heads in (None, c.heads), 'model.kv_heads does not go with model.mla.kv_rank: leave it at None'
    )
    return mla.head_dim + mla.rope_dim, c.heads
  require(c.width % c.heads == 0, f'model.heads={c.heads} does not divide model.width={c.width}')
  head_dim = c.width // c.heads
  require(head_dim % 2 == 0, f'width / heads = {head_dim} must be even for rotary embeddings')
  kv_heads = or_else(c.kv_heads, c.heads)
  require(
    kv_heads >= 1 and c.heads % kv_heads == 0,
    f'model.kv_heads={kv_heads} does not divide model.heads={c.heads}',
  )
  return head_dim, kv_heads


def check_connection(model: ModelConfig) -> None:
  """Raises ConfigError where it does not go with the model, and where tracing it or its gradient fails."""
  spec, width = model.connection, model.width
  require(
    spec.read_ways == 1 or (model.mla is None and not model.indexed),
    'connection.read_ways=4 needs attention with keys of its own: neither model.mla.kv_rank nor '
    'model.sparse.kind=topk; read_ways=1 goes with both',
  )
  require(
    width % spec.fractions == 0,
    f'connection.fractions={spec.fractions} does not divide the width {width}',
  )
  inputs = spec.generator_shape[0] * width // spec.fractions
  require(
    spec.rank is None or spec.rank <= inputs,
    f'connection.rank={spec.rank} is over {inputs}, the number of inputs of phi',
  )
  require(
    width % spec.read_heads == 0, f'connection.read_heads={spec.read_heads} does not divide the width {width}'
  )
  _check_trace(spec)


@functools.lru_cache(maxsize=1024)
def _check_trace(spec: ConnectionSpec) -> None:
  """The connection as training has it, traced on one token of width 1: no step knows a width from another."""
  n, constraint, width = spec.units, spec.constraint, spec.read_heads

  def coefficients(params: Any, x_NBTD: jax.Array) -> tuple[jax.Array, Any]:
    c = hyper_connection.generate(params, x_NBTD, spec)
    read_BTD = hyper_connection.read(c.pre_NBT, x_NBTD, spec.fractions * spec.read_ways)
    return sum(jnp.sum(x) for x in (*c, read_BTD) if x is not None), c.res_NMBT

  try:
    params = jax.eval_shape(
      lambda: hyper_connection.init_params(jax.random.key(0), spec, width * spec.fractions, 0)
    )
    x_NBTD = jax.ShapeDtypeStruct((n, 1, 1, width), jnp.float32)
    _, res_NMBT = jax.eval_shape(jax.grad(coefficients, argnums=(0, 1), has_aux=True), params, x_NBTD)
  except Exception as error:  # whatever somebody's own constraint may raise
    what = f'{type(error).__name__}: {error}'.splitlines()[0]
    raise ConfigError(f'connection.constraint={constraint.name} does not work: {what}') from None
  wanted = {'coordinates at the start': (params.get('b_res'), (constraint.num_coordinates(n),))}
  wanted['matrices'] = (res_NMBT, (n, n, 1, 1))
  for what, (found, shape) in wanted.items():
    if found is not None and found.shape != shape:
      raise ConfigError(
        f'connection.constraint={constraint.name} does not work: its {what} are {found.shape}, not {shape}'
      )
