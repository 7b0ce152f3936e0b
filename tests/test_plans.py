"""Plans for accelerators: they can start, and their page is the one that the command makes."""

import pathlib

import pytest

from experiments import planning, plans, protocol
from mhc_jax.config_file import parse
from mhc_jax.plan import resolve

FINEWEB = 9e9  # tokens of the sample's training split, fewer than there are
PAGE = pathlib.Path(__file__).parent.parent / 'docs' / 'plans.md'


def test_the_page_is_what_the_command_makes():
  """Nothing is downloaded for it; where a plan has changed: python -m experiments.plans > docs/plans.md."""
  assert plans.page() == PAGE.read_text().rstrip('\n')


@pytest.mark.parametrize('name', plans.large())
def test_no_run_needs_more_text_than_its_corpus_has(name):
  _, runs = planning.plan(name, download=False)
  assert {run.resolved['data']['name'] for run in runs} == {protocol.FINEWEB}
  assert max(run.derived['tokens'] for run in runs) <= FINEWEB
  assert not any(run.resolved['data']['repeat'] for run in runs)


def test_hours_are_flops_over_an_assumed_rate_and_said_for_large_plans_alone():
  run = resolve(parse('laptop:smoke', []), 'd')
  run.derived['flops'] = 989e12 * 0.25 * 3600 * 7
  assert plans.hours([run], 'H100') == pytest.approx(7)
  assert plans.hours([run], 'v5e-8') == pytest.approx(7 * 989 / 197)
  assert '7 device-hours on H100' in plans.sentence([run]) and 'assumed 25%' in plans.sentence([run])
  run.derived['flops'] = 1e13
  assert plans.sentence([run]) is None
