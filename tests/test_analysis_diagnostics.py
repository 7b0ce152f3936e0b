"""Diagnostics of a sweep: known values logged by hand must come out in tables, figures and the page."""

import json

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import blank, config_of, report, words, write_plan, write_run

from analysis import plots
from analysis.diagnostics import QUANTITIES, QUESTIONS, residual_depth_rank
from analysis.figures.diagnostics import by_layer, over_training
from analysis.runs import read_sweep
from analysis.study import study
from mhc_jax import diagnostics as library

HALF = 0.5 * np.eye(4) + 0.125  # half way from I to J/n
LAST = {  # sublayer 1 to 4; lists as the trainer logs them
  'distance_to_identity': [0.0, 0.2, 0.4, 1.4],
  'distance_to_mean': [1.7, 1.6, 1.5, 0.4],
  'lambda_2': [1.0, 0.9, 0.8, 0.1],
  'composite_lambda_2': [1.0, 0.9, 0.7, 0.05],
  'defect': [0.0, 1e-9, 1e-4, 1e-1],
  'stream_rank': [2.0, 3.0, 3.0, 2.5],
  'res_mean': [np.eye(4).tolist(), HALF.tolist(), (2 * HALF).tolist(), np.diag([1, 1, 1, 3.0]).tolist()],
  'gain_forward_signed': [1.0, 1.0, 1.0, 3.0],
}


def write(folder, arm, seed, state='finished', factor=1.0, last=LAST, **config):
  """A run of two layers that logs `last` times factor at its end, and once halfway with half of that."""
  planned = write_run(folder, config_of(arm, 32, 2, seed, **config), state)
  path = folder / planned['run_id'] / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row, share in ((rows[0], 0.5), (rows[-1], 1.0)):
    row |= {f'diagnostics/{name}': (share * factor * np.array(v)).tolist() for name, v in last.items()}
    row['diagnostics/depth_rank'] = share * factor * 2.0
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  return planned


@pytest.fixture
def sweep(tmp_path):
  """mhc with seeds of factors 1 and 2, hc with a sound and a diverged seed, residual with others."""
  ones = {'distance_to_identity': [0.0] * 4, 'lambda_2': [0.0] * 4}
  planned = [write(tmp_path, 'residual', seed, last=ones) for seed in (0, 1)]
  planned += [write(tmp_path, 'mhc', seed, factor=seed + 1.0) for seed in (0, 1)]
  planned += [write(tmp_path, 'hc', 0), write(tmp_path, 'hc', 1, 'diverged', factor=1e9)]
  write_plan(tmp_path, planned)
  return tmp_path


def studied(folder):
  return study(read_sweep(folder), resamples=0)


def test_means_over_sublayers_and_seeds_with_the_extreme_sublayer(sweep):
  d = studied(sweep).diagnostics
  assert set(d.by_arm['arm']) == {'mhc', 'hc'} and set(d.by_arm['size']) == {'32x2'}, (
    'one stream has no H_res'
  )
  mhc = d.of('distance_to_identity', 'mhc')
  # Means over sublayers 0.5 and 1.0; the sublayers' means over seeds go up to 1.5 * 1.4.
  assert (mhc['seeds'], mhc['diverged']) == (2, 0) and mhc['mean'] == pytest.approx(0.75)
  assert mhc['sd'] == pytest.approx(0.5 / np.sqrt(2))
  assert (mhc['worst'], mhc['worst_sublayer']) == (pytest.approx(2.1), 4)
  least = d.of('lambda_2', 'mhc')
  assert (least['worst'], least['worst_sublayer']) == (pytest.approx(0.15), 4), 'least is the most mixing'
  hc = d.of('distance_to_identity', 'hc')
  assert (hc['seeds'], hc['diverged']) == (1, 1), 'a diverged seed is no mean'
  assert hc['mean'] == pytest.approx(0.5) and np.isnan(hc['sd'])
  # Products: that of all sublayers. The whole model: its one number.
  assert d.of('composite_lambda_2', 'hc')['mean'] == pytest.approx(0.05)
  assert d.of('depth_rank', 'mhc')['mean'] == pytest.approx(3.0) and np.isnan(
    d.of('depth_rank', 'mhc')['worst']
  )
  # Every list that is logged, drawn or not.
  assert d.of('gain_forward_signed', 'hc')['mean'] == pytest.approx(1.5)


def test_errors_of_sums_are_of_rows_and_of_columns(tmp_path):
  """Rows of the first sum to 1, its columns to 0.5 and 1.5; the second is its transpose."""
  rows = np.array([[0.25, 0.75], [0.25, 0.75]])
  write_plan(tmp_path, [write(tmp_path, 'mhc', 0, last={'res_mean': [rows.tolist(), rows.T.tolist()]})])
  table = studied(tmp_path).diagnostics.by_layer.groupby('quantity')['value'].apply(list)
  assert table['row_error'] == [0, 0.5] and table['column_error'] == [0.5, 0]


def test_over_training_has_every_logged_step_and_survives_nulls(sweep):
  d = studied(sweep).diagnostics
  table = d.over_training[d.over_training['state'] == 'finished'].set_index(['quantity', 'arm', 'seed'])
  own = table.loc[('lambda_2', 'mhc', 0)]
  np.testing.assert_allclose(own['value'], [0.35, 0.7])
  np.testing.assert_allclose(own['worst'], [0.05, 0.1])
  assert own['tokens'].iloc[0] == 0 and own['tokens'].iloc[1] > 0
  np.testing.assert_allclose(table.loc[('composite_lambda_2', 'mhc', 0)]['value'], [0.025, 0.05])
  # A last row of nulls alone is not what the run logged last; single nulls leave the others.
  path = sweep / own['run_id'].iloc[0] / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows[-1] |= {'diagnostics/lambda_2': [None] * 4, 'diagnostics/distance_to_identity': [None, 0.2, 0.4, None]}
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  d = studied(sweep).diagnostics
  layers = d.by_layer[d.by_layer['run_id'] == own['run_id'].iloc[0]].set_index(['quantity', 'sublayer'])[
    'value'
  ]
  np.testing.assert_allclose(layers['lambda_2'], [0.5, 0.45, 0.4, 0.05])
  np.testing.assert_allclose(layers['distance_to_identity'], [np.nan, 0.2, 0.4, np.nan])


def panel(drawing, label):
  return next(ax for ax in drawing.fig.axes if ax.get_title() == label)


def lines(ax, label):
  return [line for line in ax.lines if line.get_label() == label]


def test_panels_show_means_over_seeds_zeros_at_the_floor_and_crosses(sweep):
  s = studied(sweep)
  drawing = by_layer(s, 'mixing')
  ax = panel(drawing, '‖H_res - I‖')
  (mean,) = lines(ax, 'mhc')
  np.testing.assert_allclose(mean.get_ydata(), [1e-3, 0.3, 0.6, 2.1])  # 0 cannot be on a log axis
  assert ax.get_yscale() == 'log' and sum(line.get_color() == mean.get_color() for line in ax.lines) == 3
  assert [line.get_marker() for line in ax.lines].count(
    'x'
  ) == 1 and 'diverged (x): hc seed 1' in drawing.caption
  assert ax.get_ylim()[1] < 100, 'a diverged run does not set the axis'
  np.testing.assert_allclose(lines(ax, 'hc')[0].get_ydata(), [1e-3, 0.2, 0.4, 1.4])
  assert lines(ax, 'H = J/n')[0].get_ydata()[0] == pytest.approx(np.sqrt(3))
  assert {'residual', 'identity'}.isdisjoint(text.get_text() for text in drawing.fig.legends[0].get_texts())
  ax = panel(over_training(s, 'mixing'), '|λ₂| of H_res')
  (mean,) = lines(ax, 'mhc')
  np.testing.assert_allclose(mean.get_ydata(), [0.525, 1.05])
  ax = panel(by_layer(s, 'rank'), 'effective rank over depth')
  np.testing.assert_allclose(lines(ax, 'mhc')[0].get_ydata(), [3.0])
  assert lines(ax, 'full rank')[0].get_ydata()[0] == 3, 'a strict triangle of 4 sublayers'


def test_products_that_are_known_for_the_first_sublayer_alone_are_drawn(tmp_path):
  planned = write(tmp_path, 'hc', 0, 'diverged')
  path = tmp_path / planned['run_id'] / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  for row in rows:
    row['diagnostics/composite_lambda_2'] = [1.0, None, None, None]
  path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  write_plan(tmp_path, [planned])
  s = studied(tmp_path)
  assert np.isnan(s.diagnostics.of('composite_lambda_2', 'hc')['mean'])
  ax = panel(by_layer(s, 'mixing'), '|λ₂| of product')
  np.testing.assert_allclose(lines(ax, 'hc')[0].get_ydata(), [1, np.nan, np.nan, np.nan])
  assert [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == 'x'] == [[1.0]]
  assert not isinstance(over_training(s, 'mixing'), str)


def test_page_and_files_have_the_table(sweep, monkeypatch):
  blank(monkeypatch)
  fits, _, page = report(sweep)
  said = words(page)
  assert 'Mixing or identity?' in said and 'href="diagnostics.csv"' in page
  # |λ₂| of H_res: mhc, hc; then what it means at either end.
  wanted = '|λ₂| of H_res 1.05 ± 0.49 [0.15 in 4] 0.7 [0.1 in 4] (1 diverged) H = I 1, H = J/n 0'
  assert wanted in said
  assert (
    'H = I 0, H = J/n 1.73' in said and f'full rank 3, plain residual {residual_depth_rank(4):.3g}' in said
  )
  written = pd.read_csv(sweep / 'report' / 'diagnostics.csv')
  assert len(written) == len(fits['diagnostics']) == 2 * 14  # ten of LAST and depth, four gains
  assert [r['mean'] for r in fits['diagnostics']] == pytest.approx(written['mean'].tolist())
  assert plots.main(['paper', str(sweep)]) == 0
  pd.testing.assert_frame_equal(pd.read_csv(sweep / 'paper' / 'diagnostics.csv'), written)


def test_a_sweep_without_diagnostics_of_streams_shows_nothing(tmp_path, monkeypatch):
  blank(monkeypatch)
  planned = [write(tmp_path, 'residual', seed, last={'lambda_2': [0.0] * 4}) for seed in (0, 1)]
  write_plan(tmp_path, planned)
  (tmp_path / 'report').mkdir()
  (tmp_path / 'report' / 'diagnostics.csv').write_text('old')
  fits, _, page = report(tmp_path)
  assert 'id=mixing' not in page and fits['diagnostics'] == []
  assert not (tmp_path / 'report' / 'diagnostics.csv').exists()
  s = studied(tmp_path)
  for question in QUESTIONS:
    assert 'No run of several streams' in by_layer(s, question) == over_training(s, question)


def test_depth_rank_of_the_residual_model_in_closed_form():
  """A triangle of m ones has singular values 1 / (2 sin(pi (2k - 1) / (4m + 2)))."""
  m = 7
  sigma = 1 / (2 * np.sin(np.pi * (2 * np.arange(1, m + 1) - 1) / (4 * m + 2)))
  share = sigma / sigma.sum()
  assert residual_depth_rank(m + 1) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-9)


def test_quantities_are_what_the_library_logs():
  """A metric that is renamed there would be missing here without a word."""
  eye = np.broadcast_to(np.eye(2, dtype=np.float32)[None, :, :, None, None], (3, 2, 2, 1, 1))
  logged = {*library.gains(eye), *library.shape_of(eye)}
  logged |= {f'composite_{name}' for name in logged}
  logged |= {*library.lambda_2({'res_mean': eye[..., 0, 0], 'composite_res_mean': eye[..., 0, 0]})}
  logged |= {*library._depth_rank(None, None, eye)}
  source = set(library.diagnose.__code__.co_consts)
  derived = {'row_error', 'column_error', 'pre_mean', 'post_mean', 'pre_saturation', 'post_saturation'}
  for q in QUANTITIES:
    assert q.name in logged | source | derived, q.name
