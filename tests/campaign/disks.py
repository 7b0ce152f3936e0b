"""A disk that is full sooner or later, under the run, its corpus or its log; then there is room again."""

import random
import subprocess
import sys
from pathlib import Path

from tests.campaign.tiny import Session, Tiny, unfit, write_text

# Becomes the command in a mount of its own, which two cores share with nobody.
MOUNT = 'mount -t tmpfs -o size=24m tmpfs {} && exec "$0" "$@"'
SCRIPT = """
import random, sys
from pathlib import Path
from tests.campaign import disks
failure = disks.inside(Path(sys.argv[1]), Path(sys.argv[2]), random.Random(sys.argv[3]))
print(failure)
"""


def possible() -> bool:
  """Whether this machine lets a process mount."""
  try:
    command = ['unshare', '--mount', '--map-root-user', 'sh', '-c', 'mount -t tmpfs tmpfs /mnt']
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
  except OSError:
    return False


def trial(tiny: Tiny, folder: Path, rng: random.Random, number: int) -> tuple[int, list[str]] | None:
  """One full disk; None where nothing can be mounted."""
  if not possible():
    return None
  disk = folder / 'disk'
  disk.mkdir()
  mount = ('unshare', '--mount', '--map-root-user', 'sh', '-c', MOUNT.format(disk))
  command = [*mount, sys.executable, '-c', SCRIPT, str(tiny.folder), str(disk), str(rng.random())]
  said = Session(command, tiny.environment | {'PYTHONPATH': '.'}, disk).end()
  if said.code:
    return 1, [f'unfit end: {said.err[-500:]}']
  return 1, [said.out.strip()] if said.out.strip() else []


def inside(folder: Path, disk: Path, rng: random.Random) -> str:
  """The trial itself, where disk is a file system of 24 MB; '' or the failure."""
  tiny = Tiny(folder)
  what = rng.choice(('run', 'run', 'run', 'corpus', 'log'))
  workdir = disk / 'run' if what == 'run' else disk.with_name('run')
  fields = ()
  if what == 'corpus':
    tiny.text = disk.with_name('text')
    write_text(tiny.text)
    fields = (f'data.dir={disk}/data',)
  filler = disk / 'filler'  # leaves so many bytes free:
  room = int(rng.choice((0, 4, 20, 50, 200, 1200, 1800, 3000)) * rng.uniform(500, 1500))
  with open(filler, 'wb', buffering=0) as file:
    file.write(bytes(max(0, (24 << 20) - room - 8192)))
  out = [f'--config.{field}' for field in fields]
  session = tiny.start(workdir, *out)
  if what == 'log':
    session.process.kill()
    session.end()
    return log(tiny, disk, workdir)
  said = session.end()
  if failure := unfit(said):
    return f'{failure} [{what}, {room} bytes free]'
  if said.code == 2:
    return f'unfit end: a full disk is called a mistake: {said.err[-300:]}'
  filler.unlink()
  said = tiny.start(workdir, *out).end()
  failure = unfit(said) or (f'unfit end: {said.err[-300:]}' if said.code else '')
  return failure or tiny.difference(workdir)


def log(tiny: Tiny, disk: Path, workdir: Path) -> str:
  """'' where a run whose stdout and stderr go to the full disk ends right all the same."""
  to_disk = ('sh', '-c', f'exec "$0" "$@" > {disk}/out 2> {disk}/err')
  said = tiny.start(workdir, before=to_disk).end()
  return tiny.difference(workdir) if said.code == 0 else f'unfit end: code {said.code} with a full log'
