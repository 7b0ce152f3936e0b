"""`mhc fit POINTS.csv`: one law, or IsoFLOP optima, from a CSV; a summary here, every number by --out.

Where: the command line of fitting/ and optima.py; fitting/document.py makes what the report stores, too.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError
from mhc_jax.paths import check_folder, expand, user_path

from .fitting.laws import HUBER_WIDTH, LAWS, LOSSES, ArmModel, Law, Points

RESAMPLES, MOST_RESAMPLED = 1000, 2000
EXAMPLES = """examples:
  mhc fit points.csv --law chinchilla --columns N=params,D=tokens,loss=loss
  mhc fit points.csv --law compute --columns C=flops,loss=loss,arm=model,seed=seed \\
      --arms common --out fits.json --figure fit.png
  mhc fit points.csv --columns N=params,C=flops,loss=loss --drop-highest 5 \\
      --loss huber --delta 0.001 --resamples 2000 --predict N=70B,D=1.4T
  mhc fit points.csv --columns N=params,D=tokens,loss=loss,arm=model,axis:rank=r
  mhc fit points.csv --columns 'N=params,D=tokens,loss="loss, val"' --tie alpha=beta --pin E=1.69
  mhc fit points.csv --columns N=params,D=tokens,loss=loss --law 'E + A*(N*D^0.5)^-alpha'
  mhc fit points.csv --isoflop --columns N=params,C=flops,loss=loss --predict C=1e21
"""


def _parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    'mhc fit',
    description='Fit a scaling law to a CSV of runs, or find the best size and token count at each budget.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument('points', type=user_path, help='CSV with one row per run')
  p.add_argument(
    '--columns',
    default='N=N,D=D,loss=loss',
    help='ROLE=COLUMN,...; roles N D C W H loss sigma arm seed cluster size, and axis:NAME for a rank r '
    'with a multiplier r^phi; quote a column with a comma (default %(default)s)',
  )
  p.add_argument(
    '--where', default='', metavar='COLUMN=VALUE,...', help='only rows with these cells, as they are written'
  )
  p.add_argument('--drop-highest', type=int, default=0, metavar='K', help='leave out the K highest losses')
  _law_options(p.add_argument_group('law'))
  what = p.add_argument_group('what is found')
  what.add_argument(
    '--isoflop',
    action='store_true',
    help='N*(C), D*(C) and D*/N* from minima at equal compute; no law of the loss',
  )
  what.add_argument('--level', type=float, default=0.95, help='of intervals and bands (default %(default)s)')
  what.add_argument(
    '--predict',
    action='append',
    default=[],
    metavar='N=..,D=..',
    help='loss there with bands; [,arm=NAME][,axis:NAME=r][,sigma=relative noise of a run][,loss=measured]; '
    'with --isoflop C=..[,arm=NAME]; may be repeated',
  )
  what.add_argument(
    '--anyway', action='store_true', help='predict also where the rules forbid it, marked as extrapolated'
  )
  what.add_argument(
    '--resamples',
    type=int,
    help=f'bootstrap draws (default {RESAMPLES}, and none above {MOST_RESAMPLED} rows)',
  )
  what.add_argument('--seed', type=int, default=0, help='of the bootstrap')
  what.add_argument(
    '--out', metavar='FILE', help="every number as JSON; '-': on standard output, without the summary"
  )
  what.add_argument(
    '--figure', type=user_path, metavar='FILE.png', help='runs and law; FILE.svg and FILE.csv beside it'
  )
  return p


def _law_options(p: argparse._ArgumentGroup) -> None:
  p.add_argument(
    '--law',
    default=None,
    metavar='LAW',
    help=f"{', '.join(LAWS)}; 'auto': what the grid can carry; or terms, 'E + A*N^-alpha + B*(C/N)^-beta' "
    '(default chinchilla)',
  )
  p.add_argument(
    '--loss',
    default='huber',
    choices=LOSSES,
    help='default %(default)s; huber_raw, mse: in nats, also the curves of --isoflop',
  )
  p.add_argument(
    '--delta',
    help="Huber width in log loss or nats, or 'auto', which follows the noise "
    f'(default {HUBER_WIDTH:g}, as in the literature; auto where arms are compared, as in the report)',
  )
  p.add_argument('--tie', action='append', default=[], metavar='alpha=beta', help='one exponent for two')
  p.add_argument('--pin', action='append', default=[], metavar='E=1.69', help='a parameter that is known')
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


def parse_delta(text: str | None, arms: int = 1) -> float | str:
  """A positive number or 'auto'; None is the literature's width for one arm, and auto for several."""
  if text is None:
    return HUBER_WIDTH if arms == 1 else 'auto'
  if text == 'auto':
    return text
  try:
    value = float(text)
  except ValueError:
    value = -1.0
  if not value > 0:
    raise ConfigError(f"--delta {text}: give a positive number or 'auto'")
  if not 1e-9 <= value <= 1e9:
    raise ConfigError(f'--delta {text}: give a number between 1e-9 and 1e9')
  return value


def parse_free(text: str) -> dict[str, bool]:
  """'E,exponents' -> the fields of ArmModel that free them."""
  names = {'E': 'free_e', 'exponents': 'free_exponents'}
  asked = [part for part in text.split(',') if part]
  for part in asked:
    if part not in names:
      raise ConfigError(f'--free {part}: choose from {", ".join(names)}')
  return {names[part]: True for part in asked}


def law_of(a: argparse.Namespace, points: Points) -> tuple[Law, list[str]]:
  """The law of --law, --tie and --pin, and notes on its choice; raises ConfigError."""
  from .fitting.formula import parse_law
  from .fitting.identify import choose_law

  text, notes = a.law or 'chinchilla', []
  if text == 'auto':
    alone = {'C': 'compute', 'N': 'params', 'D': 'tokens'}
    given = [name for name in alone if name in points.log_x]
    if len(given) == 1:
      law = LAWS[alone[given[0]]]
      notes.append(f'{law.formula} is fitted: there is no other column.')
    elif len(given) == 3:
      choice = choose_law(points)
      if choice.law is None:
        raise ConfigError(f'--law auto: {choice.reason}')
      law, notes = choice.law, [choice.reason]
    else:
      raise ConfigError('--law auto: give N, D or C in --columns')
  elif text in LAWS:
    law = LAWS[text]
  elif any(sign in text for sign in '+*^/'):
    law = parse_law(text)
  else:
    raise ConfigError(f'--law {text}: choose from {", ".join(LAWS)}, auto, or write its terms')
  for tied in a.tie:
    law = law.tie(*_pair('--tie', tied, 'alpha=beta'))
  for pinned in a.pin:
    name, value = _pair('--pin', pinned, 'E=1.69')
    try:
      law = law.pin(name, float(value))
    except ValueError as e:
      raise (
        e if isinstance(e, ConfigError) else ConfigError(f'--pin {pinned}: {value!r} is no number')
      ) from None
  freed = parse_free(a.free)
  names = {name for name, _ in law.pinned}
  if ('free_e' in freed and 'E' in names) or ('free_exponents' in freed and names & set(law.exponents)):
    raise ConfigError(f'--free {a.free}: what is pinned cannot be free')
  return law, notes


def _pair(option: str, text: str, example: str) -> list[str]:
  parts = text.split('=')
  if len(parts) != 2 or not all(parts):
    raise ConfigError(f'{option} {text}: write it like {option} {example}')
  return parts


def read(a: argparse.Namespace) -> tuple[Points, list[str], list[str]]:
  """The points of --columns, --where and --drop-highest; sentences on excluded runs, and notes."""
  from .fitting.points import drop_highest, parse_columns, read_points
  from .fitting.table import check_columns, read_table

  table, columns, notes = read_table(a.points), parse_columns(a.columns), []
  for condition in filter(None, a.where.split(',')):
    column, value = _pair('--where', condition, 'dataset=c4')
    check_columns(a.points, table, {'--where': column})
    kept = table[table[column].str.strip() == value]
    if kept.empty:
      raise ConfigError(
        f'--where {condition}: no row has it; there are {", ".join(sorted(set(table[column]))[:9])}'
      )
    notes.append(f'{len(kept)} of {len(table)} rows have {condition}')
    table = kept
  points = read_points(a.points, columns, table)
  if not 0 <= a.drop_highest < len(points):
    raise ConfigError(f'--drop-highest {a.drop_highest}: the file has {len(points)} rows')
  points, excluded = drop_highest(points, a.drop_highest)
  return points, excluded, notes


def fit_law(a: argparse.Namespace) -> tuple[dict[str, object], object]:
  """The JSON document of a law for parsed arguments, and the fit; raises ConfigError."""
  # scipy and pandas take longer to import than --help may take.
  from mhc_jax.storage import finite

  from .compare import nested, rollout
  from .fitting.document import document
  from .fitting.estimate import fit
  from .fitting.prediction import parse_point, prediction
  from .gain import gains, refused

  points, excluded, notes = read(a)
  if a.reference is not None and a.reference not in points.arms:
    raise ConfigError(f'--reference {a.reference}: the arms are {", ".join(points.arms)}')
  resamples = a.resamples
  if resamples is None:
    resamples = RESAMPLES if len(points) <= MOST_RESAMPLED else 0
  if resamples < 0 or a.seed < 0:
    raise ConfigError(f'--resamples {resamples} --seed {a.seed}: neither may be negative')
  width = parse_delta(a.delta, len(points.arms))
  law, chosen = law_of(a, points)
  arms = ArmModel(a.arms, a.reference or points.arms[0], tuple(points.axes), **parse_free(a.free))
  asked = [parse_point(text) for text in a.predict]
  fitted = fit(points, law, arms, a.loss, width)
  candidates = nested(fitted, width)
  changes = gains(fitted, candidates)
  out = document(fitted, resamples, True, a.seed, a.level, refused(changes))
  for name, value in finite(fitted.parameters).items():  # parameters are keys beside the others
    if out[name] != value and not (out[name] is None and name in out['verdicts']):
      raise ConfigError(f'--law: {name!r} means something else in the JSON: call the parameter otherwise')
  out['gains'] = finite(changes)
  out['optimum'] = finite(fitted.parameters)  # also where `verdicts` forbids quoting it
  out['excluded'], out['notes'] = excluded, notes + chosen + out['notes']
  out['rollout'] = finite(rollout(fitted, width))
  out['predictions'] = finite([prediction(fitted, at, a.level, a.anyway) for at in asked])
  if candidates:
    out['nested'] = finite([c.as_json() for c in candidates])
  return out, fitted


def fit_isoflop(a: argparse.Namespace) -> tuple[dict[str, object], tuple[Points, list]]:
  """The JSON document of --isoflop, and the points with their optima; raises ConfigError."""
  from mhc_jax.storage import finite

  from .fitting.prediction import parse_point
  from .optima import as_json, optima_of_points, predicted

  for option in ('law', 'tie', 'pin', 'free', 'reference'):
    if getattr(a, option):
      raise ConfigError(f'--isoflop fits no law of the loss: leave out --{option}')
  points, excluded, notes = read(a)
  in_nats = a.loss in ('mse', 'huber_raw')
  best = optima_of_points(points, a.level, in_nats)
  asked = [parse_point(text) for text in a.predict]
  budgets = max(len(o.budgets) for o in best)
  out = {
    'sentence': f'Minima of {len(points)} runs at equal compute, of curves through '
    f'{"the loss" if in_nats else "log loss"}: up to {budgets} budgets to an arm.',
    'in_nats': in_nats,
    'level': a.level,
    'n_points': len(points),
    'notes': notes + [f'excluded: {sentence}' for sentence in excluded],
    'optima': [as_json(o) for o in best],
    'predictions': [row for at in asked for row in predicted(best, at)],
  }
  return finite(out), (points, best)


def run(a: argparse.Namespace) -> dict[str, object]:
  """The JSON document for parsed arguments, after the figure is written; raises ConfigError."""
  if not 0 < a.level < 1:
    raise ConfigError(f'--level {a.level:g}: give a number between 0 and 1, like 0.95')
  if a.figure is not None and a.figure.suffix != '.png':
    raise ConfigError(f'--figure {a.figure}: name a .png file')
  import numpy as np

  with warnings.catch_warnings():
    # What overflows or divides by zero is judged, and said in words, by the rules of what may be printed.
    warnings.simplefilter('ignore', RuntimeWarning)
    try:
      doc, shown = (fit_isoflop if a.isoflop else fit_law)(a)
    except (ArithmeticError, np.linalg.LinAlgError) as error:
      raise ConfigError(f'no fit: {error}; some number of the file or the options is too extreme') from None
    if a.figure is not None:
      from .figures.draw import save
      from .figures.fit import fitted_curve, isoflop_curves
      from .output import staged

      drawing = isoflop_curves(*shown) if a.isoflop else fitted_curve(shown, a.level)
      with staged(a.figure.parent, lambda _: False, '--figure') as new:
        save(drawing, new, a.figure.stem)
  return doc


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code. Raises ConfigError for bad input; nothing is written then."""
  a = _parser().parse_args(argv)
  a.out = a.out and expand(a.out)
  from .output import check_file, write_file

  for option, path in (('--out', a.out), ('--figure', a.figure)):
    if path is not None and path != '-':  # before the work, whose result would be lost
      check_folder(Path(path).parent, option)
      check_file(Path(path), option)
  doc = run(a)
  text = json.dumps(doc, indent=1)
  if a.out == '-':
    print(text)
    return 0
  from .fitting.summary import isoflop_summary, summary

  print((isoflop_summary if a.isoflop else summary)(doc))
  if a.out is not None:
    write_file(Path(a.out), text + '\n', '--out')
    print(f'wrote {a.out}')
  if a.figure is not None:
    print(f'wrote {a.figure}, and its numbers as .csv')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
