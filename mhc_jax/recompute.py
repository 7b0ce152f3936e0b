"""Recomputation: what the backward pass finds kept, and what it computes again.

'layer': a layer's start, the output F of each of its sublayers and the coordinates of their connections, by
which neither the last product of F with its collective nor the generator are run again. 'products': the
products with weights too, and what attention's backward kernel needs of the forward one. 'block': the paper's
blocks of layers (mHC, arXiv 2512.24880, section 4.3.2).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mhc_jax.generator import COORDINATES
from mhc_jax.kernels.attention import ATTENTION
from mhc_jax.layers.grouped_experts import PRODUCTS

# With the coordinates, what every policy keeps, (n + 3) C numbers of a token and layer with its start.
OUTPUTS = 'outputs of sublayers'


def policy(remat: str) -> Callable:
  """What jax.checkpoint keeps of a layer, for 'layer' and 'products'."""
  policies = jax.checkpoint_policies
  if remat == 'layer':
    return policies.save_only_these_names(OUTPUTS, COORDINATES)
  return policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable,
    policies.save_only_these_names(PRODUCTS, OUTPUTS, COORDINATES, ATTENTION),
  )


def block_layers(streams: int, layers: int) -> int:
  """L_r* = sqrt(n L / (n + 2)) sublayers (eq. 20), rounded to whole layers of two, at least 1.

  It makes n C ceil(L / L_r) + (n + 2) C L_r elements per token smallest: the starts of all blocks, and what
  is alive while one of them is run again. L = 2 * layers sublayers.
  """
  sublayers = math.sqrt(streams * 2 * layers / (streams + 2))
  return max(1, round(sublayers / 2))


def scan_blocks(layer: Callable, carry: Any, inputs_L: Any, size: int) -> tuple[Any, Any]:
  """lax.scan(layer, carry, inputs_L) with recomputation in blocks of `size` layers.

  The last block is shorter where size does not divide their number. Kept are each block's carry and the
  products with weights, F's, those of experts included; products of activations with each other, everything
  elementwise, and collectives are not.
  """
  policies = jax.checkpoint_policies
  policy = policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(PRODUCTS)
  )

  @functools.partial(jax.checkpoint, policy=policy)
  def block(carry: Any, inputs: Any) -> tuple[Any, Any]:
    return lax.scan(layer, carry, inputs)

  length = len(jax.tree.leaves(inputs_L)[0])
  whole = length // size * size
  blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), inputs_L)
  carry, outputs = lax.scan(block, carry, blocks)
  outputs = jax.tree.map(lambda y: y.reshape(whole, *y.shape[2:]), outputs)
  if whole < length:
    carry, rest = block(carry, jax.tree.map(lambda x: x[whole:], inputs_L))
    outputs = jax.tree.map(lambda a, b: jnp.concatenate((a, b)), outputs, rest)
  return carry, outputs
