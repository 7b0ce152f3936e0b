"""The README tells the truth: its example runs, its paths exist, it stays short."""

import pathlib
import re

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def test_example_runs_and_learns_to_mix():
  """The example in somebody's own model: at most 15 lines, right shapes, gradients for every parameter."""
  (code,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
  assert len([line for line in code.splitlines() if line.strip()]) <= 15
  names: dict = {}
  exec(code, names)
  x_BTD = jax.random.normal(jax.random.key(0), (2, 5, 64))
  assert names['forward'](names['params'], x_BTD).shape == (2, 5, 64)
  loss = lambda params: jnp.sum(names['forward'](params, x_BTD) ** 2)  # noqa: E731
  grads = jax.jit(jax.grad(loss))(names['params'])
  for name, grad in grads[1].items():
    assert jnp.isfinite(grad).all() and (grad != 0).any(), name


def test_length_and_paths():
  """At most 120 lines; every file, folder and module that it names exists."""
  assert len(README.splitlines()) <= 120
  for path in re.findall(r'\b(?:mhc_jax|configs|experiments|analysis|docs|tests)/[\w./]*\w', README):
    assert (ROOT / path.rstrip('.')).exists(), path
  for module in re.findall(r'python -m ([\w.]+)', README):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module
