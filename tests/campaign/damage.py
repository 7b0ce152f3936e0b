"""Every way to damage a file: bytes, lengths, what stands in its place, and JSON of another shape."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ODD_NUMBERS = (0, -1, 2.5, 1e308, -1e308, float('nan'), float('inf'), 10**400, 2**63, -(2**63))
ODD_TEXTS = ('', 'x', '../../x', '\x00', '9' * 5000, '\ud800', r'$\frac{1$', '=1+1')
SCRIPT = '</script><script>alert(1)</script>'
CONTAINERS = ([], [[]], [1, 'x', None], {}, {'a': {}}, {'': 1}, {'x': [None] * 5})
VALUES: tuple[Any, ...] = (None, True, False, *ODD_NUMBERS, *ODD_TEXTS, SCRIPT, *CONTAINERS)


def flip(path: Path, rng: random.Random) -> None:
  """One bit."""
  data = bytearray(path.read_bytes())
  data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def zero(path: Path, rng: random.Random) -> None:
  """A block of zeros, as a file system leaves one after a crash."""
  data = bytearray(path.read_bytes())
  start = rng.randrange(len(data))
  stop = min(len(data), start + rng.choice((16, 512, 4096)))
  data[start:stop] = bytes(stop - start)
  path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
  """The first bytes alone."""
  size = path.stat().st_size
  os.truncate(path, rng.choice((1, size // 2, size - 1, rng.randrange(size))))


def twice(path: Path, rng: random.Random) -> None:
  """The contents and once more the contents."""
  path.write_bytes(path.read_bytes() * 2)


def folder(path: Path, rng: random.Random) -> None:
  """A folder in its place, empty or not."""
  path.unlink()
  path.mkdir()
  if rng.random() < 0.5:
    (path / 'x').write_text('x')


def dangling(path: Path, rng: random.Random) -> None:
  """A link to nothing, or to itself."""
  path.unlink()
  path.symlink_to(rng.choice((path.name, 'nowhere')))


def text(*choices: bytes) -> Callable[[Path, random.Random], None]:
  """One of these in place of the contents."""
  return lambda path, rng: (path.write_bytes(rng.choice(choices)), None)[1]


ANY: dict[str, Callable[[Path, random.Random], None]] = {
  'flipped': flip,
  'zeroed': zero,
  'cut': cut,
  'doubled': twice,
  'empty': text(b''),
  'deleted': lambda path, rng: path.unlink(),
  'folder': folder,
  'link': dangling,
  'not UTF-8': text(b'\xff\xfe\x00{}', b'{"\xff": 1}', bytes(range(128, 256))),
  'other JSON': text(b'[]', b'3', b'"x"', b'null', b'true', b'{}', b'[{}]', b'{"x": 1}'),
  'nested': text(b'[' * 100_000, b'{"a":' * 100_000, b'[' * 900 + b']' * 900),
  'digits': text(b'9' * 5000, b'1e999', b'NaN', b'-Infinity', b'{"step": ' + b'9' * 5000 + b'}'),
}


def leaves(tree: Any, path: tuple = ()) -> Iterator[tuple]:
  """The paths of all nodes below the root."""
  items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  for key, value in items:
    yield (*path, key)
    yield from leaves(value, (*path, key))


def mutate(tree: Any, rng: random.Random) -> str:
  """Replaces or removes one node; says which."""
  *above, key = rng.choice(list(leaves(tree)))
  for step in above:
    tree = tree[step]
  if rng.random() < 0.2:
    del tree[key]
    return f'without {[*above, key]}'
  tree[key] = rng.choice(VALUES)
  return f'{[*above, key]} = {str(tree[key])[:50]!r}'


def field(path: Path, rng: random.Random) -> None:
  """One value of a JSON file, or of a line of it, becomes another or goes."""
  lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
  at = rng.randrange(len(lines))
  tree = json.loads(lines[at])
  mutate(tree, rng)
  lines[at] = json.dumps(tree)
  path.write_text('\n'.join(lines) + '\n')


def lines(path: Path, rng: random.Random) -> None:
  """Lines lost in the middle, at the beginning, repeated, or in another order."""
  rows = path.read_text().splitlines(keepends=True)
  at = rng.randrange(len(rows))
  change = rng.choice(('lost', 'first lost', 'repeated', 'order', 'blank'))
  if change == 'order':
    rng.shuffle(rows)
  else:
    parts = {'lost': [], 'first lost': [], 'repeated': [rows[at]] * 2, 'blank': ['\n', rows[at]]}
    start = 0 if change == 'first lost' else at
    rows[start : at + 1] = parts[change]
  path.write_text(''.join(rows))


def kinds(path: Path) -> dict[str, Callable[[Path, random.Random], None]]:
  """What can be done to this file; an empty one has no bytes to damage."""
  some = dict(ANY) if path.stat().st_size else {name: ANY[name] for name in ANY if name not in _BYTES}
  if path.suffix in ('.json', '.jsonl'):
    some |= {'field': field, 'field again': field, 'more fields': field}
  if path.suffix == '.jsonl':
    some |= {'lines': lines}
  return some


_BYTES = ('flipped', 'zeroed', 'cut', 'doubled')


def copy(source: Path, target: Path) -> Path:
  """A copy of a folder to be damaged."""
  return Path(shutil.copytree(source, target, symlinks=True))
