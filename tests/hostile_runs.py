"""Damages of run folders, seeded: a file replaced, or one field of one by a value of another type."""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

FILES = ('config.json', 'status.json', 'metrics.jsonl', 'plan.json')
DEEP = 20_000
# A file by another: of its bytes, the new ones; None is no file.
DAMAGES = {
  'absent': lambda content: None,
  'empty': lambda content: b'',
  'cut': lambda content: content[: len(content) // 2],
  'its first byte': lambda content: content[:1],
  'last byte gone': lambda content: content.rstrip()[:-1],
  'zeros': lambda content: b'\0' * len(content),
  'zeros in the middle': lambda content: (
    content[: len(content) // 2] + b'\0' * 50 + content[len(content) // 2 + 50 :]
  ),
  'not UTF-8': lambda content: content.replace(b'e', b'\xff', 1),
  'UTF-16': lambda content: content.decode().encode('utf-16'),
  'with a mark': lambda content: b'\xef\xbb\xbf' + content,
  'a text': lambda content: b'hello\n',
  'a number': lambda content: b'5\n',
  'null': lambda content: b'null\n',
  'true': lambda content: b'true\n',
  'a string': lambda content: b'"finished"\n',
  'a list': lambda content: b'[1, 2, 3]\n',
  'an empty object': lambda content: b'{}\n',
  'a list of lists': lambda content: b'[[[]]]\n',
  'nested': lambda content: b'[' * DEEP + b']' * DEEP,
  'nested objects': lambda content: b'{"a":' * DEEP + b'1' + b'}' * DEEP,
  '60 levels': lambda content: b'{"step": 1, "state": ' + b'[' * 60 + b']' * 60 + b'}\n',
  '5,000 digits': lambda content: b'{"step": ' + b'9' * 5000 + b', "x": 1}\n',
  '400 digits': lambda content: b'{"step": 0, "tokens": ' + b'9' * 400 + b', "flops": 1}\n',
  'twice': lambda content: content + content,
  'a blank line first': lambda content: b'\n' + content,
  'lines reversed': lambda content: b'\n'.join(reversed(content.splitlines())) + b'\n',
  'a flipped bit': lambda content: content[:40] + bytes([content[40] ^ 4]) + content[41:],
  'Windows lines': lambda content: content.replace(b'\n', b'\r\n'),
}
VALUES = (
  *(None, True, False, 0, -1, -0.5, 1e308, 1e-308, 10**18, 10**30, 10**400, 2.5, '', 'text', '1', 'nan'),
  *(float('nan'), float('inf'), [], [1], [[1], [1, 2]], [[[[1]]]], ['a'], {}, {'a': 1}, {'a': {'b': []}}),
  *(
    '../../etc',
    '</script><!--',
    '$\\frac{1$',
    '=1+1',
    'a\nb\x1b[2J\u202e',
    '\ud800',
    'x' * 100_000,
    '_',
    '%s{0}',
  ),
)


def leaves(tree: object, path: tuple = ()) -> list[tuple]:
  """Paths of all fields, sections included."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  return [found for key, value in items for found in ((*path, key), *leaves(value, (*path, key)))]


def replaced(tree: object, path: tuple, value: object) -> object:
  """The tree with another value at a path."""
  if not path:
    return value
  out = dict(tree) if isinstance(tree, dict) else list(tree)
  out[path[0]] = replaced(out[path[0]], path[1:], value)
  return out


def damage(folder: Path, run_ids: list[str], rng: random.Random) -> str:
  """Damages one file of a sweep; says what was done."""
  name = rng.choice(FILES)
  path = folder / name if name == 'plan.json' else folder / rng.choice(run_ids) / name
  if rng.random() < 0.4:
    if rng.random() < 0.1:
      path.unlink()
      path.mkdir()
      return f'{name}: a folder'
    how = rng.choice(sorted(DAMAGES))
    content = DAMAGES[how](path.read_bytes())
    path.unlink() if content is None else path.write_bytes(content)
    return f'{name}: {how}'
  lines = path.read_text().splitlines() if name == 'metrics.jsonl' else [path.read_text()]
  k = rng.randrange(len(lines))
  tree = json.loads(lines[k])
  at, value = rng.choice(leaves(tree)), rng.choice(VALUES)
  limit = sys.get_int_max_str_digits()
  sys.set_int_max_str_digits(0)
  lines[k] = json.dumps(replaced(tree, at, value))
  sys.set_int_max_str_digits(limit)
  path.write_text('\n'.join(lines) + '\n')
  return f'{name}: {".".join(map(str, at))} = {str(value)[:30]!r}'


def trials(good: Path, count: int, seed: int, times: int = 1) -> Iterator[tuple[str, Path]]:
  """(what was done, folder) of copies of a sweep with `times` damages each; the folder is one for all."""
  rng = random.Random(seed)
  run_ids = [item['run_id'] for item in json.loads((good / 'plan.json').read_text())['runs']]
  folder = good.with_name(f'{good.name}-damaged')
  for _ in range(count):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder, ignore=shutil.ignore_patterns('report'))
    done = []
    for _ in range(times):
      with contextlib.suppress(OSError, ValueError, IndexError):  # damaged already
        done.append(damage(folder, run_ids, rng))
    yield '; '.join(done), folder


def ended(call) -> str | None:
  """How a call ended where it neither returned nor raised ConfigError, in words."""
  from mhc_jax.errors import ConfigError

  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    try:
      call()
    except ConfigError as error:
      return f'{len(str(error).splitlines())} lines' if '\n' in str(error) else None
    except BaseException as error:  # an exit or an interrupt is no answer either
      place = traceback.extract_tb(error.__traceback__)[-1]
      return f'{type(error).__name__}: {str(error)[:80]} in {os.path.basename(place.filename)}:{place.lineno}'
  return None
