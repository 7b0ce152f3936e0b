"""`mhc fit POINTS.csv`: one law fitted to a CSV, every number as JSON.

Where: the command line of fitting/; `document` is also what the report stores.
"""

import argparse
import json
import sys
from pathlib import Path

from mhc_jax.command import check_folder, end_with_message
from mhc_jax.errors import ConfigError

from .fitting.laws import HUBER_WIDTH, LAWS, LOSSES, ArmModel

EXAMPLES = """examples:
  mhc fit points.csv --law chinchilla --columns N=params,D=tokens,loss=loss
  mhc fit points.csv --law compute --columns C=flops,loss=loss,arm=model,seed=seed \\
      --arms common --out fits.json
  mhc fit points.csv --columns N=params,C=flops,loss=loss --drop-highest 5 \\
      --loss huber --delta 0.001 --resamples 2000 --predict N=7e10,D=1.4e12
  mhc fit points.csv --columns N=params,D=tokens,loss=loss,arm=model,axis:rank=r
"""


def _parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    'mhc fit',
    description='Fit a scaling law to a CSV of runs.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument('points', type=Path, help='CSV with one row per run')
  p.add_argument('--law', default='chinchilla', choices=sorted(LAWS))
  p.add_argument(
    '--columns',
    default='N=N,D=D,loss=loss',
    help='ROLE=COLUMN,...; roles N D C W H loss sigma arm seed cluster size, and axis:NAME for a rank r '
    'with a multiplier r^phi (default %(default)s)',
  )
  p.add_argument('--out', type=Path, help='JSON file (default: print to standard output)')
  p.add_argument('--loss', default='huber', choices=LOSSES, help='default %(default)s')
  p.add_argument(
    '--delta', default=str(HUBER_WIDTH), help="Huber width in log loss, or 'auto' (default %(default)s)"
  )
  p.add_argument(
    '--arms',
    default='common',
    choices=('none', 'common', 'N', 'D', 'both'),
    help='multipliers where the arm column holds several arms (default %(default)s)',
  )
  p.add_argument('--reference', help='the arm with m = 1 (default: the first in the file)')
  p.add_argument(
    '--free', default='', metavar='E,exponents', help='what every arm has of its own (default: all is shared)'
  )
  p.add_argument(
    '--predict',
    action='append',
    default=[],
    metavar='N=..,D=..',
    help='loss there with 95 %% bands; [,arm=NAME][,axis:NAME=r]; may be repeated',
  )
  p.add_argument('--drop-highest', type=int, default=0, help='leave out the K highest losses')
  p.add_argument('--resamples', type=int, default=1000, help='bootstrap draws (default %(default)s)')
  p.add_argument('--seed', type=int, default=0, help='of the bootstrap')
  return p


def parse_delta(text: str) -> float | str:
  """A positive number or 'auto'."""
  if text == 'auto':
    return text
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not value > 0:
    raise ConfigError(f"--delta {text}: give a positive number or 'auto'")
  return value


def parse_free(text: str) -> dict[str, bool]:
  """'E,exponents' -> the fields of ArmModel that free them."""
  names = {'E': 'free_e', 'exponents': 'free_exponents'}
  asked = [part for part in text.split(',') if part]
  for part in asked:
    if part not in names:
      raise ConfigError(f'--free {part}: choose from {", ".join(names)}')
  return {names[part]: True for part in asked}


def run(a: argparse.Namespace) -> dict[str, object]:
  """The JSON document for parsed arguments; raises ConfigError."""
  # scipy and pandas take longer to import than --help may take.
  from mhc_jax.storage import finite

  from .compare import nested, rollout
  from .fitting.document import document
  from .fitting.estimate import fit
  from .fitting.points import drop_highest, parse_columns, read_points
  from .fitting.prediction import parse_point, prediction

  points = read_points(a.points, parse_columns(a.columns))
  if not 0 <= a.drop_highest < len(points):
    raise ConfigError(f'--drop-highest {a.drop_highest}: the file has {len(points)} rows')
  points, excluded = drop_highest(points, a.drop_highest)
  if a.reference is not None and a.reference not in points.arms:
    raise ConfigError(f'--reference {a.reference}: the arms are {", ".join(points.arms)}')
  if a.resamples < 0 or a.seed < 0:
    raise ConfigError(f'--resamples {a.resamples} --seed {a.seed}: neither may be negative')
  law, width = LAWS[a.law], parse_delta(a.delta)
  arms = ArmModel(a.arms, a.reference or points.arms[0], tuple(points.axes), **parse_free(a.free))
  asked = [parse_point(text) for text in a.predict]
  fitted = fit(points, law, arms, a.loss, width)
  out = document(fitted, a.resamples, progress=True, seed=a.seed)
  out['optimum'] = finite(fitted.parameters)  # also where `verdicts` forbids quoting it
  out['excluded'] = excluded
  out['rollout'] = finite(rollout(fitted, width))
  out['predictions'] = finite([prediction(fitted, at) for at in asked])
  candidates = nested(fitted, width)
  if candidates:
    out['nested'] = finite([c.as_json() for c in candidates])
  return out


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code. Raises ConfigError for bad input; nothing is written then."""
  a = _parser().parse_args(argv)
  if a.out is not None:  # before the work, whose result would be lost
    check_folder(a.out.parent, '--out')
  text = json.dumps(run(a), indent=1)
  if a.out is None:
    print(text)
  else:
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(text + '\n')
    print(f'wrote {a.out}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
