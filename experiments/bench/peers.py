"""`mhc bench peers`: one sublayer's connection, forward and backward on CPU, beside other people's code.

Every implementation runs in a process and an environment of its own (sublayers.py), which holds its compiled
function and answers one request at a time, so that rounds of all are interleaved. One thread each. The
environments are made where they are missing, of the pins in requirements/peers/.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mhc_jax
from mhc_jax.errors import ConfigError, require

from ..workers import ONE_THREAD
from .sublayers import ITERATIONS, SEQUENCES, STREAMS
from .timing import summary

ROOT = Path(mhc_jax.__file__).parent.parent
PINS = ROOT / 'requirements' / 'peers'
PYTHONS = {'maxtext': '3.12', 'tokamax': '3.12', 'torch': '3.11'}  # environment -> the Python it needs
OURS = 'mhc_jax'
TOKENS = 2048


class Peer(NamedTuple):
  """environment: of PYTHONS, None for this one. The rest is for the reader."""

  environment: str | None
  title: str
  computes: str


PEERS = {
  OURS: Peer(None, 'mhc_jax', 'mHC as published: 20 iterations, no eps; norm without a weight'),
  'maxtext': Peer('maxtext', 'MaxText', '20 iterations with eps; norm with a weight'),
  'maxtext_lite': Peer(
    'maxtext',
    'MaxText, mHC-lite',
    'no iterations: a softmax over the 24 permutations, so 32 coordinates in place of 24; norm with a weight',
  ),
  'tokamax': Peer(
    'tokamax',
    'tokamax, XLA',
    '20 iterations with eps; norm without a weight; streams and branch in bfloat16, as it takes no others '
    '(half the bytes), coefficients in float32',
  ),
  'transformers': Peer(
    'torch', 'transformers, eager', 'DeepSeek-V4: 20 iterations with eps; norm without a weight'
  ),
  'transformers_compiled': Peer('torch', 'transformers, torch.compile', 'the same, compiled by inductor'),
  'lucidrains': Peer(
    'torch',
    'lucidrains, eager',
    '20 iterations with a clamp; norms per stream with a weight; one map of C for all streams in place of '
    'n C, so a quarter of the parameters',
  ),
  'lucidrains_compiled': Peer('torch', 'lucidrains, torch.compile', 'the same, compiled by inductor'),
}


def interpreter(version: str) -> str:
  """The command of a Python of that version; raises ConfigError if none runs."""
  name = f'python{version}'
  found = sorted(Path.home().glob(f'.pyenv/versions/{version}.*/bin/{name}'))
  for command in (name, *map(str, found)):
    with contextlib.suppress(OSError):
      if subprocess.run([command, '--version'], capture_output=True, check=False).returncode == 0:
        return command
  raise ConfigError(f'the peers need {name}: install it, or put it into PATH')


def make(folder: Path, name: str) -> Path:
  """The Python of the environment `name` under folder, which is made of its pins where it is not yet."""
  pins, environment = PINS / f'{name}.txt', folder / name
  require(pins.exists(), f'{pins} is not here: mhc bench peers needs a checkout of the repository')
  python, made_of = environment / 'bin' / 'python', environment / 'made_of.txt'
  if made_of.exists() and made_of.read_text() == pins.read_text():
    return python
  print(f'installing {name} in {environment}', file=sys.stderr, flush=True)
  subprocess.run([interpreter(PYTHONS[name]), '-m', 'venv', '--clear', environment], check=True)
  subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--requirement', pins], check=True)
  made_of.write_text(pins.read_text())
  return python


class Child:
  """A process of sublayers.py that has compiled its function; about: what it said of itself."""

  def __init__(self, name: str, python: Path | str, width: int, tokens: int) -> None:
    flags = f'{os.environ.get("XLA_FLAGS", "")} {ONE_THREAD}'.strip()
    environment = os.environ | {'XLA_FLAGS': flags, 'OMP_NUM_THREADS': '1', 'JAX_PLATFORMS': 'cpu'}
    environment['PYTHONPATH'] = str(ROOT) if PEERS[name].environment is None else ''
    script = Path(__file__).with_name('sublayers.py')
    self.name = name
    self.process = subprocess.Popen(
      [python, '-P', script, name, str(width), str(tokens)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    try:
      self.about = self._answer()
    except BaseException:
      self.close()
      raise

  def _answer(self) -> dict[str, Any]:
    line = self.process.stdout.readline()
    require(line, f'{self.name} ended without an answer: what it printed says why')
    return json.loads(line)

  def time(self, calls: int) -> dict[str, float]:
    """Seconds of a call, `cpu` of its process (user and system) and `wall`."""
    print(calls, file=self.process.stdin, flush=True)
    return self._answer()

  def close(self) -> None:
    """Ends the process."""
    self.process.kill()
    self.process.communicate()


@contextlib.contextmanager
def started(pythons: dict[str, Path | str], width: int, tokens: int) -> Iterator[dict[str, Child]]:
  """A child of each name, ready; one after the other, as compiling takes all cores. Ends them."""
  children: dict[str, Child] = {}
  try:
    for name, python in pythons.items():
      print(f'width {width}: compiling {name}', file=sys.stderr, flush=True)
      children[name] = Child(name, python, width, tokens)
    yield children
  finally:
    for child in children.values():
      child.close()


def rounds(children: dict[str, Child], repeats: int, calls: int) -> dict[str, list[dict[str, float]]]:
  """What every child answered in each of the interleaved rounds, after one that is not measured."""
  answers: dict[str, list[dict[str, float]]] = {name: [] for name in children}
  for round_ in range(repeats + 1):
    for name, child in children.items():
      answer = child.time(calls)
      if round_:
        answers[name].append(answer)
  return answers


def measure(pythons: dict[str, Path | str], width: int, tokens: int, repeats: int, calls: int) -> dict:
  """Of each implementation: milliseconds of a call, CPU and wall, and CPU over ours in the same round."""
  with started(pythons, width, tokens) as children:
    answers = rounds(children, repeats, calls)
    about = {name: child.about for name, child in children.items()}
  ours = [answer['cpu'] for answer in answers[OURS]]
  return {
    name: about[name]
    | {f'{key}_ms': summary([1e3 * answer[key] for answer in of]) for key in ('cpu', 'wall')}
    | {'over_ours': summary([answer['cpu'] / base for answer, base in zip(of, ours, strict=True)])}
    for name, of in answers.items()
  }


def machine() -> dict[str, Any]:
  """Of the whole benchmark."""
  model = platform.processor() or platform.machine()
  with contextlib.suppress(OSError):
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    model = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), model)
  return {'cpu': model, 'cores': os.cpu_count(), 'load': os.getloadavg()[0]}


def bench_peers(args: argparse.Namespace) -> dict[str, Any]:
  """All sizes of args.widths; writes peers.json and peers.md into args.out, and prints the page's table."""
  folder = Path(args.environments)
  made = {name: make(folder, name) for name in PYTHONS}
  pythons = {name: made[p.environment] if p.environment else sys.executable for name, p in PEERS.items()}
  out, before, widths = Path(args.out), machine(), {}
  out.mkdir(parents=True, exist_ok=True)
  for width in map(int, args.widths.split(',')):
    widths[str(width)] = measure(pythons, width, TOKENS, args.repeats, args.calls)
    report = {
      'settings': {'tokens': TOKENS, 'repeats': args.repeats, 'calls': args.calls},
      'machine': before | {'load_after': os.getloadavg()[0]},
      'widths': widths,
    }
    # After each, as one takes minutes.
    (out / 'peers.json').write_text(json.dumps(report, indent=1) + '\n')
    (out / 'peers.md').write_text(page(report))
    print(table(report), file=sys.stderr, flush=True)
  return report


def table(report: dict[str, Any]) -> str:
  """CPU milliseconds and, in brackets, how many times ours, by implementation and width; Markdown."""
  widths = report['widths']
  lines = [
    '| CPU ms of a call (over ours, least to most) | ' + ' | '.join(f'C = {w}' for w in widths) + ' |',
    '|---' * (1 + len(widths)) + '|',
  ]
  for name, peer in PEERS.items():
    cells = []
    for of in widths.values():
      cpu, over = of[name]['cpu_ms'], of[name]['over_ours']
      ratio = f' ({over["median"]:.2f}; {over["min"]:.2f} to {over["max"]:.2f})' if name != OURS else ''
      cells.append(f'{cpu["median"]:.1f}{ratio}')
    lines.append(f'| {peer.title} | ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def page(report: dict[str, Any]) -> str:
  """docs/peers.md."""
  settings, on, of = report['settings'], report['machine'], next(iter(report['widths'].values()))
  versions = [
    f'| {peer.title} | {peer.computes} | '
    + ', '.join(f'{key} {value}' for key, value in of[name]['versions'].items())
    + ' |'
    for name, peer in PEERS.items()
  ]
  return f"""# One sublayer beside other implementations, on CPU

Made by `mhc bench peers --environments FOLDER --out docs` from `peers.json` beside it; not edited by hand.

The connection of one sublayer: coefficients from the streams, read, write, for a branch that is the identity;
forward and the gradients of the streams and all parameters. {settings['tokens']} tokens in {SEQUENCES}
sequences, {STREAMS} streams, {ITERATIONS} Sinkhorn iterations, float32, one thread each. CPU seconds (user
and system) of the process; medians of {settings['repeats']} interleaved rounds of {settings['calls']} calls,
after one round that is not measured. The ratio is taken within a round. All processes keep freed memory
(glibc's thresholds and two arenas, as mhc sets for its own), which spares each page faults.

Machine: {on['cpu']}, {on['cores']} cores, load {on['load']:.1f} before and {on['load_after']:.1f} after.

{table(report)}

| | what it computes | versions |
|---|---|---|
{chr(10).join(versions)}
"""
