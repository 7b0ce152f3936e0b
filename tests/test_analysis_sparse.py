"""Gains at equal attention and recall by layer, from runs of known losses."""

import json

import numpy as np
import pytest
from synthetic_runs import config_of, write_plan, write_run, write_sweep

from analysis.figures.sparse import sparse_attention
from analysis.runs import read_sweep
from analysis.study import fits_json, study

LOSS = {'residual': 2.0, 'residual, top 8': 2.3, 'mhc': 1.9, 'mhc, top 8': 2.25}


def write(folder):
  """Three seeds each; recall by layer rises by 0.1 with the seed."""
  planned = []
  for seed in range(3):
    for arm, loss in LOSS.items():
      config = config_of(arm.split(',')[0], 32, 4, seed, tokens=1e6)
      config['arm'] = arm
      config['model']['sparse'] = {'kind': 'topk' if ',' in arm else None, 'topk': 8 if ',' in arm else None}
      planned.append(write_run(folder, config, noise=0, wanted=loss + 0.1 * seed))
      if ',' in arm:
        path = folder / planned[-1]['run_id'] / 'metrics.jsonl'
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for name, value in (('recall', 0.5 + 0.1 * seed), ('best', 0.9), ('random', 0.2)):
          rows[-1][f'diagnostics/attention_{name}'] = [value, value / 2, value, value]
        path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
  write_plan(folder, planned)


def test_gains_are_paired_at_equal_attention(tmp_path):
  write(tmp_path)
  s = study(read_sweep(tmp_path), resamples=0)
  gains = s.sparsity.gains.set_index(['attention', 'connection'])
  for attention, wanted in (('all tokens', -0.1), ('top 8', -0.05)):
    row = gains.loc[(attention, 'mhc')]
    assert row['difference'] == pytest.approx(wanted) and row['pairs'] == 3
    assert row['low'] <= row['difference'] <= row['high']
    assert np.isnan(float(gains.loc[(attention, 'residual'), 'difference'] or np.nan))
  layers = s.sparsity.layers
  assert set(layers['attention']) == {'top 8'} and len(layers) == 2 * 3 * 4
  of_layers = layers[layers['connection'] == 'mhc'].groupby('layer')['recall'].mean()
  assert of_layers.tolist() == pytest.approx([0.6, 0.3, 0.6, 0.6]) and layers['entropy'].isna().all()
  drawn = sparse_attention(s)
  assert len(drawn.table) == len(gains) + len(layers) and len(drawn.fig.axes) == 2
  assert len(fits_json(s)['sparse_gains']) == 4


def test_other_sweeps_have_none(tmp_path):
  write_sweep(tmp_path, arms=('residual',), sizes=((32, 2),), ranks=False)
  assert sparse_attention(study(read_sweep(tmp_path), resamples=0)) is None
