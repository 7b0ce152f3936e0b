"""Weighted sums of streams and inner products with them: what passes over the width, forward and backward.

Written out, since streams are few and one pass suffices. Axes as in hyper_connection.py; I sums.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.derivatives import with_backward


def weighted_sum(weights_NBT: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  """sum_n weights_n x_n, (B, T, D), in float32 or more, not yet rounded."""
  wide = jnp.promote_types(x_NBTD.dtype, jnp.float32)
  terms = [weights_NBT[i][..., None] * x_NBTD[i].astype(wide) for i in range(x_NBTD.shape[0])]
  return functools.reduce(jnp.add, terms)


def _sums(*terms_BTD: jax.Array) -> tuple[jax.Array, ...]:
  """Each term's sum over D. XLA:CPU makes one pass of them, and reads what they share once."""

  def one_pass(*terms_BTD):
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms_BTD)
    return tuple(lax.reduce(terms_BTD, zeros, lambda a, b: tuple(map(jnp.add, a, b)), (2,)))

  return lax.platform_dependent(
    *terms_BTD, cpu=one_pass, default=lambda *terms: tuple(jnp.sum(term, -1) for term in terms)
  )


def inner(pairs: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
  """Inner products over D of each pair (B, T, D), in float32 or more."""
  wide = jnp.promote_types(pairs[0][0].dtype, jnp.float32)
  return _sums(*(a_BTD.astype(wide) * b_BTD.astype(wide) for a_BTD, b_BTD in pairs))


def _mix(weights_INBT: jax.Array, x_NBTD: jax.Array) -> jax.Array:
  """weighted_sum by each row of weights: (I, N, B, T), (N, B, T, D) -> (I, B, T, D).

  With a backward of its own, whose gradients are as wide and rounded once.
  """
  weights_INBT = lax.optimization_barrier(weights_INBT)
  return jnp.stack([weighted_sum(weights_INBT[i], x_NBTD) for i in range(len(weights_INBT))])


def _mix_backward(saved, g_IBTD):
  weights_INBT, x_NBTD = saved
  weights_INBT, g_IBTD = lax.optimization_barrier((weights_INBT, g_IBTD))
  products = inner([(g_BTD, x_BTD) for g_BTD in g_IBTD for x_BTD in x_NBTD])
  d_x = jnp.stack([weighted_sum(weights_INBT[:, j], g_IBTD) for j in range(len(x_NBTD))])
  return jnp.stack(products).reshape(weights_INBT.shape).astype(weights_INBT.dtype), d_x.astype(x_NBTD.dtype)


mix = with_backward(_mix, lambda *args: (_mix(*args), args), _mix_backward)
