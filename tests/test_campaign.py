"""A seeded handful of each part of the campaign that is quick, on the tiniest run: tests/campaign has all."""

import random

import pytest

from experiments import planning
from tests.campaign import damaged, inputs, kills
from tests.campaign.parts import PARTS
from tests.campaign.tiny import Tiny


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  return Tiny(tmp_path_factory.mktemp('tiny'))


@pytest.fixture(autouse=True)
def experiments_as_before(monkeypatch):
  """The campaign adds one of its own to the table, which other tests in this process read."""
  monkeypatch.setitem(planning.EXPERIMENTS, 'campaign', None)


def handful(name, tiny, folder):
  tried, failures = PARTS[name].trial(tiny, folder, random.Random(f'test {name}'), 0)
  assert tried and not failures, '\n'.join(failures)


@pytest.mark.slow
def test_a_run_killed_while_it_saves_and_at_any_moment_goes_on_bit_for_bit(tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(kills, 'KILLS', 2)
  handful('kills', tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # as the commands have them
@pytest.mark.parametrize('name', ('training', 'checkpoints', 'corpus', 'evaluation', 'sweep', 'reports'))
def test_no_damaged_file_ends_in_a_traceback_or_in_other_numbers(name, tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(damaged, 'TRIED', {'corpus': 20, 'reports': 4, 'evaluation': 4}.get(name, 8))
  handful(name, tiny, tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('name', ('overrides', 'command lines'))
def test_odd_input_is_taken_or_refused_in_one_line(name, tiny, tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, 'OVERRIDES', 200)
  handful(name, tiny, tmp_path)
