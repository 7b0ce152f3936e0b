"""What the study can see: how often its report would find a gain, or its change with compute, by simulation.

  python -m analysis.power --simulations 200 > docs/results/study/power.csv

Sweeps of seven arms at five sizes over three decades of compute, paired seeds (three, two at the largest
size), from a law of known multipliers m (the reference needs m times an arm's compute for its loss); each is
judged as a report judges it. Arms but one are the reference's equals, so that false gains are counted too.
"""

import argparse
import functools
import itertools
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pandas as pd

from mhc_jax.command import end_with_message

from .compare import nested
from .fitting.estimate import fit
from .fitting.identify import verdicts
from .fitting.intervals import delta_method
from .fitting.laws import LAWS, ArmModel, Points
from .gain import gains, refused

ARMS, SEEDS, SPAN = 'abcdefg', (3, 3, 3, 3, 2), 1000.0
LAW = {'E': 1.0, 'A': 1.2, 'alpha': 0.25}  # nats; of compute over the smallest size's
# Standard deviations of log loss: of a seed, which paired arms share, and of a run's own.
NOISE = {'as the quick sweep': (0.010, 0.008), 'half': (0.005, 0.004), 'a quarter': (0.0025, 0.002)}
TRUTHS = {  # of arm b: m at the smallest and the largest size
  'm = 1': (1.0, 1.0),
  'm = 1.1': (1.1, 1.1),
  'm = 1.2': (1.2, 1.2),
  'm = 1.5': (1.5, 1.5),
  'm fades from 1.5 to 1': (1.5, 1.0),
  'm grows from 1 to 1.5': (1.0, 1.5),
}


def sweep(rng: np.random.Generator, ends: tuple[float, float], noise: tuple[float, float]) -> Points:
  """Final losses of one sweep."""
  rows = [(s, k) for s, count in enumerate(SEEDS) for k in range(count)]
  size, seed = (np.tile(v, len(ARMS)) for v in np.array(rows).T)
  arm = np.repeat(list(ARMS), len(rows))
  c = np.geomspace(1, SPAN, len(SEEDS))[size]
  m = np.where(arm == 'b', ends[0] * (ends[1] / ends[0]) ** (np.log(c) / np.log(SPAN)), 1.0)
  shared = rng.standard_normal((len(SEEDS), max(SEEDS)))[size, seed]
  loss = LAW['E'] + LAW['A'] * (m * c) ** -LAW['alpha']
  loss = loss * np.exp(noise[0] * shared + noise[1] * rng.standard_normal(len(c)))
  cluster = np.array([f'{s}|{k}' for s, k in zip(size, seed, strict=True)])
  return Points({'C': np.log(c)}, loss, arm, cluster, size, np.arange(len(c)))


def judged(points: Points) -> dict[str, bool]:
  """What the report says of arm b, and of c, which has no gain."""
  fitted = fit(points, LAWS['compute'], ArmModel('common', 'a'), width='auto', start_count=0)
  changes = {g.arm: g for g in gains(fitted, nested(fitted, start_count=0))}
  ends, refusals = delta_method(fitted), refused(list(changes.values()))
  reasons = verdicts(fitted, ends) | refusals

  def interval(arm: str) -> list[float] | None:
    if reasons[f'm[{arm}]'] is None:
      return ends[f'm[{arm}]']
    return changes[arm].largest and changes[arm].largest.interval

  b, c = interval('b'), interval('c')
  return {
    'saves': bool(b and b[0] > 1),
    'costs': bool(b and b[1] < 1),
    'false gain or loss of another arm': bool(c and not c[0] <= 1 <= c[1]),
    **{trend: changes['b'].trend == trend for trend in ('fades', 'holds', 'grows', 'cannot tell')},
  }


def simulated(case: tuple[str, str], simulations: int) -> dict[str, object]:
  """Shares of the simulated sweeps in which the report says so, of one truth and noise."""
  truth, noise = case
  rng = np.random.default_rng(0)
  found = pd.DataFrame([judged(sweep(rng, TRUTHS[truth], NOISE[noise])) for _ in range(simulations)])
  return {'noise': noise, 'truth': truth, 'simulations': simulations, **found.mean().round(3).to_dict()}


def main(argv: list[str] | None = None) -> int:
  """Prints the table as CSV."""
  parser = argparse.ArgumentParser('python -m analysis.power', description=main.__doc__)
  parser.add_argument(
    '--simulations', type=int, default=200, help='of a truth and noise (default %(default)s)'
  )
  parser.add_argument('--workers', type=int, default=1)
  a = parser.parse_args(argv)
  with ProcessPoolExecutor(a.workers) as pool:
    rows = list(
      pool.map(functools.partial(simulated, simulations=a.simulations), itertools.product(TRUTHS, NOISE))
    )
  pd.DataFrame(rows).to_csv(sys.stdout, index=False)
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
