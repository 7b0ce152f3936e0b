"""Which files a folder or a glob names, links followed: every one of them, or an error.

Main path: name of a corpus -> **paths** -> contents (`text_files.py`).
"""

import errno
import fnmatch
import functools
import heapq
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mhc_jax.errors import ConfigError


def expanded(path: str, field: str) -> str:
  """path with `~` and `~user` replaced; ConfigError, which begins with field, where there is no such name."""
  try:
    valid = b'\0' not in os.fsencode(path)
  except UnicodeEncodeError:
    valid = False
  if not valid:
    raise ConfigError(f'{field}: no file can have such a name')
  try:
    return str(Path(path).expanduser())
  except RuntimeError:
    raise ConfigError(f'{field}: there is no such user here, or no home folder') from None


def find(root: str, parts: Sequence[str], skip: Callable[[str], bool]) -> dict[str, str]:
  """Real path -> path below root of everything that is no folder and that the parts of a glob match.

  '**' is every folder below, itself too, and as the last part every file in them. skip(name) leaves out a
  file or a whole folder, but for parts that begin with a dot.

  The search is over pairs of a real folder and a part: each is looked at once, however many links lead
  there, so links in circles end. A folder goes by the name with fewest links, of these by the first. Links
  that lead nowhere are among the files.

  Raises OSError for a folder that cannot be read, for a link to one that holds root, and for a link that
  leads nowhere where a folder is looked for.
  """
  top = os.path.realpath(root)
  listing = functools.cache(_listing)
  folders = {top: ''}  # real path -> name
  for part in parts[:-1]:
    folders = _below(folders, top, skip, listing) if part == '**' else _inside(folders, part, skip, listing)
  last = parts[-1]
  if last == '**':
    folders = _below(folders, top, skip, listing, every_file=True)
  return {
    os.path.join(real, file): os.path.join(name, file)
    for real, name in folders.items()
    for file in listing(real).files
    if _matches(file, last, skip)
  }


class _Listing(NamedTuple):
  files: list[str]  # all that is no folder
  folders: list[tuple[str, bool]]  # name, whether it is a link
  broken: list[str]  # those of the files that are links to nothing


def _listing(folder: str) -> _Listing:
  listing = _Listing([], [], [])
  with os.scandir(folder) as entries:
    for entry in entries:
      link = entry.is_symlink()
      if os.path.isdir(entry.path) if link else entry.is_dir():
        listing.folders.append((entry.name, link))
      else:
        listing.files.append(entry.name)
        if link and not os.path.exists(entry.path):
          listing.broken.append(entry.name)
  return listing


def _matches(name: str, part: str, skip: Callable[[str], bool]) -> bool:
  if part == '**':
    return not skip(name)
  return fnmatch.fnmatchcase(name, part) and (part.startswith('.') or not skip(name))


def _inside(folders: dict[str, str], part: str, skip: Callable, listing: Callable) -> dict[str, str]:
  """The folders right inside these whose names match part."""
  found: dict[str, str] = {}
  for real, name in sorted(folders.items(), key=lambda item: item[1]):
    listed = listing(real)
    for child in listed.broken:
      if _matches(child, part, skip):
        os.stat(os.path.join(real, child))
    for child, link in sorted(listed.folders):
      if _matches(child, part, skip):
        path = os.path.join(real, child)
        found.setdefault(os.path.realpath(path) if link else path, os.path.join(name, child))
  return found


def _below(
  folders: dict[str, str], top: str, skip: Callable, listing: Callable, every_file: bool = False
) -> dict[str, str]:
  """These folders and all below them."""
  found: dict[str, str] = {}
  waiting = [(0, name, real) for real, name in folders.items()]
  heapq.heapify(waiting)
  while waiting:
    links, name, real = heapq.heappop(waiting)
    if real in found:
      continue
    found[real] = name
    listed = listing(real)
    for child, link in listed.folders:
      if skip(child):
        continue
      path = inner = os.path.join(real, child)
      if link:
        inner = os.path.realpath(path)
        if top.startswith(os.path.join(inner, '')) and top != inner:
          raise OSError(errno.ELOOP, 'it holds the folder that is read', path)
      heapq.heappush(waiting, (links + link, os.path.join(name, child), inner))
    for child in listed.broken:
      if not (every_file or skip(child) or _named_as_file(child)):
        os.stat(os.path.join(real, child))
  return found


def _named_as_file(name: str) -> bool:
  """Whether a link to nothing says by its suffix that it was no folder: 'x.png', but not 'part-1.0'."""
  return os.path.splitext(name)[1][1:2].isalpha()
