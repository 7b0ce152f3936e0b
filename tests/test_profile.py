"""`--profile`: a trace of the updates that were asked for, also after a resume, and no other number."""

import pytest

from mhc_jax import profiling, train
from mhc_jax.errors import ConfigError
from tests.test_train import TIMES, config, corpus, rows


def traced(folder, updates, **options):
  """What was said, of a run of ten updates with --profile."""
  fields = options.pop('fields', {})
  return train.run(config(**fields), str(folder), corpus(), quiet=True, profile=updates, **options)


def timeless(folder):
  return [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows(folder)]


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """Rows of the run without a trace."""
  folder = tmp_path_factory.mktemp('plain')
  train.run(config(), str(folder), corpus(), quiet=True)
  return timeless(folder)


def files(folder):
  return [path for path in (folder / 'profile').rglob('*') if path.is_file()]


def test_a_trace_of_some_updates_is_in_the_folder_and_changes_no_number(tmp_path, capsys, plain):
  assert traced(tmp_path, (3, 4))['state'] == 'finished'
  assert {'.pb', '.gz'} <= {path.suffix for path in files(tmp_path)}
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'updates 3 to 4 are traced in {tmp_path}/profile: ') and 'perfetto' in line
  assert timeless(tmp_path) == plain


def test_a_run_that_goes_on_traces_what_is_left(tmp_path, capsys, plain):
  stops = iter(range(100))
  assert traced(tmp_path, (9, 12), stops_at=lambda step: next(stops) >= 5)['state'] == 'interrupted'
  assert not capsys.readouterr().err and not files(tmp_path)
  traced(tmp_path, (2, 7))
  assert 'updates 7 to 7 are traced' in capsys.readouterr().err and timeless(tmp_path) == plain


def test_where_there_is_nothing_to_trace_it_is_said(tmp_path, capsys):
  stops = iter(range(100))
  traced(tmp_path, (11, 12), stops_at=lambda step: next(stops) >= 5)
  assert 'nothing is traced (the run has 10 updates)' in capsys.readouterr().err
  assert traced(tmp_path, (2, 3))['state'] == 'finished'
  assert 'update 3 was done before' in capsys.readouterr().err and not files(tmp_path)


def test_a_run_that_ends_within_the_trace_has_what_there_is(tmp_path, capsys):
  stops = iter(range(100))
  assert traced(tmp_path, (2, 9), stops_at=lambda step: next(stops) >= 3)['state'] == 'interrupted'
  assert 'updates 2 to 4 are traced' in capsys.readouterr().err and files(tmp_path)


def test_a_profiler_that_fails_ends_no_run(tmp_path, capsys, monkeypatch, plain):
  def broken(*_):
    raise OSError('no space\nleft')

  monkeypatch.setattr(profiling.jax.profiler, 'start_trace', broken)
  assert traced(tmp_path, (3, 4))['state'] == 'finished' and timeless(tmp_path) == plain
  (line,) = capsys.readouterr().err.splitlines()
  assert line == 'warning: --profile: nothing is traced (OSError: no space left); the run goes on'


@pytest.mark.parametrize('text', ('10', '5:3', '0:3', 'a:b', '1:2:3', '-1:4'))
def test_what_is_no_pair_of_updates_is_refused(text):
  with pytest.raises(ConfigError, match='like 10:15'):
    profiling.updates_of(text)


def test_dispatches_of_many_updates_end_where_the_trace_begins_and_ends(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(profiling.jax.profiler, 'start_trace', lambda folder: calls.append('start'))
  monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', lambda: calls.append('stop'))
  trace = profiling.Trace((10, 15), str(tmp_path), 100)
  assert trace.begin(0, None) == 9 and trace.begin(5, None) == 4 and not calls
  assert trace.begin(9, None) == 6 and calls == ['start']
  trace.end(12, None)
  assert trace.begin(12, None) == 3 and calls == ['start']
  trace.end(15, None)
  assert calls == ['start', 'stop'] and trace.begin(15, None) is None
  trace.close(20)
  assert calls == ['start', 'stop']


def test_a_run_of_many_updates_a_dispatch_is_cut_where_the_trace_is_and_has_the_same_numbers(
  tmp_path, capsys, monkeypatch
):
  """As accelerators train a run alone: a population of one."""
  real, counts, advance = train._train, [], train.Population.advance
  monkeypatch.setattr(train, '_train', lambda *given, **named: real(*given, side_by_side=True, **named))
  monkeypatch.setattr(
    train.Population, 'advance', lambda self, count: counts.append(count) or advance(self, count)
  )
  fields = {'evaluation__every_steps': 10, 'checkpoint__every_steps': None}
  train.run(config(**fields), str(tmp_path / 'plain'), corpus(), quiet=True)
  assert max(counts) > 3
  counts.clear()
  traced(tmp_path / 'traced', (4, 6), fields=fields)
  done = [sum(counts[:place]) for place in range(len(counts) + 1)]
  assert {3, 6} <= set(done) and done[-1] == 10
  assert 'updates 4 to 6 are traced' in capsys.readouterr().err
  assert timeless(tmp_path / 'traced') == timeless(tmp_path / 'plain')
