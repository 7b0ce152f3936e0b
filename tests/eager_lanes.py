"""What a kernel with tokens in lanes computes, instruction by instruction and without Pallas."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.kernels.entries import array_of, entries_of, spread
from mhc_jax.kernels.single_token import evaluate


def eager_lanes(function: Callable, *arrays: Any, platform: str = 'interpret') -> list[jax.Array]:
  """function of one token's arrays for all tokens, (..., T) each, as leaves (..., T)."""
  tokens = arrays[0].shape[-1:]
  traced = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape[:-1], x.dtype) for x in arrays))
  inputs = [array_of(list(jnp.asarray(x).reshape(-1, *tokens)), x.shape[:-1], x.dtype) for x in arrays]
  outputs = evaluate(traced.jaxpr, traced.consts, inputs, platform)
  return [_whole(y, tokens, aval.dtype) for y, aval in zip(outputs, traced.out_avals, strict=True)]


def _whole(y: np.ndarray, tokens: tuple[int], dtype: np.dtype) -> jax.Array:
  rows = [spread(entry, tokens, dtype) for entry in entries_of(y)]
  return jnp.array(rows, dtype).reshape(*y.shape, *tokens)


def value_and_pull(matrix: Callable) -> Callable:
  """(coordinates, cotangents) -> matrix and gradient."""

  def both(coords, cotangents):
    h, pull = jax.vjp(matrix, coords)
    return h, pull(cotangents)[0]

  return both
