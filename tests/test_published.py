"""Published losses beside a sweep's: the numbers as their sources state them, and which arm is which."""

import numpy as np
import pytest
from scipy.optimize import brentq

from analysis.figures.published import published_figure
from analysis.published import data, published_fits, published_gaps
from analysis.runs import read_sweep
from analysis.study import study
from tests.synthetic_runs import blank, config_of, report, words, write_plan, write_run

SINKHORN = {'constraint': 'birkhoff_sinkhorn', 'preset': 'paper'}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """Two sizes and seeds of residual, mhc by Sinkhorn, and an arm called mhc2 whose H_res is the identity."""
  path, planned = tmp_path_factory.mktemp('published'), []
  for size, seed in (((32, 2), 0), ((32, 2), 1), ((64, 2), 0), ((64, 2), 1)):
    for arm, more in (
      ('residual', {}),
      ('mhc', SINKHORN),
      ('mhc2', {}),
      ('mhc3', SINKHORN | {'fractions': 4}),
    ):
      config = config_of(arm, *size, seed)
      config['model']['connection'] |= {'name': arm.rstrip('23')} | more
      planned.append(write_run(path, config))
  write_plan(path, planned)
  return path


def test_the_gaps_are_those_that_the_sources_state():
  """Differences as the Factory prints them itself, and of the papers' tables by hand."""
  table = published_gaps().set_index(['arm', 'size'])['gap']
  stated = {
    **{('AttnRes', '38.5M'): -0.0407, ('Frac-Connections', '85M'): -0.0150, ('HC', '304M'): -0.0360},
    **{('HC, static', '85M'): -0.0075, ('AttnRes, heads', '304M'): -0.0378, ('mHC', '1.2B'): -0.0287},
    **{('MUDD', '38.5M'): -0.1115, ('MUDD, two norms', '304M'): -0.0710, ('mHC', '9.6M'): 0.0300},
    **{('mHC-lite', '194M'): -0.025, ('AttnRes, block', '528M'): -0.026, ('HC', '1B'): -0.087},
    ('gated residual', '25B, 3B active'): -0.027,
  }
  for key, gap in stated.items():
    assert table[key] == pytest.approx(gap, abs=1.1e-4), key  # four digits of either loss are rounded
  assert len(table) == sum(x is not None for t in data()['tables'] for v in t['losses'].values() for x in v)
  assert all(t['where'] and set(t['losses']) <= set(data()['arms']) for t in data()['tables'])


def test_multipliers_of_published_fits_are_the_compute_at_which_the_curves_meet():
  """By bisection on the two curves; the paper says 1.25 for block attention residuals at its largest."""
  fits = published_fits()
  for one in data()['fits']:
    base = one['residual']
    for arm, fit in one['curves'].items():
      for compute in one['range']:
        wanted = fit[0] + fit[1] * compute ** -fit[2]
        meet = brentq(lambda x, b=base, w=wanted: b[0] + b[1] * np.exp(-b[2] * x) - w, -10, 200)
        row = fits[(fits['arm'] == arm) & np.isclose(fits['flops'], compute * one['unit'])]
        assert row['multiplier'].item() == pytest.approx(np.exp(meet) / compute, rel=1e-9)
  block = fits[fits['arm'] == 'AttnRes, block'].set_index('flops')['multiplier']
  assert block.iloc[-1] == pytest.approx(1.25, abs=0.005)


def test_an_arm_is_known_by_its_connection_not_by_its_label(folder):
  s = study(read_sweep(folder), resamples=0)
  ours = s.published.gaps.dropna(subset='ours')
  assert set(ours['arm']) == {'mHC'} and set(ours['ours']) == {'mhc'} and set(ours['ours_size']) == {'64x2'}
  (gap,) = (g for g in s.gaps if g.arm == 'mhc' and g.size == '64x2')
  assert gap.pairs == 2 and set(ours['ours_gap']) == {gap.difference} and set(ours['ours_low']) == {gap.low}
  assert list(s.published.own['ours_size']) == ['32x2', '64x2']
  drawn = published_figure(s)
  assert len(drawn.table) == len(published_gaps()) and 'Not in this sweep' in drawn.caption
  marks = [bar for ax in drawn.fig.axes for bar in ax.containers]
  assert len(marks) == 1 and marks[0].lines[0].get_xydata().shape == (2, 2)


def test_the_report_shows_them_and_says_what_no_arm_is(folder, monkeypatch):
  blank(monkeypatch)
  fits, _, page = report(folder)
  assert len(fits['published_gaps']) == len(published_gaps()) and len(fits['published_fits']) == 8
  text = words(page)
  assert (
    'Published gaps beside ours' in text and 'no such arm' in text and 'arXiv 2603.15031, Table 2' in text
  )


def test_a_sweep_without_such_an_arm_or_without_residual_has_none(folder):
  s = study(read_sweep(folder), resamples=0, reference='mhc2')
  assert s.published.gaps.empty and published_figure(s) is None
