"""A seeded handful of each part of the campaign (tests/campaign), on the tiniest run."""

import random

import pytest

from tests.campaign.parts import PARTS
from tests.campaign.tiny import Tiny


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  return Tiny(tmp_path_factory.mktemp('tiny'))


FEW = ('training', 'checkpoints', 'corpus', 'evaluation', 'sweep', 'reports', 'overrides', 'command lines', 'kills')


@pytest.mark.parametrize('name', FEW)
@pytest.mark.filterwarnings('default')
def test_nothing_is_lost_or_wrong(name, tiny, tmp_path):
  tried, failures = PARTS[name].trial(tiny, tmp_path, random.Random(f'test {name}'), 0)
  assert tried and not failures, '\n'.join(failures)
