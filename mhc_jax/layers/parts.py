"""What sublayers are made of: the norm before them, linear maps of full rank or factored, positions, starts.

A sublayer is a module Sublayer(config, mesh, record)(x_BTD, seen: Visible) -> Output, with its own
pre-norm.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from mhc_jax.layers import fp8
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import splits_time

# A sublayer's result F(x), (B, T, D), and what it records: {}, or by name what all layers of its kind record.
# 'losses' is a dict of its own: auxiliary losses by name, sums over tokens in nats (train_step.Beside).
Output = tuple[jax.Array, dict[str, Any]]


class Visible(NamedTuple):
  """What queries may see, the same in all layers: documents, and a mask where attention is the formula."""

  segments_BT: jax.Array  # document numbers
  mask_BTS: jax.Array | None  # None: kernels make their own


def normal(std: float):
  def init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.result_type(float))

  return init


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, jnp.result_type(float))


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jnp.zeros(shape, jnp.result_type(float))


class Linear(nn.Module):
  """x W with W of shape (in, *out), or W = U V of rank `rank` with the same variance 1 / in."""

  shape: tuple[int, ...]
  rank: int | None
  dtype: Any
  gain: float = 1.0  # multiplies the standard deviation at the start
  factor_gain: float = 1.0  # the same for U alone
  mesh: Mesh | None = None
  precision: str | None = None  # of the products: a key of fp8.TILES
  measured: Callable[[dict[str, jax.Array]], None] | None = None  # gets fp8.measures of each

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, outputs = self.shape[0], self.shape[1:]
    # Tokens flattened: XLA:CPU then folds the weight gradient's transposes into the product. Where time is
    # split, it would cost a gather. FP8 wants to see which of them are one sequence.
    y = x if splits_time(self.mesh) or self.precision else x.reshape(-1, inputs)
    if self.rank is None:
      w = self.param('w', normal(self.gain * inputs**-0.5), self.shape)
      y = self._times(y, w.reshape(inputs, -1))
    else:
      u = self.param('u', normal(self.factor_gain * self.gain * inputs**-0.5), (inputs, self.rank))
      v = self.param('v', normal(self.rank**-0.5), (self.rank, *outputs))
      y = self._times(self._times(y, u), v.reshape(self.rank, -1))
    return y.reshape(*x.shape[:-1], *outputs)

  def _times(self, x: jax.Array, w: jax.Array) -> jax.Array:
    if self.precision is None:
      return x @ w.astype(self.dtype)
    if self.measured is not None:
      self.measured(fp8.measures(x, w, self.precision))
    return fp8.product(x, w, self.precision, not splits_time(self.mesh))


def linear_of(
  c: ModelConfig, mesh: Mesh | None, measured: list[dict[str, jax.Array]] | None = None
) -> Callable[..., Linear]:
  """Linear as the model has it: Linear's other fields are left to the caller.

  measured: where it is a list, fp8.measures of every product in FP8 are added to it.
  """
  note = None if measured is None else measured.append
  own = {'precision': c.precision, 'measured': note} if c.precision else {}
  return functools.partial(
    Linear, rank=c.weights_rank, dtype=c.dtype, factor_gain=c.factor_gain, mesh=mesh, **own
  )


def rope(x_BTHK: jax.Array, theta: float) -> jax.Array:
  """Rotates the pairs (k, k + K/2) of every head by position * theta^(-2k/K); K must be even."""
  half = x_BTHK.shape[-1] // 2
  wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
  frequency_K = theta ** (-jnp.arange(half, dtype=wide) / half)
  angle_TK = jnp.arange(x_BTHK.shape[1], dtype=wide)[:, None] * frequency_K[None]
  cos_1T1K, sin_1T1K = jnp.cos(angle_TK)[None, :, None], jnp.sin(angle_TK)[None, :, None]
  first, second = jnp.split(x_BTHK.astype(wide), 2, -1)
  rotated = (first * cos_1T1K - second * sin_1T1K, second * cos_1T1K + first * sin_1T1K)
  return jnp.concatenate(rotated, -1).astype(x_BTHK.dtype)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, returned in x's dtype."""
  wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
  mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), -1, keepdims=True)
  return (wide_BTD * lax.rsqrt(mean_square_BT1 + eps) * scale_D[None, None]).astype(x_BTD.dtype)
