"""Kernels from functions of one token, with tokens in lanes; every constraint's matrix is one.

in_lanes(function, platform) computes function(shared, *arrays of one token) for all tokens in one Pallas
kernel and its vjp in another, both traced from the function itself (single_token.py): there is no second
formula. The backward recomputes the forward, so nothing but the inputs is kept.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints.base import Constraint
from mhc_jax.kernels.choice import Chip
from mhc_jax.kernels.entries import NotInLanesError, array_of, entries_of, spread
from mhc_jax.kernels.lane_blocks import Work, gpu_call, instructions, tpu_call
from mhc_jax.kernels.single_token import evaluate

# Instructions of the longest kernel. Sinkhorn's vjp of 8 streams has 19,265 and compiles for 12 s on a TPU's
# compiler. Triton's time grows as the square: 3 s for 1,000, 50 s for 3,800, 140 s for 5,900.
LONGEST = {'tpu': 24_000, 'interpret': 24_000, 'gpu': 4_000}


def in_lanes(function: Callable[..., Any], platform: str) -> Callable[..., Any]:
  """function of one token, for all tokens: run(shared, *arrays), in a kernel for 'tpu', 'gpu' or 'interpret'.

  function(shared, *arrays) takes shared, a tree of small float32 arrays that all tokens share ({} for none),
  and one token's arrays (K,); it returns a tree of small float32 arrays. run takes arrays (K, *tokens) and
  returns arrays (..., *tokens). Gradients (reverse mode) reach shared and the arrays. Any number of tokens;
  where it does not fill the last block, the last token is computed again. Raises NotInLanesError where the
  function cannot be computed so, and for other dtypes.
  """

  def run(shared: Any, *arrays: jax.Array) -> Any:
    if any(x.dtype != jnp.float32 for x in jax.tree.leaves((shared, arrays))):
      raise NotInLanesError('kernels compute in float32 only')
    tokens = arrays[0].shape[1:]
    outputs = _differentiable(function, platform)(
      shared, [x.reshape(len(x), math.prod(tokens)) for x in arrays]
    )
    return jax.tree.map(lambda y: y.reshape(*y.shape[:-1], *tokens), outputs)

  return run


def matrix_kernel(constraint: Constraint, coords_KX: jax.Array, n: int, platform: str) -> jax.Array:
  """constraint.matrix(coords_KX, n), (n, n, *tokens), by a kernel; by XLA for float64."""
  if coords_KX.dtype == jnp.float64:
    return constraint.matrix(coords_KX, n)
  run = in_lanes(lambda _, coords_K: constraint.matrix(coords_K, n), platform)
  return run({}, coords_KX.astype(jnp.float32))


def kernel_for(constraint: Constraint, n: int, chip: Chip | None) -> Callable[..., jax.Array] | None:
  """The `matrix` of hyper_connection.generate by a kernel for this chip, each device its own tokens.

  None, which stands for constraint.matrix, where XLA computes it: without a chip (choice.chip_of), for sets
  that need no computing, and where a kernel cannot.
  """
  if chip is None or constraint.name in ('identity', 'unconstrained'):
    return None
  if why_not(constraint, n, chip.lanes) is not None:
    return None
  return functools.partial(matrix_kernel, constraint, platform=chip.lanes)


@functools.lru_cache(256)
def why_not(constraint: Constraint, n: int, platform: str = 'tpu') -> str | None:
  """Why matrix_kernel cannot compute this constraint's matrix or its vjp, in a line; None if it can."""
  coords_K = jax.ShapeDtypeStruct((constraint.num_coordinates(n),), jnp.float32)
  return refused(lambda _, coords_K: constraint.matrix(coords_K, n), platform, {}, coords_K)


def refused(function: Callable[..., Any], platform: str, shared: Any, *arrays: Any) -> str | None:
  """Why in_lanes cannot compute this function or its vjp, in a line; None if it can.

  shared and one token's arrays as shapes. Both are lowered for the platform, which need not be there.
  """

  def loss(shared: Any, arrays: list[jax.Array]) -> jax.Array:
    return sum(map(jnp.sum, jax.tree.leaves(in_lanes(function, platform)(shared, *arrays))))

  tokens = [jax.ShapeDtypeStruct((*x.shape, 1), jnp.float32) for x in arrays]
  where = {'tpu': ('tpu',), 'gpu': ('cuda',)}.get(platform)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter(
        'ignore', DeprecationWarning
      )  # of Triton, by JAX 0.12: no reason against a kernel
      traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).trace(shared, tokens)
      traced.lower(lowering_platforms=where)
  except NotInLanesError as error:
    return str(error)
  except Exception as error:  # whatever Pallas raises for what it cannot lower
    return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
  return None


class _Program(NamedTuple):
  """A function of one token: its jaxpr, the shapes of its arrays, and the tree of its results."""

  jaxpr: Any
  inputs: list[tuple[int, ...]]
  outputs: list[tuple[int, ...]]
  tree: Any


def _traced(function: Callable, *arguments: Any) -> _Program:
  """function traced for shapes of one token."""
  jaxpr, result = jax.make_jaxpr(function, return_shape=True)(*arguments)
  shapes = lambda avals: [aval.shape for aval in avals]  # noqa: E731
  if any(aval.dtype != jnp.float32 for aval in jaxpr.out_avals):
    raise NotInLanesError('the function returns other dtypes than float32')
  return _Program(jaxpr, shapes(jaxpr.in_avals), shapes(jaxpr.out_avals), jax.tree.structure(result))


def _single(x: jax.Array) -> jax.ShapeDtypeStruct:
  """One token's share of (..., T)."""
  return jax.ShapeDtypeStruct(x.shape[:-1], jnp.float32)


def _differentiable(function: Callable, platform: str) -> Callable[[Any, list[jax.Array]], Any]:
  """(shared, arrays (K, T)) -> results (..., T), by kernels both ways."""

  @jax.custom_vjp
  def run(shared: Any, arrays: list[jax.Array]) -> Any:
    program = _traced(function, shared, *map(_single, arrays))
    outputs = _call(program, jax.tree.leaves(shared), arrays, [], 0, platform)
    return jax.tree.unflatten(program.tree, outputs)

  def backward(inputs: tuple, g: Any) -> tuple[Any, list[jax.Array]]:
    shared, arrays = inputs

    def pull(shared: Any, arrays: list[jax.Array], g: Any) -> tuple[Any, Any]:
      d_shared, *d_arrays = jax.vjp(function, shared, *arrays)[1](g)
      return d_shared, d_arrays

    program = _traced(pull, shared, list(map(_single, arrays)), jax.tree.map(_single, g))
    leaves = jax.tree.leaves(shared)
    outputs = _call(program, leaves, arrays, jax.tree.leaves(g), len(leaves), platform)
    return jax.tree.unflatten(program.tree, outputs)

  run.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
  return run


def _call(
  program: _Program,
  shared: list[jax.Array],
  arrays: list[jax.Array],
  cotangents: list[jax.Array],
  sums: int,
  platform: str,
) -> list[jax.Array]:
  """The program's results for (..., T): (..., T), but the first `sums` of them summed over tokens.

  Arrays without entries are left out, and so is a kernel without results.
  """
  tokens, shapes = arrays[0].shape[-1], program.outputs
  sizes = [math.prod(shape) for shape in shapes]
  work = Work(
    registers=functools.partial(_registers, program, platform),
    scalars=jnp.concatenate([jnp.zeros(0, jnp.float32), *(x.reshape(-1) for x in shared)]),
    arrays=[x.reshape(-1, tokens) for x in arrays if x.size],
    cotangents=[x.reshape(-1, tokens) for x in cotangents if x.size],
    sizes=[size for size in sizes[sums:] if size],
    sums=sum(sizes[:sums]),
    tokens=tokens,
  )
  results, summed = [], jnp.zeros(work.sums)
  if tokens and (work.sizes or work.sums):
    results, summed = gpu_call(work) if platform == 'gpu' else tpu_call(work, platform == 'interpret')
  splits = list(itertools.accumulate(sizes[:sums], initial=0))
  outputs = [summed[i:j].reshape(s) for (i, j), s in zip(itertools.pairwise(splits), shapes, strict=False)]
  rest = iter(results)
  for size, shape in zip(sizes[sums:], shapes[sums:], strict=True):
    whole = next(rest) if size and results else jnp.zeros((size, tokens))
    outputs.append(whole.reshape(*shape, tokens))
  return outputs


def _registers(program: _Program, platform: str, lanes: tuple[int, ...]) -> Any:
  """The program as a jaxpr from lanes of this shape to such lanes, one per entry of inputs and outputs."""

  def compute(*registers: jax.Array) -> list[jax.Array]:
    rest = iter(registers)
    inputs = [array_of([next(rest) for _ in range(math.prod(s))], s, np.float32) for s in program.inputs]
    outputs = evaluate(program.jaxpr.jaxpr, program.jaxpr.consts, inputs, platform)
    return [spread(entry, lanes, np.float32) for x in outputs for entry in entries_of(x)]

  count = sum(map(math.prod, program.inputs))
  jaxpr = jax.make_jaxpr(compute)(*[jax.ShapeDtypeStruct(lanes, jnp.float32)] * count)
  length = instructions(jaxpr.jaxpr)
  if length > LONGEST[platform]:
    raise NotInLanesError(f'{length} instructions, more than {LONGEST[platform]}: too many to compile')
  return jaxpr
