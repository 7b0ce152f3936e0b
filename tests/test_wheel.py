"""The wheel, installed beside the dependencies alone and used from an empty folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import FLAGS
from synthetic_runs import write_sweep
from test_analysis_cli import write_points

ROOT = Path(__file__).parent.parent
FOLDERS = {'mhc_jax': 'mhc_jax'} | {f'mhc_jax/{x}': x for x in ('analysis', 'configs', 'experiments')}
IMPORTS = """
import importlib, pkgutil, mhc_jax
for module in pkgutil.walk_packages(mhc_jax.__path__, 'mhc_jax.'):
  print(importlib.import_module(module.name).__file__)
"""
pytestmark = pytest.mark.slow


def said_by(*command, cwd=None):
  """What the command prints; fails with all of it."""
  flags = ' '.join(flag for flag in FLAGS if 'device_count' not in flag)
  environment = os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': ''}
  answer = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
  assert answer.returncode == 0, answer.stdout + answer.stderr
  return answer.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  """Built from a copy: what an earlier build left in build/ would get into it."""
  copy, out = tmp_path_factory.mktemp('copy'), tmp_path_factory.mktemp('wheel')
  for folder in FOLDERS.values():
    shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, copy)
  build = f'from setuptools import build_meta; build_meta.build_wheel({str(out)!r})'
  said_by(sys.executable, '-P', '-c', build, cwd=copy)
  (path,) = out.iterdir()
  return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
  """The folder of commands of an environment with the wheel, which sees the packages of this one."""
  folder = tmp_path_factory.mktemp('environment')
  venv.create(folder, symlinks=True)
  python = str(folder / 'bin' / 'python')
  said_by(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', str(wheel))
  (packages,) = folder.glob('lib/python*/site-packages')
  # A path of a .pth file is searched, but its own .pth files are not read: the checkout is not found.
  (packages / 'dependencies.pth').write_text(sysconfig.get_path('purelib'))
  return folder / 'bin'


def test_every_file_is_in_it_under_one_name(wheel):
  names = set(zipfile.ZipFile(wheel).namelist())
  assert {name.split('/')[0].split('-')[0] for name in names} == {'mhc_jax'}  # and mhc_jax-*.dist-info
  for package, folder in FOLDERS.items():
    files = (path for path in (ROOT / folder).rglob('*') if path.is_file() and path.suffix != '.pyc')
    assert {f'{package}/{path.relative_to(ROOT / folder)}' for path in files} <= names


def test_every_module_is_imported_from_it(installed, tmp_path):
  files = said_by(installed / 'python', '-c', IMPORTS, cwd=tmp_path).split()
  assert len(files) > 100
  assert all(file.startswith(str(installed.parent)) for file in files)


def test_it_trains_plans_reports_and_fits_from_an_empty_folder(installed, tmp_path):
  def mhc(*command):
    return said_by(installed / 'mhc', *command, cwd=tmp_path)

  assert 'mhc COMMAND' in mhc('--help')
  fields = '--config.data.name=python_stdlib', '--config.duration.steps=2'
  mhc('train', '--config', 'laptop:smoke', '--workdir', 'run', *fields)
  assert (tmp_path / 'run' / 'status.json').exists()
  assert '49 runs' in mhc('sweep', 'quick', '--dry-run')
  write_sweep(tmp_path / 'runs', arms=('residual', 'mhc'), ranks=False)
  mhc('report', 'runs', '--resamples', '4')
  assert (tmp_path / 'runs' / 'report' / 'index.html').exists()
  write_points(tmp_path / 'points.csv')
  columns = 'N=params,D=tokens,loss=loss'
  assert 'alpha' in mhc('fit', 'points.csv', '--law', 'chinchilla', '--columns', columns, '--resamples', '4')
