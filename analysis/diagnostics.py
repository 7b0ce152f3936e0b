"""Mixing or identity, and how much rank: diagnostics of arms of several streams, by sublayer and in time.

Where: the runs of `selection.largest` and their files -> here -> study.py. Every 'diagnostics/' number that
runs log is gathered; QUANTITIES are those that figures and the page show, with what they mean.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from .runs import Run, array

PREFIX = 'diagnostics/'
PRODUCT = 'composite_'  # of the product of H_res up to and with a sublayer
IDENTITY, UNIFORM, FULL, RESIDUAL = 'H = I', 'H = J/n', 'full rank', 'plain residual'  # words of lines
Reference = dict[str, Callable[[int, int], float]]  # word -> its value for n streams and S sublayers


@dataclasses.dataclass(frozen=True)
class Quantity:
  """One diagnostic that is shown.

  question: key of QUESTIONS. worst: which extreme over sublayers is reported, 'max', 'min' or None.
  floor: the lowest value of a log axis, or None for a linear axis. references: what it is read against.
  """

  name: str
  question: str
  label: str
  meaning: str
  worst: str | None = 'max'
  floor: float | None = None
  references: Reference = dataclasses.field(default_factory=dict)


def residual_depth_rank(sublayers: int) -> float:
  """Depth rank where every sublayer reads all earlier ones alike: effective rank of a triangle of ones."""
  sigma = np.linalg.svd(np.tri(sublayers, k=-1), compute_uv=False)
  share = sigma[sigma > 1e-12] / sigma.sum()
  return float(np.exp(-(share * np.log(share)).sum()))


def _apart(n: int, _: int) -> float:
  """Frobenius distance of I from J/n."""
  return math.sqrt(n - 1)


def _mixing(of: str, prefix: str) -> tuple[Quantity, ...]:
  """What one matrix per sublayer does to differences between streams; of: its name in labels."""
  one: Reference = {IDENTITY: lambda n, s: 1.0, UNIFORM: lambda n, s: 0.0}
  return (
    Quantity(
      f'{prefix}distance_to_identity',
      'mixing',
      f'‖{of} - I‖',
      'Frobenius norm of H - I, mean over tokens: 0 keeps every stream to itself',
      floor=1e-3,
      references={IDENTITY: lambda n, s: 0.0, UNIFORM: _apart},
    ),
    Quantity(
      f'{prefix}distance_to_mean',
      'mixing',
      f'‖{of} - J/n‖',
      'Frobenius norm of H - J/n, mean over tokens: 0 replaces every stream by their mean',
      'min',
      floor=1e-3,
      references={IDENTITY: _apart, UNIFORM: lambda n, s: 0.0},
    ),
    Quantity(
      f'{prefix}lambda_2',
      'mixing',
      f'|λ₂| of {of}',
      'second largest modulus of eigenvalues of the token-mean matrix; of a stochastic one, the share of '
      'differences between streams that stays, along the direction that stays longest',
      'min',
      floor=1e-4,
      references=one,
    ),
    Quantity(
      f'{prefix}sigma_min',
      'mixing',
      f'σ_min of {of}',
      'smallest singular value, mean over tokens: 0 loses a direction of the streams',
      'min',
      floor=1e-4,
      references=one,
    ),
  )


QUANTITIES = (
  *_mixing('H_res', ''),
  *_mixing('product', PRODUCT),
  Quantity(
    'row_error',
    'constraint',
    'error of row sums',
    'largest |row sum - 1| of the token-mean matrix: 0 is row-stochastic',
    floor=1e-6,
  ),
  Quantity(
    'column_error',
    'constraint',
    'error of column sums',
    'largest |column sum - 1| of the token-mean matrix: 0, with that of the rows, is doubly stochastic',
    floor=1e-6,
  ),
  Quantity(
    'defect',
    'constraint',
    'defect from its own set',
    "largest violation at any token of the equations of the arm's own constraint: 0 is inside (always 0 "
    'without a constraint)',
    floor=1e-6,
  ),
  Quantity(
    'logit_range',
    'constraint',
    'logit range of H_res',
    'largest minus smallest logit of H_res, mean over tokens: large ranges give entries of 0 and 1',
    floor=1e-2,
  ),
  Quantity('pre_mean', 'constraint', 'mean of H_pre', 'weight with which a sublayer reads a stream', None),
  Quantity(
    'post_mean', 'constraint', 'mean of H_post', 'weight with which a sublayer writes to a stream', None
  ),
  Quantity(
    'pre_saturation',
    'constraint',
    'H_pre at bounds',
    'share of read weights within 1 % of a bound of their gate, where gradients vanish',
  ),
  Quantity(
    'post_saturation',
    'constraint',
    'H_post at bounds',
    'share of write weights within 1 % of a bound of their gate, where gradients vanish',
  ),
  Quantity(
    'stream_rank',
    'rank',
    'effective rank of the streams',
    'effective rank of the n streams after a sublayer, mean over tokens: 1 is copies of one stream',
    'min',
    references={FULL: lambda n, s: float(n)},
  ),
  Quantity(
    'stream_cosine',
    'rank',
    'cosine between streams',
    'mean cosine between two streams after a sublayer: 1 is copies of one stream, 0 orthogonal streams',
  ),
  Quantity(
    'depth_rank',
    'rank',
    'effective rank over depth',
    'effective rank of the matrix of how much each sublayer reads of what each earlier one wrote',
    'min',
    references={FULL: lambda n, s: s - 1.0, RESIDUAL: lambda n, s: residual_depth_rank(s)},
  ),
)
QUESTIONS = {
  'mixing': 'Does H_res mix the streams, or leave them as they are?',
  'constraint': 'Is H_res doubly stochastic, and are its gates at their bounds?',
  'rank': 'How many streams and sublayers are used?',
}


@dataclasses.dataclass(frozen=True)
class Diagnostics:
  """Of the runs of several streams at the largest common size, however they ended; all may be empty.

  by_layer: what each run logged last: quantity, arm, run_id, seed, state, sublayer (NaN for the whole model),
  value. over_training: quantity, arm, run_id, seed, state, step, tokens, value (mean over sublayers; of
  products, that of all sublayers), worst (over sublayers). by_arm: quantity, arm, size, seeds, diverged, mean
  and sd over seeds of such values, worst and worst_sublayer of the mean over seeds. shapes: every (streams,
  sublayers).
  """

  by_layer: pd.DataFrame
  over_training: pd.DataFrame
  by_arm: pd.DataFrame
  shapes: list[tuple[int, int]]

  def logged(self, question: str | None = None) -> list[Quantity]:
    """The quantities of a question (None: of all) that some run logged."""
    names = set() if self.by_layer.empty else set(self.by_layer['quantity'])
    return [q for q in QUANTITIES if question in (None, q.question) and q.name in names]

  def references(self, q: Quantity) -> dict[str, list[float]]:
    """Word -> its value for every shape of the shown models."""
    return {word: sorted({value(*shape) for shape in self.shapes}) for word, value in q.references.items()}

  def against(self, q: Quantity) -> str:
    """The references in words."""
    values = {word: ' or '.join(f'{v:.3g}' for v in some) for word, some in self.references(q).items()}
    return ', '.join(f'{word} {value}' for word, value in values.items())

  def of(self, name: str, arm: str) -> dict | None:
    """The row of by_arm, where there is one."""
    rows = self.by_arm[(self.by_arm['quantity'] == name) & (self.by_arm['arm'] == arm)]
    return rows.iloc[0].to_dict() if len(rows) else None


def diagnostics(shown: pd.DataFrame, runs: dict[str, Run]) -> Diagnostics:
  """Reads every list and number 'diagnostics/*' of metrics rows; matrices by the errors of their sums.

  row_error, column_error: largest |row sum - 1| and |column sum - 1| of the token-mean matrix of a sublayer.
  """
  layers, updates, shapes = [], [], set()
  for _, row in shown[shown['connection_streams'] > 1].iterrows():
    ids = {name: row[name] for name in ('arm', 'run_id', 'seed', 'state')}
    last: dict[str, np.ndarray] = {}
    for line in runs[row['run_id']].rows:
      measures = _measures(line)
      last |= measures
      at = {name: line.get(name) for name in ('step', 'tokens')}
      updates += [{'quantity': name} | ids | at | _summary(name, v) for name, v in measures.items()]
    shapes |= {(int(row['connection_streams']), 2 * int(row['depth']))} if last else set()
    layers += [
      {'quantity': name} | ids | {'sublayer': k if v.ndim else None, 'value': value}
      for name, v in last.items()
      for k, value in enumerate(np.atleast_1d(v), 1)
    ]
  by_layer = pd.DataFrame(layers)
  size = shown['size'].iloc[0] if len(shown) else None
  return Diagnostics(by_layer, pd.DataFrame(updates), _by_arm(by_layer, size), sorted(shapes))


def _measures(line: dict) -> dict[str, np.ndarray]:
  """The diagnostics of a metrics row, () or (sublayers,), NaN for null; without those that hold no number."""
  out = {}
  for key, value in line.items():
    if not key.startswith(PREFIX):
      continue
    name = key.removeprefix(PREFIX)
    if name.endswith('res_mean'):
      prefix, res_SNM = name.removesuffix('res_mean'), array(value, 3)
      if res_SNM is not None:
        out[f'{prefix}row_error'] = np.abs(res_SNM.sum(2) - 1).max(1)
        out[f'{prefix}column_error'] = np.abs(res_SNM.sum(1) - 1).max(1)
    elif (measure := array(value, 1 if isinstance(value, list) else 0)) is not None:
      out[name] = measure
  return out


def _summary(name: str, values: np.ndarray) -> dict[str, float]:
  """value: of the whole model; worst: over its sublayers, NaN where there is one value or a product."""
  if not values.ndim:
    return {'value': float(values), 'worst': math.nan}
  if name.startswith(PRODUCT):
    return {'value': float(values[-1]), 'worst': math.nan}
  return {'value': float(np.nanmean(values)), 'worst': float(_extreme(name)(values))}


def _extreme(name: str) -> Callable[[np.ndarray], float]:
  worst = {q.name: q.worst for q in QUANTITIES}.get(name)
  return {'min': np.nanmin, 'max': np.nanmax, None: lambda values: math.nan}[worst]


def averaged(own: pd.DataFrame) -> pd.DataFrame:
  """The rows of one arm that enter its means: of runs that did not diverge, where there is one."""
  sound = own[own['state'] != 'diverged']
  return sound if len(sound) else own


def _by_arm(by_layer: pd.DataFrame, size: str | None) -> pd.DataFrame:
  rows = []
  for (name, arm), own in by_layer.groupby(['quantity', 'arm'], sort=False) if len(by_layer) else ():
    kept = averaged(own)
    runs = [_summary(name, _profile(run)) for _, run in kept.groupby('run_id', sort=False)]
    means = pd.Series([run['value'] for run in runs])
    row = {'quantity': name, 'arm': arm, 'size': size, 'seeds': len(means)}
    row |= {
      'diverged': own.loc[own['state'] == 'diverged', 'run_id'].nunique(),
      'mean': means.mean(),
      'sd': means.std(),
    }
    row |= {'worst': math.nan, 'worst_sublayer': math.nan}
    if not name.startswith(PRODUCT) and kept['sublayer'].notna().all():
      profile = kept.groupby('sublayer')['value'].mean()
      worst = _extreme(name)(profile)
      row |= {'worst': worst, 'worst_sublayer': profile.index[profile == worst].min()}
    rows.append(row)
  return pd.DataFrame(rows)


def _profile(run: pd.DataFrame) -> np.ndarray:
  values = run['value'].to_numpy()
  return values if run['sublayer'].notna().all() else values[0]
