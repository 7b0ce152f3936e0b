"""What figures say of the runs that they show: who diverged, which budget, which exponent, what N counts."""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from synthetic_runs import (
  SIZES,
  blank,
  config_of,
  derived_of,
  write_plan,
  write_run,
  write_sweep,
)
from test_analysis_plots import add_matrices

from analysis import plots
from analysis.figures.catalogue import SECTIONS
from analysis.figures.checks import residual_panels
from analysis.figures.compute import compute_arrows, equal_flops, loss_vs_flops, multiplier_plot
from analysis.figures.draw import LOOKS, Drawing, looks
from analysis.figures.gaps import gap_and_ratio, is_ladder
from analysis.figures.isoflop import isoflop_panels
from analysis.figures.layers import gains
from analysis.figures.shape import loss_vs_depth, loss_vs_width
from analysis.figures.training import training_loss
from analysis.fitting.identify import shape_law
from analysis.page.write import page
from analysis.runs import read_sweep
from analysis.selection import classify, largest, to_points
from analysis.study import study


@pytest.fixture(autouse=True)
def blank_images(monkeypatch):
  blank(monkeypatch)


def paper(folder, out, *options):
  assert plots.main(['paper', str(folder), '--out', str(out), *options]) == 0
  return lambda name: pd.read_csv(out / f'{name}.csv')


@pytest.mark.slow
def test_an_arm_that_diverged_at_the_largest_size_stays_in_the_figures(tmp_path, capsys):
  states = {('hc', (128, 4), seed): 'diverged' for seed in (0, 1)}
  write_sweep(tmp_path, arms=('residual', 'hc', 'mhc'), ranks=False, states=states)
  read = paper(tmp_path, tmp_path / 'out')
  s = study(read_sweep(tmp_path), resamples=0)
  shown = largest(s.table, s.reference)
  assert set(shown['size']) == {'128x4'} and len(shown) == 6
  ids = set(shown.loc[shown['arm'] == 'hc', 'run_id'])
  for name in ('paper_over_training', 'paper_gap_tokens', 'paper_gains', 'training_loss'):
    table = read(name)
    assert ids <= set(table['run_id']) <= set(shown['run_id']), name
    assert set(table.loc[table['run_id'].isin(ids), 'state']) == {'diverged'}
  said = capsys.readouterr().out
  figures = ('paper_over_training', 'paper_gap_tokens', 'paper_gains', 'training_loss')
  for line in (line for line in said.splitlines() if any(f'{name}.png' in line for name in figures)):
    assert 'width x depth 128x4; diverged (x): hc seed 0 and 1' in line
  # The gap of a diverged run ends where it ended.
  gap = read('paper_gap_tokens').groupby('state')['tokens'].max()
  assert gap['diverged'] < 0.5 * gap['finished']
  losses = read('final_losses').set_index(['arm', 'size'])
  assert losses.loc[('hc', '128x4'), 'diverged'] == 2 and np.isnan(
    losses.loc[('hc', '128x4'), 'validation_loss']
  )


def test_gaps_are_drawn_against_the_reference_asked_for(tmp_path):
  write_sweep(tmp_path, arms=('residual', 'mhc'), ranks=False)
  plain, turned = (
    paper(tmp_path, tmp_path / arm, '--reference', arm)('paper_gap_flops') for arm in ('residual', 'mhc')
  )
  assert set(plain['arm']) == {'mhc'} and set(turned['arm']) == {'residual'}
  np.testing.assert_allclose(np.sort(plain['difference']), np.sort(-turned['difference']), rtol=1e-9)
  losses = pd.read_csv(tmp_path / 'mhc' / 'final_losses.csv').set_index('arm')
  assert losses.loc['mhc', 'difference'].isna().all() and losses.loc['residual', 'difference'].notna().all()


def test_arms_of_one_size_stand_side_by_side_within_the_axes(tmp_path):
  """Whatever their FLOPs."""
  write_sweep(tmp_path, ('mhc', 'residual', 'hc', 'identity'), sizes=((32, 2),), ranks=False)
  for ax in gap_and_ratio(study(read_sweep(tmp_path), 0, reference='mhc')).fig.axes:
    low, high = ax.get_xlim()
    x = np.unique([line.get_xdata()[0] for line in ax.lines if line.get_marker() not in ('None', '', '|')])
    assert len(x) >= 3 and low < x.min() and x.max() < high
    np.testing.assert_allclose(np.diff(np.log(x)), np.diff(np.log(x))[0])


def test_many_arms_of_several_sizes_stand_within_the_axes(tmp_path):
  write_sweep(tmp_path, ('residual', *(f'arm {k}' for k in range(10))), ranks=False)
  for ax in gap_and_ratio(study(read_sweep(tmp_path), 0)).fig.axes:
    x = np.concatenate([line.get_xdata() for line in ax.lines if line.get_label().startswith('arm')])
    low, high = np.log(ax.get_xlim())
    place = (np.log(x) - low) / (high - low)
    assert len(x) >= 30 and 0.02 < place.min() < place.max() < 0.98, (place.min(), place.max())


def test_the_common_size_is_one_that_every_arm_has(tmp_path):
  states = {('mhc', (128, 4), seed): None for seed in (0, 1)} | {('hc', (64, 4), 0): 'running'}
  write_sweep(tmp_path, arms=('residual', 'hc', 'mhc'), ranks=False, states=states)
  table = classify(read_sweep(tmp_path).table)
  assert set(largest(table, 'residual')['size']) == {'64x2'}


def test_every_arm_has_a_look_of_its_own():
  names = [*LOOKS, *(f'arm {k}' for k in range(24))]
  found = list(looks(names).values())
  assert len({look['color'] for look in found[:16]}) == 16, 'a sweep of sixteen arms shows no colour twice'
  widths = [look['linewidth'] for look in found]
  assert widths == sorted(widths, reverse=True) and widths[0] > 2 * widths[-1] > 1.5, (
    'those drawn later are thinner'
  )
  for cues in (('color', 'marker'), ('color', 'linestyle')):
    assert len({tuple(look[cue] for cue in cues) for look in found}) == len(names), cues


def test_arms_come_in_the_order_of_the_plan_in_every_figure(tmp_path):
  """Also where an arm's first run is missing, and where names sort otherwise."""
  arms = ('residual', 'zeta', 'mhc', 'alpha')
  write_sweep(
    tmp_path, arms=arms, ranks=False, states={('zeta', (32, 2), seed): 'running' for seed in (0, 1)}
  )
  s = study(read_sweep(tmp_path), resamples=0)
  for draw in (
    loss_vs_flops,
    equal_flops,
    gap_and_ratio,
    loss_vs_width,
    residual_panels,
    training_loss,
    gains,
  ):
    said = [text.get_text() for text in draw(s).fig.legends[0].get_texts() if text.get_text() in arms[1:]]
    assert said == list(arms[1:]), draw.__name__
  multipliers = [text.get_text() for text in multiplier_plot(s).fig.axes[0].get_yticklabels()]
  assert multipliers == ['alpha', 'mhc', 'zeta'], 'from below'
  first = page(s, {}, [], tmp_path, '')
  assert first.index('<li>zeta needs') < first.index('<li>mhc needs') < first.index('<li>alpha needs')


def test_marks_of_one_arm_leave_those_of_another_visible(tmp_path):
  """Hollow runs, bands without a face, intervals side by side; a line joins only a ladder of sizes."""
  write_sweep(tmp_path, ranks=False)
  s = study(read_sweep(tmp_path), resamples=0)
  ax = loss_vs_flops(s).fig.axes[0]
  assert not ax.collections and all(
    line.get_markerfacecolor() == 'none' for line in ax.lines if line.get_marker() != 'None'
  )
  gaps = [line for line in gap_and_ratio(s).fig.axes[0].lines if line.get_label() in s.arms[1:]]
  assert len(gaps) == 3 and len({line.get_xdata()[0] for line in gaps}) == 3
  assert all(line.get_linestyle() == 'None' for line in gaps), '32x4 before 64x2: no line joins them'
  assert not is_ladder([g for g in s.gaps if g.arm == 'mhc'])
  assert is_ladder([g for g in s.gaps if g.arm == 'mhc' and g.size != '32x4'])
  # Labels of arrows are in the legend of their axes: they cannot leave them.
  (near,) = compute_arrows(s).fig.axes
  assert len(near.get_legend().get_texts()) == 3 and not [t for t in near.texts if t.get_text()]
  low, high = near.get_xlim()
  assert all(
    low < x < high for arrow in s.arrows for x in (arrow['flops'], arrow['flops'] * arrow['multiplier'])
  )


def test_every_letter_can_be_read(tmp_path):
  """At the width at which it is printed, 3.5 or 7 inches: 7 points at least, and no label cut at an edge."""
  write_sweep(tmp_path, arms=('residual', 'attention_residual', 'mhc'))
  add_matrices(tmp_path, 'mhc')
  s, seen = study(read_sweep(tmp_path), resamples=0), 0
  for section in SECTIONS:
    for name, draw in section.figures.items():
      drawn = draw(s)
      if isinstance(drawn, Drawing):
        fig = drawn.fig
        assert fig.get_figwidth() in (3.5, 7.0), name
        small = [t for t in fig.findobj(Text) if t.get_text() and t.get_fontsize() < 7]
        assert not small, (name, small)
        fig.draw_without_rendering()
        labels = [text for ax in fig.axes for text in (ax.xaxis.label, ax.yaxis.label, ax.title)]
        for text in (text for text in labels if text.get_text()):
          extent = text.get_window_extent()
          assert extent.x0 >= -1 and extent.x1 <= fig.bbox.x1 + 1, (name, text)
          assert extent.y0 >= -1 and extent.y1 <= fig.bbox.y1 + 1, (name, text)
        seen += 1
  assert seen >= 15


@pytest.mark.slow
def test_panels_show_a_budget_in_one_colour_whatever_the_arm(tmp_path):
  """The second arm has the two larger of three budgets, at 3 % more FLOPs."""
  planned = []
  for arm, budgets in (('residual', (1e11, 4e11, 1.6e12)), ('mhc', (4.1e11, 1.65e12))):
    for flops, width in itertools.product(budgets, (16, 24, 32, 48, 64)):
      n = derived_of(config_of('residual', width, 2, 0))['params']['matmul']
      wanted = 2 + 0.05 * np.log(n / 0.02 / flops**0.5) ** 2 + 0.1 * np.log(1e13 / flops)
      planned.append(write_run(tmp_path, config_of(arm, width, 2, 0, flops=flops), noise=0.0, wanted=wanted))
  write_plan(tmp_path, planned)
  fig = isoflop_panels(study(read_sweep(tmp_path), resamples=0)).fig
  first, second = fig.axes
  looked = [
    {
      line.get_label(): (tuple(line.get_color()), line.get_marker())
      for line in ax.lines
      if 'FLOPs' in line.get_label()
    }
    for ax in (first, second)
  ]
  assert [len(one) for one in looked] == [3, 2] and set(looked[1]) < set(looked[0])
  assert all(looked[0][label] == look for label, look in looked[1].items())
  said = [text.get_text() for text in fig.legends[0].get_texts()]
  assert len(said) == 6 and said[3:] == ['parabola', 'minimum, parabola', 'minimum, akima'], (
    'every mark is explained'
  )


def test_figures_leave_none_behind(tmp_path):
  write_sweep(tmp_path, arms=('residual', 'mhc'), sizes=SIZES[:2], ranks=True)
  out = tmp_path / 'out'
  out.mkdir()
  for name in ('paper_isoflop.png', 'paper_isoflop.csv', 'ablation.csv', 'mine.png'):
    (out / name).write_text('old')
  paper(tmp_path, out)
  assert (out / 'mine.png').exists() and not list(out.glob('paper_isoflop*'))


def test_every_map_has_a_row_in_the_ablation(tmp_path):
  planned = []
  arms = {'mhc': ('sigmoid', 'sigmoid'), 'mhc pre': ('sigmoid', 'fixed'), 'mhc post': ('fixed', 'sigmoid')}
  for seed in (0, 1):
    planned.append(write_run(tmp_path, config_of('residual', 32, 4, seed)))
    for arm, gates in arms.items():
      config = config_of(arm, 32, 4, seed, gates=gates)
      config['model']['connection'] |= {'name': 'mhc', 'constraint': 'birkhoff_sinkhorn'}
      planned.append(write_run(tmp_path, config))
  write_plan(tmp_path, planned)
  s = study(read_sweep(tmp_path), resamples=0)
  said = page(s, {}, [], tmp_path, '')
  assert 'What each map is worth, at 32x4' in said and 'bits per byte' in said
  table = s.ablation.set_index('arm')
  assert table.loc['residual', ['H_res', 'H_pre', 'H_post']].tolist() == ['I', 'fixed', 'fixed']
  assert table.loc['mhc pre', ['H_res', 'H_pre', 'H_post']].tolist() == [
    'birkhoff_sinkhorn',
    'sigmoid',
    'fixed',
  ]
  assert table.loc[list(arms), ['difference', 'low', 'high', 'bits_per_byte']].notna().all().all()


def shapes(folder, depths, tokens):
  """Losses 1.2 + 20 W^-0.6 + 1.5 H^-0.8 + 60 D^-0.3 with little noise."""
  planned = []
  for width, depth in itertools.product((64, 128, 256, 512), depths):
    for d in tokens(derived_of(config_of('residual', width, depth, 0))['params']['matmul']):
      config = config_of('residual', width, depth, 0, tokens=d)
      wanted = 1.2 + 20 * width**-0.6 + 1.5 * depth**-0.8 + 60 * d**-0.3
      planned.append(write_run(folder, config, noise=1e-4, wanted=wanted))
  write_plan(folder, planned)


@pytest.mark.slow
def test_width_and_depth_have_exponents(tmp_path):
  shapes(tmp_path, (2, 4, 8, 16), lambda n: (1e6, 1e7, 1e8))
  s = study(read_sweep(tmp_path), resamples=0)
  for draw, value in ((loss_vs_width, 0.6), (loss_vs_depth, 0.8)):
    panel = draw(s)
    row = panel.table.set_index('kind').loc['exponent']
    assert row['low'] < value < row['high'] < row['low'] + 0.3
    assert 'L = E + A W^-alpha + B H^-beta + G D^-gamma.' in panel.caption
    assert f'{row["exponent"]:.2f} (95 %' in panel.caption
  assert [a.law for a in s.alternatives if a.problem is None] == [
    'compute',
    'chinchilla',
    'overtraining',
    'width_depth',
  ]
  best = min((a for a in s.alternatives), key=lambda a: a.errors.left_out_error)
  assert best.law == 'width_depth' and best.errors.left_out_error < 1e-3


def test_shape_terms_that_the_grid_cannot_tell_are_left_out(tmp_path):
  shapes(tmp_path, (2, 4, 8), lambda n: (20 * n,))
  tied = shape_law(to_points(classify(read_sweep(tmp_path).table)))
  assert tied.law.covariates == ('W', 'H') and 'tokens grow with the model' in tied.reason
  (tmp_path / 'two').mkdir()
  shapes(tmp_path / 'two', (2, 4), lambda n: (20 * n,))
  two = shape_law(to_points(classify(read_sweep(tmp_path / 'two').table)))
  assert two.law is None and two.reason == '2 depths cannot test a power law (3 are needed).'


def test_n_is_counted_as_asked(tmp_path):
  shapes(tmp_path, (2,), lambda n: (1e6, 1e7, 1e8))
  residuals = paper(tmp_path, tmp_path / 'out', '--params', 'total')('paper_residuals')
  counted = read_sweep(tmp_path).table.set_index('run_id').loc[residuals['run_id']]
  np.testing.assert_allclose(residuals['N'], counted['params_total'], rtol=1e-9)
  assert (counted['params_total'] > counted['params_matmul']).all()


def multiplier(folder):
  (m,) = study(read_sweep(folder), resamples=0).multipliers
  return m


def test_a_multiplier_from_too_few_runs_has_a_reason(tmp_path):
  planned = [write_run(tmp_path, config_of('residual', *size, 0)) for size in SIZES[:4]]
  write_plan(tmp_path, planned + [write_run(tmp_path, config_of('mhc', *size, 0)) for size in SIZES[:2]])
  m = multiplier(tmp_path)
  assert m.flops is None and m.problem.startswith('not fitted soundly: 6 runs for 4 parameters')


def test_costs_of_arms_without_a_common_size_cannot_be_compared(tmp_path):
  """L(N, D) compares at equal sizes and tokens; FLOPs and seconds need a size that both arms have."""
  planned = []
  for arm, widths in (('residual', (32, 64, 128)), ('mhc', (48, 96))):
    for width, depth, ratio in itertools.product(widths, (2, 4), (5.0, 20.0, 80.0)):
      config = config_of(arm, width, depth, 0, ratio)
      counts = derived_of(config)
      wanted = 1.2 + 60 * counts['params']['matmul'] ** -0.4 + 200 * counts['tokens'] ** -0.35
      planned.append(write_run(tmp_path, config, noise=0.001, wanted=wanted))
  write_plan(tmp_path, planned)
  assert multiplier(tmp_path).problem == 'no size in common with residual'


def test_without_speeds_there_is_no_multiplier_in_seconds(tmp_path):
  write_sweep(tmp_path, arms=('residual', 'mhc'), ranks=False)
  for path in tmp_path.glob('*/metrics.jsonl'):
    path.write_text(path.read_text().replace('time/tokens_per_second', 'time/other'))
  m = multiplier(tmp_path)
  assert m.flops is not None and m.seconds_problem == 'too few runs have a cost in this unit'


def test_a_currency_without_a_sound_fit_has_a_reason(tmp_path):
  """Speeds that are noise of a factor of 20: no multiplier in seconds can be read off."""
  write_sweep(tmp_path, arms=('residual', 'mhc'), ranks=False)
  rng = np.random.default_rng(0)
  for path in tmp_path.glob('*/metrics.jsonl'):
    speed = 1e4 * 20 ** rng.uniform(-1, 1)
    rows = [json.loads(line) | {'time/tokens_per_second': speed} for line in path.read_text().splitlines()]
    path.write_text('\n'.join(map(json.dumps, rows)))
  s = study(read_sweep(tmp_path), resamples=0)
  (m,) = s.multipliers
  text = page(s, {}, [], tmp_path, '')
  assert m.flops is not None and m.seconds is None and m.seconds_problem in text
