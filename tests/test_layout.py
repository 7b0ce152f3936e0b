"""The rules of the layout: imports run one way."""

from pathlib import Path

from importlinter.cli import lint_imports

ROOT = Path(__file__).parent.parent


def test_imports_keep_the_contracts(monkeypatch, capsys):
  """[tool.importlinter] in pyproject.toml: the library at the bottom, its layers, no circles."""
  monkeypatch.chdir(ROOT)
  assert lint_imports(no_logo=True, cache_dir=None) == 0, capsys.readouterr().out
