"""Loss over bytes between clusters, from made-up rows."""

import json

import pandas as pd
import pytest
from synthetic_runs import blank, command, config_of, write_plan, write_run

from analysis import clusters, publish, results_tables

ARMS = {'residual, one alone': (0, 2.5), 'residual, parallel': (4000, 2.0), 'residual, H = 10': (400, 2.1)}


def test_the_table_has_bytes_per_token_and_paired_differences(tmp_path, monkeypatch, capsys):
  folder = tmp_path / 'clusters'
  folder.mkdir()
  blank(monkeypatch)
  planned = []
  for arm, (size, loss) in ARMS.items():
    for seed in (0, 1):
      config = config_of('residual', 32, 2, seed) | {'arm': arm}
      planned.append(write_run(folder, config, noise=0.0, wanted=loss + seed + 0.01 * seed * (size == 400)))
      file = folder / planned[-1]['run_id'] / 'metrics.jsonl'
      rows = [json.loads(line) for line in file.read_text().splitlines()]
      for row in rows if size else ():
        row['cluster/bytes'] = size * row['tokens']
      rows[-1]['validation/loss'] = loss + seed + 0.01 * seed * (size == 400)
      file.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  write_plan(folder, planned)
  assert command(clusters.main, folder) == 0
  assert 'residual, H = 10' in capsys.readouterr().out
  found = pd.read_csv(folder / 'clusters.csv').set_index('arm')
  for arm, (size, loss) in ARMS.items():
    row = found.loc[arm]
    extra = 0.005 * (size == 400)
    assert (row['seeds'], row['reference']) == (2, 'residual, parallel')
    assert row['bytes_per_token'] == pytest.approx(size) and row['loss'] == pytest.approx(loss + 0.5 + extra)
    assert row['difference'] == pytest.approx(loss - 2.0 + extra, abs=1e-9)
    assert row['standard_error'] == pytest.approx(extra, abs=1e-9)
  assert {path.suffix for path in folder.glob('clusters_loss.*')} == {'.png', '.svg', '.pdf', '.csv'}
  out = publish.publish(folder, tmp_path / 'results', resamples=4)
  assert {path.suffix for path in out.glob('clusters_loss.*')} == {'.png', '.csv'}
  assert '| H = 10 | +0.105 ± 0.064 (400) |' in results_tables.clusters(out)


def test_a_sweep_without_clusters_is_refused_in_one_line(tmp_path, capsys):
  write_plan(tmp_path, [write_run(tmp_path, config_of('residual', 32, 2, 0))])
  assert command(clusters.main, tmp_path) == 2
  assert 'no run has logged cluster/bytes' in capsys.readouterr().err
