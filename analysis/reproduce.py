"""`mhc reproduce POINTS.csv --expect FILE`: check a published answer on its data.

Where: beside fit.py; exit code 0 when every number is met, 1 when one is missed, 2 for bad input.
FILE (JSON) says how the answer was made and what it is; analysis/expected/ holds two:
  chinchilla_besiroglu.json  240 points digitised by Besiroglu et al. 2404.10102
  porian.json                the 15 IsoFLOP exponents of Porian et al. 2406.19146
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import ConfigError
from mhc_jax.paths import user_path
from mhc_jax.run_folder import load_json

from .fitting.estimate import fit
from .fitting.intervals import bootstrap, derived, percentile
from .fitting.laws import HUBER_WIDTH, LAWS, ArmModel
from .fitting.points import drop_highest, parse_columns, read_points
from .fitting.table import check_columns, read_table
from .minima import METHODS
from .optima import optimum

EXAMPLES = """examples:
  mhc reproduce chinchilla_besiroglu.csv \\
      --expect chinchilla_besiroglu
  mhc reproduce porian_isoflops.csv --expect porian

FILE for a law:
  {"method": "law", "law": "chinchilla", "columns": "N=params,D=tokens,loss=loss",
   "drop_highest": 0, "loss": "huber", "delta": 0.001, "resamples": 2000,
   "expect": {"objective": {"at_most": 0.00102}, "alpha": {"value": 0.3473, "within": 0.0005}},
   "intervals": {"alpha": {"value": [0.317, 0.373], "within": 0.01}}}
FILE for IsoFLOP optima (N* = k C^exponent per group of rows):
  {"method": "isoflop", "columns": "N=n,C=flops,loss=loss", "interpolation": "akima",
   "group_by": ["dataset"], "within": 0.004,
   "expect": [{"group": ["rw"], "n_exponent": 0.5}]}
"""


Line = tuple[str, str, str, bool]  # quantity, expected in words, found, met


def check_value(name: str, value: float, want: dict[str, float]) -> Line:
  """One number against {'value', 'within'} or {'at_most'}."""
  if 'at_most' in want:
    met = value <= want['at_most']
    return (name, f'<= {want["at_most"]:.10g}', f'{value:.12g}', met)
  met = abs(value - want['value']) <= want['within']
  return (name, f'{want["value"]:g} +- {want["within"]:g}', f'{value:.6g}', met)


def check_law(path: Path, spec: dict) -> list[Line]:
  """Fits the law of `spec` and compares parameters, objective and bootstrap intervals."""
  points = read_points(path, parse_columns(spec['columns']))
  points, dropped = drop_highest(points, spec.get('drop_highest', 0))
  for sentence in dropped:
    print(f'excluded {sentence}')
  if spec['law'] not in LAWS:
    raise ConfigError(f'--expect: unknown law {spec["law"]!r}; laws: {", ".join(LAWS)}')
  law = LAWS[spec['law']]
  begin = time.perf_counter()
  fitted = fit(points, law, ArmModel('none'), spec.get('loss', 'huber'), spec.get('delta', HUBER_WIDTH))
  print(
    f'{len(points)} points, {fitted.starts_at_optimum} of {fitted.starts} starts at the optimum, '
    f'{time.perf_counter() - begin:.2f} s'
  )
  numbers = fitted.parameters | derived(fitted, fitted.theta_P) | {'objective': fitted.objective}
  lines = [_checked(name, numbers, want) for name, want in spec.get('expect', {}).items()]
  if spec.get('intervals'):
    begin = time.perf_counter()
    sample = bootstrap(fitted, spec.get('resamples', 2000), progress=True)
    print(f'{len(sample.theta_BP)} resamples, {time.perf_counter() - begin:.1f} s')
    ends = percentile(fitted, sample)
    for name, want in spec['intervals'].items():
      for k, side in enumerate(('lower', 'upper')):
        one = {'value': want['value'][k], 'within': want['within']}
        lines.append(_checked(f'{name} {side} 95 %', {f'{name} {side} 95 %': ends[name][k]}, one))
  return lines


def _checked(name: str, numbers: dict[str, float], want: dict) -> Line:
  if name not in numbers:
    raise ConfigError(f'--expect: the fit has no {name!r}; it has {", ".join(numbers)}')
  return check_value(name, numbers[name], want)


def check_isoflop(path: Path, spec: dict) -> list[Line]:
  """Exponent of N*(C) for every group of rows against the published one."""
  table, columns = read_table(path), parse_columns(spec['columns'])
  check_columns(path, table, {f'group {k}': name for k, name in enumerate(spec['group_by'], 1)})
  lines = []
  for want in spec['expect']:
    picked = np.ones(len(table), bool)
    for name, value in zip(spec['group_by'], want['group'], strict=True):
      picked &= (table[name] == str(value)).to_numpy()
    label = 'N* exponent, ' + ' '.join(map(str, want['group']))
    if not picked.any():
      raise ConfigError(f'{path}: no rows for {label}')
    points = read_points(path, columns, table[picked])
    log_x, method = points.log_x, spec.get('interpolation', 'akima')
    best = optimum('all', 'N*', method, (log_x['C'], log_x['N']), points.loss)
    if best.law is None:
      raise ConfigError(f'{path}: {label}: fewer than two budgets have a minimum inside')
    tolerance = want.get('within', spec.get('within', 0.004))
    one = {'value': want['n_exponent'], 'within': tolerance}
    lines.append(check_value(f'{label} ({best.law.points} budgets)', best.law.exponent, one))
  return lines


def read_expectation(path: Path) -> dict:
  """The expectation file, or one of analysis/expected/ by name; ConfigError when it is none or incomplete."""
  named = Path(__file__).parent / 'expected' / f'{path}.json'
  path = path if path.is_file() or not named.is_file() else named
  if not path.is_file():
    raise ConfigError(f'--expect {path}: no such file')
  spec, trouble = load_json(path)
  if trouble:
    raise ConfigError(f'--expect {path}: {trouble}')
  needed = {'law': ('law', 'columns', 'expect'), 'isoflop': ('columns', 'group_by', 'expect')}
  if not isinstance(spec, dict) or spec.get('method') not in needed:
    raise ConfigError(f"--expect {path}: 'method' must be 'law' or 'isoflop'")
  for key in needed[spec['method']]:
    if key not in spec:
      raise ConfigError(f'--expect {path}: {key!r} is missing')
  kinds = {'columns': str, 'law': str, 'group_by': list, 'expect': dict if spec['method'] == 'law' else list}
  kinds |= {'interpolation': str, 'loss': str, 'intervals': dict, 'drop_highest': int, 'resamples': int}
  for key, kind in kinds.items():
    if key in spec and not isinstance(spec[key], kind):
      raise ConfigError(f'--expect {path}: {key!r} has the wrong type')
  if not spec['expect']:
    raise ConfigError(f"--expect {path}: 'expect' is empty")
  if spec.get('interpolation', 'akima') not in METHODS:
    raise ConfigError(f'--expect {path}: interpolation must be one of {", ".join(METHODS)}')
  _check_wants(path, spec)
  return spec


def _check_wants(path: Path, spec: dict) -> None:
  if spec['method'] == 'isoflop':
    for want in spec['expect']:
      group = want.get('group', []) if isinstance(want, dict) else None
      if not (
        _numbers(want, 'n_exponent') and isinstance(group, list) and len(group) == len(spec['group_by'])
      ):
        raise ConfigError(f'--expect {path}: {want} needs n_exponent and a group of {spec["group_by"]}')
    return
  for name, want in spec['expect'].items():
    if not (_numbers(want, 'at_most') or _numbers(want, 'value', 'within')):
      raise ConfigError(f"--expect {path}: {name} needs numbers 'value' and 'within', or 'at_most'")
  for name, want in spec.get('intervals', {}).items():
    ends = want.get('value') if isinstance(want, dict) else None
    if not (
      isinstance(ends, list) and len(ends) == 2 and _numbers(dict(enumerate(ends)) | want, 0, 1, 'within')
    ):
      raise ConfigError(f"--expect {path}: interval {name} needs 'value': [low, high] and 'within'")


def _numbers(want: object, *keys: object) -> bool:
  return isinstance(want, dict) and all(isinstance(want.get(key), int | float) for key in keys)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints one line per number and returns the exit code. Raises ConfigError for bad input."""
  parser = argparse.ArgumentParser(
    'mhc reproduce',
    description='Check a published scaling-law answer on its own data.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('points', type=user_path, help='CSV with one row per run')
  parser.add_argument('--expect', type=user_path, required=True, metavar='FILE')
  a = parser.parse_args(argv)
  spec = read_expectation(a.expect)
  lines = (check_law if spec['method'] == 'law' else check_isoflop)(a.points, spec)
  table = pd.DataFrame(lines, columns=['quantity', 'expected', 'found', 'met'])
  table['met'] = table['met'].map({True: 'met', False: 'MISSED'})
  print(table.to_string(index=False))
  missed = int((table['met'] != 'met').sum())
  print(f'{len(table) - missed} of {len(table)} met')
  return 1 if missed else 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
