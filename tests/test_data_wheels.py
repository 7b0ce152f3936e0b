"""The corpus of wheels: what of them is read; that they are fetched once and whole, or a word is said."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mhc_jax.data import BYTES, is_here, load_corpus, wheels
from mhc_jax.errors import ConfigError


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for name, text in files.items():
      archive.writestr(zipfile.ZipInfo(name), text)
  return path


@pytest.fixture
def folder(tmp_path, rng) -> Path:
  """Two wheels of 60 modules each, with files that are not to be read."""
  root = tmp_path / 'wheels'
  root.mkdir()
  for project in ('beta', 'alpha'):
    files = {f'{project}/m{i}.py': b'# %d\n' % i + rng.bytes(60).hex().encode() for i in range(60)}
    files |= {
      f'{project}/empty.py': b'',
      f'{project}/data.txt': b'no Python',
      f'{project}/latin.py': b'\xe9\r\n',
    }
    files |= {f'{project}/_vendor/other.py': b'copied', f'{project}/x_pb2.py': b'made'}
    files |= {f'{project}/table.py': b'# This file is AUTO-GENERATED.\n', 'shared.py': b'the same in both'}
    files |= {f'{project}/long.py': bytes(wheels._MOST_BYTES + 1)}
    make_wheel(root / f'{project}-1.0-py3-none-any.whl', files)
  (root / 'readme.md').write_text('not a wheel')
  return root


@pytest.fixture
def pinned(folder, tmp_path, monkeypatch):
  """They are the pinned ones, and a pip that copies them: (the folder of data, what pip was asked for)."""
  listed = [
    wheels.Wheel(path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 'MIT', 1000)
    for path in sorted(folder.glob('*.whl'))
  ]
  monkeypatch.setattr(wheels, 'pinned', lambda: tuple(listed))
  asked = tmp_path / 'asked'
  pip = tmp_path / 'pip.py'
  pip.write_text(
    'import pathlib, shutil, sys\n'
    "options = dict(a.removeprefix('--').split('=', 1) for a in sys.argv if '=' in a)\n"
    "for line in open(options['requirement']):\n"
    f"  open({str(asked)!r}, 'a').write(line.strip() + '\\n')\n"
    "  name = line.split(' ')[0].replace('==', '-') + '-py3-none-any.whl'\n"
    f"  shutil.copy(pathlib.Path({str(folder)!r}, name), options['dest'])\n"
  )
  monkeypatch.setattr(wheels, '_pip', lambda instead: [sys.executable, str(pip)])
  return tmp_path / 'data', asked


def documents(stream: np.ndarray) -> list[bytes]:
  parts = np.split(stream, np.flatnonzero(stream == BYTES.bos))[1:]
  return [part[1:].astype(np.uint8).tobytes() for part in parts]


def test_python_of_wheels_is_read_once_in_order_as_it_is(folder, tmp_path):
  loaded = load_corpus(f'python_wheels:{folder}', str(tmp_path / 'data'))
  train, validation = documents(loaded.train), documents(loaded.validation)
  expected = []
  for project in ('alpha', 'beta'):
    archive = zipfile.ZipFile(folder / f'{project}-1.0-py3-none-any.whl')
    names = sorted(name for name in archive.namelist() if '/m' in name or 'latin' in name or 'shared' in name)
    expected += [archive.read(name) for name in names]
  expected = list(dict.fromkeys(expected))
  assert len(expected) == 122 and sorted(train + validation) == sorted(expected)
  assert train == [text for text in expected if text in train] and 0 < len(validation) < 30
  assert b'\xe9\r\n' in train + validation


def test_the_folder_of_the_default_wheels_is_the_default_corpus(folder, pinned, tmp_path):
  data, asked = pinned
  assert not is_here('python_wheels', str(data))
  default = load_corpus('python_wheels', str(data))
  assert is_here('python_wheels', str(data)) and len(asked.read_text().splitlines()) == 2
  offline = load_corpus(f'python_wheels:{folder}', str(tmp_path / 'other'))
  assert offline.digest == default.digest
  [beta] = folder.glob('beta*')
  content = beta.read_bytes()
  for damage in (lambda: beta.write_bytes(content[:-5]), beta.unlink):
    damage()
    with pytest.raises(ConfigError, match=r'beta-1\.0-py3-none-any\.whl of the pinned wheels are missing'):
      load_corpus(f'python_wheels:{folder}', str(tmp_path / 'other'))


def test_only_what_is_missing_or_damaged_is_fetched(pinned, capsys):
  data, asked = pinned
  first = load_corpus('python_wheels', str(data))
  cache = data / 'mhc_jax' / 'wheels'
  asked.unlink()
  load_corpus('python_wheels', str(data))
  for tokens in (data / 'mhc_jax').glob('python_wheels-*/'):
    (tokens / 'corpus.json').unlink()
  load_corpus('python_wheels', str(data))
  assert not asked.exists()
  [alpha] = cache.glob('alpha*')
  alpha.write_bytes(alpha.read_bytes()[:-1])
  for tokens in (data / 'mhc_jax').glob('python_wheels-*/'):
    (tokens / 'corpus.json').unlink()
  assert load_corpus('python_wheels', str(data)).digest == first.digest
  assert asked.read_text().startswith('alpha==1.0 --hash=sha256:') and asked.read_text().count('\n') == 1
  assert f'warning: {alpha} is damaged' in capsys.readouterr().err
  assert not list(cache.glob('.fetch*'))


def test_a_dead_network_is_one_line_that_says_what_to_do(pinned, monkeypatch):
  data, _ = pinned
  fail = "import sys; sys.exit('WARNING: Retrying\\nERROR: Could not find a version that satisfies')"
  monkeypatch.setattr(wheels, '_pip', lambda instead: [sys.executable, '-c', fail])
  with pytest.raises(ConfigError) as error:
    load_corpus('python_wheels', str(data))
  said = str(error.value)
  assert 'pip cannot fetch them (Could not find a version' in said and '\n' not in said
  assert 'data.name=python_wheels:FOLDER' in said and 'python_stdlib' in said
  assert not list((data / 'mhc_jax' / 'wheels').glob('*.whl')) and not list(data.rglob('corpus.json'))


def test_the_real_pip_refuses_without_an_index(tmp_path):
  """conftest.py allows none: the command is one that pip takes."""
  with pytest.raises(ConfigError, match=r'pip cannot fetch them .*(No matching|Could not find)'):
    load_corpus('python_wheels', str(tmp_path))


def test_pip_is_that_of_the_python_or_the_one_it_brings(monkeypatch):
  real = wheels.importlib.util.find_spec
  monkeypatch.setattr(wheels.importlib.util, 'find_spec', lambda name: None if name == 'pip' else real(name))
  command = [*wheels._pip('x'), '--version']
  assert 'pip-' in command[1]
  assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith('pip ')
  monkeypatch.setattr(wheels.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='has no pip to fetch wheels: install pip, or do that'):
    wheels._pip('do that')


def test_processes_that_start_together_fetch_once(pinned, tmp_path):
  data, asked = pinned
  listed = [tuple(wheel) for wheel in wheels.pinned()]
  code = (
    f'import sys; from mhc_jax.data import wheels, load_corpus\n'
    f'wheels.pinned = lambda: tuple(wheels.Wheel(*one) for one in {listed!r})\n'
    f'wheels._pip = lambda instead: {wheels._pip("")!r}\n'
    f"print('ready', flush=True); input(); print(load_corpus('python_wheels', {str(data)!r}).digest)"
  )
  pipe = subprocess.PIPE
  processes = [
    subprocess.Popen([sys.executable, '-c', code], stdin=pipe, stdout=pipe, text=True) for _ in '12'
  ]
  assert [process.stdout.readline() for process in processes] == ['ready\n'] * 2
  for process in processes:
    process.stdin.write('go\n')
    process.stdin.flush()
  digests = {process.communicate(timeout=60)[0] for process in processes}
  assert [process.returncode for process in processes] == [0, 0] and len(digests) == 1
  assert len(asked.read_text().splitlines()) == 2


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda root: None, 'No such file'),
    (lambda root: root.mkdir(), r'no wheels \(\*\.whl\)'),
    (lambda root: root.write_text(''), 'Not a directory'),
    (lambda root: root.mkdir() or (root / 'a-1.0-py3-none-any.whl').write_text('x'), 'is damaged'),
    (lambda root: root.mkdir() or make_wheel(root / 'a-1.0-py3-none-any.whl', {'a.py': b'1'}), 'too little'),
  ],
)
def test_folders_without_whole_wheels_are_refused(tmp_path, make, message):
  make(tmp_path / 'wheels')
  with pytest.raises(ConfigError, match=message) as error:
    load_corpus(f'python_wheels:{tmp_path}/wheels', str(tmp_path / 'data'))
  assert '\n' not in str(error.value) and not list(tmp_path.rglob('corpus.json'))


def test_the_pinned_wheels_are_pure_licensed_and_enough():
  listed = json.loads(Path(wheels.__file__).with_name('python_wheels.json').read_text())
  assert [wheel['file'] for wheel in listed] == [wheel.file for wheel in wheels.pinned()]
  for wheel in wheels.pinned():
    assert wheel.file.endswith('-py3-none-any.whl') and len(wheel.sha256) == 64
    assert wheel.license in ('MIT', 'Apache-2.0', 'BSD-3-Clause')
  assert sum(wheel.bytes for wheel in wheels.pinned()) > 60e6
