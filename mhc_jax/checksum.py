"""A checksum of arrays, computed where they lie: the same on every mesh and process count.

Part of **checkpoint**, which orbax alone would restore with a flipped byte and no word about it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


@jax.jit
def leaf_checksums(leaves: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """One uint32 per leaf that any change of a single 32-bit word of it is certain to change.

  Sum mod 2^32 over words of mix(word + index * odd constant), mix being MurmurHash3's 32-bit
  finalizer, a bijection. A weighted sum with weights 2 i + 1 would not do: a 4 kB block of float32
  ones turned to zeros leaves it unchanged. Order does not matter, so the result is the same for
  every sharding and process count, and only scalars cross devices.
  """
  return tuple(_checksum(leaf) for leaf in leaves)


def _checksum(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool_:
    words = x.astype(jnp.uint32)
  else:
    bits = min(8 * x.dtype.itemsize, 32)  # 64-bit elements become two words on a new last axis
    words = jax.lax.bitcast_convert_type(x, f'uint{bits}').astype(jnp.uint32)
  index = jnp.zeros(words.shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(words.ndim)):  # not arange().reshape(): that would gather the shards
    index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
    stride *= words.shape[axis]
  h = words + index * jnp.uint32(0x9E3779B9)
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)
