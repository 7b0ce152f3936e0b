"""The paper's models have the sizes of its Table 5, counted on the parameter trees themselves."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from mhc_jax.config_file import parse
from mhc_jax.model import Transformer
from mhc_jax.plan import resolve

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'

# (vocabulary, active, total) of Table 5, and tokens of facts derived from it.
TABLE_5 = {
  'paper_3b': (331e6, 612e6, 2.97e9, 39.3e9),
  'paper_9b': (496e6, 1.66e9, 9.18e9, 105e9),
  'paper_27b': (662e6, 4.14e9, 27.0e9, 262e9),
  'paper_3b_1t': (331e6, 612e6, 2.97e9, 1.05e12),
}


@pytest.mark.parametrize('name', TABLE_5)
def test_residual_arms_have_the_parameters_of_table_5(name):
  """Within 1 %; active counts the vocabulary once, and 6 of the routed experts."""
  run = resolve(parse(f'{CONFIGS / name}.py:residual', []), 'digest')
  tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  params = jax.eval_shape(Transformer(run.model).init, jax.random.key(0), tokens, tokens)['params']
  leaves = jax.tree_util.tree_leaves_with_path(params)
  sizes = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.size for path, leaf in leaves}
  vocabulary = sizes['embedding'] + sizes['unembedding']
  routed = sum(size for path, size in sizes.items() if '/expert_' in path)
  total = sum(sizes.values())
  active = total - sizes['embedding'] - routed * (run.model.moe.experts - 6) // run.model.moe.experts
  for found, wanted in zip((vocabulary, active, total), TABLE_5[name], strict=False):
    assert found == pytest.approx(wanted, rel=0.01)
  counted = run.derived['params']
  assert (counted['total'], counted['active'], counted['routed_experts']) == (total, active, routed)
  assert run.derived['tokens'] == pytest.approx(TABLE_5[name][3], rel=0.005)


def test_arms_differ_by_their_connections_alone():
  """mHC adds (n^2 + 2n)(nC + 1) + 3 parameters a sublayer (facts: 122 907 at 3B)."""
  path = f'{CONFIGS}/paper_3b.py'
  residual, hc, mhc = (resolve(parse(f'{path}:{arm}', []), 'd') for arm in ('residual', 'hc', 'mhc'))
  assert resolve(parse(path, []), 'd').run_id == mhc.run_id
  assert mhc.derived['params']['total'] - residual.derived['params']['total'] == 24 * 122_907
  assert {run.model.connection.streams for run in (hc, mhc)} == {4}
  different = residual.resolved['model'] | {'connection': None}
  assert all(run.resolved['model'] | {'connection': None} == different for run in (hc, mhc))
  with pytest.raises(ValueError, match='residual, hc, mhc'):
    parse(f'{path}:nonsense', [])
