"""The rules of the layout: imports run one way."""

import subprocess
import sys
from pathlib import Path


def test_imports_keep_the_contracts():
  """[tool.importlinter] in pyproject.toml: the library at the bottom, its layers, no circles."""
  command = [Path(sys.executable).with_name('lint-imports'), '--no-cache', '--no-logo']
  root = Path(__file__).parent.parent
  answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
  assert answer.returncode == 0, answer.stdout + answer.stderr
