"""Which code a run says it was made by."""

import re
import subprocess
from importlib import metadata

import pytest

from mhc_jax import workdir


@pytest.fixture
def checkout(tmp_path, monkeypatch):
  """A repository of one commit that the package seems to lie in."""
  file = tmp_path / 'mhc_jax' / 'workdir.py'
  file.parent.mkdir()
  file.write_text('# one\n')
  who = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
  for command in (['init', '-q'], ['add', '.'], [*who, 'commit', '-qm', 'one'], ['tag', 'v1']):
    subprocess.run(['git', '-C', tmp_path, *command], check=True, timeout=60)
  monkeypatch.setattr(workdir, '__file__', str(file))
  return tmp_path


def test_a_checkout_is_named_by_its_commit_and_by_what_differs_from_it(checkout):
  clean = workdir.revision.__wrapped__()
  assert re.fullmatch('[0-9a-f]{12}', clean)
  (checkout / 'mhc_jax' / 'workdir.py').write_text('# two\n')
  assert workdir.revision.__wrapped__() == f'{clean}-dirty'


def test_an_installed_package_is_named_by_its_version_even_inside_a_checkout(checkout, monkeypatch):
  inside = checkout / 'env' / 'site-packages' / 'mhc_jax' / 'workdir.py'
  monkeypatch.setattr(workdir, '__file__', str(inside))
  assert workdir.revision.__wrapped__() == metadata.version('mhc_jax')
  inside.parent.mkdir(parents=True)
  assert workdir.revision.__wrapped__() == metadata.version('mhc_jax')


def test_without_git_it_is_the_version(checkout, monkeypatch):
  monkeypatch.setenv('PATH', '')
  assert workdir.revision.__wrapped__() == metadata.version('mhc_jax')
