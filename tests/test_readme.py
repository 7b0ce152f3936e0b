"""The README tells the truth: its example runs, its paths exist, it stays short."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from test_constraints import check

from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.errors import ConfigError
from mhc_jax.evaluate import load

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_example_runs_and_learns_to_mix():
  """The example in somebody's own model: at most 15 lines, right shapes, gradients for every parameter."""
  code, _ = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len([line for line in code.splitlines() if line.strip()]) <= 15
  names: dict = {}
  exec(code, names)
  x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 64))
  assert names['forward'](names['params'], x_BTD).shape == (2, 5, 64)
  loss = lambda params: jnp.sum(names['forward'](params, x_BTD) ** 2)  # noqa: E731
  grads = jax.jit(jax.grad(loss))(names['params'])
  for name, grad in grads[1].items():
    assert jnp.isfinite(grad).all() and (grad != 0).any(), name


@pytest.mark.slow
def test_own_constraint_conforms_and_trains(tmp_path, x64):
  """The section is at most 25 lines; its claims hold; its run is named by its name and parameters."""
  section = README[README.index('## Add a constraint') : README.index('## Where things are')]
  assert len(section.strip().splitlines()) <= 25
  _, code = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  text = f"'--config.data.name=text_files:{ROOT}/analysis/*.py'"
  code = code.replace('[]', f"[{text}, '--config.duration.steps=2']").replace(
    'runs/lazy', str(tmp_path / 'run')
  )
  names: dict = {}
  with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
    patch.chdir(ROOT)
    exec(code, names)
  for n in (1, 2, 4):
    check(names['lazy_average'](), n)
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert config['model']['connection']['constraint'] == 'lazy_average'
  with jax.enable_x64(False):
    assert load(str(tmp_path / 'run'), names['lazy_average']())[2] == 2
    with pytest.raises(ConfigError, match='trained with the constraint lazy_average'):
      load(str(tmp_path / 'run'), CONSTRAINTS['circulant']())


@pytest.mark.parametrize('name', ('README.md', 'CONTRIBUTING.md'))
def test_length_and_paths(name):
  """At most 120 lines; every file, folder and module that it names exists."""
  page = (ROOT / name).read_text()
  assert len(page.splitlines()) <= 120
  for path in re.findall(r'\b(?:mhc_jax|configs|experiments|analysis|docs|tests)/[\w./]*\w', page):
    assert (ROOT / path.rstrip('.')).exists(), path
  for module in re.findall(r'python -m (?!pytest)([\w.]+)', page):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module
