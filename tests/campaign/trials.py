"""How a trial is run, bounded in time and written down, so that a second call of the campaign goes on."""

import dataclasses
import faulthandler
import json
import random
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign.tiny import Tiny

KINDS = {
  'wrong number': 'wrong numbers',
  'traceback': 'tracebacks',
  'hang': 'hangs',
  'silent loss': 'silent losses',
  'false alarm': 'false alarms',
  'unfit end': 'unfit ends',
}


@dataclasses.dataclass(frozen=True)
class Part:
  """One row of the table.

  trial(tiny, folder, rng, number) -> (how many things were tried, failures), in a new folder; number from 0.
  A failure is a line that begins with one of KINDS. None in place of the two: this machine cannot do it.
  """

  what: str  # in the table
  trials: int  # of a whole campaign
  seconds: float  # after which a trial counts as a hang, many times what it takes
  trial: Callable[[Tiny, Path, random.Random, int], tuple[int, list[str]] | None]


def run(part: Part, name: str, number: int, seed: int, tiny: Tiny, out: Path) -> dict[str, Any]:
  """Does one trial and returns its record; the folder of a failed one stays, in out/failed."""
  folder = out / 'failed' / f'{name}-{number}'
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  began = time.monotonic()
  # Python may be stuck in a call: then only this ends the process, and its parent writes the trial down.
  faulthandler.dump_traceback_later(part.seconds, exit=True, file=sys.__stderr__)
  try:
    tried = part.trial(tiny, folder, random.Random(f'{seed} {name} {number}'), number)
  except Exception as error:
    traceback.print_exc()
    tried = 1, [f'traceback: {type(error).__name__}: {error} (of the trial itself)']
  finally:
    faulthandler.cancel_dump_traceback_later()
  count, failures = tried or (0, [])
  if not failures:
    shutil.rmtree(folder, ignore_errors=True)
  return {
    'count': count,
    'failures': failures,
    'skipped': tried is None,
    'seconds': round(time.monotonic() - began, 1),
  }


def append(path: Path, record: dict[str, Any]) -> None:
  """Adds one line, whole, also beside other processes that add theirs."""
  with open(path, 'ab', buffering=0) as file:
    file.write(json.dumps(record).encode() + b'\n')


def read(path: Path) -> list[dict[str, Any]]:
  """The records; half a line of a killed campaign is none."""
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith(b'}\n')]
