"""What the analysis writes: files and folders that are always whole, CSV that no spreadsheet computes with.

Where: under report.py, plots.py, fit.py and page/write.py.
"""

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from mhc_jax import storage
from mhc_jax.errors import FULL_DISK, ConfigError

STAGED = '.writing-'
FORMULA = re.compile(r"'*[=+\-@\t\r]")  # what a spreadsheet takes for one; apostrophes keep it a text


def escaped(cell: object) -> object:
  """A text that would be a formula, behind an apostrophe; anything else as it is."""
  return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def unescaped(cell: str) -> str:
  """What `escaped` made the cell of."""
  return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell


def csv_text(table: pd.DataFrame) -> str:
  """A table as CSV: numbers as they are, texts and names of columns escaped."""
  out = table.rename(columns=escaped)
  texts = [i for i, kind in enumerate(out.dtypes) if not pd.api.types.is_numeric_dtype(kind)]
  for i in texts:
    out.isetitem(i, out.iloc[:, i].map(escaped))
  return out.to_csv(index=False)


@contextlib.contextmanager
def written(path: Path, option: str) -> Iterator[None]:
  """Turns errors of writing into one line that names path and option; full disks have one of their own."""
  try:
    yield
  except OSError as error:
    if error.errno in FULL_DISK:
      raise
    raise ConfigError(f'{option} {path} cannot be written: {error.strerror or error}') from None


def check_file(path: Path, option: str) -> None:
  """Raises ConfigError where a file cannot be: before the work, whose result would be lost."""
  with written(path, option):
    folder = path.is_dir()  # raises for a name that is too long
    nearest = next(parent for parent in path.absolute().parents if parent.exists())
    if not path.exists():
      tempfile.TemporaryFile(dir=nearest).close()  # what permissions say is not all: /proc has no new files
  if folder:
    raise ConfigError(f'{option} {path} is a folder: name a file')


def write_file(path: Path, text: str, option: str) -> None:
  """Writes a file so that it is always whole; a device or a pipe is written to. Raises ConfigError."""
  with written(path, option):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
      path.write_text(text)
    else:
      storage.write_text(os.path.realpath(path), text)  # a link stays one


@contextlib.contextmanager
def staged(folder: Path, ours: Callable[[Path], bool], option: str) -> Iterator[Path]:
  """A new folder inside `folder`, whose files take their places there only when all of them are written.

  ours: which files of `folder` go then, where the new ones do not have them. After an error, or a stop, what
  was there stays; what a killed process left goes at the next call. Two at once end as one of them.
  """
  with contextlib.ExitStack() as stack:
    with written(folder, option):
      made = not folder.exists()
      folder.mkdir(parents=True, exist_ok=True)
      for left in folder.glob(f'{STAGED}*'):
        with contextlib.suppress(OSError), _locked(left, wait=False):
          shutil.rmtree(left)
      new = Path(tempfile.mkdtemp(prefix=STAGED, dir=folder))
    try:
      with contextlib.suppress(OSError):  # a file system without locks
        stack.enter_context(_locked(new, wait=False))
      with written(folder, option):
        yield new
        files = sorted(
          new.iterdir(), key=lambda path: path.suffix == '.html'
        )  # a page after what it links to
        with contextlib.suppress(OSError):
          stack.enter_context(_locked(folder, wait=True))
        for path in files:
          os.replace(path, folder / path.name)
        names = {path.name for path in files}
        for old in folder.iterdir():
          if old.is_file() and ours(old) and old.name not in names:
            old.unlink()
    finally:
      shutil.rmtree(new, ignore_errors=True)
      if made:
        with contextlib.suppress(OSError):
          folder.rmdir()  # only an empty one


@contextlib.contextmanager
def _locked(folder: Path, wait: bool) -> Iterator[None]:
  """Holds a folder against other processes; the system lets go of it when this one dies. Raises OSError."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    yield
  finally:
    os.close(handle)
