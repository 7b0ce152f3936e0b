"""Deliberately wrong constraints fail the conformance suite (test_constraints.py), each where it is wrong."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_constraints import CHECKS

from mhc_jax.constraints.base import Constraint
from mhc_jax.constraints.birkhoff_sinkhorn import birkhoff_sinkhorn
from mhc_jax.constraints.circulant import circulant
from mhc_jax.constraints.elementary import row_stochastic, unconstrained
from mhc_jax.constraints.spectral_sphere import spectral_sphere

replaced = dataclasses.replace


def claiming(constraint: Constraint, claim: str) -> Constraint:
  return replaced(constraint, properties=constraint.properties | {claim})


def with_matrix(constraint: Constraint, change) -> Constraint:
  """change(matrix, coords_KX, n) in place of matrix(coords_KX, n)."""
  return replaced(constraint, matrix=functools.partial(change, constraint.matrix))


@jax.custom_vjp
def tripled_gradient(x):
  return x


tripled_gradient.defvjp(lambda x: (x, None), lambda _, g: (3 * g,))


def overflowing(_, coords_KX, n):
  m_NMX = jnp.exp(coords_KX.reshape(n, n, -1) * 4)
  return m_NMX / m_NMX.sum(1, keepdims=True)


def starting(identity) -> Constraint:
  """Rows as softmaxes with another start."""
  return replaced(row_stochastic(), identity=identity)


def flat() -> Constraint:
  """At the right place, but in coordinates a thousand times larger: only the slopes are wrong."""
  small = with_matrix(row_stochastic(), lambda matrix, c, n: matrix(1e-3 * c, n))
  return replaced(small, identity=lambda n, mixing=0.01: 1e3 * row_stochastic().identity(n, mixing))


def row_near(n: int, mixing: float) -> np.ndarray:
  with np.errstate(divide='ignore'):
    return np.where(np.eye(n) > 0, 1 - mixing, mixing / (n - 1)).reshape(-1)


# name -> (the check that must fail, the constraint).
WRONG = {
  'columns of rows': ('claims', lambda: claiming(row_stochastic(), 'column_stochastic')),
  'norm of rows': ('claims', lambda: claiming(row_stochastic(), 'nonexpansive')),
  'signs of the sphere': ('claims', lambda: claiming(spectral_sphere(), 'nonnegative')),
  'orthogonal mixture': ('claims', lambda: claiming(circulant(), 'orthogonal')),
  'sinkhorn exact': ('claims', lambda: claiming(birkhoff_sinkhorn(), 'exact')),
  'leaky closed': ('claims', lambda: claiming(circulant(0.2), 'closed_under_product')),
  'gradient tripled': (
    'gradient',
    lambda: with_matrix(row_stochastic(), lambda matrix, c, n: matrix(tripled_gradient(c), n)),
  ),
  'gradient stopped': (
    'gradient',
    lambda: with_matrix(row_stochastic(), lambda matrix, c, n: jax.lax.stop_gradient(matrix(c, n))),
  ),
  'overflow': ('claims', lambda: with_matrix(row_stochastic(), overflowing)),
  'bfloat16 inside': (
    'claims',
    lambda: with_matrix(row_stochastic(), lambda matrix, c, n: matrix(c.astype(jnp.bfloat16), n)),
  ),
  'float64 lowered': (
    'claims',
    lambda: with_matrix(
      row_stochastic(), lambda matrix, c, n: matrix(c.astype(jnp.float32), n).astype(c.dtype)
    ),
  ),
  'tokens mixed': (
    'low precision',
    lambda: with_matrix(row_stochastic(), lambda matrix, c, n: matrix(c, n).reshape(n, n, -1)),
  ),
  'transposed defect': (
    'claims',
    lambda: replaced(row_stochastic(), defect=lambda h: row_stochastic().defect(h.swapaxes(0, 1))),
  ),
  'blind defect': ('defect', lambda: replaced(circulant(), defect=lambda h: jnp.zeros(h.shape[2:]))),
  'dimension over the coordinates': ('counts', lambda: replaced(circulant(), dimension=lambda n: n + 1)),
  'dimension too high': ('dimension', lambda: replaced(circulant(), dimension=lambda n: n)),
  'dimension too low': ('dimension', lambda: replaced(unconstrained(), dimension=lambda n: n)),
  'start far from I': ('start', lambda: starting(lambda n, mixing=0.01: np.zeros(n * n))),
  'start saturated': ('slopes', lambda: starting(lambda n, mixing=0.01: 30 * np.eye(n).reshape(-1))),
  'start infinite': (
    'start',
    lambda: starting(lambda n, mixing=0.01: np.log(row_near(n, mixing)).reshape(-1)),
  ),
  'slopes too small': ('slopes', flat),
}


@pytest.mark.parametrize('name', WRONG)
def test_wrong_constraints_fail_where_they_are_wrong(x64, name):
  expected, make = WRONG[name]
  with pytest.raises((AssertionError, TypeError)), np.errstate(all='ignore'):
    CHECKS[expected](dataclasses.replace(make(), name=name), 4)


def test_a_flat_start_passes_everything_but_the_slopes(x64):
  constraint = dataclasses.replace(flat(), name='flat')
  for name in ('counts', 'claims', 'start', 'defect'):
    CHECKS[name](constraint, 4)
