"""What the analysis writes: whole or as it was, and safe wherever a name is shown."""

import fcntl
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from synthetic_runs import command, report, write_sweep

from analysis import coverage, fit, plots, reproduce
from analysis.figures.draw import Drawing, figure, legend, save
from analysis.fitting.table import read_table
from analysis.output import STAGED, csv_text, staged, write_file
from analysis.report import main

SIZES = ((32, 2), (64, 2), (64, 4))


def pictures(path):
  return path.suffix == '.png'


def files(folder):
  return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize('stop', [KeyboardInterrupt, RuntimeError, OSError(28, 'No space left on device')])
def test_what_stops_leaves_what_was_there(tmp_path, stop):
  (tmp_path / 'a.png').write_text('old')
  with pytest.raises(stop if isinstance(stop, type) else OSError), staged(tmp_path, pictures, 'x') as new:
    (new / 'a.png').write_text('new')
    raise stop
  assert files(tmp_path) == {'a.png': 'old'} and len(list(tmp_path.iterdir())) == 1
  with pytest.raises(RuntimeError), staged(tmp_path / 'never', pictures, 'x'):
    raise RuntimeError
  assert not (tmp_path / 'never').exists()


def test_what_is_whole_takes_its_place_and_what_is_ours_goes(tmp_path):
  for name in ('a.png', 'stale.png', 'notes.txt'):
    (tmp_path / name).write_text('old')
  (tmp_path / f'{STAGED}dead').mkdir()  # of a killed process
  alive = tmp_path / f'{STAGED}alive'
  alive.mkdir()
  held = os.open(alive, os.O_RDONLY)
  fcntl.flock(held, fcntl.LOCK_EX)
  with staged(tmp_path, pictures, 'x') as new, staged(tmp_path, pictures, 'x') as other:  # two at once
    (new / 'a.png').write_text('one')
    (other / 'a.png').write_text('two')
    (other / 'b.png').write_text('two')
  assert files(tmp_path) == {'a.png': 'one', 'notes.txt': 'old'}, 'the last one, and nothing of the other'
  assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [alive.name]
  os.close(held)


def test_an_interrupted_report_leaves_the_old_one(tmp_path, monkeypatch):
  monkeypatch.setattr('analysis.page.write.draw_all', lambda *_: ({}, []))
  write_sweep(tmp_path, arms=('residual', 'mhc'), sizes=SIZES[:1], ranks=False)
  report(tmp_path, 2)
  before = files(tmp_path / 'report'), (tmp_path / 'results.csv').read_text()

  def stopped(*_):
    raise KeyboardInterrupt

  for name in ('draw_all', 'page', 'csv_text'):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(f'analysis.page.write.{name}', stopped)
      main([str(tmp_path), '--resamples', '2'])
    assert (files(tmp_path / 'report'), (tmp_path / 'results.csv').read_text()) == before, name
  (tmp_path / 'report').rename(tmp_path / 'kept')
  (tmp_path / 'report').write_text('a file')
  assert command(main, tmp_path, '--resamples', 2) == 2


def test_formulas_in_cells_are_texts_and_come_back(tmp_path):
  names = ['=1+1', '+a', '-a', '@a', '\ta', "'=a", "'a'", 'a=1', '', 'mhc, W']
  table = pd.DataFrame({'arm': names, '=N': -1.5, 'D': range(10), 'note': [None, *names[1:]]})
  (tmp_path / 't.csv').write_text(csv_text(table))
  lines = (tmp_path / 't.csv').read_text().splitlines()
  assert lines[0] == "arm,'=N,D,note" and lines[1] == "'=1+1,-1.5,0," and lines[6].startswith("''=a,-1.5")
  back = read_table(tmp_path / 't.csv')
  assert list(back['arm']) == names and list(back.columns) == list(table.columns)
  assert list(back['=N']) == ['-1.5'] * 10


HOSTILE = (r'$\frac{1$', '=cmd|x', '</script><!--\u2028', '_hidden\n\x1b[2J\u202e' + 'x' * 500)


def test_hostile_names_reach_every_figure_the_page_and_the_terminal(tmp_path, capsys):
  """Drawn for once, not blanked: the reader of mathematics is in the drawing."""
  plan = write_sweep(tmp_path, arms=('residual', 'mhc', 'hc', 'identity'), sizes=SIZES[:1], ranks=False)
  names = dict(zip(('residual', 'mhc', 'hc', 'identity'), HOSTILE, strict=True))
  for item in plan:
    path = tmp_path / item['run_id'] / 'config.json'
    resolved = json.loads(path.read_text())
    path.write_text(json.dumps(resolved | {'arm': names[resolved['arm']]}))
  with pytest.MonkeyPatch.context() as patch:  # a PNG draws all of it
    patch.setattr('analysis.figures.catalogue.SECTIONS', [])
    _, results, page = report(tmp_path, 2)
  assert page.count('</script>') == page.count('<script')
  assert '<!--' not in page.split('<script>')[0].removeprefix('<!doctype html>') and '\u2028' not in page
  said = capsys.readouterr().out
  assert all(line.isprintable() for line in said.splitlines()) and len(set(results['arm'])) == 4
  assert results['arm'].str.startswith("'=cmd").any() and results['arm'].str.len().max() <= 49


def test_a_dollar_begins_no_formula_and_an_underscore_hides_nothing(tmp_path):
  with figure() as (fig, ax):
    for k, name in enumerate(('$\\frac{1$', '_arm', '100 % \\alpha_1')):
      ax.plot([1, 2], [k, 2], label=name)
    ax.axhline(1)
    ax.set(title='$\\frac{1$', xlabel='a $b', ylabel='{$}')
    legend(fig, ax)
  save(Drawing(fig, '', pd.DataFrame()), tmp_path, 'x')
  named = [text.get_text().strip() for text in fig.legends[0].get_texts()]
  assert named == ['$\\frac{1$', '_arm', '100 % \\alpha_1']
  assert not any('$' in tick.get_text() for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_ticklabels())


@pytest.fixture
def points(tmp_path):
  path = tmp_path / 'p.csv'
  rows = [(n, d, 1.5 + 400 / n**0.34 + 410 / d**0.28) for n in (1e6, 3e6, 1e7, 3e7) for d in (1e8, 1e9, 1e10)]
  path.write_text('N,D,loss\n' + ''.join(f'{n},{d},{loss}\n' for n, d, loss in rows))
  return path


@pytest.mark.parametrize(
  'options',
  [
    *(('--delta', '1e-300'), ('--delta', 'inf'), ('--pin', 'E=1e308'), ('--pin', 'alpha=1e308')),
    *(('--out', '.'), ('--out', '/proc/x.json'), ('--out', 'x' * 300), ('--figure', '/proc/x.png')),
  ],
)
def test_a_fit_that_cannot_be_ends_in_one_line(points, capsys, options):
  assert command(fit.main, points, '--resamples', 2, *options) == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ') and error.count('\n') == 1


@pytest.mark.parametrize('value', ['1e308', '1e-308', '0', '-1', '9' * 400, '1e-320', '0.' + '0' * 400 + '1'])
def test_points_of_extreme_numbers_end_in_one_line(points, capsys, value):
  text = points.read_text()
  for column in range(3):
    cells = text.splitlines()[3].split(',')
    cells[column] = value
    points.write_text(text.replace(text.splitlines()[3], ','.join(cells)))
    assert command(fit.main, points, '--resamples', 0) == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1 and 'line 4' in error


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'f.json'
  path.write_text('kept')

  def full(_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    write_file(path, 'new', '--out')
  assert files(tmp_path) == {'f.json': 'kept'}
  monkeypatch.undo()
  (tmp_path / 'link.json').symlink_to(path)
  write_file(tmp_path / 'link.json', 'new', '--out')
  assert (tmp_path / 'link.json').is_symlink() and path.read_text() == 'new'
  write_file(Path('/dev/null'), 'new', '--out')
  assert not Path('/dev/null').is_file()


def test_other_commands_refuse_bad_files_before_the_work(tmp_path, points, capsys):
  for out in (tmp_path, '/proc/x/y.json'):
    assert command(coverage.main, '--simulations', 1, '--only', 'single', '--out', out) == 2
  write_sweep(tmp_path, arms=('mhc',), sizes=SIZES[:1], ranks=False)
  (tmp_path / 'file').write_text('')
  assert command(plots.main, 'paper', tmp_path, '--out', tmp_path / 'file') == 2
  wrong = b'{"method": "law", "law": 5, "columns": 5, "expect": 5}'
  for content in (b'\xff', b'[' * 20_000, b'5', b'{"method": "law"}', wrong):
    (tmp_path / 'expect.json').write_bytes(content)
    assert command(reproduce.main, points, '--expect', tmp_path / 'expect.json') == 2
  assert all(line.startswith('error: ') for line in capsys.readouterr().err.splitlines())
