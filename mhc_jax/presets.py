"""The connections by name, as data: what each published variant sets in ConnectionSpec.

model_config.py resolves `connection.name`, `connection.preset` and the overrides through `connection_spec`.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from mhc_jax.connection import READ_GATES, WRITE_GATES, ConnectionSpec, Gate, Init
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.constraints.base import Constraint
from mhc_jax.errors import require
from mhc_jax.values import check_dataclass, checked, checked_arguments

# Start values by name, given n. Biases are coordinates, before the gate (connection.Init).
INITS: dict[str, Callable[[int], Init]] = {
  # Reads and writes lean to the home stream (mhc-lite's +-1), so H_res has a gradient from step 0 on.
  'cyclic': lambda n: Init(read=(-1, 1), write=(-1, 1), mixing=0.01, phi=1.0, alpha=0.01),
  # The same without a dynamic part: at the start every token has the biases' H_res, reads and writes.
  'cyclic_zero_phi': lambda n: Init(read=(-1, 1), write=(-1, 1), mixing=0.01, phi=0.0, alpha=0.01),
  # Megatron-LM, MaxText: H_res = J/n, reads 1/2, unit writes; only phi breaks the symmetry of streams.
  'zero': lambda n: Init(read=(0, 0), write=(0, 0), mixing=None, phi=1.0, alpha=0.01),
  # Uniform reads 1/n, unit writes, H_res near I (SkyRL, Hunyuan v4).
  'near_identity': lambda n: Init(
    read=(-math.log(max(n - 1, 1)),) * 2, write=(0, 0), mixing=0.01, phi=1.0, alpha=0.01
  ),
  # A sum of all streams.
  'unit_reads': lambda n: Init(read=(1, 1), write=(0, 0), mixing=None, phi=1.0, alpha=0.01),
  # Zero coordinates but for phi, behind 1 / n (Qwen4-Exp).
  'scaled_phi': lambda n: Init(read=(0, 0), write=(0, 0), mixing=None, phi=1.0, alpha=1 / n),
  # HC: one-hot cyclic reads, unit writes, H_res = I, phi = 0: exactly pre-norm at step 0.
  'pre_norm': lambda n: Init(read=(0, 1), write=(1, 1), mixing=0.0, phi=0.0, alpha=0.01),
}

MOST_STREAMS = 2048  # every read and write sums over them, written out
MOST_MIXED = 64  # of streams with an H_res, whose n^2 products are written out
MOST_COORDINATES = 4096
MOST_FLOPS = 10**8  # of one matrix of one token

_MHC_GATES = {'read_gate': Gate('sigmoid'), 'write_gate': Gate('sigmoid', 2.0)}
_HC = {
  'read_gate': Gate('linear'),
  'write_gate': Gate('linear'),
  'init': 'pre_norm',
  'constraint': 'unconstrained',
  'scope': 'per_stream',
  'activation': 'tanh',
  'share_alpha': True,
  'collapse': 'sum',
}
_MHC = {**_MHC_GATES, 'init': 'cyclic', 'constraint': 'birkhoff_sinkhorn'}
_SOURCES = {
  'read_gate': Gate('sources'),
  'write_gate': Gate('one_hot'),
  'init': 'zero',
  'constraint': 'identity',
  'norm_weight': True,
  'expansion': 'one_hot',
  'collapse': 'sources',
}
_DENSE = {
  'read_gate': Gate('dense'),
  'read_ways': 4,
  'write_gate': Gate('one_hot'),
  'write_period': 2,
  'init': 'zero',
  'constraint': 'identity',
  'expansion': 'one_hot',
  'collapse': 'dense',
}
# mhc-lite, KromHC, hyper-connections: a learned norm weight, phi = 0, streams summed. They clamp the norm at
# 1e-12.
_TORCH = {
  **_MHC_GATES,
  'init': 'cyclic_zero_phi',
  'norm_weight': True,
  'norm_eps': 1e-20,
  'collapse': 'sum',
}

# name -> preset -> what it sets. The first preset of a name is its default.
PRESETS: dict[str, dict[str, dict]] = {
  'residual': {
    'plain': {
      'read_gate': Gate('fixed'),
      'write_gate': Gate('fixed'),
      'init': 'zero',
      'constraint': 'identity',
      'streams': 1,
    }
  },
  'hc': {
    'dynamic': _HC,
    'no_tanh': {**_HC, 'activation': 'none'},
    'static': {**_HC, 'dynamic': False},
  },
  'mhc': {
    'paper': {**_MHC, 'constraint_params': {'preset': 'paper'}, 'norm_eps': 1e-20},  # Table 5
    'deepseek_v4': {
      **_MHC,
      'constraint_params': {'preset': 'deepseek_v4'},
      'read_gate': Gate('sigmoid', eps=1e-6),
      'collapse': 'learned',
      'collapse_eps': 1e-6,
    },
    # Single-pass: streams seeded one-hot, each read map made one sublayer earlier, the last one collapses.
    'deepseek_v4_1': {
      **_MHC,
      'constraint_params': {'preset': 'deepseek_v4'},
      'read_gate': Gate('sigmoid', eps=1e-6),
      'single_pass': True,
      'expansion': 'one_hot',
      'collapse': 'read',
    },
    'megatron_main': {
      **_MHC,
      'constraint_params': {'preset': 'megatron_main'},
      'init': 'zero',
      'norm_eps': 1e-6,
      'norm_eps_outside': True,
    },
    'mhc_lite': {**_TORCH, 'constraint': 'birkhoff_permutations'},
    'kromhc': {**_TORCH, 'constraint': 'birkhoff_kronecker'},
    # One map of C for all streams.
    'lucidrains': {
      **_TORCH,
      'constraint': 'birkhoff_sinkhorn',
      'constraint_params': {'preset': 'lucidrains'},
      'scope': 'per_stream',
    },
  },
  # mHC in all but H_res = I.
  'identity': {
    'sigmoid': {**_MHC_GATES, 'init': 'cyclic', 'constraint': 'identity', 'norm_eps': 1e-20},
    # Hunyuan V4 (transformers 5.23): both gates with eps, V4's head.
    'hy_v4': {
      'read_gate': Gate('sigmoid', eps=1e-6),
      'write_gate': Gate('sigmoid', 2.0, 1e-6),
      'init': 'near_identity',
      'constraint': 'identity',
      'collapse': 'learned',
      'collapse_eps': 1e-6,
    },
  },
  # Qwen4-Exp (transformers 5.23): a low-rank read per channel, H_res = I, writes 2 sigmoid(phi^T v / n).
  'gated_residual': {
    'qwen4exp': {
      'read_gate': 'elementwise',
      'read_rank': 4,
      'write_gate': Gate('sigmoid', 2.0),
      'phi_only': True,
      'init': 'scaled_phi',
      'constraint': 'identity',
      'norm_scope': 'per_stream',
      'norm_weight': True,
    }
  },
  # HC of one stream's fractions, each of which is written by itself (Frac-Connections, arXiv 2503.14125).
  'frac': {'dynamic': {**_HC, 'streams': 1, 'fractions': 4, 'write_across': False}},
  # HC with reads and writes between all fractions of all streams (virtual width, arXiv 2511.11238).
  'vwn': {'dynamic': {**_HC, 'fractions': 2}},
  # Unmixed: sublayer t reads sum_s A_ts F_s over all earlier outputs, A learned, 1 at the start (a residual
  # stream). One stream per output: 2 depth + 1 of them.
  'depth_matrix': {
    'static': {
      'read_gate': Gate('linear'),
      'write_gate': Gate('one_hot'),
      'init': 'unit_reads',
      'constraint': 'identity',
      'dynamic': False,
      'expansion': 'one_hot',
      'collapse': 'weights',
    }
  },
  # Attention over the embedding and earlier outputs (Kimi, arXiv 2603.15031): of each, of sums of about an
  # eighth of all sublayers, by eight heads (MHAR, arXiv 2607.27230), of normed sources (Inkling-2).
  'attention_residual': {
    'full': _SOURCES,
    'block': _SOURCES,
    'heads': {**_SOURCES, 'read_heads': 8},
    'inkling2': {**_SOURCES, 'norm_weight': False, 'read_normed': True},
  },
  # Dynamic dense reads (MUDD, arXiv 2502.12170): queries, keys, values and the residual apart, plain or with
  # norms before and after their sums; or one read.
  'mudd': {
    'multiway': _DENSE,
    'normed': {**_DENSE, 'depth_norm': True},
    'single': {**_DENSE, 'read_ways': 1},
  },
}
BY_DEPTH = ('depth_matrix', 'attention_residual', 'mudd')  # whose streams are counted by what writes them
BLOCKS = 8  # of attention_residual's presets 'block' and 'inkling2', about


def connection_spec(
  name: str = 'mhc',
  preset: str | None = None,
  *,
  streams: int = 4,
  constraint: str | Constraint | None = None,
  constraint_params: dict | None = None,
  init: str | Init | None = None,
  mixing: float | None = None,
  alpha: float | None = None,
  read_gate: str | Gate | None = None,
  read_scale: float | None = None,
  write_gate: str | Gate | None = None,
  write_scale: float | None = None,
  read_eps: float | None = None,
  write_eps: float | None = None,
  **overrides,
) -> ConnectionSpec:
  """The connection `name`, a key of PRESETS, in one of its presets, with n = streams.

  None keeps the preset's value. constraint: a key of CONSTRAINTS or a Constraint of one's own; init: a key of
  INITS or an Init; mixing and alpha replace that one value of it; read_gate and write_gate: a Gate or its
  kind, with scales and eps; overrides are fields of ConnectionSpec. 'residual' and 'frac' have one stream
  whatever `streams` says. Raises ValueError for unknown names and sizes.
  """
  if name not in PRESETS:
    raise ValueError(f'connection.name must be one of {", ".join(PRESETS)}, got {name!r}')
  presets = PRESETS[name]
  preset = next(iter(presets)) if preset is None else preset
  if preset not in presets:
    raise ValueError(f'connection.preset of {name!r} must be one of {", ".join(presets)}, got {preset!r}')
  fields = dict(presets[preset])
  n = checked('connection.streams', fields.pop('streams', streams), int)
  require(
    1 <= n <= MOST_STREAMS, f'connection.streams must be at least 1 and at most {MOST_STREAMS}, got {n}'
  )
  default, default_params = fields.pop('constraint'), fields.pop('constraint_params', {})
  constraint = default if constraint is None else constraint
  params = {**(default_params if constraint == default else {}), **(constraint_params or {})}
  constraint = _constraint(constraint, params)
  default_init = fields.pop('init')
  init = default_init if init is None else init
  if isinstance(init, str):
    if init not in INITS:
      raise ValueError(f'connection.init must be one of {", ".join(INITS)}, got {init!r}')
    init = INITS[init](n)
  changes = {'mixing': mixing, 'alpha': alpha}
  init = dataclasses.replace(init, **{k: v for k, v in changes.items() if v is not None})
  fields.update({k: v for k, v in overrides.items() if v is not None})
  fields['read_gate'] = _gate(fields['read_gate'], read_gate, read_scale, read_eps, 1 / n)
  fields['write_gate'] = _gate(fields['write_gate'], write_gate, write_scale, write_eps, 1.0)
  spec = ConnectionSpec(streams=n, constraint=constraint, init=init, **fields)
  _check(spec)
  return spec


def _constraint(constraint: str | Constraint, params: dict) -> Constraint:
  """The constraint of that name with these parameters, or the given one; ValueError for a wrong name."""
  if isinstance(constraint, str):
    if constraint not in CONSTRAINTS:
      raise ValueError(f'connection.constraint must be one of {", ".join(CONSTRAINTS)}, got {constraint!r}')
    make = CONSTRAINTS[constraint]
    return make(**checked_arguments(f'connection.constraint={constraint}', make, params))
  if constraint.name in CONSTRAINTS and not constraint.is_of_package:
    raise ValueError(f'{constraint.name!r} names a constraint of the package; give your own another name')
  return constraint


def _gate(
  preset: str | Gate, wanted: str | Gate | None, scale: float | None, eps: float | None, mean: float
) -> Gate:
  """The preset's gate with what is wanted instead; `mean` is the scale of gates that average or add up."""
  gate = preset if wanted is None else wanted
  if isinstance(gate, str):
    gate = Gate(gate, mean if gate in ('fixed', 'elementwise') else 1.0)
  changes = {'scale': scale, 'eps': eps if gate.has_coordinates else None}
  return dataclasses.replace(gate, **{k: v for k, v in changes.items() if v is not None})


_CHOICES = {
  'scope': ('joint', 'per_stream'),
  'norm_scope': ('joint', 'per_stream'),
  'generator': ('matrix', 'cp'),
  'activation': ('none', 'tanh'),
  'expansion': ('replicate', 'one_hot', 'learned'),
  'collapse': ('mean', 'sum', 'learned', 'weights', 'read', 'sources', 'dense'),
}


def _check_cost(spec: ConnectionSpec) -> None:
  """Raises ConfigError, before anything is computed, for what takes too long to trace or to compute."""
  constraint, n = spec.constraint, spec.units
  what = f'connection.streams={n}'
  if spec.fractions > 1:
    what = f'connection.streams * fractions = {n}'
    require(n <= MOST_MIXED, f'{what}, which all are read by weights of their own; at most {MOST_MIXED}')
  if constraint.name != 'identity':
    require(n <= MOST_MIXED, f'{what} mixed by {n * n} sums, written out; at most {MOST_MIXED}^2')
  where = f'connection.constraint={constraint.name} at {n} streams'
  for what, count, most in (
    ('coordinates', constraint.num_coordinates, MOST_COORDINATES),
    ('flops', constraint.flops, MOST_FLOPS),
  ):
    found = checked(f'{what} of {where}', count(n), float)
    require(0 <= found <= most, f'{where} has {found:.0f} {what} a token; at most {most}')


def _check(spec: ConnectionSpec) -> None:
  parts = {'init': spec.init, 'read_gate': spec.read_gate, 'write_gate': spec.write_gate}
  for name, part in {'connection': spec, **{f'connection.{k}': v for k, v in parts.items()}}.items():
    check_dataclass(name, part)
  for name, choices in _CHOICES.items():
    value = getattr(spec, name)
    if value not in choices:
      raise ValueError(f'connection.{name} must be one of {", ".join(choices)}, got {value!r}')
  for name, kinds in (('read_gate', READ_GATES), ('write_gate', WRITE_GATES)):
    kind = getattr(spec, name).kind
    if kind not in kinds:
      raise ValueError(f'connection.{name} must be one of {", ".join(kinds)}, got {kind!r}')
  if spec.norm_eps < 0:
    raise ValueError(f'connection.norm_eps must not be negative, got {spec.norm_eps}')
  _check_fractions(spec)
  _check_cost(spec)
  _check_combinations(spec)
  mixing = spec.init.mixing
  if mixing is not None:
    with np.errstate(all='ignore'):
      start = spec.constraint.identity(spec.units, mixing) if 0 <= mixing <= 1 else np.nan
    if not np.isfinite(start).all():
      raise ValueError(
        f'{spec.constraint.name} has no start with connection.mixing={mixing}; 0.01 is a usual value'
      )
  outputs = spec.generator_shape[1]
  if spec.rank is not None and not (spec.dynamic and 1 <= spec.rank <= outputs):
    raise ValueError(
      f'connection.rank must lie between 1 and {outputs}, the number of coordinates that phi generates, '
      f'got {spec.rank}'
    )


def _check_fractions(spec: ConnectionSpec) -> None:
  require(spec.fractions >= 1, f'connection.fractions must be at least 1, got {spec.fractions}')
  if spec.fractions == 1:
    require(spec.write_across, 'connection.write_across=False needs connection.fractions above 1')
    return
  for what, there in (
    (f'read_gate={spec.read_gate.kind}', spec.read_gate.kind in ('elementwise', 'sources', 'dense')),
    ('write_gate=one_hot', spec.write_gate.kind == 'one_hot'),
    ('single_pass', spec.single_pass),
  ):
    require(not there, f'connection.{what} does not go with connection.fractions={spec.fractions}')


def _check_dense(spec: ConnectionSpec) -> None:
  ours = spec.read_gate.kind == 'dense', spec.collapse == 'dense'
  written = spec.write_gate.kind == 'one_hot' and spec.write_period == 2 and spec.expansion == 'one_hot'
  require(
    ours == (False, False) or (all(ours) and written and spec.dynamic and not spec.parts),
    'connection.read_gate=dense and collapse=dense need each other, write_gate=one_hot, write_period=2, '
    'expansion=one_hot, dynamic and a constraint without coordinates',
  )
  require(ours[0] or not spec.depth_norm, 'connection.depth_norm needs read_gate=dense')
  require(
    spec.read_ways == 1 or (ours[0] and spec.read_ways == 4),
    f'connection.read_ways must be 1, or 4 with read_gate=dense, got {spec.read_ways}',
  )


def _check_combinations(spec: ConnectionSpec) -> None:
  if spec.single_pass and not spec.read_gate.has_coordinates:
    raise ValueError(f'connection.single_pass needs generated reads, not read_gate={spec.read_gate.kind}')
  if (spec.collapse == 'read') != spec.single_pass:
    raise ValueError('connection.collapse=read and connection.single_pass need each other')
  if spec.generator == 'cp' and (spec.rank is None or spec.scope != 'joint' or 'res' not in spec.parts):
    raise ValueError('connection.generator=cp needs a connection.rank, scope=joint and an H_res to generate')
  if spec.phi_only and ('res' in spec.parts or not spec.dynamic):
    raise ValueError('connection.phi_only has no biases: it needs constraint=identity and a generator')
  elementwise = spec.read_gate.kind == 'elementwise'
  if elementwise != (spec.read_rank is not None) or (elementwise and spec.read_rank < 1):
    raise ValueError('connection.read_gate=elementwise and a connection.read_rank >= 1 need each other')
  if elementwise and spec.scope != 'joint':
    raise ValueError('connection.read_gate=elementwise needs scope=joint')
  ours = spec.read_gate.kind == 'sources', spec.collapse == 'sources'
  both = spec.write_gate.kind == 'one_hot' and spec.expansion == 'one_hot' and not spec.parts
  if ours not in ((False, False), (True, True)) or (any(ours) and not (both and spec.dynamic)):
    raise ValueError(
      'connection.read_gate=sources and collapse=sources need each other, write_gate=one_hot, '
      'expansion=one_hot, dynamic and a constraint without coordinates'
    )
  _check_dense(spec)
  if (spec.read_heads, spec.read_normed) != (1, False) and not any(ours):
    raise ValueError('connection.read_heads and read_normed need read_gate=sources')
  if spec.write_period != 1 and spec.write_gate.kind != 'one_hot':
    raise ValueError('connection.write_period needs write_gate=one_hot')
  if min(spec.read_heads, spec.write_period) < 1:
    raise ValueError('connection.read_heads and write_period must be at least 1')
