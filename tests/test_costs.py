"""What arms cost: experiments/costs.py measures the step that training compiles; analysis/costs.py."""

import numpy as np
import pandas as pd
import pytest

from analysis import costs as shown
from experiments import costs, study
from mhc_jax.errors import ConfigError
from mhc_jax.plan import resolve


@pytest.fixture(scope='module')
def measured():
  """Two arms at a small size, one of them planned twice."""
  configs = [
    study.config('cpu', arm, (16, 2), seed, 1e-3) for arm, seed in (('residual', 0), ('hc', 0), ('hc', 1))
  ]
  for c in configs:
    c.data.update({'batch_size': 2, 'seq_len': 16})
  return configs, costs.costs(configs, repeats=2, calls=1)


def test_a_row_for_each_arm_with_what_its_step_takes(measured):
  configs, table = measured
  assert table[['arm', 'width', 'depth']].to_numpy().tolist() == [['residual', 16, 2], ['hc', 16, 2]]
  for c, (_, row) in zip(configs, table.iterrows(), strict=False):
    derived = resolve(c, 'd').derived
    assert row['flops_per_token'] == derived['flops_per_token']
    # Parameters and two moments are read and written, gradients too: 4 bytes each, a step of 32 tokens.
    assert (
      8 * 4 * derived['params']['total'] < 32 * row['bytes_per_token'] < 1e3 * 4 * derived['params']['total']
    )
    times = row[[f'seconds_per_token_{k}' for k in ('min', 'median', 'max')]].tolist()
    assert 0 < times[0] <= times[1] <= times[2] < 1
  assert table['bytes_per_token'][1] > 1.2 * table['bytes_per_token'][0], 'four streams'


def test_bytes_are_those_of_the_program_that_is_timed(measured):
  """Half the tokens at the same parameters: more bytes a token, fewer in all."""
  c = measured[0][0].copy_and_resolve_references()
  c.data.batch_size = 1
  _, found = costs.compiled_step(c)
  whole = measured[1]['bytes_per_token'][0]
  assert whole < found['bytes_per_token'] < 2 * whole


RUNS = pd.DataFrame(
  {
    'arm': ['residual', 'residual', 'mhc', 'mhc', 'mhc', 'mhc'],
    'width': [16, 16, 16, 16, 16, 32],
    'depth': 2,
    'tokens': 1e3,
    'seed': [0, 1, 0, 1, 0, 0],
    'excluded': [None, None, None, None, 'rank figures only', None],
    'device_kind': 'cpu',
    'state': ['finished'] * 5 + ['diverged'],
    'validation_loss': [2.0, 3.0, 1.0, 2.0, 9.0, np.nan],
  }
)
COSTS = pd.DataFrame(
  {
    'arm': ['residual', 'mhc'] * 2,
    'width': [16, 16, 32, 32],
    'depth': 2,
    'device_kind': 'cpu',
    'flops_per_token': [10.0, 20.0, 40.0, 50.0],
    'bytes_per_token': [3.0, 9.0, 8.0, 12.0],
    'seconds_per_token_median': [0.1, 0.4, 0.2, 0.5],
  }
)


def test_what_runs_have_spent_by_hand():
  found = shown.spent(RUNS, COSTS).set_index('arm')
  assert found['validation_loss'].to_dict() == {'residual': 2.5, 'mhc': 1.5}, (
    'full rank, finished, over seeds'
  )
  assert found.loc['mhc', ['flops', 'bytes', 'seconds']].tolist() == [2e4, 9e3, 400.0]
  drawing = shown.loss_vs_costs(found.reset_index())
  assert [ax.get_xlabel() for ax in drawing.fig.axes] == [*shown.AXES.values()]
  assert drawing.fig.axes[3].lines[1].get_xdata().tolist() == [9e3]


def test_costs_of_another_device_are_refused():
  with pytest.raises(ConfigError, match='different devices: cpu, v4'):
    shown.spent(RUNS, COSTS.assign(device_kind='v4'))


def test_an_equal_loss_takes_the_ratios_of_the_largest_size_over_the_tokens_that_are_saved():
  """Largest by the reference's FLOPs: 24x9 here. An arm better at equal tokens needs less than they cost."""
  large = COSTS['width'] == 32
  costs = COSTS.assign(width=COSTS['width'].mask(large, 24), depth=COSTS['depth'].mask(large, 9))
  costs = pd.concat([costs, costs[:2].assign(width=48, depth=1)])
  ends = ['[0.8, 2.0]', None, '[1, 2]']
  multipliers = pd.DataFrame(
    {'arm': ['mhc', 'hc', 'x'], 'equal_tokens': [1.25, np.nan, 1], 'equal_tokens_interval': ends}
  )
  table = shown.equal_loss(costs, multipliers)
  [row] = table.to_dict('records')
  assert (row['flops'], row['bytes'], row['seconds']) == (1.25, 1.5, 2.5)
  for unit, ratio in (('flops', 1.25), ('bytes', 1.5), ('seconds', 2.5)):
    found = [row[f'{k}_{unit}'] for k in ('low', 'need', 'high')]
    assert found == pytest.approx([ratio / 2.0, ratio / 1.25, ratio / 0.8]), unit
  assert '| mhc | 1.25 | 1.50 | 2.50 | 1.00 (0.62 to 1.56) |' in shown.markdown(table)
