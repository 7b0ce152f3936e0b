"""The report over complete synthetic run folders, and over none."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from synthetic_runs import MULTIPLIER, command, report, words, write_sweep

from analysis.diagnostics import QUESTIONS
from analysis.gaps import pair_up
from analysis.page.words import METHODS
from analysis.report import main
from analysis.runs import read_sweep
from analysis.selection import classify

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def complete(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'quick'
  planned = write_sweep(folder)
  return folder, planned, report(folder, 40)


def test_complete_sweep(complete):
  folder, planned, (fits, results, _) = complete
  assert results['run_id'].tolist() == [p['run_id'] for p in planned]
  assert (results['state'] == 'finished').all()
  assert fits['law'] == 'compute' and 'L(C) is fitted' in fits['choice']
  assert fits['fit']['E'] == pytest.approx(1.2, abs=0.06)
  for m in fits['multipliers']:
    low, high = m['flops_interval']
    assert low < MULTIPLIER[m['arm']] < high and high / low < 1.2
  # 28 grid runs are in the law; 10 rank runs are not, each with its reason.
  assert fits['fit']['n_points'] == 28 and len(fits['excluded']) == 10
  assert all('rank figures only' in e['reason'] for e in fits['excluded'])
  ranks = {r['axis']: r for r in fits['rank_sweeps']}
  low, high = ranks['weights_rank']['phi_interval']
  assert low < 0.5 < high and len(ranks['connection_streams']['runs']) == 3
  # The weight ranks are given the full-rank run's tokens in another field of the configuration.
  assert len(ranks['weights_rank']['full_rank_runs']) == 1 == len(ranks['connection_rank']['full_rank_runs'])
  assert ranks['weights_rank']['p_value'] > 0.05, 'm is a power of the rank here'
  assert [r['problem'] is None for r in fits['rollout']] == [False, False, True, True]
  names = ['no effect', 'one multiplier m per arm', 'm and own exponents per arm', 'm and own E per arm']
  assert [c['name'] for c in fits['nested']] == names
  assert sorted(r['run'] for r in fits['fit']['influence']) == sorted(
    results[results['excluded'].isna()]['run_id']
  )
  assert (folder / 'report' / 'fits.json').read_text().find('NaN') < 0


def test_gaps_pair_equal_seeds(complete):
  folder, _, _ = complete
  table = classify(read_sweep(folder).table).set_index('run_id')
  pairs = pair_up(table.reset_index(), 'residual')
  assert set(pairs) == {'hc', 'mhc', 'identity'}
  for arm, rows in pairs.items():
    own, other = table.loc[rows['run_id_own']], table.loc[rows['run_id_ref']]
    assert len(rows) == 7 and (own['arm'] == arm).all() and (other['arm'] == 'residual').all()
    for name in ('seed', 'size', 'tokens'):
      assert own[name].tolist() == other[name].tolist()


def test_the_first_screen_answers_in_the_direction_of_the_arm(complete):
  """Title, a sentence per arm in the order of the plan, how far the law misses, one picture."""
  folder, planned, (fits, _, page) = complete
  first = page[: page.index('<nav')]
  said = words(first[first.index('<h1>') :])
  assert 'Do hc, mhc and identity need less compute than residual?' in said
  known = {m['arm']: m for m in fits['multipliers']}
  place = 0
  for arm in list(dict.fromkeys(p['arm'] for p in planned))[1:]:
    m, (low, high) = known[arm]['flops'], known[arm]['flops_interval']
    assert low > 1, 'all arms of this sweep save compute'
    sentence = (
      f"{arm} needs {1 / m:.2f} times residual's compute for the same loss "
      f'(95 %: {1 / high:.2f} to {1 / low:.2f}): it saves compute.'
    )
    assert said.find(sentence) > place
    place = said.find(sentence)
  lack, last = fits['lack_of_fit'], fits['rollout'][-1]
  assert last['sizes_fitted'] == 4, 'all but the largest'
  assert (
    f'The law misses the runs by {100 * lack["scatter"]:.1f} % (seeds differ by {100 * lack["seeds"]:.1f} %) '
    f'and the largest size, held out, by {100 * last["held_out_error"]:.1f} %; 1 to 2 seeds per arm and size.'
  ) in said
  assert re.findall(r'<figure id="(\w+)"', first) == ['loss_vs_flops']
  # Figure, table and parameters read in the same direction.
  drawn = pd.read_csv(folder / 'report' / 'compute_multiplier.csv').set_index('arm')
  arrows = pd.read_csv(folder / 'report' / 'paper_compute.csv').query("kind == 'arrow'").set_index('arm')
  for arm, one in known.items():
    assert drawn.loc[arm, 'value'] == pytest.approx(1 / one['flops'])
    assert arrows.loc[arm, 'needed'] == pytest.approx(1 / one['flops'])
    assert f'{arm} {1 / one["flops"]:.3f} ({drawn.loc[arm, "low"]:.3f} to' in words(page)
  assert list(drawn.index) == ['hc', 'mhc', 'identity']


def test_one_method_of_intervals_is_quoted(complete):
  _, _, (fits, _, page) = complete
  quoted = fits['fit']['interval_method']
  assert len(fits['fit']['intervals_by_method']) == 2
  law = page[page.index('<h2 id="compute"') : page.index('<h2 id="checks"')]
  assert [name for name, text in METHODS.items() if text in words(law)] == [quoted]


def test_figures_of_other_experiments_are_not_missed(complete):
  _, _, (_, _, page) = complete
  left_out = words(re.search(r'<h2 id="missing">.*?<h2', page, re.S).group())
  # Ranks, budgets, rates, depths and routers are no part of it; what is missing of a question is said once.
  lacking = 'No run of several streams logged it.'
  said = (
    'Heat maps of H_res: no run of several streams logged diagnostics/res_mean.',
    *(f'{question} {lacking}' for question in QUESTIONS.values()),
  )
  assert left_out.removesuffix('<h2').strip() == 'Figures left out # ' + ' '.join(said)


def test_the_curves_are_drawn_by_one_vendored_file(complete):
  _, _, (_, _, page) = complete
  vendor = ROOT / 'analysis' / 'page' / 'vendor'
  library = (vendor / 'uPlot.iife.min.js').read_text()
  assert page.count('var uPlot=') == 1 and library in page
  assert 'Permission is hereby granted' in (vendor / 'LICENSE').read_text() in page, 'a copy has its licence'
  version = re.search(r'v(\d+\.\d+\.\d+)', library).group(1)
  assert f'uPlot {version}' in (vendor / 'README.md').read_text()
  # The one thing that the page draws by itself is given every run, in the looks of the figures.
  curves = json.loads(re.search(r'id=curve-data>(.*?)</script>', page, re.S).group(1))
  assert list(curves['arms']) == ['residual', 'hc', 'mhc', 'identity'] and curves['size'] == '128x4'


def test_figures_have_numbers_and_render(complete):
  folder, _, _ = complete
  names = {p.stem for p in (folder / 'report').glob('*.png')}
  wanted = {'loss_vs_flops', 'loss_at_equal_flops', 'paper_gap_flops', 'loss_vs_width', 'paper_compute'}
  wanted |= {'loss_vs_depth', 'loss_vs_connection_rank', 'loss_vs_weights_rank', 'paper_gains', 'rollout'}
  wanted |= {'loss_vs_connection_streams', 'compute_multiplier', 'paper_gap_tokens', 'paper_over_training'}
  assert wanted <= names
  for name in names:
    assert (folder / 'report' / f'{name}.png').read_bytes()[:4] == b'\x89PNG'
    assert (folder / 'report' / f'{name}.png').stat().st_size < 200_000
    assert '<svg' in (folder / 'report' / f'{name}.svg').read_text()
    pdf = (folder / 'report' / f'{name}.pdf').read_bytes()
    assert pdf[:5] == b'%PDF-' and b'/CIDFontType2' in pdf and b'/Type3' not in pdf, 'letters stay text'
    assert len(pd.read_csv(folder / 'report' / f'{name}.csv'))
  points = pd.read_csv(folder / 'report' / 'loss_vs_flops.csv')
  assert (points['kind'] == 'run').sum() == 28
  fit = points[points['kind'] == 'fit']
  assert (fit['new_run_low'] < fit['low']).all() and (fit['low'] < fit['loss']).all()
  gaps = pd.read_csv(folder / 'report' / 'paper_gap_flops.csv')
  assert (gaps[gaps['arm'] == 'mhc']['difference'] < 0).all() and gaps['low'].notna().all()


def test_page_is_self_contained_and_linked(complete):
  folder, _, (_, _, page) = complete
  addresses = re.findall(r'\w+://[\w./]+', re.sub(r'data:image[^"]*', '', page))
  assert addresses == ['https://github.com/leeoniya/uPlot'], 'in a comment of the file: nothing is loaded'
  assert set(re.findall(r'src="(.{10})', page)) == {'data:image'}
  anchors = re.findall(r'href="#([\w-]+)"', page)
  assert len(anchors) >= 10 and all(f'id="{a}"' in page for a in anchors)
  headings = re.findall(r'<h[23] id="([\w-]+)">', page) + re.findall(r'<figure id="(\w+)"', page)
  assert len(headings) >= 25 and len(set(headings)) == len(headings) and set(headings) <= set(anchors)
  assert len(re.findall(r'<h[23]\b', page)) + page.count('<figure ') == len(headings)
  for link in re.findall(r'href="([^#"]+)"', page):
    assert (folder / 'report' / link).exists(), link
  text = words(page)
  assert 'mhc report' in text and '0.10.2' in text
  assert (
    '1 (reference)' in text and 'fewer than 40 runs' in text and 'Runs scatter about the fit by 0.' in text
  )
  curves = json.loads(re.search(r'id=curve-data>(.*?)</script>', page, re.S).group(1))
  assert len(curves['runs']) == 28 and len(curves['runs'][0]['validation/loss']) == 21


def test_every_figure_that_is_drawn_is_shown(complete):
  """Once, in its section; those of a text width take a row of their own."""
  folder, _, (_, _, page) = complete
  drawn = sorted(p.stem for p in (folder / 'report').glob('*.png'))
  assert sorted(re.findall(r'<figure id="(\w+)"', page)) == drawn and len(drawn) >= 15
  images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)
  assert len(set(images)) == len(images) == len(drawn)
  for name in drawn:
    assert all(f'href="{name}.{suffix}"' in page for suffix in ('csv', 'png', 'svg', 'pdf')), name
  wide = set(re.findall(r'<figure id="(\w+)" class=wide>', page))
  for name in drawn:
    with Image.open(folder / 'report' / f'{name}.png') as image:
      assert (name in wide) == (image.width > 1000), name


def test_what_the_page_says_is_in_the_json(complete):
  """Summary, tables, lack of fit; each number as the page rounds it."""
  _, _, (fits, _, page) = complete
  said = words(page)
  for row in fits['summary']:
    assert f'{row["loss"]:.4f} {row["flops"]:.3g} {row["size"]} {row["seeds"]}' in said
  for row in fits['final_losses']:
    assert f'{row["flops"]:.3g} {row["seeds"]} {row["diverged"]} {row["validation_loss"]:.4f}' in said
  lack = fits['lack_of_fit']
  assert f'fit by {100 * lack["scatter"]:.2f} % of the loss, seeds by {100 * lack["seeds"]:.2f} %' in said
  assert fits['isoflop'] == fits['stability'] == fits['router_loads'] == []
  for sweep in fits['rank_sweeps']:
    assert len(sweep['means']) >= 3 and sweep['reference_loss'] > 0
    assert (sweep['full_rank_loss'] is None) == (sweep['axis'] == 'connection_streams'), 'n has no full rank'


def test_bad_folders_end_in_one_line(tmp_path, capsys):
  (tmp_path / 'broken').mkdir()
  (tmp_path / 'broken' / 'plan.json').write_text('{')
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'empty' / 'plan.json').write_text('{"sweep": "x", "runs": []}')
  for name in ('absent', 'broken', 'empty', '.'):
    assert command(main, tmp_path / name) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
  assert not list(tmp_path.rglob('results.csv')) and not list(tmp_path.rglob('report'))
  with pytest.raises(SystemExit) as stop:
    main(['--help'])
  assert stop.value.code == 0 and 'examples:' in capsys.readouterr().out
