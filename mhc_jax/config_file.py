"""Configuration files and `--config.a.b=v`: reading, typed overrides, and checks of fields' names."""

import ast
import difflib
import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mhc_jax.config import base_config
from mhc_jax.errors import ConfigError, require


def parse(path: str, overrides: list[str]) -> ConfigDict:
  """Loads a config file and applies `--config.a.b=v` overrides.

  path: a file, or the name of one in configs/ (`laptop`), with `:argument` where it takes one.
  Raises ConfigError for an unknown field (naming the nearest), a value of the wrong type, or a bad file.
  """
  name, _, argument = path.partition(':')
  filename = name if os.path.isfile(name) else os.path.join(_configs(), f'{name}.py')
  if not os.path.isfile(filename):
    files = sorted(Path(_configs()).glob('*.py'))
    named = [file.stem for file in files if 'def get_config(' in file.read_text(encoding='utf-8')]
    raise ConfigError(f'no config file {name!r}; by name there are {", ".join(named)}')
  spec = importlib.util.spec_from_file_location('config_file', filename)
  require(spec is not None, f'{filename}: a config file ends in .py')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    config = module.get_config(argument or None)
  except ConfigError:
    raise
  except ValueError as error:
    raise ConfigError(str(error)) from None
  except Exception as error:  # whatever somebody's file may raise
    what = ' '.join(f'{type(error).__name__}: {error}'.split())
    raise ConfigError(f'{filename} does not work: {what}') from None
  require(isinstance(config, ConfigDict), f'{filename}: get_config must return a ConfigDict')
  for override in overrides:
    name, equals, text = override.partition('=')
    if not name.startswith('--config.') or not equals:
      raise ConfigError(f'cannot read {override!r}: write --config.section.field=value')
    _set(config, name.removeprefix('--config.').split('.'), text)
  return config


def _configs() -> str:
  """The folder of the project's config files: in the package where it is installed, else beside it."""
  package = os.path.dirname(os.path.abspath(__file__))
  inside = os.path.join(package, 'configs')
  return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), 'configs')


def _set(config: ConfigDict, keys: list[str], text: str) -> None:
  """Sets one field from the text of an override, in the field's own type."""
  node = config
  for depth, key in enumerate(keys):
    free = depth > 0 and keys[depth - 1] == 'constraint_params'
    known = isinstance(node, ConfigDict) and (key in node or (free and depth == len(keys) - 1))
    require(known, f'unknown config field {".".join(keys)}{_nearest(keys[:depth], key, node)}')
    if depth < len(keys) - 1:
      node = node[key]
  key = keys[-1]
  if key in node and isinstance(node[key], ConfigDict):
    raise ConfigError(f'{".".join(keys)} is a section; set one of {", ".join(node[key]) or "its fields"}')
  kind = node.get_type(key) if key in node else None
  value = text if kind is str and text != 'None' else _literal(text)
  shown = repr(text if len(text) < 80 else f'{text[:80]}...')
  try:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if isinstance(value, dict):
      raise TypeError
    json.dumps(value, allow_nan=False)  # as config.json will hold it
  except (ValueError, OverflowError):
    raise ConfigError(f'{".".join(keys)} must be finite, got {shown}') from None
  except TypeError:
    raise ConfigError(f'{".".join(keys)} takes numbers, texts and lists of them, got {shown}') from None
  try:
    if kind is int and isinstance(value, bool):
      raise TypeError
    with node.unlocked():
      node[key] = value
  except TypeError:
    raise ConfigError(f'{".".join(keys)} takes {kind.__name__}, got {shown}') from None


def _literal(text: str) -> Any:
  """The Python literal that the text is, else the text itself."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes in a text that Python will refuse one day
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _nearest(path: list[str], key: str, known: Any) -> str:
  near = difflib.get_close_matches(key, list(known), 1, 0.0) if isinstance(known, ConfigDict) else []
  return f'; did you mean {".".join([*path, near[0]])}?' if near else ''


def check_fields(config: ConfigDict) -> None:
  """Raises ConfigError unless the fields are those of base_config(), with None only where it is allowed."""

  def check(given: ConfigDict, known: ConfigDict, path: list[str]) -> None:
    for key in [*given.keys(), *(key for key in known if key not in given)]:
      name = '.'.join([*path, key])
      if key not in known:  # the search for a near one is slow
        raise ConfigError(f'unknown config field {name}{_nearest(path, key, known)}')
      require(key in given, f'config field {name} is missing')
      if key != 'constraint_params' and isinstance(known[key], ConfigDict):
        require(isinstance(given[key], ConfigDict), f'{name} must be a section')
        check(given[key], known[key], [*path, key])
      elif given[key] is None and known[key] is not None:
        require(name == 'optimizer.clip_norm', f'{name} must have a value, got None')

  check(config, base_config(), [])
