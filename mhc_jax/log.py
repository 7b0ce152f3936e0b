"""What a user sees of a run or command: its lines, its progress, and streams that may fail.

Output never decides a run: what cannot be printed is said once on the other stream, and the work goes on.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm


def say(line: str) -> None:
  """One line for the user, on stderr."""
  print(line, file=sys.stderr, flush=True)


@functools.cache
def say_once(line: str) -> None:
  """The same, once in a process: of what many runs meet alike."""
  say(line)


def duration(seconds: float) -> str:
  """Seconds, minutes, hours or days, to two digits or so."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 5400:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h' if seconds < 200_000 else f'{seconds / 86400:,.0f} days'


@contextlib.contextmanager
def tolerant_streams() -> Iterator[None]:
  """stdout and stderr that never raise: not where a reader is gone, a disk full, a stream closed or ASCII.

  What the terminal cannot show becomes a question mark; the first loss of a stream is said on the other.
  """
  for number in range(3):  # a file opened as number 2 would get what libraries print
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)
  with contextlib.ExitStack() as stack:
    for name in ('stdout', 'stderr'):
      stream = getattr(sys, name)
      if not isinstance(stream, _Tolerant):
        setattr(sys, name, _Tolerant(stream, name))
        stack.callback(setattr, sys, name, stream)
        stack.callback(getattr(sys, name).let_go)
    yield


class _Tolerant:
  """A text stream whose failures end no program."""

  def __init__(self, stream: Any, name: str):
    self._stream = open(os.devnull, 'w', encoding='utf-8') if stream is None else stream
    self._name, self._failed = name, False

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
    except UnicodeEncodeError:
      encoding = self._stream.encoding
      self._attempt(self._stream.write, text.encode(encoding, 'replace').decode(encoding))
    except (OSError, ValueError) as error:  # ValueError: it was closed
      self._say_once(error)
    return len(text)

  def flush(self) -> None:
    self._attempt(self._stream.flush)

  def isatty(self) -> bool:
    try:
      return self._stream.isatty()
    except (OSError, ValueError):  # it was closed
      return False

  def let_go(self) -> None:
    """Leaves the stream so that Python's own flush of it, when the process ends, cannot fail."""
    self.flush()
    if self._failed:
      with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
    self._failed = True  # what a bar that is collected later may say is nobody's concern

  def _attempt(self, do: Callable, *arguments: str) -> None:
    try:
      do(*arguments)
    except (OSError, ValueError) as error:
      self._say_once(error)

  def _say_once(self, error: Exception) -> None:
    if not self._failed:
      self._failed = True
      other = sys.stderr if self._name == 'stdout' else sys.stdout
      print(f'warning: {self._name} cannot be written ({error}); the work goes on', file=other)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


class Progress:
  """A bar with loss, tokens/s and time left on a terminal; elsewhere a plain line every few seconds."""

  def __init__(self, name: str, start: int, total: int, quiet: bool):
    name = ''.join(letter if letter.isprintable() else '?' for letter in name)  # a terminal obeys others
    self._name, self._total = name, total
    self._printed = time.monotonic()
    self._first: tuple[float, int] | None = None  # when, and how many, were done first: after compiling
    self._plain = not sys.stderr.isatty() and not quiet
    hidden = quiet or self._plain
    self._bar = tqdm(desc=name, initial=start, total=total, unit='step', postfix='compiling', disable=hidden)

  def update(self, step: int, loss: float, tokens_per_second: float | None) -> None:
    """Shows that `step` updates are done."""
    speed = '' if tokens_per_second is None else f', {tokens_per_second:,.0f} tokens/s'
    if not self._bar.disable:
      self._bar.set_postfix_str(f'loss {loss:.4f}{speed}', refresh=False)
      self._bar.update(step - self._bar.n)
    now = time.monotonic()
    began, first = self._first = self._first or (now, step)
    if self._plain and (now - self._printed > 10 or step == self._total):
      self._printed = now
      left = f', {(now - began) / (step - first) * (self._total - step):.0f} s left' if step > first else ''
      line = f'{self._name}: step {step}/{self._total}, loss {loss:.4f}{speed}{left}'
      print(line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    self._bar.close()
