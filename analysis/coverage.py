"""`mhc coverage`: do nominal 95 % intervals cover, and what can a sweep resolve?

Where: evidence, by simulation, for intervals.py (below 40 runs the quoted method is the delta method with
Student's t). Three designs with a known law:
  single   25 runs of L(N, D) = 1.8172 + 477.83 N^-.3473 + 2143.4 D^-.3672 (Chinchilla's optimum), five N
           over two decades x D/N in {5, 10, 20, 40, 80}, normal noise of 0.002 and 0.008 in log loss;
           'loss at 10x' is the predicted loss at ten times the compute of the largest run;
  resampled  the same runs with the percentile interval of the case bootstrap (200 resamples, every tenth
           simulation), which is quoted from 40 runs on: no target at 25;
  paired   four arms of L(C) = 1.5 + 1.2 (m C)^-.25 at six sizes over two decades, noise 0.003 in log loss,
           of whose variance the arms of one size share 0 or 70 %;
  power    two arms of L(C) = 1.9 + 2 (m C)^-.18 at five budgets over a factor of 256, m = 1.2, one seed,
           noise of 0.01 nats: the spread of log m.
Exit code 1 when a coverage is outside 90-98 % (paired: 90-99 %) or sd(log m) is above 0.03.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .fitting.estimate import Fit, fit
from .fitting.intervals import band, bootstrap, delta_method, percentile
from .fitting.laws import HUBER_WIDTH, LAWS, ArmModel, Points

EXAMPLES = """examples:
  mhc coverage --simulations 1000 --seed 0
  mhc coverage --simulations 50 --out coverage.json
"""
TRUE = {'E': 1.8172, 'A': 477.83, 'B': 2143.4, 'alpha': 0.3473, 'beta': 0.3672}
ARMS = {'a': 1.0, 'b': 1.2, 'c': 1.1, 'd': 1.15}
WANTED = {'single': (0.90, 0.98), 'paired': (0.90, 0.99)}
WANTED_SPREAD = 0.03
EVERY, RESAMPLES = 10, 200  # of design `resampled`: 100 simulations measure a coverage to 2 %


def _points_nd(n: np.ndarray, d: np.ndarray, loss: np.ndarray) -> Points:
  rows = np.arange(len(n))
  log_x = {'N': np.log(n), 'D': np.log(d), 'C': np.log(6 * n * d)}
  return Points(log_x, loss, np.full(len(n), 'one'), rows, n, rows)


def chinchilla_loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
  """The law of design `single`, nats per token."""
  return TRUE['E'] + TRUE['A'] * n ** -TRUE['alpha'] + TRUE['B'] * d ** -TRUE['beta']


def _fit_25(rng: np.random.Generator, noise: float, width: float | str) -> Fit:
  n, ratio = (v.ravel() for v in np.meshgrid(np.geomspace(5e7, 5e9, 5), [5, 10, 20, 40, 80]))
  d = n * ratio
  loss = chinchilla_loss(n, d) * np.exp(noise * rng.standard_normal(len(n)))
  return fit(_points_nd(n, d, loss), LAWS['chinchilla'], width=width, start_count=0)


def _covers(ends: dict[str, list[float]]) -> dict[str, bool]:
  return {name: ends[name][0] < TRUE[name] < ends[name][1] for name in ('E', 'alpha', 'beta')}


def resampled(rng: np.random.Generator, noise: float, width: float | str) -> dict[str, bool]:
  """One simulation: whether each interval of the case bootstrap covers."""
  fitted = _fit_25(rng, noise, width)
  return _covers(percentile(fitted, bootstrap(fitted, RESAMPLES, seed=int(rng.integers(2**31)))))


def single(rng: np.random.Generator, noise: float, width: float | str) -> dict[str, bool]:
  """One simulation: whether each interval covers."""
  fitted = _fit_25(rng, noise, width)
  out = _covers(delta_method(fitted))
  # Ten times the largest run's compute, split evenly over N and D.
  far_n, far_d = (np.array([v * 10**0.5]) for v in (5e9, 5e9 * 80))
  far = _points_nd(far_n, far_d, chinchilla_loss(far_n, far_d))
  b = band(fitted, far)
  return out | {'loss at 10x': bool(b.low[0] < far.loss[0] < b.high[0])}


def paired(rng: np.random.Generator, rho: float, width: float | str) -> dict[str, bool]:
  """One simulation of four paired arms: whether each interval covers."""
  c = np.repeat(np.geomspace(1, 100, 6), len(ARMS))
  m, arm = np.tile(list(ARMS.values()), 6), np.tile(list(ARMS), 6)
  size = np.repeat(np.arange(6), len(ARMS))
  shared = np.repeat(rng.standard_normal(6), len(ARMS))
  noise = 0.003 * (np.sqrt(rho) * shared + np.sqrt(1 - rho) * rng.standard_normal(len(c)))
  loss = (1.5 + 1.2 * (m * c) ** -0.25) * np.exp(noise)
  points = Points({'C': np.log(c)}, loss, arm, size, size, np.arange(len(c)))
  ends = delta_method(fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0))
  truth = {'E': 1.5, 'alpha': 0.25} | {f'm[{name}]': m for name, m in ARMS.items() if name != 'a'}
  return {name: ends[name][0] < value < ends[name][1] for name, value in truth.items()}


def power(rng: np.random.Generator, width: float | str) -> float:
  """One simulation of two arms: the fitted log m (true: log 1.2)."""
  c = np.tile(np.geomspace(1, 256, 5), 2)
  m, rows = np.repeat([1.0, 1.2], 5), np.arange(10)
  loss = 1.9 + 2 * (m * c) ** -0.18 + 0.01 * rng.standard_normal(10)
  points = Points({'C': np.log(c)}, loss, np.repeat(['a', 'b'], 5), rows, rows % 5, rows)
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0)
  return float(fitted.theta_P[fitted.theta_names.index('log m[b]')])


def simulate(simulations: int, seed: int, progress: bool) -> list[dict[str, object]]:
  """All designs for the CLI's default delta and the report's ('auto'); one row per number."""
  out = []
  for width in (HUBER_WIDTH, 'auto'):
    cases = [('single', f'noise {noise:g}', single, noise) for noise in (0.002, 0.008)]
    cases += [('resampled', f'noise {noise:g}', resampled, noise) for noise in (0.002, 0.008)]
    cases += [('paired', f'shared {rho:.0%}', paired, rho) for rho in (0.0, 0.7)]
    for design, case, function, value in cases:
      rng = np.random.default_rng(seed)
      count = -(-simulations // EVERY) if design == 'resampled' else simulations
      bar = tqdm(range(count), f'{design} {case}', disable=None if progress else True, leave=False)
      hits = [function(rng, value, width) for _ in bar]
      for name in hits[0]:
        rate = float(np.mean([hit[name] for hit in hits]))
        low, high = WANTED.get(design, (None, None))
        met = None if low is None else low <= rate <= high
        what = {'quantity': f'coverage of {name}', 'value': round(rate, 4), 'met': met}
        out.append({'design': design, 'case': case, 'delta': width} | what)
    rng = np.random.default_rng(seed)
    logs = [power(rng, width) for _ in range(simulations)]
    # Only the report's delta is held to the target: an L1-like fit gives up a quarter of the efficiency.
    spread = float(np.std(logs))
    met = spread <= WANTED_SPREAD if width == 'auto' else None
    base = {'design': 'power', 'case': 'noise 0.01 nats', 'delta': width}
    out.append(base | {'quantity': 'sd(log m)', 'value': round(spread, 4), 'met': met})
    mean = {'quantity': 'exp(mean log m)', 'value': round(float(np.exp(np.mean(logs))), 4), 'met': None}
    out.append(base | mean)
  return out


def main(argv: list[str] | None = None) -> int:
  """Command line; returns 0 when every target is met, 1 when one is missed."""
  parser = argparse.ArgumentParser(
    'mhc coverage',
    description='Simulated coverage of the default intervals, and the power of the joint fit.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--simulations', type=int, default=1000, help='per case (default %(default)s)')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--out', type=Path, help='also write the rows as JSON')
  a = parser.parse_args(argv)
  require(a.simulations >= 1, f'--simulations {a.simulations}: at least 1 is needed')
  rows = simulate(a.simulations, a.seed, progress=True)
  shown = pd.DataFrame(rows).assign(
    met=[{True: 'met', False: 'MISSED', None: ''}[row['met']] for row in rows]
  )
  print(shown.to_string(index=False))
  if a.out is not None:
    a.out.parent.mkdir(parents=True, exist_ok=True)
    record = {'simulations': a.simulations, 'seed': a.seed, 'wanted': WANTED, 'rows': rows}
    a.out.write_text(json.dumps(record, indent=1) + '\n')
  return 1 if any(row['met'] is False for row in rows) else 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
