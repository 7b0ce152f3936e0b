"""`mhc bench constraints`: every constraint beside 20 Sinkhorn iterations; time, defect, size.

Times are of jitted matrix() alone and of matrix() with its gradient, at logits of standard deviation 3; the
ratios are taken within a round, so that a machine whose speed drifts does not favour a constraint.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.base import Constraint

from .timing import interleaved, summary

REFERENCE = 'birkhoff_sinkhorn'  # 20 iterations, preset paper
STDS = (1, 3, 10)
TIMED_STD = 3


def draw(constraint: Constraint, n: int, tokens: int, std: float) -> jax.Array:
  """Coordinates (K, 16, tokens / 16), float32."""
  rng = np.random.default_rng(0)
  coords = std * rng.normal(size=(constraint.num_coordinates(n), 16, tokens // 16))
  return jnp.asarray(coords, jnp.float32)


def functions_of(constraint: Constraint, n: int, tokens: int) -> dict:
  """Closures to time, by (name, what)."""
  coords_KX = draw(constraint, n, tokens, TIMED_STD)
  cot_NMX = jax.random.normal(jax.random.key(0), (n, n, *coords_KX.shape[1:]))

  def both(coords_KX, cot_NMX):
    h_NMX, pull = jax.vjp(lambda c: constraint.matrix(c, n), coords_KX)
    return h_NMX, pull(cot_NMX)[0]

  forward = jax.jit(lambda coords_KX: constraint.matrix(coords_KX, n))
  both = jax.jit(both)
  return {
    (constraint.name, 'forward'): lambda: forward(coords_KX),
    (constraint.name, 'forward_backward'): lambda: both(coords_KX, cot_NMX),
  }


def defects(constraint: Constraint, n: int, tokens: int) -> dict[str, float]:
  """Largest defect over the tokens by standard deviation of the coordinates."""
  evaluate = jax.jit(lambda coords_KX: constraint.defect(constraint.matrix(coords_KX, n)).max())
  return {str(std): float(evaluate(draw(constraint, n, tokens, std))) for std in STDS}


def bench_constraints(args: argparse.Namespace) -> dict[str, object]:
  """Times, defects and sizes of every constraint; reads args.streams, tokens, repeats, calls.

  Constraints that are not defined for that number of streams are listed with the reason.
  """
  n, undefined, defined, timed = args.streams, {}, {}, {}
  for name, factory in CONSTRAINTS.items():
    constraint = factory()
    try:
      constraint.num_coordinates(n)
    except ValueError as error:
      undefined[name] = str(error)
      continue
    defined[name] = constraint
    timed.update(functions_of(constraint, n, args.tokens))
  seconds = interleaved(timed, args.repeats, args.calls)

  def timing(name: str, what: str) -> dict[str, object]:
    ratios = np.asarray(seconds[name, what]) / np.asarray(seconds[REFERENCE, what])
    return {'seconds': summary(seconds[name, what]), 'ratio_to_sinkhorn': summary(list(ratios))}

  constraints = {
    name: {
      'forward': timing(name, 'forward'),
      'forward_backward': timing(name, 'forward_backward'),
      'defect_by_std': defects(constraint, n, args.tokens),
      'coordinates': constraint.num_coordinates(n),
      'dimension': constraint.dimension(n),
    }
    for name, constraint in defined.items()
  }
  settings = {name: getattr(args, name) for name in ('streams', 'tokens', 'repeats', 'calls')}
  return {
    'settings': {**settings, 'timed_std': TIMED_STD},
    'device': jax.devices()[0].device_kind,
    'constraints': constraints,
    'undefined': undefined,
  }
