"""Which rows of a table are one model, and which share noise, where no column says so.

Where: points.py -> here. A model size is what was trained, never a rounded number: its own fields decide, and
arms whose counts differ a little (a connection adds parameters and FLOPs) are matched size by size.
"""

import numpy as np

DERIVED = 5e-3  # N = C / 6D carries the rounding of two columns: so close in log are one model
NEAR = 0.5  # of the gap to the next size: closer to an arm's size another arm's is the same model
MOST = np.log(1.5)  # by which matched sizes may differ: what an arm costs more than another
UNITS = 2.0  # factor between C and 6 N D above which units are doubted (attention adds some tens of percent)


def sizes(
  log_x: dict[str, np.ndarray], arm: np.ndarray, given: set[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
  """(model size of every row, notes): width and depth, or N, or else C or D, of rows without a size column.

  given: covariates that have columns. Arms are matched by `matched`.
  """
  if {'W', 'H'} <= given:
    shapes = np.stack([log_x['W'], log_x['H']], 1)
    return np.unique(shapes, axis=0, return_inverse=True)[1].ravel().astype(str), ()
  name = next(k for k in ('N', 'W', 'C', 'D') if k in log_x)
  return matched(log_x[name], arm, 0.0 if name in given else DERIVED, name)


def matched(
  log_n: np.ndarray, arm: np.ndarray, tolerance: float, name: str
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Sizes by distinct log N within each arm; those of two arms are one where each is the other's nearest.

  Nearest after what the arm costs more at all its sizes, and by less than NEAR of the gap to the next size.
  The note says how far apart matched sizes lie.
  """
  own = {a: _distinct(log_n[arm == a], tolerance) for a in dict.fromkeys(arm.tolist())}
  home = own[max(own, key=lambda a: len(own[a]))]  # of the first arm with most sizes
  label, apart, alone = np.empty(len(log_n), object), 0.0, []
  for a, values in own.items():
    partner = _partners(values, home)
    apart = max([apart, *(abs(values[k] - home[near]) for k, near in partner.items())])
    if not partner:
      alone.append(str(a))
    index = {k: str(partner[k]) if k in partner else f'{a} {values[k]:.4g}' for k in range(len(values))}
    rows = np.flatnonzero(arm == a)
    label[rows] = [index[k] for k in _nearest(log_n[rows], values).tolist()]
  notes = []
  if apart > max(tolerance, 1e-6):
    notes.append(
      f'arms differ in {name} by up to {np.expm1(apart):.1%} at what is taken for one model size; '
      'a size column would settle it'
    )
  if alone:
    verb = 'shares' if len(alone) == 1 else 'share'
    notes.append(
      f'{", ".join(alone)} {verb} no model size with the other arms: nothing is paired, '
      'and m rests on the law'
    )
  return label.astype(str), tuple(notes)


def _partners(values: np.ndarray, home: np.ndarray) -> dict[int, int]:
  """Index of each size of an arm -> that of its partner among the sizes of another."""
  exact = (np.abs(home[_nearest(values, home)] - values) < 1e-9).any()
  dearer = float(np.mean(values - home)) if len(values) == len(home) and not exact else 0.0
  moved = values - (dearer if abs(dearer) < MOST else 0.0)
  out, there, back = {}, _nearest(moved, home), _nearest(home, moved)
  for k, (value, near) in enumerate(zip(moved, there.tolist(), strict=True)):
    close = abs(home[near] - values[k]) <= MOST and back[near] == k
    if close and abs(home[near] - value) <= NEAR * min(_gap(moved, k), _gap(home, near)):
      out[k] = near
  return out


def _nearest(values: np.ndarray, among: np.ndarray) -> np.ndarray:
  """Index of the nearest of some ascending numbers to each value."""
  return np.searchsorted((among[1:] + among[:-1]) / 2, values)


def _distinct(log_n: np.ndarray, tolerance: float) -> np.ndarray:
  """Sorted distinct values; a chain of values within the tolerance is one (its mean)."""
  ordered = np.sort(log_n)
  breaks = np.flatnonzero(np.diff(ordered) > max(tolerance, 1e-9)) + 1
  return np.array([part.mean() for part in np.split(ordered, breaks)])


def _gap(values: np.ndarray, k: int) -> float:
  """Distance of a value to its nearest neighbour; one value alone may be matched within a factor of two."""
  return min(
    (abs(values[j] - values[k]) for j in (k - 1, k + 1) if 0 <= j < len(values)), default=np.log(2) / NEAR
  )


def clusters(label: dict[str, np.ndarray], size: np.ndarray) -> np.ndarray:
  """Rows that share noise: the cluster column, or runs of one size and seed, or every row its own.

  A seed that every row has tells nothing: then rows are their own.
  """
  if 'cluster' in label:
    return label['cluster']
  if 'seed' in label:
    return np.array([f'{s}|{k}' for s, k in zip(size, label['seed'], strict=True)])
  return np.arange(len(size)).astype(str)


def doubtful(value: dict[str, np.ndarray], arm: np.ndarray) -> tuple[str, ...]:
  """Notes on columns that contradict each other, and on rows that are there twice."""
  notes = []
  if {'N', 'D', 'C'} <= set(value):
    factor = float(np.median(value['C'] / (6 * value['N'] * value['D'])))
    if not 1 / UNITS < factor < UNITS:
      notes.append(f'C is {factor:.3g} times 6 N D: are the units of C, N and D the same?')
  rows = np.stack([np.unique(arm, return_inverse=True)[1], *value.values()])
  again = rows.shape[1] - np.unique(rows, axis=1).shape[1]
  if again:
    notes.append(f'{again} rows repeat another row, loss and all: they count as one measurement')
  return tuple(notes)
