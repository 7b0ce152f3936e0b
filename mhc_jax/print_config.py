"""`mhc train --print-config`: every field of the configuration, its value, its default and what it means.

The words are the comments of config.py, read from its source, so that a field is described in one place: the
comment at the end of a field's line and the lines of comments right above it.
"""

import ast
import functools
import inspect
import io
import textwrap
import tokenize
from typing import Any

from ml_collections import ConfigDict

from mhc_jax import config as declared
from mhc_jax.config import base_config

_COLUMNS = 110


@functools.cache
def meanings() -> dict[str, str]:
  """'section.field' -> its comment, for every field and section of base_config() that has one."""
  source = inspect.getsource(declared._pickled_base)
  beside, above = _comments(source)
  found: dict[str, str] = {}

  def note(path: str, first: int, last: int) -> None:
    words, line = [beside.get(last, '')], first - 1
    while line in above:
      words.insert(0, above[line])
      line -= 1
    found[path] = ' '.join(filter(None, words))

  def fields(path: str, value: ast.expr) -> None:
    of_section = [node for node in value.args if isinstance(node, ast.Dict)] if _calls_section(value) else []
    for section in of_section:
      for key, inner in zip(section.keys, section.values, strict=True):
        is_section = _calls_section(inner) and inner.args
        note(f'{path}{key.value}', key.lineno, key.lineno if is_section else inner.end_lineno)
        fields(f'{path}{key.value}.', inner)

  for statement in ast.parse(source).body[0].body:
    target = statement.targets[0] if isinstance(statement, ast.Assign) else None
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
      section = _calls_section(statement.value)
      note(target.attr, statement.lineno, statement.lineno if section else statement.end_lineno)
      fields(f'{target.attr}.', statement.value)
  return found


def _calls_section(node: ast.expr) -> bool:
  return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'Section'


def _comments(source: str) -> tuple[dict[int, str], dict[int, str]]:
  """By line: the comments at the ends of lines of code, and those that are lines of their own."""
  beside, above = {}, {}
  lines = source.splitlines()
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      line, column = token.start
      own = not lines[line - 1][:column].strip()
      (above if own else beside)[line] = token.string.lstrip('# ')
  return beside, above


def text(config: ConfigDict) -> str:
  """Every field of a configuration: name, value, default where it is another, meaning."""
  rows, words = [], meanings()

  def add(section: ConfigDict, default: ConfigDict | None, path: str) -> None:
    whole = {key: isinstance(value, ConfigDict) and len(value) > 0 for key, value in section.items()}
    for key in sorted(section, key=lambda key: whole[key]):
      value = section[key]
      name = f'{path}{key}'
      if whole[key]:
        rows.append((name, None, None, words.get(name, '')))
        add(value, None if default is None or key not in default else default[key], f'{name}.')
      else:
        before = default[key] if default is not None and key in default else None
        rows.append((name, _shown(value), _shown(before), words.get(name, '')))

  add(config, base_config(), '')
  width = max(len(f'{name}={value}') for name, value, *_ in rows if value is not None and len(value) < 24) + 2
  return '\n'.join(line for row in rows for line in _lines(*row, width))


def _shown(value: Any) -> str:
  return '{}' if isinstance(value, ConfigDict) else str(value)


def _lines(name: str, value: str | None, default: str | None, meaning: str, width: int) -> list[str]:
  if value is None:
    return ['', *textwrap.wrap(f'{name}: {meaning}' if meaning else f'{name}:', _COLUMNS)]
  words = meaning + f' (default {default})' * (value != default)
  lines = textwrap.wrap(words.strip(), _COLUMNS - width) or ['']
  head = f'{name}={value}'
  if len(head) > width - 2:
    return [head, *(' ' * width + line for line in lines)]
  return [f'{head:{width}}{lines[0]}', *(' ' * width + line for line in lines[1:])]
