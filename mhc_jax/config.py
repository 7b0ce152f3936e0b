"""The configuration: every field with its default, and the frozen dataclasses that the core sees.

A config file (configs/*.py) returns base_config() with changes; config_file.parse applies `--config.a.b=v`;
the `build_*` functions check the values and build the dataclasses once; the model's are in model_config.py.
None means off or derived.
"""

import dataclasses
import functools
import math
import pickle
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder as optional

from mhc_jax.energy import check_kind
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
  """Every field, unlocked, with the defaults of a small model on a laptop.

  The comments beside and above the fields are what `mhc --print-config` says of them (print_config.py).
  """
  return pickle.loads(_pickled_base())  # a quarter of the time of building it, for plans of thousands of runs


@functools.cache
def _pickled_base() -> bytes:
  c = Section()
  c.arm = optional(str)  # label of the arm in a sweep; None: the connection's name
  c.seed = 0  # of the initial weights and the order of the data
  c.start = optional(str)  # digest of the weights to begin with, set by `mhc import`; None: random ones
  c.data = Section(
    {
      # python_wheels, python_stdlib, text_files:, parquet:, jsonl: or arrow:<file, folder or glob>,
      # hf:<data set>, or a TFDS data set with text
      'name': 'python_wheels',
      'column': optional(str),  # of parquet, jsonl, arrow and hf; None: text
      # None: bytes; a tokenizer.json, tiktoken:<encoding> or sentencepiece:<model file>. The run id has the
      # digest of the tokens, which covers the tokenizer's content, not its path
      'tokenizer': optional(str),
      'seq_len': 128,  # tokens
      'batch_size': 16,  # sequences per update, over all devices
      'cross_documents': False,  # True: attention sees earlier documents in its window
      'repeat': False,  # True: allow more than one epoch
      'dir': optional(str),  # where data sets are kept; None: TFDS's default. Not part of the run id
    }
  )
  c.model = Section(
    {
      'width': 64,  # C, of a stream
      'depth': 4,  # layers of two sublayers, attention and feed-forward
      'heads': 4,  # of queries
      'kv_heads': optional(int),  # None: as many as heads
      # None: 8/3 of width, rounded up to a multiple of 8; with experts, as wide as all that a token goes to
      'ffn_width': optional(int),
      'vocab_size': optional(int),  # None: the tokenizer's; more leaves the rest of the table unused
      'dtype': 'float32',  # of activations and streams: float32, bfloat16 or float64
      # Of the products with weights in attention and feed-forward: fp8_v3 (E4M3 in tiles, as DeepSeek-V3) or
      # fp8_tensor (one scale for an array, for comparison); None: dtype's
      'precision': optional(str),
      # Of the backward pass: 'layer' computes each layer again, 'products' all of it but the products with
      # weights, 'block' the connections of mHC's blocks of layers.
      'remat': 'none',
      'kernels': 'auto',  # Pallas kernels on accelerators; or xla, or pallas. Not part of the run id
      'scan': True,  # layers as a loop; False: written out, all of them
      'scan_unroll': 4,  # so many layers at most are written out: no copies; more are a loop, compiled as one
      'rope_theta': 10000.0,  # base of the rotary embedding's wave lengths
      'norm_eps': 1e-6,  # of RMS norms, under the root
      'weights': Section(
        {
          'rank': optional(int),  # of attention's and feed-forward's maps, W = U V; None is full
        }
      ),
      # Multi-head latent attention (DeepSeek-V2), on where kv_rank is set.
      'mla': Section(
        {
          'kv_rank': optional(int),  # of the latent that keys and values come from
          'head_dim': optional(int),  # of queries and keys, without the rotary part; None: width / heads
          'rope_dim': optional(int),  # None: half of head_dim
          'value_dim': optional(int),  # None: head_dim
          'q_rank': optional(int),  # of the latent that queries come from; None: they have full rank
        }
      ),
      # Attention over some of the tokens before, on where kind is set. A mask: exact, and no faster.
      'sparse': Section(
        {
          'kind': optional(str),  # window: the last tokens; topk: those that an index chooses (DeepSeek-V3.2)
          'topk': optional(int),  # tokens of a query
          'window': optional(int),  # the last so many, its own included; with topk they are among those
          'index_heads': optional(int),  # None: half as many as heads
          'index_dim': optional(int),  # of an index head; None: that of attention's, without mla.rope_dim
          'index_rope_dim': optional(int),  # the first so many have the position; None: half of index_dim
          # warmup: attention over all tokens, and the index alone learns, from it; None: both learn
          'stage': optional(str),
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
      # Multi-token prediction (DeepSeek-V3): a module that predicts the token after the next, on where depth
      # is set. It is trained on beside the reported loss; its parameters are in no N of scaling laws.
      'mtp': Section(
        {
          'depth': optional(int),  # further tokens that are predicted: 1
          'weight': optional(float),  # of its loss; None: 0.3
        }
      ),
      'dense_layers': optional(int),  # leading layers without experts; None: 1 with experts
      # None keeps what presets.py sets.
      'connection': Section(
        {
          'name': 'mhc',  # a key of presets.PRESETS
          'preset': optional(str),  # one of PRESETS[name]; None: its first
          'streams': 4,  # n; the residual connection has one
          'fractions': optional(int),  # m, in which each stream is read, mixed and written; None: 1
          'write_across': optional(bool),  # a fraction of a sublayer's output goes to all; None: the preset's
          'rank': optional(int),  # of the generator phi
          'constraint': optional(str),  # of H_res: a key of constraints.CONSTRAINTS
          'constraint_params': Section(),  # of the constraint, by the names of its function, like iterations
          'init': optional(str),  # start values: a key of presets.INITS
          'mixing': optional(float),  # off-diagonal mass of H_res at the start
          'alpha': optional(float),  # start of the factor on what phi generates
          'dynamic': optional(bool),  # maps depend on the token
          'activation': optional(str),  # of the generator: 'none' or 'tanh'
          'generator': optional(str),  # 'matrix', or 'cp' with a rank
          'scope': optional(str),  # of phi: 'joint' or 'per_stream'
          'norm_scope': optional(str),  # of the norm before phi: 'joint' or 'per_stream'
          'norm_weight': optional(bool),  # that norm has weights
          'norm_eps': optional(float),  # of that norm
          'norm_eps_outside': optional(bool),  # 1 / (rms + eps) instead of 1 / sqrt(mean square + eps)
          'read_gate': optional(str),  # sigmoid, softmax, tanh, linear, fixed, elementwise, sources or dense
          'read_scale': optional(float),  # None: the preset's; 1 / streams for a fixed gate
          'read_rank': optional(int),  # of the elementwise read gate
          'read_heads': optional(int),  # of the sources read gate: slices of the width
          'read_normed': optional(bool),  # the sources read gate adds up normed streams
          'read_ways': optional(int),  # of the dense read gate: 1, or 4: queries, keys, values, residual
          'depth_norm': optional(bool),  # norms before and after the dense read gate's sums
          'write_period': optional(int),  # sublayers that a one_hot write adds up in one stream
          'write_gate': optional(str),  # sigmoid, softmax, tanh, linear, fixed or one_hot
          'write_scale': optional(float),  # m of m-sigmoid; 1 for a fixed gate
          'read_eps': optional(float),  # added to the read gate
          'write_eps': optional(float),  # added to the write gate
          'single_pass': optional(bool),  # reads by the map of the sublayer before (DeepSeek-V4.1)
          'expansion': optional(str),  # of the embedding to streams: replicate, one_hot or learned
          'collapse': optional(str),  # of streams: mean, sum, learned, weights, read, sources or dense
          'output_init_scaling': False,  # HC's: output maps start sqrt(n) times larger
        }
      ),
    }
  )
  # Width and depth transfer (CompleteP); None is off. The base is the size at which lr was tuned.
  c.transfer = Section(
    {
      'base_width': optional(int),  # model.width at which lr was tuned
      'base_depth': optional(int),  # model.depth at which it was
      # weights.rank at the base width. None: it grows as the width; where it does not, weights.rank itself.
      'base_rank': optional(float),
    }
  )
  c.optimizer = Section(
    {
      'lr': 4e-3,  # the largest, after warmup, at the base width and depth
      'beta1': 0.9,  # AdamW's, of the mean of gradients
      'beta2': 0.95,  # AdamW's, of the mean of their squares
      'eps': 1e-8,  # AdamW's
      'weight_decay': 0.1,  # AdamW's, times lr; of embedding and matrices, not of norms
      'clip_norm': optional(float),  # of the gradient; None does not clip
      'schedule': 'wsd',  # wsd, cosine, step (the paper's) or constant
      'warmup_steps': optional(int),  # updates from 0 to lr; exactly one of this and warmup_fraction
      'warmup_fraction': optional(float),  # of all updates
      'decay_fraction': 0.2,  # of all updates, the last ones: where wsd falls to final_fraction
      'final_fraction': 0.0,  # of lr, where wsd and cosine end
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
  # Clusters that train apart and average their parameters now and then (DiLoCo), on where workers is set.
  c.cluster = Section(
    {
      'workers': optional(int),  # each with its share of the batch and moments of its own
      'sync_every': optional(int),  # updates between averages; None: gradients are averaged at every update
      'outer_lr': optional(float),  # of the step to the average; None: 0.7 as published, few rounds want 1
      'outer_momentum': optional(float),  # Nesterov's; None: 0.9 as published, few rounds want 0
      'fragments': optional(int),  # parts of the layers that are averaged at times of their own; None: 1
      'overlap': optional(int),  # updates from sending an average to its arrival; None: 0
      'outer_bits': optional(int),  # of a number that is sent: 32, or 4 (E3M0); None: 32
    }
  )
  # Exactly one. Parameters are matmul parameters with the unembedding (cost.py: 'matmul').
  c.duration = Section(
    {
      'steps': optional(int),  # updates
      'tokens': optional(float),  # of training, over all devices
      'flops': optional(float),  # of training, as cost.py counts them
      'tokens_per_param': optional(float),  # Chinchilla's 20, say
    }
  )
  # Also before the first update and at the end.
  c.evaluation = Section(
    {
      'every_steps': 100,  # updates
      'sequences': 256,  # of the validation split, the same for every run
      'batch_size': 64,  # sequences at a time, over all devices
    }
  )
  c.log = Section(
    {
      'every_steps': 10,  # updates from row to row of metrics.jsonl
      'diagnostics_every_steps': optional(int),  # of H_res and the streams, by layer; None: never
      'tensorboard': True,  # rows go there too. Not part of the run id
      'wandb': optional(str),  # project of Weights & Biases for rows (extra wandb). Not part of the run id
      'energy': optional(
        str
      ),  # joules in rows, by nvml, rapl or cpu:WATTS (energy.py). Not part of the run id
    }
  )
  c.checkpoint = Section(
    {
      'every_steps': optional(int),  # None: only at the end. Not part of the run id
      'keep': 2,  # the newest so many. Not part of the run id
    }
  )
  c.divergence = Section(
    {
      'patience': 10,  # losses after warmup whose median ends a run where it lies above the beginning
    }
  )
  # Devices along each axis; one may be -1, all that the others leave. Not part of the run id
  c.mesh = Section(
    {
      'data': 1,  # splits the batch
      'fsdp': 1,  # splits the batch, and every parameter and moment
      'tensor': 1,  # splits heads, feed-forward width, vocabulary, and time
      'expert': 1,  # splits the batch, and the experts of a mixture
    }
  )
  # The accelerators that the mesh is meant for, like v5p:4x4x4. Not part of the run id
  c.topology = optional(str)
  return pickle.dumps(c)


# What does not change the numbers of a run, and so is left out of its id.
NOT_IN_ID = (
  *(('arm',), ('mesh',), ('topology',), ('checkpoint',)),
  *(('model', 'kernels'), ('data', 'dir'), ('data', 'column'), ('data', 'tokenizer')),
  *(('log', 'tensorboard'), ('log', 'wandb'), ('log', 'energy')),
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


def fill_mesh(config: ConfigDict, devices: int) -> None:
  """Makes of an axis of mesh that is -1, in place, what the others leave of so many devices.

  Raises ConfigError where two are, or the others do not divide the devices.
  """
  rest = [axis for axis, size in config.mesh.items() if size == -1]
  if not rest:
    return
  require(len(rest) == 1, f'one axis of mesh can be -1, all devices that are left, not {" and ".join(rest)}')
  others = {axis: size for axis, size in config.mesh.items() if size != -1}
  size = math.prod(others.values())
  require(
    size >= 1 and devices % size == 0,
    f'mesh.{rest[0]}=-1 takes what is left of {devices} devices, and the other axes, '
    f'{" * ".join(f"{axis} {others[axis]}" for axis in others)} = {size}, do not divide them',
  )
  with config.unlocked():
    config.mesh[rest[0]] = devices // size


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
  check_kind(config.log.energy)
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
