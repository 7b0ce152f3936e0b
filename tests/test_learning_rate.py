"""The best learning rate per arm and size, how far it moves, and what a wrong one costs."""

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import command, config_of, write_plan, write_run

from analysis import learning_rate
from analysis.figures.learning_rate import MARKS, learning_rates
from analysis.learning_rate import picks, shifts, summary
from analysis.minima import learning_rate_sensitivity
from analysis.rates import rate_sweeps
from analysis.runs import read_sweep
from analysis.selection import classify
from analysis.study import study

GRID = (0.01, 0.02, 0.04, 0.08)


def sweeps(tmp_path, optimum, grids=(GRID, GRID)):
  """Parabolas of log loss in log lr around optimum(width); one run has diverged."""
  planned = []
  for width, grid in zip((32, 64), grids, strict=True):
    for lr in grid:
      state = 'diverged' if (width, lr) == (32, GRID[-1]) else 'finished'
      wanted = 2 * np.exp(0.05 * np.log(lr / optimum(width)) ** 2)
      config = config_of('mhc', width, 2, 0, lr=lr, tokens=2e6)
      planned.append(write_run(tmp_path, config, state, noise=0.0, wanted=wanted))
  # Ranks and other budgets are not part of a grid.
  planned.append(write_run(tmp_path, config_of('mhc', 32, 2, 0, lr=0.02, tokens=2e6, rank=1), wanted=0.1))
  planned.append(write_run(tmp_path, config_of('mhc', 32, 2, 0, lr=0.01, tokens=9e6), wanted=0.1))
  write_plan(tmp_path, planned)
  return rate_sweeps(classify(read_sweep(tmp_path).table))


def test_interpolated_optimum_and_shift(tmp_path):
  """An exact parabola is found to 1e-6 of log lr; a shift by one grid step counts as 1."""
  found = sweeps(tmp_path, lambda width: 0.025 if width == 32 else 0.05)
  assert np.allclose(np.log([r.best for r in found]), np.log([0.025, 0.05]), atol=1e-6)
  assert [r.losses.idxmin() for r in found] == [0.02, 0.04]
  assert abs(shifts(found)['mhc'] - 1) < 1e-5
  assert summary(found).loc[0, 'loss at 0.08'] == np.inf


def test_one_rate_for_all_sizes(tmp_path):
  assert picks(sweeps(tmp_path, lambda width: 0.02 if width == 32 else 0.03)) == {'mhc': 0.02}


def test_optimum_at_the_edge_is_refused_with_a_reason(tmp_path):
  found = sweeps(tmp_path, lambda width: 1e-3)
  assert all(r.best is None and r.problem for r in found) and shifts(found) == {'mhc': None}
  assert list(summary(found)['best_lr']) == [0.01, 0.01]


def test_sensitivity_is_a_mean_over_log_uniform_rates():
  """|log lr| between -2 and 1: the integral is 2.5 over a range of 3; what diverged is capped."""
  rate = np.exp(np.arange(-2.0, 2.0))
  assert learning_rate_sensitivity(rate, 3 + abs(np.log(rate)), 9.0) == pytest.approx(2.5 / 3)
  assert learning_rate_sensitivity(rate[::-1], 3 + abs(np.log(rate[::-1])), 4.0) == pytest.approx(2 / 3)
  assert learning_rate_sensitivity(rate, np.array([4, 3, 3, np.nan]), 5.0) == pytest.approx(1.5 / 3)


def test_command_line(tmp_path, capsys):
  sweeps(tmp_path, lambda width: 0.02)
  assert learning_rate.main([str(tmp_path)]) == 0
  said = capsys.readouterr().out
  table = pd.read_csv(tmp_path / 'learning_rates.csv')
  assert len(table) == 2 and table['sensitivity'].notna().all() and (table['highest_lr'] == 0.08).all()
  assert 'rate of the lowest mean loss over sizes: 0.02' in said and 'grid steps' in said


def test_grids_without_a_common_rate(tmp_path, capsys):
  sweeps(tmp_path, lambda width: 0.02, (GRID, (0.011, 0.022, 0.044)))
  assert learning_rate.main([str(tmp_path)]) == 0
  assert 'over sizes: none' in capsys.readouterr().out


def test_no_grid_ends_in_one_line(tmp_path, capsys):
  write_plan(tmp_path, [write_run(tmp_path, config_of('mhc', 32, 2, 0))])
  for folder in (tmp_path, tmp_path / 'absent'):
    assert command(learning_rate.main, folder) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1


def test_a_rate_that_is_too_low_is_told_from_one_that_diverges(tmp_path):
  """A rate of 0 has no place among log rates; where a run has not learned at a high rate, that is said."""
  planned = []
  for lr in (0.0, 1e-6, 0.01, 0.02, 0.04, 0.08, 0.16):
    state, stuck = 'diverged' if lr == 0.16 else 'finished', lr in (0.0, 1e-6, 0.08)
    wanted = 5.49 if stuck else 2 * np.exp(0.05 * np.log(lr / 0.02) ** 2)
    planned.append(write_run(tmp_path, config_of('mhc', 32, 2, 0, lr=lr), state, noise=0.0, wanted=wanted))
    path = tmp_path / planned[-1]['run_id'] / 'metrics.jsonl'
    path.write_text(f'{{"step": 0, "validation/loss": 5.5}}\n{path.read_text().split(chr(10), 1)[1]}')
  write_plan(tmp_path, planned)
  s = study(read_sweep(tmp_path), resamples=0)
  (found,) = s.rates
  told = dict(zip(found.rows['lr'], found.rows['outcome'], strict=True))
  assert told == {0.0: 'too low', 1e-6: 'too low', 0.08: 'not learned', 0.16: 'diverged'} | dict.fromkeys(
    (0.01, 0.02, 0.04), 'learned'
  )
  assert 0.0 not in found.losses and found.losses[0.16] == np.inf and np.isfinite(found.sensitivity)
  row = summary(s.rates).iloc[0]
  assert (row['too_low'], row['diverged'], row['not_learned']) == ('0 1e-06', '0.16', '0.08')
  drawing = learning_rates(s)
  entries = [text.get_text() for text in drawing.fig.legends[0].get_texts()]
  assert entries[-3:] == [words for _, words in MARKS.values()]
  marks = [(one.get_marker(), len(one.get_xdata())) for one in drawing.fig.axes[0].lines]
  assert [(mark, 1) in marks for mark in 'xvs'] == [True] * 3
  assert set(drawing.table.loc[drawing.table['kind'] == 'run', 'outcome']) == set(told.values())
