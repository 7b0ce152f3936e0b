"""mhc bench peers without a peer: the pipes, the pins, the page."""

import json
import sys
from pathlib import Path

import pytest

from experiments.bench import peers, sublayers
from mhc_jax.errors import ConfigError

DOCS = Path(__file__).parent.parent / 'docs'


def test_peers_pins_and_implementations_agree():
  environments = {peer.environment for peer in peers.PEERS.values()} - {None}
  assert environments == set(peers.PYTHONS) == {path.stem for path in peers.PINS.iterdir()}
  assert list(peers.PEERS) == list(sublayers.IMPLEMENTATIONS)
  named = {'maxtext': {'maxtext'}, 'tokamax': {'tokamax'}, 'torch': {'transformers', 'hyper-connections'}}
  for name, wanted in named.items():
    lines = (peers.PINS / f'{name}.txt').read_text().splitlines()
    pins = dict(line.split('==') for line in lines if not line.startswith('#'))
    assert wanted <= set(pins)


def test_ours_beside_ours_through_the_pipes():
  """9 arrays: the streams, and the gradients of them and of phi and each part's b and alpha."""
  found = peers.measure({peers.OURS: sys.executable}, width=16, tokens=64, repeats=2, calls=1)[peers.OURS]
  assert found['arrays'] == 9 and set(found['versions']) == {'python', 'jax', 'jaxlib'}
  assert 0 < found['cpu_ms']['min'] <= found['cpu_ms']['median'] <= found['cpu_ms']['max']
  assert found['over_ours'] == {'median': 1, 'min': 1, 'max': 1}


def test_a_peer_that_does_not_start_is_named():
  with pytest.raises(ConfigError, match='maxtext ended without an answer'):
    with peers.started({'maxtext': sys.executable}, 16, 64):
      pass


def test_rounds_are_interleaved_and_the_first_is_not_measured():
  asked = []

  class Fake:
    def __init__(self, name):
      self.name = name

    def time(self, calls):
      asked.append((self.name, calls))
      return {'cpu': len(asked)}

  found = peers.rounds({name: Fake(name) for name in 'ab'}, repeats=2, calls=3)
  assert asked == [('a', 3), ('b', 3)] * 3
  assert found == {'a': [{'cpu': 3}, {'cpu': 5}], 'b': [{'cpu': 4}, {'cpu': 6}]}


def test_environments_are_made_once_for_their_pins(tmp_path, monkeypatch):
  commands = []

  def run(command, **_):
    commands.append(command[1:3])
    (tmp_path / 'torch').mkdir(exist_ok=True)

  monkeypatch.setattr(peers, 'interpreter', lambda version: f'python{version}')
  monkeypatch.setattr(peers.subprocess, 'run', run)
  python = peers.make(tmp_path, 'torch')
  assert commands == [['-m', 'venv'], ['-m', 'pip']]
  assert peers.make(tmp_path, 'torch') == python and len(commands) == 2
  (tmp_path / 'torch' / 'made_of.txt').write_text('torch==1\n')
  assert peers.make(tmp_path, 'torch') == python and len(commands) == 4


def test_the_page_is_that_of_its_numbers():
  report = json.loads((DOCS / 'peers.json').read_text())
  assert (DOCS / 'peers.md').read_text() == peers.page(report)
