"""Attention without scores in memory, by kernels that JAX brings: splash attention on TPUs, Triton on NVIDIA.

layers/attention.py holds the definition and the choice. Keys after the query and of other documents are left
out by the kernels, whole blocks of later keys without being computed. cuDNN's attention is not used: it knows
no documents but by a mask of all scores, and cannot be compiled where no GPU is.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

# The name under which recomputation finds the output and the logarithm of the softmax's sums (recompute.py).
ATTENTION = 'output and log-sum-exp of attention'
TILE = 128  # lanes of a TPU, by which the kernels cut the time axis
LARGEST, COMPUTED = 1024, 512  # steps in a block of splash attention, and keys of it computed at once


def why_not(time: int, dtype: Any) -> str | None:
  """Why the kernels cannot take sequences of that length and type; None where they can."""
  if dtype == jnp.float64:
    return 'the kernels know no float64'
  if time % TILE:
    return f'sequences of {time} tokens, not a multiple of {TILE}'
  if time == TILE:  # on v5e a step of width 64 takes a quarter more with the kernel
    return f'sequences of {time} tokens, whose logits are as small as their queries'
  return None


def block_of(time: int, largest: int) -> int:
  """The largest multiple of TILE that divides `time`, itself one, and is not over `largest`."""
  return max(size for size in range(TILE, largest + 1, TILE) if time % size == 0)


# TPU -----------------------------------------------------------------------------------------------------


def splash(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  segments_BT: jax.Array,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """Causal attention within documents, (B, T, H, size of a value), by JAX's splash attention.

  The scale goes into the queries, in float32 before they are rounded. Sequences are a batch dimension of the
  kernel's grid, which both cores of a v4 or v5p share.
  """
  wide = jnp.promote_types(q_BTHK.dtype, jnp.float32)
  q_BTHK = (q_BTHK.astype(wide) * scale).astype(q_BTHK.dtype)
  q_BHTK, k_BGSK, v_BGSK = (x.swapaxes(1, 2) for x in (q_BTHK, k_BSGK, v_BSGK))
  return _splash(q_BHTK, k_BGSK, v_BGSK, segments_BT, interpret).swapaxes(1, 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _splash(q_BHTK, k_BGSK, v_BGSK, segments_BT, interpret):
  return _splash_forward(q_BHTK, k_BGSK, v_BGSK, segments_BT, interpret)[0]


def _splash_forward(q_BHTK, k_BGSK, v_BGSK, segments_BT, interpret):
  kernel = functools.partial(_splash_kernel, interpret=interpret)

  def forward(q_BHTK, k_BGSK, v_BGSK, segments_BT):
    return jax.vjp(lambda q, k, v: kernel(q, k, v, segments_BT), q_BHTK, k_BGSK, v_BGSK)

  costs = _splash_costs(q_BHTK.shape, k_BGSK.shape[1], v_BGSK.shape[-1], q_BHTK.dtype.itemsize)
  out_BHTK, pull = _priced(forward, costs[0])(q_BHTK, k_BGSK, v_BGSK, segments_BT)
  return out_BHTK, pull


def _splash_backward(interpret, pull, out_BHTK):
  del interpret
  q_BHTK, k_BGSK, v_BGSK = jax.eval_shape(pull, out_BHTK)
  costs = _splash_costs(q_BHTK.shape, k_BGSK.shape[1], v_BGSK.shape[-1], q_BHTK.dtype.itemsize)
  return *_priced(lambda pull, out_BHTK: pull(out_BHTK), costs[1])(pull, out_BHTK), None


_splash.defvjp(_splash_forward, _splash_backward)


def _splash_kernel(q_BHTK, k_BGSK, v_BGSK, segments_BT, interpret):
  from jax.experimental.pallas.ops.tpu import splash_attention as library

  heads, time = q_BHTK.shape[1:3]
  block = block_of(time, LARGEST)
  computed = block_of(block, COMPUTED)
  sizes = library.BlockSizes(
    block_q=block,
    block_kv=block,
    block_kv_compute=computed,
    block_q_dkv=block,
    block_kv_dkv=block,
    block_kv_dkv_compute=computed,
    use_fused_bwd_kernel=True,
  )
  kernel = library.make_splash_mha(
    library.MultiHeadMask([library.CausalMask((time, time))] * heads),
    head_shards=1,
    q_seq_shards=1,
    block_sizes=sizes,
    residual_checkpoint_name=ATTENTION,
    interpret=interpret,
  )

  def sequence(q_HTK, k_GSK, v_GSK, segments_T):
    return kernel(q_HTK, k_GSK, v_GSK, library.SegmentIds(segments_T, segments_T))

  return jax.vmap(sequence)(q_BHTK, k_BGSK, v_BGSK, segments_BT)


def _splash_costs(
  shape_BHTK: tuple[int, ...], groups: int, value_dim: int, item: int
) -> tuple[pl.CostEstimate, pl.CostEstimate]:
  """(of the forward, of the backward kernel): the blocks on and below the diagonal, computed whole.

  Backward the scores are made again, and the queries' gradient is written once for each block of keys.
  """
  batch, heads, time, head_dim = shape_BHTK
  block = block_of(time, LARGEST)
  blocks = time // block
  pairs = blocks * (blocks + 1) // 2  # of a block of queries and one of keys
  scores = batch * heads * pairs * block**2
  queries, values, lanes = batch * heads * time * head_dim * item, batch * heads * time * value_dim * item, 4
  per_pair = batch * heads * pairs * block * (head_dim + value_dim) * item  # keys, values or q, dout
  key_values = batch * groups * time * (head_dim + value_dim) * item
  sums = batch * heads * time * lanes
  forward = pl.CostEstimate(
    flops=2 * scores * (head_dim + value_dim),
    transcendentals=scores,
    bytes_accessed=queries + values + 128 * sums + per_pair,  # the sums in all lanes
  )
  backward = pl.CostEstimate(
    flops=2 * scores * (3 * head_dim + 2 * value_dim),
    transcendentals=scores,
    bytes_accessed=per_pair + 2 * key_values + blocks * queries + 16 * blocks * sums,
  )
  return forward, backward


def _priced(function: Callable, cost: pl.CostEstimate) -> Callable:
  """function, whose one kernel tells the compiler this cost: the library's kernels tell none."""

  def run(*arguments: Any) -> Any:
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    leaves = jaxpr_as_fun(_with_cost(jaxpr, cost))(*jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

  return run


def _with_cost(value: Any, cost: pl.CostEstimate) -> Any:
  if not isinstance(value, Jaxpr):  # since JAX 0.12 every one is closed
    return value.replace(jaxpr=_with_cost(value.jaxpr, cost)) if isinstance(value, ClosedJaxpr) else value
  equations = []
  for equation in value.eqns:
    if equation.primitive.name == 'pallas_call':
      params = equation.params | {'cost_estimate': cost}
    else:
      params = {name: _with_cost(param, cost) for name, param in equation.params.items()}
    equations.append(equation.replace(params=params))
  return value.replace(eqns=equations)


# NVIDIA --------------------------------------------------------------------------------------------------


def triton(
  q_BTHK: jax.Array,
  k_BSGK: jax.Array,
  v_BSGK: jax.Array,
  segments_BT: jax.Array,
  scale: float,
  interpret: bool = False,
) -> jax.Array:
  """The same by the kernels of jax.experimental.pallas.ops.gpu.attention.

  Its heads have keys and values of their own, of one size: groups are repeated, the smaller padded by zeros.
  """
  heads, value_dim = q_BTHK.shape[2], v_BSGK.shape[-1]
  size = max(q_BTHK.shape[-1], value_dim)

  def widened(x_BTGK: jax.Array) -> jax.Array:
    x_BTGK = jnp.pad(x_BTGK, [(0, 0)] * 3 + [(0, size - x_BTGK.shape[-1])])
    return jnp.repeat(x_BTGK, heads // x_BTGK.shape[2], axis=2)

  out_BTHK = _triton(*map(widened, (q_BTHK, k_BSGK, v_BSGK)), segments_BT, scale, interpret)
  return out_BTHK[..., :value_dim]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _triton(q_BTHK, k_BTHK, v_BTHK, segments_BT, scale, interpret):
  return _triton_forward(q_BTHK, k_BTHK, v_BTHK, segments_BT, scale, interpret)[0]


def _triton_forward(q_BTHK, k_BTHK, v_BTHK, segments_BT, scale, interpret):
  library, sizes = _triton_library(q_BTHK)
  out_BTHK, sums_BHT = library.mha(
    *(q_BTHK, k_BTHK, v_BTHK, segments_BT, scale),
    causal=True,
    block_sizes=sizes,
    interpret=interpret,
    return_residuals=True,
  )
  out_BTHK, sums_BHT = (checkpoint_name(x, ATTENTION) for x in (out_BTHK, sums_BHT))
  return out_BTHK, (q_BTHK, k_BTHK, v_BTHK, segments_BT, out_BTHK, sums_BHT)


def _triton_backward(scale, interpret, residuals, out_BTHK):
  library, sizes = _triton_library(out_BTHK)
  # The rule of mha itself and its arguments: differentiated as it is, its residuals would have no name.
  settings = (scale, True, sizes, 'triton', None, 2, None, interpret, False, False)
  return library.mha.bwd(*settings, residuals, out_BTHK)


_triton.defvjp(_triton_forward, _triton_backward)


def _triton_library(x_BTHK: jax.Array) -> tuple[Any, Any]:
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)  # for a package that this one does not need
    from jax.experimental.pallas.ops.gpu import attention as library
  # Tiles of heads lie in shared memory, 227 KiB of a block on an H100.
  head_bytes = pl.next_power_of_2(x_BTHK.shape[-1]) * x_BTHK.dtype.itemsize
  rows = min(128, 32768 // head_bytes)
  steps = min(64, max(16, 16384 // head_bytes))
  blocks = {'block_q': rows, 'block_k': rows, 'block_q_dkv': steps, 'block_kv_dkv': steps}
  return library, library.BlockSizes(**blocks, block_q_dq=steps, block_kv_dq=steps)
