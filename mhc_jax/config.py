"""The configuration: every field with its default, and the frozen dataclasses that the core sees.

A config file (configs/*.py) returns base_config() with changes; config_file.parse applies `--config.a.b=v`;
the `build_*` functions check the values and build the dataclasses once; the model's are in model_config.py.
None means off or derived.
"""

import dataclasses
import functools
import pickle
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder as optional

from mhc_jax.errors import require
from mhc_jax.manifold_updates import MANIFOLDS

SCHEDULES = ('wsd', 'cosine', 'step', 'constant')
OPTIMIZERS = (None, 'adamw', 'muon')
DURATIONS = ('steps', 'tokens', 'flops', 'tokens_per_param')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW or Muon and its schedule; lr and weight_decay are those of the base width and depth."""

  lr: float
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip_norm: float | None
  schedule: str
  warmup_steps: int | None  # exactly one of warmup_steps and warmup_fraction
  warmup_fraction: float | None
  decay_fraction: float  # 'wsd': the last fraction of updates, linear to final_fraction
  final_fraction: float  # of lr, where 'wsd' and 'cosine' end
  manifold: str | None  # set or optimizer of manifold_updates.py
  manifold_pattern: str | None  # regular expression of the parameters' paths
  manifold_value: float | None  # rank, radius, or LORO's updates between exact steps
  name: str | None  # None: adamw; or muon for matrices (muon.py)
  muon_beta: float | None  # None: 0.95
  muon_connections: bool | None  # True: the generators' matrices by Muon too
  microbatches: int | None  # parts of a batch whose gradients are added one after another; None is one


class Section(ConfigDict):
  """A ConfigDict that refuses a bool for a number, where ConfigDict makes 1 or 1.0 of it."""

  def __setitem__(self, key: str, value: Any) -> None:
    kind = self.get_type(key) if key in self else None
    if isinstance(value, bool) and kind in (int, float):
      raise TypeError(f'{key} takes {kind.__name__}, got {value}')
    if kind is Section and isinstance(value, ConfigDict):
      value = Section(value)  # ConfigDict wants the very type
    super().__setitem__(key, value)


def base_config() -> ConfigDict:
  """Every field, unlocked, with the defaults of a small model on a laptop."""
  return pickle.loads(_pickled_base())  # a quarter of the time of building it, for plans of thousands of runs


@functools.cache
def _pickled_base() -> bytes:
  c = Section()
  c.arm = optional(str)  # label of the arm in a sweep; None: the connection's name
  c.seed = 0  # of the initial weights and the order of the data
  c.data = Section(
    {
      'name': 'python_stdlib',  # or text_files:<folder or glob>, or a TFDS data set with text
      'tokenizer': optional(str),  # None: bytes
      'seq_len': 128,  # tokens
      'batch_size': 16,  # sequences per update, over all devices
      'cross_documents': False,  # True: attention sees earlier documents in its window
      'repeat': False,  # True: allow more than one epoch
      'dir': optional(str),  # where data sets are kept; None: TFDS's default. Not part of the run id
    }
  )
  c.model = Section(
    {
      'width': 64,
      'depth': 4,
      'heads': 4,
      'kv_heads': optional(int),  # None: as many as heads
      # None: 8/3 of width, rounded up to a multiple of 8; with experts, as wide as all that a token goes to
      'ffn_width': optional(int),
      'vocab_size': optional(int),  # None: the tokenizer's; more leaves the rest of the table unused
      'dtype': 'float32',  # of activations and streams: float32, bfloat16 or float64
      # Of the backward pass: 'layer' computes each layer again, 'products' all of it but the products with
      # weights, 'block' the connections of mHC's blocks of layers.
      'remat': 'none',
      'kernels': 'auto',  # Pallas kernels on accelerators; or xla, or pallas. Not part of the run id
      'scan': True,
      'scan_unroll': 4,  # so many layers at most are written out: no copies; more are a loop, compiled as one
      'rope_theta': 10000.0,
      'norm_eps': 1e-6,
      'weights': Section({'rank': optional(int)}),  # W = U V of this rank; None is full
      # Multi-head latent attention (DeepSeek-V2), on where kv_rank is set.
      'mla': Section(
        {
          'kv_rank': optional(int),
          'head_dim': optional(int),  # of queries and keys, without the rotary part; None: width / heads
          'rope_dim': optional(int),  # None: half of head_dim
          'value_dim': optional(int),  # None: head_dim
        }
      ),
      # A mixture of experts (DeepSeek-V3) in every layer after the dense ones, on where experts is set.
      'moe': Section(
        {
          'experts': optional(int),  # routed ones
          'active': optional(int),  # of them, per token; None: 6
          'shared': optional(int),  # experts of every token; None: 2
          'ffn_width': optional(int),  # of one expert; None: 8/3 of width over active + shared
          'scale': optional(float),  # of the routed experts' sum; None: 2.5 (DeepSeek-V3)
          'router': optional(str),  # None: sigmoid; or sinkhorn
          'bias_rate': optional(float),  # of the balancing; None: 1e-3, 0 is off
        }
      ),
      'dense_layers': optional(int),  # leading layers without experts; None: 1 with experts
      # None keeps what presets.py sets.
      'connection': Section(
        {
          'name': 'mhc',  # a key of presets.PRESETS
          'preset': optional(str),
          'streams': 4,
          'rank': optional(int),  # of the generator phi
          'constraint': optional(str),  # a key of CONSTRAINTS
          'constraint_params': Section(),
          'init': optional(str),  # a key of INITS
          'mixing': optional(float),  # off-diagonal mass of H_res at the start
          'alpha': optional(float),
          'dynamic': optional(bool),
          'activation': optional(str),  # of the generator: 'none' or 'tanh'
          'generator': optional(str),  # 'matrix', or 'cp' with a rank
          'scope': optional(str),  # of phi: 'joint' or 'per_stream'
          'norm_scope': optional(str),  # of the norm before phi: 'joint' or 'per_stream'
          'norm_weight': optional(bool),
          'norm_eps': optional(float),
          'norm_eps_outside': optional(bool),  # 1 / (rms + eps) instead of 1 / sqrt(mean square + eps)
          'read_gate': optional(str),  # sigmoid, softmax, tanh, linear, fixed, elementwise or sources
          'read_scale': optional(float),  # None: the preset's; 1 / streams for a fixed gate
          'read_rank': optional(int),  # of the elementwise read gate
          'read_heads': optional(int),  # of the sources read gate: slices of the width
          'read_normed': optional(bool),  # the sources read gate adds up normed streams
          'write_period': optional(int),  # sublayers that a one_hot write adds up in one stream
          'write_gate': optional(str),  # sigmoid, softmax, tanh, linear, fixed or one_hot
          'write_scale': optional(float),  # m of m-sigmoid; 1 for a fixed gate
          'read_eps': optional(float),
          'write_eps': optional(float),
          'single_pass': optional(bool),  # reads by the map of the sublayer before (DeepSeek-V4.1)
          'expansion': optional(str),  # replicate, one_hot or learned
          'collapse': optional(str),  # mean, sum, learned, weights, read or sources
          'output_init_scaling': False,  # HC's: output maps start sqrt(n) times larger
        }
      ),
    }
  )
  # Width and depth transfer (CompleteP); None is off. The base is the size at which lr was tuned.
  c.transfer = Section(
    {
      'base_width': optional(int),
      'base_depth': optional(int),
      # weights.rank at the base width. None: it grows as the width; where it does not, weights.rank itself.
      'base_rank': optional(float),
    }
  )
  c.optimizer = Section(
    {
      'lr': 4e-3,
      'beta1': 0.9,
      'beta2': 0.95,
      'eps': 1e-8,
      'weight_decay': 0.1,
      'clip_norm': optional(float),
      'schedule': 'wsd',  # wsd, cosine, step (the paper's) or constant
      'warmup_steps': optional(int),  # exactly one of the two
      'warmup_fraction': optional(float),
      'decay_fraction': 0.2,
      'final_fraction': 0.0,
      # Keeps the parameters whose path matches on a set: fixed_rank, stiefel, row_sphere, spectral_ball,
      # doubly_stochastic (after AdamW's update), or by an optimizer of their own: loro, manifold_muon.
      'manifold': optional(str),
      'manifold_pattern': optional(str),  # for example layers/(attention|feed_forward)/.*/w
      'manifold_value': optional(float),  # rank, radius (None: 1), or LORO's updates between exact steps
      'name': optional(str),  # None: adamw; muon: matrices by Muon, all else by AdamW
      'muon_beta': optional(float),  # None: 0.95
      'muon_connections': optional(bool),  # True: the connections' matrices by Muon too; else by AdamW
      'microbatches': optional(int),  # parts of a batch, one after another: less memory, equal gradients
    }
  )
  c.optimizer.clip_norm = 1.0
  # Exactly one. Parameters are matmul parameters with the unembedding (cost.py: 'matmul').
  c.duration = Section(
    {
      'steps': optional(int),
      'tokens': optional(float),
      'flops': optional(float),
      'tokens_per_param': optional(float),
    }
  )
  c.evaluation = Section(
    {
      'every_steps': 100,
      'sequences': 256,
      'batch_size': 64,
    }  # also before the first update and at the end
  )
  c.log = Section({'every_steps': 10, 'diagnostics_every_steps': optional(int), 'tensorboard': True})
  c.checkpoint = Section({'every_steps': optional(int), 'keep': 2})  # None: only at the end
  # Diverged: anything non-finite, or a loss above the first for this many updates in a row after warmup.
  c.divergence = Section({'patience': 10})
  # Devices along each axis. Not part of the run id
  c.mesh = Section({'data': 1, 'fsdp': 1, 'tensor': 1, 'expert': 1})
  # The accelerators that the mesh is meant for, like v5p:4x4x4. Not part of the run id
  c.topology = optional(str)
  return pickle.dumps(c)


# What does not change the numbers of a run, and so is left out of its id.
NOT_IN_ID = (
  *(('arm',), ('mesh',), ('topology',), ('checkpoint',)),
  *(('model', 'kernels'), ('data', 'dir'), ('log', 'tensorboard')),
)


def build_optimizer(config: ConfigDict) -> OptimizerConfig:
  """config.optimizer -> OptimizerConfig; raises ConfigError for values out of range."""
  c = config.optimizer
  require(
    c.schedule in SCHEDULES,
    f'optimizer.schedule must be one of {", ".join(SCHEDULES)}, got {c.schedule!r}',
  )
  require(
    (c.warmup_steps is None) != (c.warmup_fraction is None),
    'set exactly one of optimizer.warmup_steps and optimizer.warmup_fraction',
  )
  for name in ('warmup_fraction', 'decay_fraction', 'final_fraction'):
    require(c[name] is None or 0 <= c[name] <= 1, f'optimizer.{name} must lie in [0, 1], got {c[name]}')
  for name in ('lr', 'weight_decay', 'warmup_steps'):
    require(c[name] is None or c[name] >= 0, f'optimizer.{name} must not be negative, got {c[name]}')
  require(c.name in OPTIMIZERS, f'optimizer.name must be adamw or muon, got {c.name!r}')
  require(
    c.name == 'muon' or (c.muon_beta is None and c.muon_connections is None),
    'optimizer.muon_beta and optimizer.muon_connections need optimizer.name=muon',
  )
  require(c.eps > 0, f'optimizer.eps must be positive, got {c.eps}')
  for name in ('beta1', 'beta2', 'muon_beta'):
    require(c[name] is None or 0 <= c[name] < 1, f'optimizer.{name} must lie in [0, 1), got {c[name]}')
  require(
    c.clip_norm is None or c.clip_norm > 0,
    f'optimizer.clip_norm must be positive or None, got {c.clip_norm}',
  )
  _check_manifold(c)
  return OptimizerConfig(**c.to_dict())


def _check_manifold(c: ConfigDict) -> None:
  require(
    c.manifold is None or c.manifold in MANIFOLDS,
    f'optimizer.manifold must be one of {", ".join(MANIFOLDS)}, got {c.manifold!r}',
  )
  require(
    (c.manifold is None) == (c.manifold_pattern is None),
    'optimizer.manifold and optimizer.manifold_pattern need each other',
  )
  require(
    c.manifold not in ('fixed_rank', 'loro') or (c.manifold_value or 0) >= 1,
    f'optimizer.manifold={c.manifold} needs optimizer.manifold_value >= 1, got {c.manifold_value}',
  )
  require(
    c.manifold_value is None or c.manifold_value > 0,
    f'optimizer.manifold_value must be positive, got {c.manifold_value}',
  )


def check_counts(config: ConfigDict) -> None:
  """Raises ConfigError where a count is below its minimum or not exactly one duration is set."""
  least = {
    'data': ('seq_len', 'batch_size'),
    'evaluation': ('every_steps', 'sequences', 'batch_size'),
    'log': ('every_steps', 'diagnostics_every_steps'),
    'checkpoint': ('every_steps', 'keep'),
    'divergence': ('patience',),
    'optimizer': ('microbatches',),
    'mesh': ('data', 'fsdp', 'tensor', 'expert'),
  }
  for section, names in least.items():
    for name in names:
      value = config[section][name]
      require(value is None or value >= 1, f'{section}.{name} must be at least 1, got {value}')
  require(0 <= config.seed < 2**31, f'seed must lie between 0 and 2**31 - 1, got {config.seed}')
  given = [name for name in DURATIONS if config.duration[name] is not None]
  require(
    len(given) == 1,
    f'set exactly one of duration.{{{", ".join(DURATIONS)}}}, got {given or "none"}',
  )
  value = config.duration[given[0]]
  require(value > 0, f'duration.{given[0]} must be positive, got {value}')
  rows, parts = config.data.batch_size, config.optimizer.microbatches or 1
  shards = config.mesh.data * config.mesh.fsdp * config.mesh.expert
  require(
    rows % (shards * parts) == 0,
    f'data.batch_size={rows} must be a multiple of mesh.data * mesh.fsdp * mesh.expert = {shards}'
    + f' times optimizer.microbatches={parts}' * (parts > 1),
  )
  rows = config.evaluation.batch_size
  require(rows % shards == 0, f'evaluation.batch_size={rows} must be a multiple of {shards} devices')
  require(
    config.evaluation.sequences % rows == 0,
    f'evaluation.sequences={config.evaluation.sequences} must be a multiple of evaluation.batch_size={rows}',
  )
