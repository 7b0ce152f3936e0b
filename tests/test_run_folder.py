"""Run folders that are damaged, cut, hostile or half-written: one line or a fallback, never another table."""

import contextlib
import json
import os
import shutil
import zlib

import pytest
from hostile_runs import DAMAGES, DEEP, ended, trials
from synthetic_runs import blank, config_of, report, words, write_plan, write_run, write_sweep
from test_train import config, corpus, run

from analysis.report import main
from analysis.runs import clean, read_run, read_sweep
from experiments import sweep
from mhc_jax import evaluate
from mhc_jax.errors import ConfigError
from mhc_jax.log import say_once
from mhc_jax.plan import resolve
from mhc_jax.run_folder import (
  crc32,
  last_row,
  load_config,
  load_plan,
  load_rows,
  load_status,
  rows_until,
  write_status,
)


@pytest.fixture(scope='module')
def good(tmp_path_factory):
  """A small sweep of two arms at three sizes."""
  folder = tmp_path_factory.mktemp('sweep') / 'good'
  folder.mkdir()
  write_sweep(folder, arms=('residual', 'mhc'), sizes=((32, 2), (64, 2), (64, 4)), ranks=False)
  return folder


@pytest.fixture
def folder(good, tmp_path):
  """A copy of it."""
  shutil.copytree(good, tmp_path / 'copy')
  return tmp_path / 'copy'


def first(folder):
  return folder / json.loads((folder / 'plan.json').read_text())['runs'][0]['run_id']


@pytest.mark.parametrize('how', sorted(DAMAGES))
def test_a_damaged_file_is_said_by_name_and_nothing_else_is_believed(folder, how):
  path = first(folder)
  for name, load in (('status.json', load_status), ('config.json', load_config)):
    before, content = load(str(path))[0], DAMAGES[how]((path / name).read_bytes())
    (path / name).unlink() if content is None else (path / name).write_bytes(content)
    found, trouble = load(str(path))
    if content is None:
      assert trouble is None and found in (None, {'state': 'missing'})
    elif found != before:
      assert found in (None, {'state': 'damaged'}) or how == 'a flipped bit'
      assert how == 'a flipped bit' or trouble.startswith(f'{name} ')
  (path / 'metrics.jsonl').write_bytes(DAMAGES[how]((path / 'metrics.jsonl').read_bytes()) or b'')
  rows, _ = load_rows(str(path))
  steps = [row['step'] for row in rows]
  assert steps == sorted(set(steps)) and all(isinstance(step, int) for step in steps)
  with contextlib.suppress(ConfigError):
    load_plan(str(folder))


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    *(
      ('versions', ['jax']),
      ('step', 'one'),
      ('step', True),
      ('step', -1),
      ('state', 'asleep'),
      ('state', None),
    ),
    *(('seconds', 1e308), ('final', [1]), ('final', {'a': 'b'}), ('derived', {'params': [1]}), ('error', 5)),
  ],
)
def test_a_status_of_other_types_is_damaged(folder, field, value):
  path = first(folder) / 'status.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
  status, trouble = load_status(str(path.parent))
  assert status == {'state': 'damaged'} and trouble.startswith(f'status.json has {field}')


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / 'status.json')
  (tmp_path / 'config.json').mkdir()
  os.mkfifo(tmp_path / 'metrics.jsonl')
  assert load_status(str(tmp_path)) == ({'state': 'damaged'}, 'status.json is not a file')
  assert load_config(str(tmp_path)) == (None, 'config.json is not a file')
  assert load_rows(str(tmp_path)) == ([], 'metrics.jsonl is not a file') and last_row(str(tmp_path)) == {}
  with pytest.raises(ConfigError, match='not a file'):
    rows_until(str(tmp_path / 'metrics.jsonl'), 5, 1)


def kept(tmp_path, lines, last=9, every=1):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b''.join(lines))
  found, warning = rows_until(str(path), last, every)
  return [json.loads(line)['step'] for line in found], warning and warning.removeprefix(f'{path} ')


LINES = [b'{"step": %d, "train/loss": 2.5}\n' % step for step in range(15)]


def test_rows_up_to_a_checkpoint_are_kept_without_a_word(tmp_path):
  for tail in ([], [b'{"step": 15, "tr'], [b'{"ste\n']):  # the writer was killed; later lines go anyway
    assert kept(tmp_path, LINES + tail) == (list(range(10)), None)
  tens = [b'{"step": %d}\n' % step for step in (0, 10, 15, 20)]  # and an evaluation
  assert kept(tmp_path, tens, 29, 10) == ([0, 10, 15, 20], None)
  assert kept(tmp_path, [*LINES[:9], LINES[9].rstrip()]) == (list(range(10)), None)


@pytest.mark.parametrize(
  'line', [b'\n', b'5\n', b'[]\n', b'{"train/loss": 1}\n', b'{"step": "3"}\n', b'\xff\n']
)
def test_a_damaged_row_is_counted_and_its_hole_said(tmp_path, line):
  steps, warning = kept(tmp_path, [*LINES[:3], line, *LINES[4:]])
  assert steps == [0, 1, 2, 4, 5, 6, 7, 8, 9]
  assert warning.startswith(
    'has 1 damaged line (line 4) and lacks 1 of 10 rows up to step 9, the first of step 3'
  )


def test_every_hole_is_said(tmp_path):
  assert kept(tmp_path, LINES[:5])[1].startswith('lacks 5 of 10 rows up to step 9, the first of step 5')
  assert kept(tmp_path, [])[1].startswith('lacks 10 of 10 rows')
  assert rows_until(str(tmp_path / 'absent'), 9, 1)[1].split(' lacks ')[1].startswith('10 of 10')
  assert kept(tmp_path, LINES[::2])[1].startswith('lacks 5 of 10')
  huge = b'{"step": 3, "tokens": ' + b'9' * 400 + b'}\n'
  assert kept(tmp_path, [*LINES[:3], huge, *LINES[4:]])[1].startswith('has 1 damaged line (line 4)')
  # One step out of its place costs one row, not those after it.
  steps, warning = kept(tmp_path, [*LINES[:3], b'{"step": 83}\n', *LINES[4:]])
  assert steps == [0, 1, 2, 4, 5, 6, 7, 8, 9] and 'line 4' in warning
  steps, warning = kept(tmp_path, LINES[:6] + LINES[2:])
  assert steps == list(range(10)) and warning.startswith('has 4 damaged lines (line 7)')


@pytest.mark.parametrize(
  ('plan', 'words'),
  [
    ('[]', 'lists no runs'),
    ('[' * DEEP, 'nested'),
    ('{"runs": {}}', 'lists no runs'),
    ('{"runs": []}', 'lists no runs'),
    ('{"runs": [5]}', 'without run_id or arm'),
    ('{"runs": [{"run_id": 5, "arm": "a"}]}', 'without run_id'),
    ('{"runs": [{"run_id": "a", "arm": ["a"]}]}', 'without run_id or arm'),
    ('{"runs": [{"run_id": "../a", "arm": "a"}]}', 'is no run_id'),
    ('{"runs": [{"run_id": "..", "arm": "a"}]}', 'is no run_id'),
    ('{"runs": [{"run_id": "", "arm": "a"}]}', 'is no run_id'),
    ('{"runs": [{"run_id": "a", "arm": "a"}, {"run_id": "a", "arm": "b"}]}', 'run a twice'),
    ('{"runs": [' + '0,' * 200_000 + '0]}', '200,001 runs'),
  ],
)
def test_a_hostile_plan_ends_in_one_line(tmp_path, plan, words):
  (tmp_path / 'plan.json').write_text(plan)
  with pytest.raises(ConfigError, match=words) as raised:
    load_plan(str(tmp_path))
  assert '\n' not in str(raised.value) and len(str(raised.value)) < 300


CHANGES = (
  *(('metrics.jsonl', '5\n'), ('metrics.jsonl', '{"step": 0, "tokens": ' + '9' * 400 + ', "flops": 1}\n')),
  *(('status.json', '[' * DEEP + ']' * DEEP), ('status.json', '{"x": ' + '9' * 5000 + '}')),
  *(
    ('status.json', {'versions': ['jax']}),
    ('config.json', {'seed': 'zero'}),
    ('config.json', {'model': None}),
  ),
)


def test_the_report_of_damaged_runs_has_them_as_rows_and_leaves_the_others(folder, monkeypatch):
  monkeypatch.setattr('analysis.page.write.draw_all', lambda *_: ({}, []))
  run_ids = [item['run_id'] for item in json.loads((folder / 'plan.json').read_text())['runs']]
  for (file, change), run_id in zip(CHANGES, run_ids, strict=False):
    path = folder / run_id / file
    new = change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    path.write_text(new)
  fits, results, page = report(folder, 2)
  rows = results.set_index('run_id')
  assert list(rows.index) == run_ids
  for (file, _), run_id in zip(CHANGES, run_ids, strict=False):
    row = rows.loc[run_id]
    assert row['error'].startswith(f'{file} ')
    assert any(run_id in line and file in line for line in fits['warnings'])
    whole = file == 'metrics.jsonl'  # the final loss is in status.json
    assert row['state'] == ('finished' if whole else 'failed') and (row['validation_loss'] > 0) == whole
    assert whole or f'failed: {file}' in words(page)
  assert len(fits['excluded']) == 5 and len(fits['warnings']) == 7
  assert rows.loc[run_ids[7:], 'error'].isna().all()


def test_a_sample_of_damages_ends_by_a_report_or_one_line(good, monkeypatch):
  blank(monkeypatch)
  for what, damaged in trials(good, 5, seed=3, times=3):
    assert ended(lambda at=damaged: main([str(at), '--resamples', '2'])) is None, what


def test_a_run_that_is_being_written_is_no_trouble(tmp_path):
  planned = [
    write_run(tmp_path, config_of('mhc', 32, 2, seed) | {'log': {'every_steps': 1}}, 'running')
    for seed in (0, 1)
  ]
  for item, lines, step in zip(planned, (LINES[:12], LINES[:1]), (11, 0), strict=True):
    path = tmp_path / item['run_id']
    (path / 'metrics.jsonl').write_bytes(b''.join(lines) + b'{"step": 12, "tra')
    status = json.loads((path / 'status.json').read_text())
    (path / 'status.json').write_text(json.dumps(status | {'step': step}))
  (tmp_path / planned[1]['run_id'] / 'status.json').unlink()
  (tmp_path / planned[1]['run_id'] / 'metrics.jsonl').unlink()  # it compiles
  write_plan(tmp_path, planned)
  found = read_sweep(tmp_path)
  assert found.warnings == [] and set(found.table['state']) == {'running'}
  (tmp_path / planned[0]['run_id'] / 'metrics.jsonl').write_bytes(b''.join(LINES[5:]))
  (warning,) = read_sweep(tmp_path).warnings
  assert 'lacks 5 of 11 rows up to step 10, the first of step 0' in warning


def test_names_that_differ_stay_different_and_can_be_shown_anywhere():
  names = ['a', 'a\n', 'a\x1b[2J', 'a\u202e', 'a\u2028', '\ud800', *('x' * n for n in (300, 301)), 'mhc, W']
  shown = [clean(name, 48) for name in names]
  assert len(set(shown)) == len(names) and all(len(name) <= 48 and name.isprintable() for name in shown)
  assert shown[0] == 'a' and shown[-1] == 'mhc, W' and clean({'a\n': ['\x00']}) == {'a\\n': ['\\x00']}
  json.dumps(shown).encode()


# Training and sweeps.


def test_a_run_goes_on_without_its_status_and_never_without_its_config(tmp_path, capsys):
  status, rows = run(tmp_path, duration__steps=4)
  for damage in ('', '{"state": "fin'):
    (tmp_path / 'status.json').write_text(damage)
    say_once.cache_clear()
    again, same = run(tmp_path, duration__steps=4)
    assert again['state'] == 'finished' and again['final'] == status['final'] and same == rows
    warnings = [line for line in capsys.readouterr().err.splitlines() if 'status.json is damaged' in line]
    assert len(warnings) == 1 and 'goes on from its checkpoint' in warnings[0]
  (tmp_path / 'config.json').rename(tmp_path / 'kept')
  for seed in (0, 1):
    with pytest.raises(ConfigError, match=r'config\.json is missing.*restore it, or choose another'):
      run(tmp_path, duration__steps=4, seed=seed)
  (tmp_path / 'status.json').unlink()  # its checkpoint is nobody's too
  with pytest.raises(ConfigError, match=r'config\.json is missing'):
    run(tmp_path, duration__steps=4)


@pytest.mark.parametrize(
  'change', [{'model': {'width': 10**9}}, {'seed': 'a'}, {'data': []}, {'optimizer': None}]
)
def test_evaluate_and_train_refuse_a_hostile_config_in_one_line(tmp_path, change):
  resolved = resolve(config(), 'digest').resolved
  (tmp_path / 'config.json').write_text(json.dumps(resolved | change))
  for call in (lambda: evaluate.load(str(tmp_path)), lambda: run(tmp_path)):
    with pytest.raises(ConfigError, match=r'config\.json') as raised:
      call()
    assert '\n' not in str(raised.value)


def test_a_sweep_shows_a_damaged_run_and_does_it_again(tmp_path, capsys):
  plan = resolve(config(), corpus().digest)
  workdir = tmp_path / plan.run_id
  workdir.mkdir()
  (workdir / 'status.json').write_text('{"state": "finished"')
  assert sweep.table([plan], str(tmp_path)).splitlines()[1].endswith('damaged')
  assert sweep.select([plan], str(tmp_path), None, None, False) == ([0], [0])
  assert capsys.readouterr().err.count('status.json is damaged') == 1, 'said once'
  (workdir / 'status.json').write_text('{"state": "finished", "seconds": 0}')
  assert sweep.state_of(plan, str(tmp_path)) == 'damaged', 'results of no configuration'
  (workdir / 'config.json').write_text(json.dumps(plan.resolved))
  assert sweep.state_of(plan, str(tmp_path)) == 'finished'
  assert 'GFLOP/s (assumed)' in sweep.table([plan], str(tmp_path))


def test_a_changed_digit_is_noticed_wherever_it_is(tmp_path):
  """Files that stay valid: by checksums of the status, of the configuration and of the rows."""
  config = {'data': {}, 'model': {'connection': {}}, 'optimizer': {'lr': 0.5}, 'duration': {'steps': 2}}
  config |= {'log': {'every_steps': 1}}
  lines = [f'{json.dumps({"step": step, "train/loss": 2.5})}\n' for step in range(3)]
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'config.json').write_text(json.dumps(config))
  (run / 'metrics.jsonl').write_text(''.join(lines))
  sums = {'config_crc32': crc32(config), 'rows_crc32': zlib.crc32(''.join(lines).encode())}
  write_status(str(run), {'state': 'finished', 'step': 2, 'final': {'train/loss': 2.5}, **sums})
  assert read_run(tmp_path, 'run', 'arm').trouble is None
  for name in ('status.json', 'config.json', 'metrics.jsonl'):
    text = (run / name).read_text()
    (run / name).write_text(text.replace('.5', '.6'))
    assert read_run(tmp_path, 'run', 'arm').trouble.startswith(f'{name} does not match its checksum')
    (run / name).write_text(text)
  (run / 'metrics.jsonl').unlink()
  assert read_run(tmp_path, 'run', 'arm').trouble == 'metrics.jsonl is missing'


def test_a_changed_row_is_said_when_the_run_goes_on(tmp_path):
  path, lines = tmp_path / 'metrics.jsonl', ['{"step": 0}\n', '{"step": 1, "loss": 2.5}\n']
  path.write_text(''.join(lines) + '{"step": 2}\n')
  crc = zlib.crc32(''.join(lines).encode())
  assert rows_until(str(path), 1, 1, crc) == (lines, None)
  path.write_text(path.read_text().replace('2.5', '2.6'))
  assert 'was changed' in rows_until(str(path), 1, 1, crc)[1]
  assert rows_until(str(path), 1, 1, None)[1] is None, 'of a run from before'
