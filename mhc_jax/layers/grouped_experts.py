"""The experts of a mixture on their own rows: sorting tokens by expert, grouped products, and the mesh.

moe.py decides which expert a token goes to; here its products are made, without a dropped token.
Axes: S tokens, E experts, A chosen experts of a token, R rows (a token at one of its experts), D width,
F width of an expert.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mhc_jax.derivatives import with_backward
from mhc_jax.errors import ConfigError
from mhc_jax.layers import fp8
from mhc_jax.sharding import BATCH

PRODUCTS = 'products of experts'  # their name for policies of recomputation, which know plain products alone


class Routing(NamedTuple):
  """The chosen experts of every token and their weights, both (B, T, A)."""

  index_BTA: jax.Array
  weight_BTA: jax.Array


def buffer_rows(tokens: int, active: int, experts: int) -> int:
  """Rows of the buffer of a device with that many experts: no token is dropped at any load.

  All tokens may choose among these experts, each an expert once at most. With balanced loads
  tokens * active * experts / (all experts) of them are in use; the others cost memory and, where the grouped
  matrix product skips what is in no group (TPU), no FLOPs.
  """
  return tokens * min(active, experts)


class _Rows(NamedTuple):
  """Where the rows of a device's buffer come from; rows are sorted by expert, unused ones last."""

  slot_R: jax.Array  # token * A + choice
  used_R: jax.Array  # a row of one of this device's experts
  row_SA: jax.Array  # of every token and choice; meaningless where the expert is another device's
  here_SA: jax.Array  # the expert is this device's
  size_E: jax.Array  # number of rows of each of this device's experts


def _arrange(index_SA: jax.Array, first: jax.Array | int, experts: int) -> _Rows:
  """The rows for experts first .. first + experts - 1."""
  tokens, active = index_SA.shape
  rows = buffer_rows(tokens, active, experts)
  expert_SA = index_SA - first
  here_SA = (expert_SA >= 0) & (expert_SA < experts)
  key_N = jnp.where(here_SA, expert_SA, experts).reshape(-1)
  slot_N = jnp.argsort(key_N)
  size_E = jnp.sum(key_N[:, None] == jnp.arange(experts)[None], 0, dtype=jnp.int32)
  row_SA = jnp.minimum(jnp.argsort(slot_N).reshape(tokens, active), rows - 1)
  return _Rows(slot_N[:rows], jnp.arange(rows) < size_E.sum(), row_SA, here_SA, size_E)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode='promise_in_bounds')


def _add_up(y_RD: jax.Array, weight_SA: jax.Array, rows: _Rows) -> jax.Array:
  """sum_a weight_a * (the row of choice a), (S, D), summed in float32 or more and rounded once."""
  wide = jnp.promote_types(y_RD.dtype, jnp.float32)
  terms = [
    jnp.where(here_S[:, None], weight_S[:, None] * _take(y_RD, row_S).astype(wide), 0)
    for row_S, here_S, weight_S in zip(rows.row_SA.T, rows.here_SA.T, weight_SA.T, strict=True)
  ]
  return functools.reduce(jnp.add, terms).astype(y_RD.dtype)


def _spread(x_SD: jax.Array, rows: _Rows) -> jax.Array:
  """Every row's token, (R, D); zeros in unused rows."""
  return jnp.where(rows.used_R[:, None], _take(x_SD, rows.slot_R // rows.row_SA.shape[1]), 0)


def _spread_backward(rows: _Rows, g_RD: jax.Array) -> tuple[jax.Array, None]:
  return _add_up(g_RD, jnp.ones(rows.row_SA.shape, g_RD.dtype), rows), None


_spread = with_backward(_spread, lambda x_SD, rows: (_spread(x_SD, rows), rows), _spread_backward)


def _collect(y_RD: jax.Array, weight_SA: jax.Array, rows: _Rows) -> jax.Array:
  """Each token's weighted sum over its rows, (S, D); rows in no group are never looked at."""
  return _add_up(y_RD, weight_SA, rows)


def _collect_backward(saved, g_SD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  y_RD, weight_SA, rows = saved
  wide = jnp.promote_types(y_RD.dtype, jnp.float32)
  weight_R = _take(weight_SA.reshape(-1), rows.slot_R)
  g_RD = weight_R[:, None] * _take(g_SD, rows.slot_R // weight_SA.shape[1]).astype(wide)
  products = [
    jnp.where(here_S, jnp.sum(g_SD.astype(wide) * _take(y_RD, row_S).astype(wide), -1), 0)
    for row_S, here_S in zip(rows.row_SA.T, rows.here_SA.T, strict=True)
  ]
  g_weight_SA = jnp.stack(products, 1).astype(weight_SA.dtype)
  return jnp.where(rows.used_R[:, None], g_RD, 0).astype(y_RD.dtype), g_weight_SA, None


_collect = with_backward(_collect, lambda *args: (_collect(*args), args), _collect_backward)


@jax.custom_batching.sequential_vmap  # JAX batches a ragged product only where all three are batched
def _grouped_product(x_RD: jax.Array, w_EDF: jax.Array, size_E: jax.Array) -> jax.Array:
  """Each row times its expert's matrix, (R, F); what is in rows of no expert is undefined.

  With a backward of its own for the weights' gradient alone, see _weight_gradient.
  """
  return lax.ragged_dot(x_RD, w_EDF, size_E)


def _grouped_product_backward(saved, g_RF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x_RD, w_EDF, size_E = saved
  d_x_RD = _grouped_product(g_RF, w_EDF.swapaxes(1, 2), size_E)
  return d_x_RD, _weight_gradient(x_RD, g_RF, size_E), None


_grouped_product = with_backward(
  _grouped_product, lambda *args: (_grouped_product(*args), args), _grouped_product_backward
)


@jax.custom_batching.sequential_vmap
def _weight_gradient(x_RD: jax.Array, g_RF: jax.Array, size_E: jax.Array) -> jax.Array:
  """sum over an expert's rows of x g^T, (E, D, F). No TPU has float64."""
  kernel = _weight_gradient_anywhere if x_RD.dtype == jnp.float64 else _weight_gradient_on_tpu
  return lax.platform_dependent(x_RD, g_RF, size_E, tpu=kernel, default=_weight_gradient_anywhere)


def _weight_gradient_backward(saved, d_EDF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
  x_RD, g_RF, size_E = saved
  d_x_RD = _grouped_product(g_RF, d_EDF.swapaxes(1, 2), size_E)
  return d_x_RD, _grouped_product(x_RD, d_EDF, size_E), None


_weight_gradient = with_backward(
  _weight_gradient, lambda *args: (_weight_gradient(*args), args), _weight_gradient_backward
)


def _weight_gradient_anywhere(x_RD: jax.Array, g_RF: jax.Array, size_E: jax.Array) -> jax.Array:
  rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
  return lax.ragged_dot_general(x_RD, g_RF, size_E, rows, preferred_element_type=x_RD.dtype)


def _weight_gradient_on_tpu(x_RD: jax.Array, g_RF: jax.Array, size_E: jax.Array) -> jax.Array:
  """The same by JAX's megablox kernel (Gale et al., arXiv 2211.15841).

  XLA's TPU compiler has a kernel for the ragged product, but for this one (ragged in what is contracted) it
  multiplies all rows for every expert and masks: E times the FLOPs.
  """
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm  # 0.3 s, wanted by experts alone

  def tile(size: int) -> int:
    """The largest whole part of a dimension whose blocks and float32 sums fit the on-chip memory."""
    return max((part for part in range(128, 1281, 128) if size % part == 0), default=min(size, 1024))

  tiles = (math.gcd(len(x_RD), 512), tile(x_RD.shape[1]), tile(g_RF.shape[1]))
  return tgmm(x_RD.T, g_RF, size_E, x_RD.dtype, tiles)


def _tiles(rows: _Rows, shape: tuple[int, ...]) -> tuple[jax.Array, int]:
  """(every row's tile of the weights' gradient in FP8, ascending; their number): 128 rows of an expert.

  They are of one sequence, so that an expert's tiles do not depend on which sequences a device has; rows of
  no expert have the last tile. shape: of the choices, (B, T, A).
  """
  batch, time, active = shape
  row_R, groups = jnp.arange(len(rows.slot_R)), len(rows.size_E) * batch
  expert_R = jnp.searchsorted(jnp.cumsum(rows.size_E), row_R, side='right')
  group_R = jnp.where(rows.used_R, expert_R * batch + rows.slot_R // (active * time), groups)
  place_R = row_R - jnp.searchsorted(group_R, jnp.arange(groups + 1))[group_R]
  size = fp8.TILES['fp8_v3'].column[0]
  each = -(-time // size)  # a token goes to an expert once at the most
  return jnp.minimum(group_R * each + place_R // size, groups * each), groups * each + 1


def _fp8_product(x_RD, w_EDF, size_E, tile_R, count):
  """_grouped_product as fp8.product has it; the weights' gradient by tiles of _tiles."""
  return _fp8_forward(x_RD, w_EDF, size_E, tile_R, count)[0]


def _fp8_forward(x_RD, w_EDF, size_E, tile_R, count):
  row, block, _ = fp8.TILES['fp8_v3']
  q, wide = fp8.quantise(x_RD, row), jnp.promote_types(x_RD.dtype, jnp.float32)
  with jax.default_matmul_precision('highest'):
    y_RF = _grouped_product(fp8.dequantise(q, row).astype(wide), fp8.fake(w_EDF, block).astype(wide), size_E)
  return y_RF.astype(x_RD.dtype), (q, w_EDF, size_E, tile_R)


def _fp8_backward(count, saved, g_RF):
  (row, block, _), (q, w_EDF, size_E, tile_R) = fp8.TILES['fp8_v3'], saved
  wide = jnp.promote_types(g_RF.dtype, jnp.float32)
  w_EFD = fp8.fake(w_EDF, block).astype(wide).swapaxes(1, 2)
  x_RD = fp8.fake_by_rows(fp8.dequantise(q, row), tile_R, count).astype(wide)
  with jax.default_matmul_precision('highest'):
    d_x_RD = _grouped_product(fp8.fake(g_RF, row), w_EFD, size_E)
    d_w_EDF = _weight_gradient(x_RD, fp8.fake_by_rows(g_RF, tile_R, count), size_E)
  return d_x_RD.astype(g_RF.dtype), d_w_EDF.astype(w_EDF.dtype), None, None


_fp8_product = with_backward(_fp8_product, _fp8_forward, _fp8_backward, (4,))


def _experts_here(
  x_BTD: jax.Array,
  index_BTA: jax.Array,
  weight_BTA: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  first: jax.Array | int,
  in_fp8: bool,
) -> jax.Array:
  """These tokens' sum over the given experts, of which the first has the index `first`."""
  active = index_BTA.shape[-1]
  rows = _arrange(index_BTA.reshape(-1, active), first, len(gate_EDF))
  x_RD = _spread(x_BTD.reshape(-1, x_BTD.shape[-1]), rows)

  def product(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
    if in_fp8:
      return _fp8_product(x_RD, w_EDF, rows.size_E, *_tiles(rows, index_BTA.shape))
    return _grouped_product(x_RD, w_EDF, rows.size_E)

  gate_RF = checkpoint_name(product(x_RD, gate_EDF), PRODUCTS)
  up_RF = checkpoint_name(product(x_RD, up_EDF), PRODUCTS)
  hidden_RF = jax.nn.silu(gate_RF) * up_RF
  y_RD = checkpoint_name(product(hidden_RF, down_EFD), PRODUCTS)
  return _collect(y_RD, weight_BTA.reshape(-1, active), rows).reshape(x_BTD.shape)


@jax.named_scope('routed_experts')  # a part whose cost experiments/compile reports
def experts(
  x_BTD: jax.Array,
  routing: Routing,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  mesh: Mesh | None,
  in_fp8: bool = False,
) -> jax.Array:
  """sum_a weight_a * SwiGLU_{index_a}(x), (B, T, D) in x's dtype, in which the weights must be too.

  in_fp8: products as fp8.product has them by 'fp8_v3'; weights may be wider than x then.

  On a mesh: tokens are gathered over `expert` and `tensor`. The devices of `expert` hold E / expert experts
  each, those of `tensor` a part of every expert's width F. Every device sorts the rows of its own by expert,
  multiplies group by group, and the sums are scattered back, rounded to x's dtype before. Weights are
  gathered over `fsdp` on use, and their gradients added over it in x's dtype. Tokens that the mesh does not
  divide (a single sequence) are computed by every device alike. Raises ConfigError where `expert` does not
  divide E, or `tensor` F.
  """
  arrays = (x_BTD, routing.index_BTA, routing.weight_BTA, gate_EDF, up_EDF, down_EFD)
  if mesh is None or mesh.size == 1:
    return _experts_here(*arrays, first=0, in_fp8=in_fp8)
  batch, tensor = math.prod(mesh.shape[axis] for axis in BATCH), mesh.shape['tensor']
  if x_BTD.shape[0] % batch or x_BTD.shape[1] % tensor:
    return _experts_here(*arrays, first=0, in_fp8=in_fp8)
  count, width, ffn_width = gate_EDF.shape
  for axis, name, size in (('expert', 'moe.experts', count), ('tensor', 'moe.ffn_width', ffn_width)):
    if size % mesh.shape[axis]:
      raise ConfigError(f'mesh.{axis}={mesh.shape[axis]} does not divide model.{name}={size}')
  # A width that fsdp does not divide is gathered before.
  fsdp = 'fsdp' if width % mesh.shape['fsdp'] == 0 else None
  gathered = functools.partial(lax.all_gather, tiled=True)
  scattered = functools.partial(lax.psum_scatter, tiled=True)

  def body(*arrays):
    tokens = [gathered(gathered(a, 'expert', axis=0), 'tensor', axis=1) for a in arrays[:3]]
    weights = arrays[3:]
    if fsdp:
      weights = [gathered(w, fsdp, axis=axis) for w, axis in zip(weights, (1, 1, 2), strict=True)]
    first = lax.axis_index('expert') * len(weights[0])
    y_BTD = _experts_here(*tokens, *weights, first=first, in_fp8=in_fp8)
    return scattered(scattered(y_BTD, 'tensor', scatter_dimension=1), 'expert', scatter_dimension=0)

  tokens, into, out = P(BATCH, 'tensor'), P('expert', fsdp, 'tensor'), P('expert', 'tensor', fsdp)
  # check_vma=False: Pallas kernels do not say over which axes their results vary.
  where = {'in_specs': (tokens, tokens, tokens, into, into, out), 'out_specs': tokens, 'check_vma': False}
  return jax.shard_map(body, mesh=mesh, **where)(*arrays)
