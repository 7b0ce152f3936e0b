"""Paths as users give them: home folders, names that no file here can have."""

import shutil

import pytest

from configs import laptop
from mhc_jax import evaluate
from mhc_jax.__main__ import main
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.paths import expand


def test_a_home_folder_that_nobody_knows_is_named_by_every_command(capsys):
  for command in ('evaluate', 'report'):
    try:
      code = main([command, '~nosuchuser/x'])
    except SystemExit as ended:  # argparse's way
      code = ended.code
    assert code == 2 and 'no home folder is known for ~nosuchuser' in capsys.readouterr().err


def test_a_config_file_may_lie_in_a_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  shutil.copy(laptop.__file__, tmp_path / 'mine.py')
  assert parse('~/mine.py:smoke', ['--config.seed=3']).seed == 3


@pytest.mark.parametrize('name', ('a\udcff', 'a\0b'))
def test_a_name_that_no_checkpoint_can_have_is_refused_at_once(name):
  with pytest.raises(ConfigError, match='must be UTF-8'):
    expand(f'/tmp/{name}')
  with pytest.raises(ConfigError, match='must be UTF-8'):
    evaluate.main([name])


@pytest.mark.parametrize('wrong', ('file', 'loop', 'nowhere'))
def test_checkpoints_that_are_no_folder_are_refused_before_anything_is_trained(tmp_path, wrong):
  path = tmp_path / 'checkpoints'
  if wrong == 'file':
    path.write_text('')
  else:
    path.symlink_to(path if wrong == 'loop' else tmp_path / 'gone')
  with pytest.raises(ConfigError, match='is not a folder: move it away'):
    Checkpoints(path).restore_latest({})
