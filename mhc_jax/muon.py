"""Muon, an orthogonal step for every matrix, beside AdamW for all else (DeepSeek-V4, arXiv 2502.16982).

M = moving average of gradients with Nesterov's look-ahead, O = ten Newton-Schulz steps on M, and a step of
0.18 sqrt(max(fan-in, fan-out)) O, whose root mean square is 0.18 whatever the shape: about AdamW's, so that
learning rates carry over. Moments and orthogonalisation are optax.contrib.scale_by_muon's; contrib.muon
itself would run the other parameters by NAdam.

Transfer: an orthogonal step of one root mean square has a spectral norm that grows as sqrt(max), AdamW's
aligned one as sqrt(fan-in fan-out). So where AdamW's share of the rate keeps a map's change constant over
sizes, Muon's is that times sqrt(min(fan-in, fan-out)), over the base's.
"""

import math
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mhc_jax.parameters import line_of, path_name

# DeepSeek-V4, algorithm 1: eight steps that spread the singular values around 1, two that gather them there.
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2
RMS = 0.18  # of a step at lr = 1
BETA = 0.95


def _is_of_connection(name: str) -> bool:
  return '_connection/' in name or name.startswith(('collapse/', 'mtp/collapse/'))


def is_matrix(path: tuple[Any, ...], connections: bool) -> bool:
  """Whether Muon updates the parameter: maps of sublayers, routers, and with `connections` generators too."""
  name = path_name(path)
  kind = line_of(name)[1]
  if _is_of_connection(name):
    return connections and kind in ('hidden', 'plain') and not name.endswith('read_query')
  if '/index/' in name:
    return False  # as published: an index of attention learns by AdamW
  from_latent = tuple(f'{up}_up/{part}' for up in ('kv', 'q') for part in 'wuv')
  return kind in ('hidden', 'factor') or name.endswith((*from_latent, '/router'))


def dimensions(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers:
  """Which axes are a map's input and its output; those of stacked layers and experts are neither.

  Maps of sublayers have their input first (D, H, K), as read_up has (R, N, C); generators their output last
  (N, C, K).
  """
  name = path_name(path)
  first = name.startswith('layers/') + ('/expert_' in name)
  axes = tuple(range(first, leaf.ndim))
  split = len(axes) - 1 if _is_of_connection(name) and not name.endswith('read_up') else 1
  return MuonDimensionNumbers(axes[:split], axes[split:])


def share(path: tuple[Any, ...], adamw: float, width_ratio: float, rank_ratio: float) -> float:
  """Of the rate, for a map whose share under AdamW is `adamw`."""
  name = path_name(path)
  smaller = width_ratio
  if name.endswith('/u') or line_of(name)[1] == 'factor':
    smaller = rank_ratio
  if _is_of_connection(name) or name.endswith(('/router', 'kv_down/w', 'kv_up/w', 'q_down/w', 'q_up/w')):
    smaller = 1.0  # a few streams, experts or a latent, whatever the width
  return adamw * math.sqrt(smaller)


def orthogonal(beta: float) -> optax.GradientTransformation:
  """Gradients to steps of root mean square RMS; every leaf is a matrix by `dimensions`."""

  def scaled(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
    numbers = dimensions(path, update)
    sizes = (math.prod(update.shape[axis] for axis in axes) for axes in numbers)
    return RMS * math.sqrt(max(sizes)) * update

  return optax.chain(
    scale_by_muon(
      COEFFICIENTS,
      len(COEFFICIENTS),
      beta,
      weight_dimension_numbers=lambda updates: jax.tree_util.tree_map_with_path(dimensions, updates),
    ),
    optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)),
  )
