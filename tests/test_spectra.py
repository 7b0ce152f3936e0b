"""Singular values and determinants of small matrices against LAPACK, the small ones to relative accuracy."""

import jax
import numpy as np
import pytest

from mhc_jax.constraints.spectra import determinant, singular_values


def cases(n):
  """(n, n, 7): random, graded over ten decades, of rank 1, zero, the identity, a rotation, a permutation."""
  rng = np.random.default_rng(n)
  left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
  graded = left @ np.diag(np.geomspace(1, 1e-10, n)) @ np.eye(n)  # graded columns keep small values accurate
  kinds = (rng.normal(size=(n, n)), graded, np.full((n, n), 1 / n), np.zeros((n, n)))
  return np.stack((*kinds, np.eye(n), right, np.eye(n)[rng.permutation(n)]), -1)


@pytest.mark.parametrize('n', (1, 2, 4, 9))
def test_singular_values_are_those_of_lapack(x64, n):
  h_NMX = cases(n)
  found_NX = np.asarray(jax.jit(singular_values)(h_NMX))
  wanted_NX = np.linalg.svd(np.moveaxis(h_NMX, 2, 0), compute_uv=False).T
  np.testing.assert_allclose(found_NX, wanted_NX, rtol=1e-12, atol=1e-15)
  graded = 1  # LAPACK itself knows its small values to 1e-16 of the largest only
  np.testing.assert_allclose(found_NX[:, graded], np.geomspace(1, 1e-10, n), rtol=1e-12)


@pytest.mark.parametrize('n', (1, 2, 4, 9))
def test_determinants_are_those_of_lapack(x64, n):
  h_NMX = cases(n)
  wanted_X = np.linalg.det(np.moveaxis(h_NMX, 2, 0))
  np.testing.assert_allclose(jax.jit(determinant)(h_NMX), wanted_X, rtol=1e-9, atol=1e-15)
