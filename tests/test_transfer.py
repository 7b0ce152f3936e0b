"""CompleteP (arXiv 2505.01618): activations and what training changes in them keep their size.

The coordinate check of experiments/coordinate_check.py at two widths and two depths. With transfer the
size of every module's output stays the same; without, the streams grow with width and with depth.
"""

import functools

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import command

from analysis import plots
from experiments import coordinate_check
from experiments.coordinate_check import BASE

LR = 5e-2
HC_LR = 1.6e-2  # hc's matrices are not bounded: at 5e-2 they leave the identity within four updates
SIZES = {axis: (sizes[0], sizes[2]) for axis, sizes in coordinate_check.SIZES.items()}

coordinates = functools.cache(coordinate_check.coordinates)  # the base is every axis' first size


def slopes(arm, axis, sizes, bases, lr=LR, optimizer='adamw'):
  """d log(coordinate) / d log(width or depth), for each coordinate."""
  found = [coordinates(arm, size, base, lr, optimizer) for size, base in zip(sizes, bases, strict=True)]
  at = np.log([size[list(SIZES).index(axis)] for size in sizes])
  return {name: np.polyfit(at, np.log([f[name][-1] for f in found]), 1)[0] for name in found[0]}


@pytest.mark.slow
@pytest.mark.parametrize('axis', SIZES)
@pytest.mark.parametrize('arm', ('residual', 'mhc', 'identity'))
def test_coordinates_keep_their_size_with_transfer(arm, axis):
  """0 in the limit; at these sizes, where terms of 1 / sqrt(width) are left, within 0.2."""
  found = slopes(arm, axis, SIZES[axis], [BASE] * 2)
  assert max(map(abs, found.values())) < 0.2, found


@pytest.mark.slow
def test_muons_rates_transfer_in_width():
  """Slopes are within 0.07. Without, the change of the logits grows as the root of the width."""
  found = slopes('mhc', 'width', SIZES['width'], [BASE] * 2, optimizer='muon')
  assert max(map(abs, found.values())) < 0.2, found


@pytest.mark.slow
@pytest.mark.parametrize('axis,limit', (('width', 0.2), ('depth', 0.4)))
def test_coordinates_of_hyper_connections_transfer_less_well_in_depth(axis, limit):
  """Updates of an unbounded H_res compound over depth.

  The slope is -0.62 if b_res and alpha_res keep lr, -0.34 at lr / m_L; the rest is phi's share of H_res.
  The logits do not see it: the final norm divides the streams' size out.
  """
  found = slopes('hc', axis, SIZES[axis], [BASE] * 2, HC_LR)
  assert max(map(abs, found.values())) < limit, found
  assert abs(found['change of the logits']) < 0.2, found


@pytest.mark.slow
def test_factors_of_a_rank_that_grows_with_width_transfer():
  """Streams as the other arms'; the change of W = U V falls towards its limit, by less than half.

  With V's rate as it is at the base, streams grow with slope 0.7 and the change by a factor of 1.4.
  """
  found = [coordinates('low_rank', size, BASE, LR) for size in SIZES['width']]
  ratio = {name: values[-1] / found[0][name][-1] for name, values in found[1].items()}
  for name in coordinate_check.NAMES:
    assert abs(np.log(ratio[name]) / np.log(4)) < 0.35, ratio
  assert 0.5 < ratio[coordinate_check.CHANGE] < 1.1, ratio


@pytest.mark.slow
@pytest.mark.parametrize('arm,axis', (('residual', 'width'), ('residual', 'depth'), ('mhc', 'width')))
def test_streams_grow_in_proportion_without_transfer(arm, axis):
  """Every size its own base, which turns the rules off and leaves the smallest model as it is."""
  found = slopes(arm, axis, SIZES[axis], SIZES[axis])
  assert min(found[name] for name in found if name.startswith('streams')) > 0.6, found


@pytest.mark.slow
def test_the_command_writes_what_the_figure_reads(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(coordinate_check, 'SIZES', SIZES)
  assert coordinate_check.main(['--arms', 'residual', '--lr', str(LR), '--out', str(tmp_path)]) == 0
  found = pd.read_csv(tmp_path / 'coordinates.csv')
  assert len(found) == 2 * 2 * 2 * 5 * 3
  start = found.query('update == 0 and coordinate == "change of the logits"')['value']
  assert len(start) == 8 and (start == 0).all()
  assert plots.main(['coordinates', str(tmp_path)]) == 0
  said = capsys.readouterr().out
  slope = slopes('residual', 'width', SIZES['width'], [BASE] * 2)['streams after attention']
  drawn = pd.read_csv(tmp_path / 'figures' / 'coordinates.csv')
  own = drawn.query('axis == "width" and transfer and coordinate == "streams after attention"')
  np.testing.assert_allclose(own['slope'], slope, rtol=1e-5)
  assert 'coordinates.png' in said
  assert command(plots.main, 'coordinates', tmp_path / 'absent') == 2
