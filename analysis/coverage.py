"""`mhc coverage`: do nominal 95 % intervals cover, among what is printed, and what can a sweep resolve?

Where: evidence, by simulation, for the rules of fitting/identify.py, noise.py, gain.py, gaps.py and
selection.py. What is refused is not counted; `printed` is the share that is not. Each design is a function
below, with its truth; its cases are in `cases`. Exit code 1 when a target is missed: coverage among what is
printed outside WANTED (where it is printed in 5 % of the simulations or more), a false "saves compute" in
more than FALSE, or a spread of log m above WANTED_SPREAD.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd
from tqdm import tqdm

from mhc_jax.command import end_with_message
from mhc_jax.errors import require
from mhc_jax.paths import check_folder, user_path

from .compare import nested
from .fitting.estimate import Fit, fit
from .fitting.identify import verdicts
from .fitting.intervals import band, bootstrap, delta_method, percentile
from .fitting.laws import HUBER_WIDTH, LAWS, ArmModel, Points
from .gain import Gain, gains, refused
from .gaps import Pairs, paired_gap, spreads
from .minima import minima_by_budget, power_law
from .output import check_file, write_file
from .selection import classify, rate_problems, to_points

EXAMPLES = """examples:
  mhc coverage --simulations 1000 --workers 2
  mhc coverage --simulations 50 --only gain --out coverage.json
"""
WANTED = (0.92, 0.98)
FALSE = 0.03
WANTED_SPREAD = 0.03
RARE = 0.05  # printed less often than this, coverage is not judged
EVERY, RESAMPLES = 10, 200  # of design `resampled`: 100 simulations measure a coverage to 2 %
TRUE = {'E': 1.8172, 'A': 477.83, 'B': 2143.4, 'alpha': 0.3473, 'beta': 0.3672}
GRID = (np.geomspace(5e7, 5e9, 5), np.array([5, 10, 20, 40, 80]))  # N, and D / N

Hits = dict[str, bool | None]  # quantity -> whether its interval covers, None where it is refused


def chinchilla_loss(n: np.ndarray, d: np.ndarray) -> np.ndarray:
  """Chinchilla's optimum, nats per token."""
  return TRUE['E'] + TRUE['A'] * n ** -TRUE['alpha'] + TRUE['B'] * d ** -TRUE['beta']


def _points_nd(n: np.ndarray, d: np.ndarray, loss: np.ndarray, cluster: np.ndarray | None = None) -> Points:
  rows = np.arange(len(n))
  log_x = {'N': np.log(n), 'D': np.log(d), 'C': np.log(6 * n * d)}
  return Points(log_x, loss, np.full(len(n), 'one'), rows if cluster is None else cluster, n, rows)


def _covers(fitted: Fit, truth: dict[str, float], refusals: dict[str, str] | None = None) -> Hits:
  ends = delta_method(fitted)
  reasons = verdicts(fitted, ends) | (refusals or {})
  return {k: None if reasons[k] else bool(ends[k][0] < v < ends[k][1]) for k, v in truth.items()}


def single(rng: np.random.Generator, width: float | str, noise: str | float) -> Hits:
  """25 runs of L(N, D): five N over two decades x five D/N.

  noise: sd of log loss, or 'falling': from 0.02 to 0.001 with the loss.
  """
  n, ratio = (v.ravel() for v in np.meshgrid(*GRID))
  d = n * ratio
  log_loss = np.log(chinchilla_loss(n, d))
  sd = noise
  if noise == 'falling':
    sd = 0.001 * 20 ** ((log_loss - log_loss.min()) / np.ptp(log_loss))
  loss = np.exp(log_loss + sd * rng.standard_normal(len(n)))
  fitted = fit(_points_nd(n, d, loss), LAWS['chinchilla'], width=width, start_count=0)
  # Ten times the largest run's compute, split evenly over N and D.
  far_n, far_d = (np.array([v * 10**0.5]) for v in (5e9, 5e9 * 80))
  far = _points_nd(far_n, far_d, chinchilla_loss(far_n, far_d))
  b = band(fitted, far)
  out = _covers(fitted, {k: TRUE[k] for k in ('E', 'alpha', 'beta')})
  return out | {'loss at 10x': None if out['E'] is None else bool(b.low[0] < far.loss[0] < b.high[0])}


def resampled(rng: np.random.Generator, width: float | str, noise: float) -> Hits:
  """The runs of `single` with the case bootstrap, which is quoted from 40 runs on: no target at 25."""
  n, ratio = (v.ravel() for v in np.meshgrid(*GRID))
  loss = chinchilla_loss(n, n * ratio) * np.exp(noise * rng.standard_normal(len(n)))
  fitted = fit(_points_nd(n, n * ratio, loss), LAWS['chinchilla'], width=width, start_count=0)
  ends = percentile(fitted, bootstrap(fitted, RESAMPLES, seed=int(rng.integers(2**31))))
  return {k: bool(ends[k][0] < TRUE[k] < ends[k][1]) for k in ('E', 'alpha', 'beta')}


def trunks(rng: np.random.Generator, width: float | str, checkpoints: int, column: bool) -> Hits:
  """Five trunks of L(N, D) whose rows share 70 % of the variance of their noise; column: of clusters."""
  n = np.repeat(GRID[0], checkpoints)
  d = n * np.tile(np.geomspace(5, 80, checkpoints), 5)
  trunk = np.repeat(np.arange(5), checkpoints)
  shared, own = rng.standard_normal(5)[trunk], rng.standard_normal(len(n))
  loss = chinchilla_loss(n, d) * np.exp(0.004 * (np.sqrt(0.7) * shared + np.sqrt(0.3) * own))
  points = _points_nd(n, d, loss, trunk if column else None)
  fitted = fit(points, LAWS['chinchilla'], width=width, start_count=0)
  return _covers(fitted, {k: TRUE[k] for k in ('E', 'alpha', 'beta')})


def clusters(rng: np.random.Generator, width: float | str, count: int) -> Hits:
  """`count` clusters of eight runs of L(C) over the same sizes, which share 70 % of their variance."""
  c, cluster = np.tile(np.geomspace(1, 100, 8), count), np.repeat(np.arange(count), 8)
  shared, own = rng.standard_normal(count)[cluster], rng.standard_normal(len(c))
  loss = (1.5 + 1.2 * c**-0.25) * np.exp(0.004 * (np.sqrt(0.7) * shared + np.sqrt(0.3) * own))
  points = Points({'C': np.log(c)}, loss, np.full(len(c), 'one'), cluster, c, np.arange(len(c)))
  return _covers(fit(points, LAWS['compute'], width=width, start_count=0), {'E': 1.5, 'alpha': 0.25})


def paired(rng: np.random.Generator, width: float | str, rho: float) -> Hits:
  """Four arms of L(C) at six sizes over two decades, of whose noise the arms of one size share `rho`."""
  arms = {'a': 1.0, 'b': 1.2, 'c': 1.1, 'd': 1.15}
  c = np.repeat(np.geomspace(1, 100, 6), len(arms))
  m, arm = np.tile(list(arms.values()), 6), np.tile(list(arms), 6)
  size = np.repeat(np.arange(6), len(arms))
  shared = np.repeat(rng.standard_normal(6), len(arms))
  noise = 0.003 * (np.sqrt(rho) * shared + np.sqrt(1 - rho) * rng.standard_normal(len(c)))
  loss = (1.5 + 1.2 * (m * c) ** -0.25) * np.exp(noise)
  points = Points({'C': np.log(c)}, loss, arm, size, size, np.arange(len(c)))
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0)
  truth = {f'm[{name}]': m for name, m in arms.items() if name != 'a'}
  return _covers(fitted, {'E': 1.5, 'alpha': 0.25} | truth)


def _quick(
  rng: np.random.Generator,
  loss_of: Callable,
  spread: tuple[float, float],
  span: float = 300.0,
  sizes: int = 6,
) -> Points:
  """The quick sweep's layout: four arms, two seeds. loss_of(arm, C); spread: sd shared by a size, and own."""
  a, size, seed = (v.ravel() for v in np.meshgrid(range(4), range(sizes), range(2), indexing='ij'))
  arm, c = np.array(list('abcd'))[a], np.geomspace(1, span, sizes)[size]
  shared, paired = rng.standard_normal(sizes)[size], rng.standard_normal((sizes, 2))[size, seed]
  own = np.sqrt(0.5) * (paired + rng.standard_normal(len(c)))
  loss = np.array([loss_of(k, x) for k, x in zip(arm, c, strict=True)])
  loss = loss * np.exp(spread[0] * shared + spread[1] * own)
  cluster = np.array([f'{s}|{k}' for s, k in zip(size, seed, strict=True)])
  return Points({'C': np.log(c)}, loss, arm, cluster, size, np.arange(len(c)))


def gain(rng: np.random.Generator, width: float | str, kind: str) -> Hits:
  """Arm b at the quick layout: its gain holds, fades from 1.5 to 1.04, or it has its own E or exponent.

  'm': one multiplier, against that at the largest size. 'false saves compute': of arm c, which has m = 1.
  """
  span = 300.0

  def loss_of(arm: str, c: float) -> float:
    m = 1.3 if kind == 'holds' and arm == 'b' else 1.0
    if kind == 'fades' and arm == 'b':
      m = 1.5 * (1.04 / 1.5) ** (np.log(c) / np.log(span))
    floor = 1.5 - 0.03 * (kind == 'own E' and arm == 'b')
    return floor + 1.2 * (m * c) ** -(0.25 * (1 + 0.1 * (kind == 'own exponent' and arm == 'b')))

  points = _quick(rng, loss_of, (0.0, 0.003), span)
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0)
  changes = gains(fitted, nested(fitted, start_count=0))
  truth = {c: ((loss_of('b', c) - 1.5) / 1.2) ** -4 / c for c in (1.0, span)}
  out = {'m': _covers(fitted, {'m[b]': truth[span]}, refused(changes))['m[b]']}
  for name, c in (('smallest', 1.0), ('largest', span)):
    one = getattr(changes[0], name)
    out[f'm at the {name} size'] = None if one is None else one.interval[0] < truth[c] < one.interval[1]
  return out | {'false saves compute': _saves(fitted, changes[1], refused(changes))}


def _saves(fitted: Fit, change: Gain, refusals: dict[str, str]) -> bool | None:
  """Whether an arm is said to save compute: by its one multiplier, or else by that at the largest size."""
  label = f'm[{change.arm}]'
  ends = delta_method(fitted)
  if (verdicts(fitted, ends) | refusals)[label] is None:
    return ends[label][0] > 1
  return None if change.largest is None else change.largest.interval[0] > 1


def floor(rng: np.random.Generator, width: float | str, scatter: float) -> Hits:
  """The quick layout over a factor of 40 only, where E often runs to zero; sizes scatter about the law."""
  arms = {'a': 1.0, 'b': 1.3, 'c': 1.1, 'd': 0.9}
  points = _quick(rng, lambda arm, c: 0.5 + 3.5 * (arms[arm] * c) ** -0.21, (scatter, 0.006), 40.0, 5)
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0)
  return _covers(fitted, {'E': 0.5, 'alpha': 0.21, 'm[b]': 1.3})


def rates(rng: np.random.Generator, width: float | str, tried: int, others: int, seeds: int) -> Hits:
  """Arm b the best of `tried` equal learning rates, the reference the best of `others`; m = 1."""
  rows = []
  for arm, count in (('residual', others), ('b', tried)):
    for size, c in enumerate(np.geomspace(1e12, 3e14, 6)):
      for seed in range(seeds):
        for k in range(count):
          loss = (1.5 + 1.2 * (c / 1e12) ** -0.25) * np.exp(0.004 * rng.standard_normal())
          rows.append(_run(arm, size, c, seed, k, loss))
  table = classify(pd.DataFrame(rows))
  problems = {f'm[{arm}]': reason for arm, reason in rate_problems(table, 'residual').items()}
  points = to_points(table[table['excluded'].isna()])
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'residual'), width=width, start_count=0)
  if problems:
    return {'m': None, 'false saves compute': None}
  changes = gains(fitted, nested(fitted, start_count=0))
  refusals = refused(changes)
  return {
    'm': _covers(fitted, {'m[b]': 1.0}, refusals)['m[b]'],
    'false saves compute': _saves(fitted, changes[0], refusals),
  }


def _run(arm: str, size: int, c: float, seed: int, rate: int, loss: float) -> dict[str, object]:
  """A row of a sweep's table, as runs.py makes it."""
  n = np.sqrt(c / 120)
  same = {'state': 'finished', 'depth': 4, 'duration': 'd', 'variant': arm, 'data_digest': 'x'}
  same |= dict.fromkeys(('connection_rank', 'weights_rank', 'projected_rank', 'connection_streams'))
  counts = {name: n for name in ('params_matmul', 'params_total', 'params_non_embedding')}
  own = {'run_id': f'{arm}{size}{seed}{rate}', 'arm': arm, 'connection_name': arm, 'width': 64 * (size + 1)}
  own |= {'seed': seed, 'lr': 1e-3 * 2**rate, 'validation_loss': loss, 'flops': c, 'tokens': 20 * n}
  return same | counts | own


def isoflop(rng: np.random.Generator, width: float | str, noise: float) -> Hits:
  """N* by parabolas at four budgets of seven sizes each, D = C / 6N; the law's exponent b/(a + b)."""
  c = np.repeat(np.geomspace(1e19, 1e21, 4), 7)
  a = TRUE['beta'] / (TRUE['alpha'] + TRUE['beta'])
  scale = (TRUE['alpha'] * TRUE['A'] / (TRUE['beta'] * TRUE['B'])) ** (1 / (TRUE['alpha'] + TRUE['beta']))
  n = scale * (c / 6) ** a * np.tile(np.geomspace(0.25, 4, 7), 4)
  loss = chinchilla_loss(n, c / (6 * n)) * np.exp(noise * rng.standard_normal(len(c)))
  inside = [(x, m.log_x) for x, m in minima_by_budget(np.log(c), np.log(n), loss) if m.log_x is not None]
  law = power_law(*np.array(inside).T) if inside else None
  return {'exponent of N*': None if law is None or law.low is None else law.low < a < law.high}


def gap(rng: np.random.Generator, width: float | str, kind: str) -> Hits:
  """Paired gaps of three arms at five sizes, two seeds: spreads equal, one tenfold, falling twentyfold."""
  groups = []
  for arm in 'abc':
    for size in range(5):
      sd = {'equal': 0.01, 'one arm': 0.05 if arm == 'a' else 0.005, 'falling': 0.02 * 20 ** (-size / 4)}[
        kind
      ]
      own = 3.0 + sd * rng.standard_normal(2)
      groups.append(Pairs(arm, float(size), (own, np.full(2, 3.0))))
  known = spreads(groups, [g.losses[0] - g.losses[1] for g in groups])
  out = {}
  ones = (np.ones(2), np.ones(2))
  for g, spread in zip(groups, known, strict=True):
    one = paired_gap(g, 's', ones, (spread, spread))
    if g.log_flops in (0.0, 4.0):
      out[f'gap of {g.arm} at the {"smallest" if g.log_flops == 0 else "largest"}'] = one.low < 0 < one.high
  return out


def power(rng: np.random.Generator, width: float | str) -> float:
  """Two arms of L(C) at five budgets over a factor of 256, one seed, 0.01 nats: log m (true: log 1.2)."""
  c = np.tile(np.geomspace(1, 256, 5), 2)
  m, rows = np.repeat([1.0, 1.2], 5), np.arange(10)
  loss = 1.9 + 2 * (m * c) ** -0.18 + 0.01 * rng.standard_normal(10)
  points = Points({'C': np.log(c)}, loss, np.repeat(['a', 'b'], 5), rows, rows % 5, rows)
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width=width, start_count=0)
  return float(fitted.theta_P[fitted.theta_names.index('log m[b]')])


@dataclasses.dataclass(frozen=True)
class Case:
  """One simulated design with its arguments and width of Huber's loss; judged: whether it has a target."""

  design: str
  case: str
  function: Callable
  arguments: tuple
  width: float | str = 'auto'
  judged: bool = True


def cases() -> list[Case]:
  """All of them; those of one law also at the literature's width."""
  out = []
  for width in (HUBER_WIDTH, 'auto'):
    at = {'width': width}
    out += [Case('single', f'noise {v}', single, (v,), **at) for v in (0.002, 0.008, 'falling')]
    out += [Case('resampled', f'noise {v}', resampled, (v,), **at, judged=False) for v in (0.002, 0.008)]
    for count in (5, 40):
      for column in (True, False):
        words = f'5 x {count}, {"cluster column" if column else "no column"}'
        out.append(Case('trunks', words, trunks, (count, column), **at))
    out += [Case('paired', f'shared {rho:.0%}', paired, (rho,), **at) for rho in (0.0, 0.7)]
  out += [Case('clusters', f'{n} clusters', clusters, (n,)) for n in (2, 4)]
  out += [Case('gain', kind, gain, (kind,)) for kind in ('holds', 'fades', 'own E', 'own exponent')]
  out += [Case('floor', f'scatter {v:g}', floor, (v,)) for v in (0.004, 0.012)]
  for tried, others, seeds in ((5, 1, 1), (5, 5, 1), (5, 1, 3), (3, 1, 2)):
    out.append(Case('rates', f'{tried} against {others}, {seeds} seeds', rates, (tried, others, seeds)))
  out += [Case('isoflop', f'noise {v:g}', isoflop, (v,)) for v in (0.001, 0.004)]
  return out + [Case('gap', kind, gap, (kind,)) for kind in ('equal', 'one arm', 'falling')]


def simulated(case: Case, simulations: int, seed: int) -> list[dict[str, object]]:
  """Rows of one case: a quantity with its coverage among what is printed, and the share printed."""
  rng, begin = np.random.default_rng(seed), time.process_time()
  count = -(-simulations // EVERY) if case.design == 'resampled' else simulations
  hits = [case.function(rng, case.width, *case.arguments) for _ in range(count)]
  seconds = round((time.process_time() - begin) / count, 3)
  out = []
  for name in hits[0]:
    known = [hit[name] for hit in hits if hit[name] is not None]
    share, rate = len(known) / count, float(np.mean(known)) if known else None
    out.append(
      {'design': case.design, 'case': case.case, 'delta': case.width, 'quantity': name, 'value': rate}
      | {'printed': round(share, 4), 'met': _met(case, name, rate, share), 'seconds': seconds}
    )
  return out


def _met(case: Case, name: str, rate: float | None, share: float) -> bool | None:
  """Whether the target is met; None where there is none."""
  if not case.judged or share < RARE:
    return None
  return rate <= FALSE if name.startswith('false') else WANTED[0] <= rate <= WANTED[1]


def resolved(simulations: int, seed: int) -> list[dict[str, object]]:
  """sd(log m) of design `power` by width; only the report's is held to the target."""
  out = []
  for width in (HUBER_WIDTH, 'auto'):
    rng = np.random.default_rng(seed)
    logs = [power(rng, width) for _ in range(simulations)]
    spread = float(np.std(logs))
    base = {'design': 'power', 'case': 'noise 0.01 nats', 'delta': width, 'printed': 1.0}
    # An L1-like fit gives up a quarter of the efficiency.
    met = spread <= WANTED_SPREAD if width == 'auto' else None
    out.append(base | {'quantity': 'sd(log m)', 'value': round(spread, 4), 'met': met})
    mean = round(float(np.exp(np.mean(logs))), 4)
    out.append(base | {'quantity': 'exp(mean log m)', 'value': mean, 'met': None})
  return out


def simulate(
  simulations: int, seed: int, only: str | None = None, workers: int = 1, progress: bool = False
) -> list[dict[str, object]]:
  """All cases, or those of one design; the same numbers for any number of workers."""
  chosen = [case for case in cases() if only in (None, case.design)]
  one = functools.partial(simulated, simulations=simulations, seed=seed)
  bar = functools.partial(tqdm, desc='cases', total=len(chosen), disable=None if progress else True)
  if workers > 1:
    with ProcessPoolExecutor(workers) as pool:
      parts = list(bar(pool.map(one, chosen)))
  else:
    parts = list(bar(map(one, chosen)))
  rows = [row for part in parts for row in part]
  return rows + (resolved(simulations, seed) if only in (None, 'power') else [])


def main(argv: list[str] | None = None) -> int:
  """Command line; returns 0 when every target is met, 1 when one is missed."""
  designs = [*dict.fromkeys(case.design for case in cases()), 'power']
  parser = argparse.ArgumentParser(
    'mhc coverage',
    description='Simulated coverage of what is printed, and the power of the joint fit.',
    epilog=EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--simulations', type=int, default=1000, help='per case (default %(default)s)')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--only', choices=designs, help='one design')
  parser.add_argument('--workers', type=int, default=1, help='processes (default %(default)s)')
  parser.add_argument('--out', type=user_path, help='also write the rows as JSON')
  a = parser.parse_args(argv)
  require(a.simulations >= 1, f'--simulations {a.simulations}: at least 1 is needed')
  require(a.workers >= 1, f'--workers {a.workers}: at least 1 is needed')
  if a.out is not None:  # before the work, whose result would be lost
    check_folder(a.out.parent, '--out')
    check_file(a.out, '--out')
  rows = simulate(a.simulations, a.seed, a.only, a.workers, progress=True)
  shown = pd.DataFrame(rows).assign(
    met=[{True: 'met', False: 'MISSED', None: ''}[row['met']] for row in rows]
  )
  print(shown.to_string(index=False))
  if a.out is not None:
    record = {'simulations': a.simulations, 'seed': a.seed, 'wanted': WANTED, 'false': FALSE, 'rows': rows}
    write_file(a.out, json.dumps(record, indent=1) + '\n', '--out')
  return 1 if any(row['met'] is False for row in rows) else 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
