"""The best learning rate per arm and size, and how far it moves."""

import numpy as np
import pandas as pd

from analysis.learning_rate import optima, picks, shifts

GRID = (0.01, 0.02, 0.04, 0.08)


def table(optimum):
  """Parabolas of log loss in log lr around optimum(width); one run has diverged."""
  rows = []
  for width in (32, 64):
    for lr in GRID:
      loss = 2 * np.exp(0.05 * np.log(lr / optimum(width)) ** 2)
      rows.append(('mhc', width, 2, lr, 'finished', loss))
  rows[3] = (*rows[3][:4], 'diverged', np.nan)
  names = ['arm', 'width', 'depth', 'lr', 'state', 'validation_loss']
  return pd.DataFrame(rows, columns=names)


def test_interpolated_optimum_and_shift():
  """An exact parabola is found to 1e-6 of log lr; a shift by one grid step counts as 1."""
  best = optima(table(lambda width: 0.025 if width == 32 else 0.05))
  assert np.allclose(np.log(best['optimal_lr'].astype(float)), np.log([0.025, 0.05]), atol=1e-6)
  assert list(best['best_lr']) == [0.02, 0.04]
  assert abs(shifts(best)['mhc'] - 1) < 1e-5
  assert best.loc[0, 'loss at 0.08'] == np.inf
  assert picks(optima(table(lambda width: 0.02 if width == 32 else 0.03))) == {'mhc': 0.02}


def test_optimum_at_the_edge_is_refused_with_a_reason():
  best = optima(table(lambda width: 1e-3))
  assert best['optimal_lr'].isna().all() and best['problem'].notna().all()
  assert list(best['best_lr']) == [0.01, 0.01]
