"""The campaign: everything that may happen to a run, tried at random and judged against an undisturbed one.

  python -m tests.campaign                               # all of it, in half an hour on two cores
  python -m tests.campaign --only kills --seed 1         # one part, with other random numbers
  python -m tests.campaign --table docs/reliability.md   # and write the table there

Each trial is a line of OUT/trials.jsonl, so a second call does what is missing, of the same code and seed.
The exit code is 1 where something failed; the folders of failed trials stay in OUT/failed.
"""

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mhc_jax.workdir import revision
from tests.campaign import trials
from tests.campaign.parts import PARTS
from tests.campaign.table import markdown, write_into
from tests.campaign.tiny import ROOT, Tiny


def main() -> int:
  """The command line; returns 1 where a trial failed."""
  parser = argparse.ArgumentParser(
    'python -m tests.campaign', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--only', action='append', choices=list(PARTS), help='a part; may be given again')
  parser.add_argument('--seed', type=int, default=0, help='of all random choices (default 0)')
  parser.add_argument('--scale', type=float, default=1.0, help='times as many trials (default 1)')
  parser.add_argument('--jobs', type=int, default=2, help='parts at a time (default 2)')
  parser.add_argument('--out', type=Path, default=Path('runs/campaign'), help='default runs/campaign')
  parser.add_argument('--table', type=Path, help='a page whose table is to be written anew')
  parser.add_argument('--child', action='store_true', help=argparse.SUPPRESS)
  a = parser.parse_args()
  a.out.mkdir(parents=True, exist_ok=True)
  chosen = a.only or list(PARTS)
  if a.child:
    return work(chosen[0], a.seed, a.scale, a.out.absolute())
  began, running = time.monotonic(), {}
  waiting = sorted(chosen, key=lambda name: -PARTS[name].trials * PARTS[name].seconds)
  while waiting or running:
    while waiting and len(running) < a.jobs:
      name = waiting.pop(0)
      running[name] = start(name, a)
    time.sleep(0.2)
    for name, process in list(running.items()):
      if process.poll() is not None:
        del running[name]
        if died(name, process.returncode, a):
          waiting.insert(0, name)
  records = [r for r in trials.read(a.out / 'trials.jsonl') if r['part'] in chosen and is_of(r, a.seed)]
  rows = {name: [r for r in records if r['part'] == name and 'count' in r] for name in chosen}
  text = markdown(rows, time.monotonic() - began)
  print(text)
  if a.table:
    write_into(a.table, text)
  for record in records:
    for failure in record.get('failures', ()):
      print(f'{record["part"]} {record["number"]}: {failure}')
  return int(any(record.get('failures') for record in records))


def is_of(record: dict, seed: int) -> bool:
  """Whether a record is of this seed and this code."""
  return (record['seed'], record['revision']) == (seed, revision())


def start(name: str, a: argparse.Namespace) -> subprocess.Popen:
  """A process that does the missing trials of one part."""
  command = [sys.executable, '-m', 'tests.campaign', '--child', '--only', name, '--out', str(a.out)]
  command += ['--seed', str(a.seed), '--scale', str(a.scale)]
  with open(a.out / f'{name}.log', 'ab') as log:
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def work(name: str, seed: int, scale: float, out: Path) -> int:
  """In that process: the trials of a part that have no record."""
  part, path = PARTS[name], out / 'trials.jsonl'
  key = {'part': name, 'seed': seed, 'revision': revision()}
  done = {r['number'] for r in trials.read(path) if r.items() >= key.items() and 'count' in r}
  with tempfile.TemporaryDirectory(prefix='campaign-') as folder:
    tiny = Tiny(Path(folder))
    for number in range(math.ceil(part.trials * scale)):
      if number not in done:
        trials.append(path, key | {'number': number})  # begun
        trials.append(path, key | {'number': number} | trials.run(part, name, number, seed, tiny, out))
  return 0


def died(name: str, code: int, a: argparse.Namespace) -> bool:
  """Writes down a trial in which the process hung or was aborted; True where another is to go on."""
  path = a.out / 'trials.jsonl'
  mine = [r for r in trials.read(path) if r['part'] == name and is_of(r, a.seed)]
  if code == 0 or not mine or 'count' in mine[-1]:
    if code:
      raise SystemExit(f'error: the process of {name} ended with code {code}: see {a.out / name}.log')
    return False
  kind = 'hang' if code == 1 else 'unfit end'
  failure = f'{kind}: the process ended with code {code}, see {name}.log'
  trials.append(path, mine[-1] | {'count': 1, 'failures': [failure], 'skipped': False, 'seconds': 0.0})
  return True


if __name__ == '__main__':
  sys.exit(main())
