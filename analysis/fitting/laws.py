"""Scaling laws as sums of power terms, and the linear design that one fit needs.

Where: points (points.py) -> Design (here) -> fit (fit.py) -> intervals, comparisons, report.

A law is  L = E + sum_j A_j (X_j m_j)^-alpha_j.  It is fitted as
  log L = logsumexp(log E, log A_j - alpha_j (log X_j + log m_j))
(Hoffmann et al. 2203.15556, approach 3; multipliers as in 2602.07712), in covariates centred on
their mean, which takes the condition number of the problem down by orders of magnitude
(2603.22339). Every arm shares E, A and the exponents unless an ArmModel frees them.

Array suffixes in analysis/: R runs, J power terms, P parameters, B resamples, G clusters.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from mhc_jax.errors import ConfigError

LOSSES = (
  'huber',
  'mse_log',
  'huber_raw',
  'mse',
)  # what a fit may minimise; huber_raw, mse: of the loss itself
HUBER_WIDTH = 1e-3  # delta, in log loss; the literature's value (Hoffmann et al. 2203.15556)


@dataclasses.dataclass(frozen=True)
class Term:
  """One power term A * (prod_k X_k^c_k)^-alpha; `share` is the part of log m that enters it."""

  coefficient: str
  exponent: str
  covariates: tuple[tuple[str, float], ...]
  share: float


@dataclasses.dataclass(frozen=True)
class Law:
  """A named sum of power terms above a constant E (nats per token); `pinned` values are not fitted."""

  name: str
  formula: str
  terms: tuple[Term, ...]
  pinned: tuple[tuple[str, float], ...] = ()

  @property
  def coefficients(self) -> tuple[str, ...]:
    return tuple(t.coefficient for t in self.terms)

  @property
  def exponents(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(t.exponent for t in self.terms))

  @property
  def covariates(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for t in self.terms for name, _ in t.covariates))

  def keep(self, covariates: Collection[str]) -> 'Law':
    """A law of one covariate to a term, without the terms of other covariates: they are part of E."""
    kept = tuple(t for t in self.terms if {name for name, _ in t.covariates} <= set(covariates))
    words = [f'{t.coefficient} {t.covariates[0][0]}^-{t.exponent}' for t in kept]
    return dataclasses.replace(self, formula=' + '.join(['L = E', *words]), terms=kept)

  def tie(self, one: str, other: str) -> 'Law':
    """The law with one exponent for two; raises ConfigError unless it has both."""
    if one == other or not {one, other} <= set(self.exponents):
      raise ConfigError(f'--tie {one}={other}: the exponents are {", ".join(self.exponents)}')
    terms = [dataclasses.replace(t, exponent=one) if t.exponent == other else t for t in self.terms]
    return dataclasses.replace(self, formula=f'{self.formula}, {other} = {one}', terms=tuple(terms))

  def pin(self, name: str, value: float) -> 'Law':
    """The law with a parameter held at a value (E = 0: no constant); raises ConfigError."""
    names = ('E', *self.coefficients, *self.exponents)
    pinned = dict(self.pinned) | {name: value}
    if name not in names:
      raise ConfigError(f'--pin {name}: the parameters are {", ".join(names)}')
    if not np.isfinite(value) or value < 0 or (value == 0 and name != 'E'):
      raise ConfigError(f'--pin {name}={value:g}: {name} must be positive')
    if value and not 1e-50 <= value <= 1e50:
      raise ConfigError(f'--pin {name}={value:g}: give a number between 1e-50 and 1e50')
    if set(pinned) == set(names):
      raise ConfigError('--pin: nothing is left to fit')
    formula = f'{self.formula}, {name} = {value:g}'
    return dataclasses.replace(self, formula=formula, pinned=tuple(pinned.items()))


# A multiplier m is a compute multiplier: an arm at its size behaves like the reference arm with m
# times the compute. `share` splits log m over the factors of compute (N and D: one half each;
# width^2 x depth x D: one quarter each), so that the product of the factors grows by exactly m.
LAWS = {
  law.name: law
  for law in (
    Law('compute', 'L = E + A C^-alpha', (Term('A', 'alpha', (('C', 1.0),), 1.0),)),
    Law(
      'chinchilla',
      'L = E + A N^-alpha + B D^-beta',
      (Term('A', 'alpha', (('N', 1.0),), 0.5), Term('B', 'beta', (('D', 1.0),), 0.5)),
    ),
    # Of one factor of compute alone, m is a multiplier of that factor.
    Law('params', 'L = E + A N^-alpha', (Term('A', 'alpha', (('N', 1.0),), 1.0),)),
    Law('tokens', 'L = E + B D^-beta', (Term('B', 'beta', (('D', 1.0),), 1.0),)),
    Law(
      'width_depth',
      'L = E + A W^-alpha + B H^-beta + G D^-gamma',
      (
        Term('A', 'alpha', (('W', 1.0),), 0.25),
        Term('B', 'beta', (('H', 1.0),), 0.25),
        Term('G', 'gamma', (('D', 1.0),), 0.25),
      ),
    ),
    Law(
      'width_depth_params',
      'L = E + A W^-alpha + B H^-beta + G N^-gamma + K D^-kappa',  # McLeish et al. 2502.06857
      (
        Term('A', 'alpha', (('W', 1.0),), 0.25),
        Term('B', 'beta', (('H', 1.0),), 0.25),
        Term('G', 'gamma', (('N', 1.0),), 0.75),  # width^2 x depth
        Term('K', 'kappa', (('D', 1.0),), 0.25),
      ),
    ),
    Law(
      'overtraining',
      'L = E + (A M^eta + B M^-eta) C^-eta',  # M = tokens per parameter; Gadre et al. 2403.08540
      (
        Term('A', 'eta', (('C', 1.0), ('M', -1.0)), 1.0),
        Term('B', 'eta', (('C', 1.0), ('M', 1.0)), 1.0),
      ),
    ),
  )
}


@dataclasses.dataclass(frozen=True)
class ArmModel:
  """How arms may differ.

  multiplier: 'none' (all arms equal), 'common' (one compute multiplier m per arm), 'N' or 'D' (rho_N or rho_D
  alone), 'both' (rho_N and rho_D). axes: names of Points.axes; each adds m = r^phi along that axis. slope_at:
  log C at which m is m; elsewhere it is m (C / that)^g, with g of each arm's own (L(C): the same as an
  exponent of its own); None: m is the same at every C. free_e, free_exponents: one value per arm instead of a
  shared one.
  """

  multiplier: str = 'common'
  reference: str | None = None
  axes: tuple[str, ...] = ()
  free_e: bool = False
  free_exponents: bool = False
  slope_at: float | None = None


@dataclasses.dataclass(frozen=True)
class Points:
  """Measured runs. log_x: log covariates by name (N, D, C, W, H, M); loss in nats per token.

  sigma: noise standard deviation of log loss per run, or None (equal). cluster: runs whose noise
  is shared (a seed across arms, branches of one trunk). size: model-size group for rollouts.
  axes: log r along a named axis, 0 where the axis does not apply. notes: what reading the points has found.
  """

  log_x: dict[str, np.ndarray]
  loss: np.ndarray
  arm: np.ndarray
  cluster: np.ndarray
  size: np.ndarray
  run: np.ndarray
  sigma: np.ndarray | None = None
  axes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  notes: tuple[str, ...] = ()

  def __len__(self) -> int:
    return len(self.loss)

  def take(self, index: np.ndarray) -> 'Points':
    """The runs picked by an index or mask."""
    return Points(
      {k: v[index] for k, v in self.log_x.items()},
      *(getattr(self, k)[index] for k in ('loss', 'arm', 'cluster', 'size', 'run')),
      sigma=None if self.sigma is None else self.sigma[index],
      axes={k: v[index] for k, v in self.axes.items()},
      notes=self.notes,
    )

  @property
  def arms(self) -> tuple[str, ...]:
    return tuple(dict.fromkeys(self.arm.tolist()))


@dataclasses.dataclass(frozen=True)
class Parameter:
  """One number of a fit.

  kind: 'constant' (E), 'coefficient', 'exponent', 'multiplier', 'slope' (g of m C^g), 'axis' (phi of r^phi)
  or 'derived'. of: the arm or axis that it belongs to; None where all runs share it.
  """

  kind: str
  base: str
  of: str | None = None

  @property
  def label(self) -> str:
    """As it is published: E, alpha, m[arm]."""
    return self.base if self.of is None else f'{self.base}[{self.of}]'

  @property
  def in_log(self) -> bool:
    """Whether it is fitted as its logarithm."""
    return self.kind in ('constant', 'coefficient', 'multiplier')

  @property
  def name(self) -> str:
    """As it is fitted: log E, alpha, log m[arm]."""
    return f'log {self.label}' if self.in_log else self.label


@dataclasses.dataclass(frozen=True)
class Design:
  """The affine maps from the parameter vector to each run's log E, log A_j, alpha_j and log m_j.

  e_R, a_JR and x_JR are the pinned values, 0 where a parameter is fitted. A term with one is not centred.
  """

  law: Law
  arms: ArmModel
  parameters: tuple[Parameter, ...]
  e_RP: np.ndarray
  a_JRP: np.ndarray
  x_JRP: np.ndarray
  m_JRP: np.ndarray
  cov_JR: np.ndarray
  centre_J: np.ndarray
  e_R: np.ndarray
  a_JR: np.ndarray
  x_JR: np.ndarray

  @property
  def names(self) -> tuple[str, ...]:
    return tuple(p.name for p in self.parameters)

  @property
  def linear(self) -> np.ndarray:
    """Which parameters the loss is linear in once exponentiated (log E and log A)."""
    return np.array([p.kind in ('constant', 'coefficient') for p in self.parameters])

  @property
  def is_exponent(self) -> np.ndarray:
    return np.array([p.kind == 'exponent' for p in self.parameters])


def power_covariates(law: Law, points: Points) -> np.ndarray:
  """log X_j of every term and run, (J, R); raises ConfigError for a covariate that is absent."""
  missing = [name for name in law.covariates if name not in points.log_x]
  if missing:
    raise ConfigError(f'law {law.name} needs column {missing[0]}: give it with --columns')
  return np.stack([sum(c * points.log_x[name] for name, c in term.covariates) for term in law.terms])


def _multiplier_columns(law: Law, points: Points, arms: ArmModel) -> dict[Parameter, np.ndarray]:
  """(J, R) weight of each log multiplier, and of each exponent of an axis, in each term."""
  share_J = np.array([term.share for term in law.terms])
  columns = {}
  for arm in points.arms:
    if arm == arms.reference or arms.multiplier == 'none':
      continue
    is_arm_R = (points.arm == arm).astype(float)
    if arms.multiplier == 'common':
      columns[Parameter('multiplier', 'm', arm)] = share_J[:, None] * is_arm_R
      if arms.slope_at is not None:
        log_c_R = points.log_x['C'] - arms.slope_at
        columns[Parameter('slope', 'g', arm)] = share_J[:, None] * is_arm_R * log_c_R
      continue
    for factor in {'both': ('N', 'D')}.get(arms.multiplier, (arms.multiplier,)):
      in_term_J = np.array([float(term.covariates == ((factor, 1.0),)) for term in law.terms])
      if not in_term_J.any():
        raise ConfigError(f'law {law.name} has no {factor} term for a multiplier rho_{factor}')
      columns[Parameter('multiplier', f'rho_{factor}', arm)] = in_term_J[:, None] * is_arm_R
  for axis in arms.axes:
    columns[Parameter('axis', 'phi', axis)] = share_J[:, None] * points.axes[axis]
  return columns


def design(law: Law, points: Points, arms: ArmModel, centre_J: np.ndarray | None = None) -> Design:
  """Design of a fit; `centre_J` reuses another design's centring (to predict at new points)."""
  if arms.reference is None:
    arms = dataclasses.replace(arms, reference=points.arms[0])
  pinned = dict(law.pinned)
  cov_JR = power_covariates(law, points)
  if centre_J is None:
    fitted_J = np.array([not {t.coefficient, t.exponent} & set(pinned) for t in law.terms])
    centre_J = np.where(fitted_J, cov_JR.mean(1), 0.0)
  parameters = _own_parameters(law, tuple(dict.fromkeys((arms.reference, *points.arms))), arms)
  multipliers = _multiplier_columns(law, points, arms)
  parameters += list(multipliers)
  column = {parameter: p for p, parameter in enumerate(parameters)}
  runs = (len(law.terms), len(points))
  e_RP, (a_JRP, x_JRP, m_JRP) = np.zeros((runs[1], len(column))), np.zeros((3, *runs, len(column)))
  e_R, (a_JR, x_JR) = np.zeros(runs[1]), np.zeros((2, *runs))
  with np.errstate(divide='ignore'):  # E = 0
    log_pinned = {name: np.log(value) for name, value in pinned.items()}
  for arm in points.arms:
    r = np.flatnonzero(points.arm == arm)
    if 'E' in pinned:
      e_R[r] = log_pinned['E']
    else:
      e_RP[r, column[Parameter('constant', 'E', arm if arms.free_e else None)]] = 1
    for j, term in enumerate(law.terms):
      if term.coefficient in pinned:
        a_JR[j, r] = log_pinned[term.coefficient]
      else:
        a_JRP[j, r, column[Parameter('coefficient', term.coefficient)]] = 1
      if term.exponent in pinned:
        x_JR[j, r] = pinned[term.exponent]
      else:
        x_JRP[j, r, column[Parameter('exponent', term.exponent, arm if arms.free_exponents else None)]] = 1
  for parameter, weight_JR in multipliers.items():
    m_JRP[:, :, column[parameter]] = weight_JR
  cov_JR = cov_JR - centre_J[:, None]
  return Design(law, arms, tuple(parameters), e_RP, a_JRP, x_JRP, m_JRP, cov_JR, centre_J, e_R, a_JR, x_JR)


def _own_parameters(law: Law, arm_names: tuple[str, ...], arms: ArmModel) -> list[Parameter]:
  """E, coefficients and exponents that are fitted."""

  def versions(kind: str, base: str, free: bool) -> list[Parameter]:
    if base in dict(law.pinned):
      return []
    return [Parameter(kind, base, arm) for arm in arm_names] if free else [Parameter(kind, base)]

  out = versions('constant', 'E', arms.free_e)
  out += [p for name in law.coefficients for p in versions('coefficient', name, False)]
  return out + [p for name in law.exponents for p in versions('exponent', name, arms.free_exponents)]


def log_loss(theta_P: np.ndarray, d: Design) -> tuple[np.ndarray, np.ndarray]:
  """Log loss of every run (R,) and its Jacobian with respect to the parameters (R, P)."""
  alpha_JR = d.x_JR + d.x_JRP @ theta_P
  z_JR = d.cov_JR + d.m_JRP @ theta_P
  term_JR = d.a_JR + d.a_JRP @ theta_P - alpha_JR * z_JR
  e_R = d.e_R + d.e_RP @ theta_P
  top_R = np.maximum(e_R, term_JR.max(0))
  part_JR = np.exp(term_JR - top_R)
  part_R = np.exp(e_R - top_R)
  total_R = part_R + part_JR.sum(0)
  jac_RP = (part_R / total_R)[:, None] * d.e_RP
  for j, share_R in enumerate(part_JR / total_R):
    jac_RP += share_R[:, None] * d.a_JRP[j]
    jac_RP -= (share_R * z_JR[j])[:, None] * d.x_JRP[j]
    jac_RP -= (share_R * alpha_JR[j])[:, None] * d.m_JRP[j]
  return top_R + np.log(total_R), jac_RP


def natural_map(d: Design) -> tuple[list[Parameter], np.ndarray]:
  """Uncentred parameters and the matrix T that makes them, T @ theta: log E, log A, exponents, log m.

  With exponents free per arm the uncentred coefficients differ per arm too: A[arm].
  """
  identity = np.eye(len(d.parameters))
  out, rows = [], []
  for k, parameter in enumerate(d.parameters):
    if parameter.kind != 'coefficient':
      out.append(parameter)
      rows.append(identity[k])
      continue
    (j,) = [j for j, term in enumerate(d.law.terms) if term.coefficient == parameter.base]
    name = d.law.terms[j].exponent
    if name in dict(d.law.pinned):  # not centred
      out.append(parameter)
      rows.append(identity[k])
    for q, exponent in enumerate(d.parameters):
      if (exponent.kind, exponent.base) == ('exponent', name):
        out.append(dataclasses.replace(parameter, of=exponent.of))
        rows.append(identity[k] + d.centre_J[j] * identity[q])
  return out, np.array(rows)


def natural(theta_P: np.ndarray, d: Design) -> dict[str, float]:
  """Parameters as they are published: E, A, alpha, ..., m[arm] (logs exponentiated), and the pinned ones."""
  parameters, map_ = natural_map(d)
  values = map_ @ theta_P
  with np.errstate(over='ignore'):  # log A of a term that ran away: inf is the honest value
    fitted = {p.label: float(np.exp(v) if p.in_log else v) for p, v in zip(parameters, values, strict=True)}
  return fitted | dict(d.law.pinned)
