"""Configuration files and `--config.a.b=v`: reading, typed overrides, and checks of fields' names."""

import ast
import difflib
import functools
import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mhc_jax.config import base_config
from mhc_jax.errors import ConfigError, require
from mhc_jax.paths import expand
from mhc_jax.values import checked


def parse(path: str, overrides: list[str]) -> ConfigDict:
  """Loads a config file and applies `--config.a.b=v` overrides.

  path: a file, or the name of one in configs/ (`laptop`), with `:argument` where it takes one.
  Raises ConfigError for an unknown field (naming the nearest), a value of the wrong type, or a bad file.
  """
  name, _, argument = path.partition(':')
  name = expand(name)
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
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # whatever somebody's file may raise, exit() too
    what = ' '.join(f'{error}'.split())
    if isinstance(error, ValueError) and what:
      raise ConfigError(what) from None
    raise ConfigError(f'{filename} does not work: {type(error).__name__}: {what}') from None
  require(isinstance(config, ConfigDict), f'{filename}: get_config must return a ConfigDict')
  locked, checked_fields, config = config.is_locked, check_fields(config), base_config()
  config.update(checked_fields)
  if locked:
    config.lock()
  override(config, overrides)
  return config


def override(config: ConfigDict, overrides: list[str]) -> None:
  """Applies `--config.a.b=v`, in place; ConfigError for an unknown field or a value of the wrong type."""
  for text in overrides:
    name, equals, value = text.partition('=')
    if not name.startswith('--config.') or not equals:
      raise ConfigError(f'cannot read {text!r}: write --config.section.field=value')
    _set(config, name.removeprefix('--config.').split('.'), value)


def _configs() -> str:
  """The folder of the project's config files: in the package where it is installed, else beside it."""
  package = os.path.dirname(os.path.abspath(__file__))
  inside = os.path.join(package, 'configs')
  return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), 'configs')


def _set(config: ConfigDict, keys: list[str], text: str) -> None:
  """Sets one field from the text of an override, in the field's own type."""
  node, kind = config, _kinds()
  for depth, key in enumerate(keys):
    free = depth > 0 and keys[depth - 1] == _FREE and depth == len(keys) - 1
    known = isinstance(kind, dict) and (key in kind or free)
    require(known, f'unknown config field {".".join(keys)}{_nearest(keys[:depth], key, kind)}')
    kind = kind.get(key, Any)
    if depth < len(keys) - 1:
      node = node[key]
  name = '.'.join(keys)
  if isinstance(kind, dict):
    raise ConfigError(f'{name} is a section; set one of {", ".join(kind) or "its fields"}')
  value = text if text != 'None' and kind in (str, str | None) else _literal(text)
  with node.unlocked():
    node[keys[-1]] = checked(name, value, kind)


def _literal(text: str) -> Any:
  """The Python literal that the text is, else the text itself."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of escapes in a text that Python will refuse one day
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return text


def _nearest(path: list[str], key: str, known: Any) -> str:
  near = difflib.get_close_matches(str(key), list(known), 1, 0.0) if isinstance(known, dict) else []
  return f'; did you mean {".".join([*path, near[0]])}?' if near else ''


_FREE = 'constraint_params'  # the section whose fields are the constraint's
_MAY_BE_NONE = ('clip_norm',)  # though it has a value by default


@functools.cache
def _kinds() -> dict[str, Any]:
  """The kinds of base_config()'s fields, by section; with None where it is their value."""

  def kinds(section: ConfigDict) -> dict[str, Any]:
    return {
      key: kinds(value) if isinstance(value, ConfigDict) else kind(section, key, value)
      for key, value in section.items()
    }

  def kind(section: ConfigDict, key: str, value: Any) -> Any:
    return section.get_type(key) | None if value is None or key in _MAY_BE_NONE else section.get_type(key)

  return kinds(base_config())


def check_fields(config: ConfigDict) -> ConfigDict:
  """The configuration in plain Python values, locked.

  Raises ConfigError unless its fields are those of base_config(), each of its kind (values.checked), with
  None only where it is allowed.
  """
  return _plain(config, _kinds(), []).lock()


def _plain(given: Any, kinds: dict[str, Any], path: list[str], whole: bool = True) -> ConfigDict:
  """A section in plain values; where it need not be whole, fields of no kind are left out."""
  require(isinstance(given, ConfigDict | dict), f'{".".join(path) or "a configuration"} must be a section')
  given, plain = dict(given.items()), ConfigDict()
  if path and path[-1] == _FREE:
    kinds = dict.fromkeys(given, Any)
  if whole and given.keys() != kinds.keys():
    for key in given:
      if key not in kinds:  # the search for a near one is slow
        raise ConfigError(f'unknown config field {".".join([*path, str(key)])}{_nearest(path, key, kinds)}')
    missing = next(key for key in kinds if key not in given)
    raise ConfigError(f'config field {".".join([*path, missing])} is missing')
  above = ''.join(f'{name}.' for name in path)
  for key, kind in kinds.items():
    if key in given and isinstance(kind, dict):
      plain[key] = _plain(given[key], kind, [*path, key], whole)
    elif key in given:
      name = f'{above}{key}'
      if not isinstance(key, str) or '.' in key:
        raise ConfigError(f'{name} is no name of a field')
      plain[key] = checked(name, given[key], kind)
  return plain


def complete(resolved: Any) -> ConfigDict:
  """The configuration that config.json holds, with the defaults of fields that are newer than the run.

  What resolving adds is left out: gates and start values of the connection, the digest of the corpus. Raises
  ConfigError for a field of another kind.
  """
  kinds = _kinds() | {'model': _kinds()['model'] | {'connection': dict(_kinds()['model']['connection'])}}
  for name in ('init', 'read_gate', 'write_gate'):
    del kinds['model']['connection'][name]
  config = base_config()
  config.update(_plain(resolved, kinds, [], whole=False))
  return config
