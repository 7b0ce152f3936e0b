"""metrics.jsonl, status.json, TensorBoard and the progress line."""

import json
import math

import pytest

from mhc_jax.log import MetricsLog, Progress
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
