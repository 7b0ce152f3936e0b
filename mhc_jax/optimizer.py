"""AdamW, or Muon for matrices (muon.py), as one visible optax chain; schedules; transfer by parameter group.

Transfer follows CompleteP (arXiv 2505.01618) with alpha = 1, relative to a base width and depth: m_N =
width ratio, m_L = depth ratio. In the model: hidden maps start with variance 1 / fan-in, F's output is
divided by m_L, logits by m_N, attention scores scale by 1 / K. Here: hidden maps learn with lr / m_N and
decay with weight_decay * m_N; Adam's eps is divided by m_N m_L. The generator phi of a connection has
infinite fan-in and finite fan-out, so it learns with lr / m_N too; alphas and biases are scalars and keep
lr, but for those of H_res: the matrices of all layers multiply, so that what training changes in the product
grows with depth unless b_res and alpha_res learn with lr / m_L.

The factors of a map W = U V of rank r, with m_R = r / base rank, meet the spectral condition of arXiv
2310.17813 (norms of a map and of its change as sqrt(fan-out / fan-in)) each for itself. V has the fan-in r:
it starts with variance 1 / r, learns with lr / m_R and decays with weight_decay * m_R. U sums over width and
learns with lr / m_N; it starts with variance m_R / (m_N width): where r does not grow, it is output-like.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mhc_jax import manifold_updates, muon
from mhc_jax.config import OptimizerConfig
from mhc_jax.model_config import ModelConfig
from mhc_jax.parameters import kinds, matches

INDEX = '.*/attention/index/.*'  # parameters with a loss of their own (layers/sparse.py)


def schedule(step: jax.Array, num_steps: jax.Array, warmup: jax.Array, c: OptimizerConfig) -> jax.Array:
  """The multiplier of lr for update `step` (0-based) of num_steps, float32.

  Warmup is linear, (step + 1) / warmup. 'wsd' falls linearly over the last decay_fraction of the updates,
  'cosine' from warmup to the end; both to final_fraction. 'step' is mHC's: 0.316 from 80 %, 0.1 from 90 %.
  """
  step, num_steps = jnp.asarray(step, jnp.float32), jnp.asarray(num_steps, jnp.float32)
  if c.schedule == 'wsd':
    left = (num_steps - step) / jnp.maximum(c.decay_fraction * num_steps, 1)
    shape = c.final_fraction + (1 - c.final_fraction) * jnp.minimum(left, 1)
  elif c.schedule == 'cosine':
    progress = jnp.clip((step - warmup) / jnp.maximum(num_steps - warmup, 1), 0, 1)
    shape = c.final_fraction + (1 - c.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
  elif c.schedule == 'step':
    late, last = step >= 0.8 * num_steps, step >= 0.9 * num_steps
    shape = jnp.where(last, 0.1, jnp.where(late, 0.316, 1.0))
  else:
    shape = jnp.ones(())
  return shape * jnp.minimum((step + 1) / jnp.maximum(warmup, 1), 1)


def warmup_steps(c: OptimizerConfig, num_steps: int) -> int:
  """Number of warmup updates, from whichever of the two fields is set."""
  return c.warmup_steps if c.warmup_fraction is None else round(c.warmup_fraction * num_steps)


def least_moments(c: OptimizerConfig | ConfigDict) -> int:
  """How many arrays of a parameter's size the optimizer keeps of each at the least: Adam two, Muon one."""
  return 1 if c.name == 'muon' or c.manifold == 'manifold_muon' else 2


def transform(
  c: OptimizerConfig, model: ModelConfig, lr: jax.Array, weight_decay: jax.Array
) -> optax.GradientTransformation:
  """AdamW (arXiv 1711.05101) or Muon with decoupled decay, and the manifold that c names; lr may be traced.

  lr already includes the schedule. Its state does not depend on lr or weight_decay. c.manifold: a projection
  after AdamW's update, or 'loro' or 'manifold_muon' in its place, for the parameters of c.manifold_pattern.
  """
  clip = optax.identity() if c.clip_norm is None else optax.clip_by_global_norm(c.clip_norm)
  plain = _descent(c, model, lr, weight_decay)
  if model.indexed:  # two losses, two norms: neither changes the other's steps
    clip = optax.partition({'index': clip, 'rest': clip}, _of_index)
  if model.warms_up:  # plan.py refuses a manifold
    return optax.partition({'index': optax.chain(clip, plain), 'rest': optax.set_to_zero()}, _of_index)
  if c.manifold is None:
    return optax.chain(clip, plain)
  if c.manifold in manifold_updates.PROJECTIONS:
    return optax.chain(clip, plain, manifold_updates.projected(projection(c), c.manifold_pattern))
  if c.manifold == 'loro':
    own = manifold_updates.loro(plain, lr / model.width_ratio, int(c.manifold_value))
  else:  # a step of spectral norm lr is the right one at every width
    own = manifold_updates.manifold_muon(lr)

  def label(params: Any) -> Any:
    return jax.tree.map(lambda ours: 'own' if ours else 'adamw', matches(c.manifold_pattern, params))

  return optax.chain(clip, optax.partition({'own': own, 'adamw': plain}, label))


def _of_index(params: Any) -> Any:
  return jax.tree.map(lambda ours: 'index' if ours else 'rest', matches(INDEX, params))


def projection(c: OptimizerConfig) -> manifold_updates.Projection:
  """The projection onto the set on which c.manifold_pattern's parameters are kept."""
  if c.manifold == 'manifold_muon':
    return manifold_updates.stiefel
  return manifold_updates.PROJECTIONS[c.manifold](c.manifold_value)


def start(c: OptimizerConfig, params: Any) -> Any:
  """Initial parameters moved onto the manifold that c names, if any."""
  if c.manifold in (None, 'loro'):
    return params
  if c.manifold == 'fixed_rank':
    scaled = functools.partial(manifold_updates.fixed_rank_start, rank=int(c.manifold_value))
    return manifold_updates.project_params(scaled, c.manifold_pattern, params)
  return manifold_updates.project_params(projection(c), c.manifold_pattern, params)


def _descent(
  c: OptimizerConfig, model: ModelConfig, lr: jax.Array, weight_decay: jax.Array
) -> optax.GradientTransformation:
  m_n, m_l, m_r = model.width_ratio, model.depth_ratio, model.rank_ratio
  lr_of = {'hidden': 1 / m_n, 'factor': 1 / m_r, 'mixing': 1 / m_l, 'plain': 1, 'scalar': 1, 'frozen': 0}
  adam = optax.scale_by_adam(c.beta1, c.beta2, c.eps / (m_n * m_l))

  def by_muon(path: tuple[Any, ...]) -> bool:
    return c.name == 'muon' and muon.is_matrix(path, c.muon_connections is True)

  def shares(params: Any) -> Any:
    def share(path: tuple[Any, ...], kind: str) -> float:
      return muon.share(path, lr_of[kind], m_n, m_r) if by_muon(path) else lr_of[kind]

    return jax.tree_util.tree_map_with_path(share, kinds(params))

  def decay(updates: Any, params: Any) -> Any:
    # Of all but biases and gates, in proportion to lr alone whatever the share of it.
    def decayed(u: jax.Array, p: jax.Array, kind: str, share: float) -> jax.Array:
      return u + weight_decay * (1 / share) * p if kind in ('hidden', 'factor', 'plain') else u

    return jax.tree.map(decayed, updates, params, kinds(params), shares(params))

  def descend(updates: Any, params: Any) -> Any:
    return jax.tree.map(lambda u, share: -lr * share * u, updates, shares(params))

  def label(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: 'muon' if by_muon(path) else 'adamw', params)

  steps = adam
  if c.name == 'muon':
    orthogonal = muon.orthogonal(muon.BETA if c.muon_beta is None else c.muon_beta)
    steps = optax.partition({'muon': orthogonal, 'adamw': adam}, label)
  return optax.chain(steps, optax.stateless(decay), optax.stateless(descend))
