"""docs/energy.md and the report's costs: the numbers by hand, and the text that the data give."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from analysis import energy
from analysis.efficiency import at_equal_loss, efficiency
from analysis.multipliers import Multiplier
from analysis.needs import Need
from analysis.runs import read_sweep
from mhc_jax.errors import ConfigError
from tests.synthetic_runs import config_of, write_plan, write_run

DOCS = pathlib.Path(__file__).parent.parent / 'docs'


def test_the_page_is_what_the_data_say():
  assert (DOCS / 'energy.md').read_text() == energy.page(energy.read(DOCS)), 'mhc energy writes it'


def test_a_pair_by_hand():
  """9B, n = 4: joules at least of a token; for equal loss by the worse and the better of two currencies."""
  one, two = (
    json.loads((DOCS / 'compile' / f'paper_9b-v5p-{arm}.json').read_text()) for arm in ('residual', 'mhc-n4')
  )
  pair = energy._pair({'paper_9b-v5p-residual': one, 'paper_9b-v5p-mhc-n4': two}, 'paper_9b', 4, *_needs())
  tokens = 512 * 4096 / 128
  flops, moved = one['predicted']['per_device']['flops'], one['predicted']['per_device']['hbm_bytes']
  least = flops / tokens * 0.295e-12 + moved / tokens * 31.36e-12
  assert pair['arms'][0]['least'] == pytest.approx(least, rel=1e-12) and 5e-3 < least < 7e-3
  assert pair['flops'] < pair['seconds'] < pair['bytes'], 'the extremes hold the ratio of times'
  assert pair['flops'] < pair['least'] < pair['bytes']
  by_flop = [pair[unit] / pair['flops'] for unit in ('least', 'seconds')]
  assert pair['measured'] == pytest.approx((1.2 * min(by_flop), 1.6 * max(by_flop)), rel=1e-12)
  assert energy._pair({'paper_9b-v5p-residual': one}, 'paper_9b', 4, *_needs()) is None


def _needs():
  return Need(1.4, 1.2, 1.6), Need(0.8, 0.7, 0.9)


def test_equal_loss_scales_the_compute_needed_by_joules_of_a_flop():
  """Twice the joules and 1.25 times the FLOPs of a token: 1.6 times the joules of a FLOP."""
  assert at_equal_loss(Need(0.5, 0.25, 1.0), 2.0, 1.25) == pytest.approx((0.8, 0.4, 1.6))


def test_the_published_need_is_that_of_xhc_s_fits():
  need = energy.published_need()
  assert need.low == pytest.approx(1 / 1.331, abs=1e-3) and need.high == pytest.approx(1 / 1.261, abs=1e-3)


def test_a_folder_without_the_data_is_one_line(tmp_path):
  with pytest.raises(ConfigError, match=r'is not the docs/ of a checkout'):
    energy.read(tmp_path)


def test_joules_counted_in_runs_are_on_the_page():
  table = pd.DataFrame(
    {
      **{'sweep': 's', 'arm': ['mhc'] * 3, 'width': 64, 'depth': 4, 'energy': 'rapl'},
      'joules_per_token': [1e-3, 3e-3, np.nan],
    }
  )
  assert energy._counted_lines([table])[-1] == '| s | mhc | 64x4 | 2 | 0.002 | rapl |'
  assert energy._counted_lines([]) == []


def test_the_report_has_joules_by_the_counter_where_both_arms_have_it(tmp_path):
  """The counter: 2 J for 2048 tokens of residual, 3 J of mhc, from its second row on; hc's did not count."""
  planned = []
  for arm, joules in (('residual', 2.0), ('mhc', 3.0), ('hc', None)):
    plan = write_run(tmp_path, config_of(arm, 32, 2, 0))
    planned.append(plan)
    path = tmp_path / plan['run_id'] / 'metrics.jsonl'
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[1:]:
      row['device/joules'] = joules and joules * row['step']
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n')
    status = json.loads((tmp_path / plan['run_id'] / 'status.json').read_text())
    status |= {'energy': joules and 'rapl', 'device_kind': 'NVIDIA H100 80GB HBM3', 'device_count': 2}
    (tmp_path / plan['run_id'] / 'status.json').write_text(json.dumps(status))
  write_plan(tmp_path, planned)
  table = read_sweep(tmp_path).table.assign(size='32x2')
  known = [Multiplier('mhc', None, 1.25, [1.0, 2.0]), Multiplier('hc', None, 0.5, [0.4, 0.8])]
  shown = efficiency(table, known, 'residual').set_index('arm')
  assert shown['joules_per_token'].to_dict() == pytest.approx(
    {'residual': 2 / 2048, 'mhc': 3 / 2048, 'hc': np.nan}, nan_ok=True
  )
  flops = shown['flops_per_token']
  each = 1.5 * flops['residual'] / flops['mhc']  # joules of a FLOP over residual's
  ends = shown.loc['mhc', ['for_equal_loss', 'for_equal_loss_low', 'for_equal_loss_high']].tolist()
  assert ends == pytest.approx([0.8 * each, 0.5 * each, 1.0 * each]) and shown['by']['mhc'] == 'counter'
  assert shown['by']['hc'] == 'time' and shown['for_equal_loss']['residual'] == 1
  assert shown['joules_per_token_at_most']['hc'] == pytest.approx(2 * 700 / 20000)
  assert efficiency(table.assign(tokens_per_second=np.nan), known, 'residual').empty
