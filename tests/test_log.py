"""metrics.jsonl, status.json, TensorBoard and the progress line."""

import errno
import io
import json
import math
import os
import subprocess
import sys

import pytest

from mhc_jax import log
from mhc_jax.log import Progress
from mhc_jax.metrics_log import MetricsLog
from mhc_jax.storage import finite, write_json


def rows(path):
  return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_rows_after_the_checkpoint_are_dropped_and_half_a_line_too(tmp_path):
  """What a killed process wrote after its last checkpoint is written again, not twice."""
  log = MetricsLog(str(tmp_path), None, tensorboard=False)
  for step in (0, 10, 20, 30):
    log.write({'step': step, 'train/loss': 1.0 / (step + 1)})
  log.close()
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 40, "train/lo')
  log = MetricsLog(str(tmp_path), 20, tensorboard=False)
  log.write({'step': 30, 'train/loss': 7.0})
  log.close()
  assert [(row['step'], row['train/loss']) for row in rows(tmp_path)][2:] == [(20, 1 / 21), (30, 7.0)]


def test_starting_without_a_checkpoint_starts_the_rows_anew(tmp_path):
  for _ in range(2):
    log = MetricsLog(str(tmp_path), None, tensorboard=False)
    log.write({'step': 0})
    log.close()
  assert len(rows(tmp_path)) == 1


def test_non_finite_numbers_become_null(tmp_path):
  log = MetricsLog(str(tmp_path), None, tensorboard=False)
  log.write({'step': 1, 'train/loss': math.nan, 'diagnostics/defect': [1.0, math.inf]})
  log.close()
  assert rows(tmp_path) == [{'step': 1, 'train/loss': None, 'diagnostics/defect': [1.0, None]}]
  assert finite({'a': (math.nan, {'b': -math.inf})}) == {'a': [None, {'b': None}]}


def test_tensorboard_gets_every_scalar_and_the_maximum_of_lists(tmp_path):
  """Read back with TensorBoard's own record format: 8 bytes of length, 4 of checksum, data, 4 of checksum."""
  from tensorboardX.proto.event_pb2 import Event

  log = MetricsLog(str(tmp_path), None, tensorboard=True)
  log.write({'step': 3, 'train/loss': 2.5, 'diagnostics/defect': [0.5, 4.0]})
  log.close()
  (file,) = (tmp_path / 'tensorboard').iterdir()
  data, found = file.read_bytes(), {}
  while data:
    length = int.from_bytes(data[:8], 'little')
    event = Event.FromString(data[12 : 12 + length])
    found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
    data = data[16 + length :]
  assert found == {'train/loss': (3, 2.5), 'diagnostics/defect': (3, 4.0)}


def test_write_json_keeps_the_old_file_where_it_cannot_write_the_new(tmp_path):
  path = tmp_path / 'status.json'
  write_json(str(path), {'state': 'running'})
  with pytest.raises(TypeError):
    write_json(str(path), {'state': object()})
  assert json.loads(path.read_text()) == {'state': 'running'}


def test_progress_prints_plain_lines_without_a_terminal(capsys):
  progress = Progress('mhc', 0, 10, quiet=False)
  progress.update(5, 2.0, 1000.0)
  progress.update(10, 1.5, 1000.0)
  progress.close()
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('mhc: step 10/10, loss 1.5000, 1,000 tokens/s')
  quiet = Progress('mhc', 0, 10, quiet=True)
  quiet.update(10, 1.5, 1000.0)
  quiet.close()
  assert not capsys.readouterr().err


def test_the_time_left_leaves_out_the_first_update_which_is_compiled(capsys, monkeypatch):
  now = iter((0.0, 100.0, 130.0))
  monkeypatch.setattr(log.time, 'monotonic', lambda: next(now))
  progress = Progress('mhc', 0, 10, quiet=False)
  progress.update(1, 2.0, None)
  progress.update(4, 2.0, None)
  first, second = capsys.readouterr().err.splitlines()
  assert first == 'mhc: step 1/10, loss 2.0000'
  assert second == 'mhc: step 4/10, loss 2.0000, 60 s left'
  monkeypatch.undo()
  progress.close()


class Broken(io.StringIO):
  """A stream of which every write fails."""

  def write(self, text):
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_streams_that_fail_are_said_once_on_the_other(monkeypatch):
  err = io.StringIO()
  monkeypatch.setattr(sys, 'stdout', Broken())
  monkeypatch.setattr(sys, 'stderr', err)
  with log.tolerant_streams():
    print('one')
    print('two', flush=True)
    with log.tolerant_streams():
      print('three')
  assert err.getvalue().count('warning: stdout cannot be written') == 1
  assert sys.stderr is err, 'left as they were'


def test_a_closed_stream_is_no_terminal(monkeypatch):
  closed = io.StringIO()
  closed.close()
  monkeypatch.setattr(sys, 'stderr', closed)
  with log.tolerant_streams():
    progress = Progress('mhc', 0, 1, quiet=False)
    progress.update(1, 2.0, None)
    progress.close()


def test_what_the_terminal_lacks_becomes_a_question_mark(monkeypatch):
  raw = io.BytesIO()
  monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(raw, 'ascii'))
  with log.tolerant_streams():
    print('a\u2588\udc80b')
  assert raw.getvalue() == b'a??b\n'


@pytest.mark.parametrize(
  'streams', ('', '>&- 2>&-', '2>&1 | head -c 0', '> /dev/full 2>&1', '< /dev/null >&-')
)
def test_a_command_ends_with_its_own_code_whatever_its_streams(streams, tmp_path):
  """In bash, with what it writes by number: a file opened as stderr must not get what libraries print."""
  code = (
    'import contextlib, os, sys; from mhc_jax.command import end_with_message; from mhc_jax.log import say\n'
    'def main():\n'
    f'  with open({str(tmp_path / "kept")!r}, "w") as file:\n'
    '    for _ in range(3000): print("x" * 20); say("y" * 20)\n'
    '    with contextlib.suppress(OSError): os.write(2, b"printed by a library")\n'
    '    file.write("kept")\n'
    '  return 7\n'
    'sys.exit(end_with_message(main))'
  )
  environment = os.environ | {'CODE': code, 'PY': sys.executable}
  script = f'{{ "$PY" -c "$CODE"; echo $? > "{tmp_path}/code"; }} {streams}'
  ended = subprocess.run(['bash', '-c', script], env=environment, capture_output=True, text=True, timeout=60)
  assert (tmp_path / 'code').read_text() == '7\n' and 'Traceback' not in ended.stderr
  assert (tmp_path / 'kept').read_text() == 'kept'


def test_tensorboard_fails_once_and_the_rows_go_on(tmp_path, capsys):
  (tmp_path / 'tensorboard').write_text('no folder')
  metrics = MetricsLog(str(tmp_path), None, tensorboard=True)
  metrics.write({'step': 0, 'train/loss': 1.0})
  metrics.close()
  assert len(rows(tmp_path)) == 1 and capsys.readouterr().err.count('TensorBoard gets no more') == 1
  again = tmp_path / 'again'
  again.mkdir()
  metrics = MetricsLog(str(again), None, tensorboard=True)
  metrics._board.close()
  metrics._board._records = Broken()
  for step in range(3):
    metrics.write({'step': step, 'train/loss': 1.0})
  metrics.close()
  assert len(rows(again)) == 3 and capsys.readouterr().err.count('TensorBoard gets no more') == 1
