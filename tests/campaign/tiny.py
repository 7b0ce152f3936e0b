"""The tiniest run with all parts, as a command of its own or in this process, and how its end is judged.

A failure is a line that begins with its kind: 'wrong number: ', 'traceback: ', 'hang: ', 'silent loss: ',
'false alarm: ' or 'unfit end: '.
"""

import contextlib
import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from mhc_jax import train
from mhc_jax.checkpoint import Checkpoints
from mhc_jax.command import end_with_message
from mhc_jax.config_file import parse
from mhc_jax.plan import resolve
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import programs
from tests.conftest import FLAGS  # unoptimised compilation, for the processes that inherit it too

ROOT = Path(__file__).parent.parent.parent
SMOKE = f'{ROOT / "configs" / "laptop.py"}:smoke'
STEPS, TIMEOUT = 24, 240  # seconds until a command counts as hanging; one takes five on an idle machine
FIELDS = (
  'model.width=16',
  'model.depth=1',
  'model.connection.name=residual',
  'model.scan=False',  # half of the time goes into tracing
  'data.seq_len=16',
  'data.batch_size=8',
  f'duration.steps={STEPS}',
  'evaluation.every_steps=12',
  'evaluation.sequences=8',
  'evaluation.batch_size=8',
  'log.diagnostics_every_steps=None',
  'checkpoint.every_steps=4',
)


class Said(NamedTuple):
  """How a command ended and what it said."""

  code: int  # minus the signal where one killed it
  out: str
  err: str


class Tiny:
  """The tiny run on a text of its own; everything lies below one folder."""

  def __init__(self, folder: Path):
    self.folder, self.data = folder, folder / 'data'
    self.text = folder / 'text'
    if not self.text.exists():
      write_text(self.text)

  def arguments(self, workdir: Path, *fields: str) -> list[str]:
    """Of `mhc train`; fields: more overrides, the last one counts."""
    fields = (*FIELDS, f'data.name=text_files:{self.text}', f'data.dir={self.data}', *fields)
    return ['--config', SMOKE, '--workdir', str(workdir), *(f'--config.{field}' for field in fields)]

  @property
  def environment(self) -> dict[str, str]:
    """Of child processes, which share their compilations."""
    return os.environ | {
      'XLA_FLAGS': ' '.join(flag for flag in FLAGS if 'device_count' not in flag),
      'JAX_COMPILATION_CACHE_DIR': str(self.folder / 'compiled'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      'JAX_ENABLE_COMPILATION_CACHE': 'true',
    }

  def start(self, workdir: Path, *more: str, before: tuple[str, ...] = ()) -> 'Session':
    """The training command as a process; `before` becomes it."""
    command = [*before, sys.executable, '-m', 'mhc_jax', 'train', *self.arguments(workdir), *more]
    return Session(command, self.environment, workdir)

  def train(self, workdir: Path, *fields: str) -> Said:
    """The training command in this process."""
    return command(train.main, *self.arguments(workdir, *fields))

  def config(self, *fields: str) -> Any:
    """The run's ConfigDict."""
    return parse(SMOKE, self.arguments(Path('unused'), *fields)[4:])

  @functools.cached_property
  def undisturbed(self) -> Path:
    """The workdir of a run that nothing disturbed."""
    workdir = self.folder / 'undisturbed'
    said = self.train(workdir)
    if said.code:
      raise RuntimeError(f'the undisturbed run failed: {said.err}')
    return workdir

  @functools.cached_property
  def interrupted(self) -> Path:
    """The workdir of a run that stopped after 14 of its updates, with checkpoints of steps 12 and 14."""
    workdir = self.folder / 'interrupted'
    if not workdir.exists():
      train.run(self.config(), str(workdir), quiet=True, stops_at=lambda step: step == 14)
    return workdir

  def newest(self, workdir: Path) -> tuple[int, Any] | None:
    """(step, all arrays) of the newest checkpoint."""
    plan = resolve(self.config(), '')
    abstract = programs(plan.model, plan.optimizer, make_mesh({})).abstract
    newest = Checkpoints(workdir / 'checkpoints').restore_latest(abstract)
    return newest and (newest[0], jax.device_get(newest[1]))

  def difference(self, workdir: Path) -> str:
    """'' where a run ended as the undisturbed one, bit for bit; else the failure."""
    rows, expected = logged(workdir), logged(self.undisturbed)
    steps, wanted = [row['step'] for row in rows], [row['step'] for row in expected]
    if steps != wanted:
      return f'silent loss: rows of steps {steps}'
    for row, other in zip(rows, expected, strict=True):
      if row != other:
        names = sorted(name for name in row.keys() | other.keys() if row.get(name) != other.get(name))
        return f'wrong number: {", ".join(names)} of step {row["step"]}'
    if status(workdir).get('final') != status(self.undisturbed)['final']:
      return f'wrong number: final {status(workdir).get("final")}'
    kept = [path.name for path in (workdir / 'checkpoints').iterdir()]
    if kept != [str(STEPS)]:
      return f'unfit end: checkpoints {kept} are left'
    (_, state), (_, other) = self.newest(workdir), self.newest(self.undisturbed)
    same = jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), state, other)
    return '' if jax.tree.all(same) else 'wrong number: arrays of the last checkpoint'


def write_text(folder: Path) -> None:
  """Twenty files of letters."""
  folder.mkdir(parents=True)
  words = random.Random(0)
  for index in range(20):
    (folder / f'{index}.txt').write_text(' '.join(words.choice('abcdefgh') * 3 for _ in range(500)))


class Session:
  """A command in a process group of its own."""

  def __init__(self, command: list[str], environment: dict[str, str], workdir: Path):
    pipes = {
      'stdin': subprocess.PIPE,
      'stdout': subprocess.PIPE,
      'stderr': subprocess.PIPE,
      'text': True,
      'errors': 'replace',
    }
    self.workdir, self.began = workdir, time.time()
    self.process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True, **pipes)

  def wait_until(self, condition: Callable[[], Any]) -> bool:
    """Looks every half millisecond; False where the process ended before."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
      if self.process.poll() is not None or time.monotonic() > deadline:
        return False
      time.sleep(0.0005)
    return True

  def end(self, *signals: int, timeout: float = TIMEOUT) -> Said:
    """Sends signals, if any, and waits; what still runs at the end of its time is killed: code 124."""
    for number in signals:
      self.process.send_signal(number)
    try:
      out, err = self.process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      self.kill_all()
      out, err = self.process.communicate()
      return Said(124, out, err)
    return Said(self.process.returncode, out, err)

  def kill_all(self) -> None:
    """Kills the process and its children."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)

  def rows(self) -> int:
    """Rows in metrics.jsonl by now."""
    path = self.workdir / 'metrics.jsonl'
    return path.read_text().count('\n') if path.exists() else 0

  def is_writing_a_checkpoint(self) -> bool:
    """Whether orbax's temporary folder of a step is there, and not one that a killed session left."""
    for path in (self.workdir / 'checkpoints').glob('*tmp*'):
      with contextlib.suppress(FileNotFoundError):
        if path.stat().st_ctime > self.began:
          return True
    return False


def command(main: Callable[[list[str]], int], *arguments: object) -> Said:
  """Runs a command in this process as its entry does; an exception becomes what Python would print."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      code = end_with_message(lambda: main([str(argument) for argument in arguments]))
    except SystemExit as end:
      code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
      traceback.print_exc(file=err)
      code = 1
  return Said(code, out.getvalue(), err.getvalue())


def unfit(said: Said) -> str:
  """'' where a command ended well, or in one line that says why not; else the failure."""
  if 'Traceback' in said.err:
    where = [line.strip() for line in said.err.splitlines() if line.startswith('  File')]
    return f'traceback: {said.err.strip().splitlines()[-1][:300]} ({where[-1] if where else "?"})'
  if said.code == 124:
    return f'hang: {said.err[-300:]}'
  errors = [line for line in said.err.splitlines() if 'error: ' in line or ' failed: ' in line]  # of a sweep
  if said.code == 0 or (said.code in (1, 2) and len(errors) == 1):
    return ''
  return f'unfit end: code {said.code}, {len(errors)} lines with an error: {said.err[-300:]}'


def logged(workdir: Path) -> list[dict[str, Any]]:
  """Rows without their times; half a line, or no file yet, is nothing; a damaged row has its text as step."""
  rows, data = [], b''
  with contextlib.suppress(OSError):
    data = (workdir / 'metrics.jsonl').read_bytes()
  for line in data.split(b'\n')[:-1]:
    try:
      row = json.loads(line)
      rows.append({key: value for key, value in row.items() if not key.startswith(('time/', 'device/'))})
      rows[-1]['step'] = row['step']
    except (ValueError, LookupError, AttributeError, RecursionError):
      rows.append({'step': line[:40]})
  return rows


def status(workdir: Path) -> dict[str, Any]:
  """What status.json says."""
  return json.loads((workdir / 'status.json').read_text())


def pick(rng: random.Random, weights: dict[Any, float]) -> Any:
  """One of the keys, by weight."""
  return rng.choices(list(weights), list(weights.values()))[0]


def files_below(folder: Path) -> Iterator[Path]:
  """All files, in order."""
  return (path for path in sorted(folder.rglob('*')) if path.is_file())
