"""What a sweep varies: a figure over something else belongs to other experiments, and is not missed.

Where: under the other figures. All planned runs count, however they ended; of those that never started
nothing is known.
"""

import json

from ..study import Study


def several(s: Study, column: str, within: tuple[str, ...] = ()) -> bool:
  """Whether runs that agree in all of `within` have two values of a column."""
  counts = s.table.groupby(list(within))[column].nunique() if within else [s.table[column].nunique()]
  return max(counts, default=0) > 1


def arms(s: Study) -> bool:
  """Whether there are arms to compare."""
  return len(s.arms) > 1


def sizes(s: Study) -> bool:
  """Whether there is a law to look for; before any run has started there may be."""
  return several(s, 'size') or s.table['size'].isna().all()


def rates(s: Study) -> bool:
  """Whether an arm has several learning rates at one size."""
  return several(s, 'lr', ('arm', 'size'))


def budgets(s: Study) -> bool:
  """Whether an arm has several sizes at one compute budget, asked for or met."""
  if s.optima:
    return True
  of_flops = s.table['duration'].map(lambda text: bool((json.loads(text) or {}).get('flops')))
  return s.table[of_flops].groupby(['arm', 'duration'])['size'].nunique().max() > 1


def axis(s: Study, name: str) -> bool:
  """Whether runs lie on this manifold rank."""
  return bool((s.table['axis'] == name).any())


def streams(s: Study) -> bool:
  """Whether an arm has several streams."""
  return bool((s.table['connection_streams'] > 1).any())


def experts(s: Study) -> bool:
  """Whether a model has a router."""
  models = [(run.config or {}).get('model') or {} for run in s.sweep.runs.values()]
  return any((model.get('moe') or {}).get('experts') for model in models)
