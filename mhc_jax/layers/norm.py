"""RMSNorm (Zhang and Sennrich, 2019), computed in at least float32."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps) * scale over the last axis, returned in x's dtype."""
  wide_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
  mean_square_BT1 = jnp.mean(jnp.square(wide_BTD), -1, keepdims=True)
  return (wide_BTD * lax.rsqrt(mean_square_BT1 + eps) * scale_D[None, None]).astype(x_BTD.dtype)
