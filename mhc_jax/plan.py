"""A run: what a configuration resolves to once the corpus is known. Pure: nothing is read or written.

config -> **plan** -> train. `resolve` fills in derived values, counts parameters and FLOPs, turns the
duration into a number of updates and names the run by the hash of what determines its numbers.
"""

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mhc_jax import clusters, config_file, cost
from mhc_jax import optimizer as optim
from mhc_jax.clusters import ClusterConfig, build_cluster
from mhc_jax.config import NOT_IN_ID, OptimizerConfig, build_optimizer, check_counts, fill_mesh
from mhc_jax.connection import ConnectionSpec, Gate, Init
from mhc_jax.constraints.base import Constraint
from mhc_jax.data import BYTES
from mhc_jax.errors import ConfigError, require
from mhc_jax.manifold_updates import check_matches
from mhc_jax.model import Transformer
from mhc_jax.model_config import (
  ModelConfig,
  build_connection,
  check_connection,
  derive_sizes,
  derive_transfer,
  model_of,
)
from mhc_jax.patterns import check_pattern
from mhc_jax.presets import INITS, PRESETS, connection_spec
from mhc_jax.sharding import check_mesh, find_devices
from mhc_jax.train_step import init_state, without_traced
from mhc_jax.values import INT32

PLACED = ('text_files', 'python_wheels', 'parquet', 'jsonl', 'arrow')  # corpora whose names are places
MOST_BYTES = 2**50  # of parameters, moments and the least activations


@dataclasses.dataclass(frozen=True)
class Run:
  """Everything that train.run needs: the resolved configuration and what follows from it."""

  run_id: str
  resolved: dict[str, Any]  # plain values, goes into config.json
  model: ModelConfig
  optimizer: OptimizerConfig
  derived: dict[str, Any]  # parameters by group, FLOPs, tokens, num_steps; goes into status.json
  cluster: ClusterConfig | None = None

  @property
  def num_steps(self) -> int:
    """Number of optimizer updates."""
    return self.derived['num_steps']

  @property
  def loose(self) -> ClusterConfig | None:
    """The clusters that average parameters, not gradients."""
    return self.cluster if self.cluster and self.cluster.sync_every else None

  @property
  def shapes(self) -> tuple[Any, ...]:
    """What must be equal for two runs to share a compilation."""
    data = self.resolved['data']
    loose = self.loose and clusters.without_traced(self.loose)
    return self.model, without_traced(self.optimizer), data['batch_size'], data['seq_len'], loose

  @property
  def _every(self) -> dict[str, int | None]:
    every = {name: self.resolved[name]['every_steps'] for name in ('log', 'evaluation', 'checkpoint')}
    return every | {'diagnostics': self.resolved['log']['diagnostics_every_steps']}  # None is off

  def due(self, step: int) -> set[str]:
    """What comes after update `step`, the last one included: log, evaluation, diagnostics, checkpoint."""
    every = self._every
    always = {'log', 'evaluation', 'checkpoint'} | {name for name, steps in every.items() if steps}
    periodic = {name for name, steps in every.items() if steps and step % steps == 0}
    return always if step == self.num_steps else periodic

  def until_due(self, step: int) -> int:
    """How many updates after `step` the state is wanted next, for anything but the log."""
    every = [steps for name, steps in self._every.items() if steps and name != 'log']
    return min(self.num_steps - step, *(steps - step % steps for steps in every))


def resolve(config: ConfigDict, digest: str, constraint: Constraint | None = None) -> Run:
  """ConfigDict and the corpus's content digest -> Run; raises ConfigError for impossible values.

  constraint: one of the caller's own in place of the named one; its name and params enter the run id.
  """
  find_devices()  # tracing needs one
  config = config_file.check_fields(config)
  fill_mesh(config, jax.device_count())
  check_counts(config)
  cluster = build_cluster(config)
  resolved = config.to_dict()
  resolved['arm'] = config.arm or config.model.connection.name
  resolved['data']['digest'] = digest
  if config.data.tokenizer == BYTES.name:
    resolved['data']['tokenizer'] = None  # the same run
  if config.optimizer.name == 'adamw':
    resolved['optimizer']['name'] = None  # likewise
  resolved['model'] |= derive_sizes(config)
  resolved['transfer'] = derive_transfer(config)
  spec = build_connection(config.model.connection, config.model.depth, constraint)
  model = model_of(resolved['model'], resolved['transfer'], spec)
  check_size(model, config)
  check_connection(model)
  resolved['model']['connection'] = _resolved_connection(resolved['model']['connection'], spec)
  optimizer = build_optimizer(config)
  _check_fit(model, without_traced(optimizer))
  check_mesh(config.mesh.to_dict(), model, config.data.seq_len)
  flops_per_token = cost.train_flops_per_token(model, config.data.seq_len)
  params = cost.parameters(model)
  tokens_per_step = config.data.batch_size * config.data.seq_len
  num_steps = steps_of(config.duration, tokens_per_step, flops_per_token, params['matmul'])
  derived = {
    'params': params,
    'flops_per_token': flops_per_token,
    'ideal_flops_per_token': cost.train_flops_per_token(model, config.data.seq_len, causal=True),
    'forward_flops_per_token_by_term': cost.forward_flops_per_token(model, config.data.seq_len),
    'tokens_per_step': tokens_per_step,
    'num_steps': num_steps,
    'tokens': num_steps * tokens_per_step,
    'flops': num_steps * tokens_per_step * flops_per_token,
    'data_digest': digest,
  }
  if cluster:
    messages = clusters.message_bytes(_shapes(model), cluster)
    sent = clusters.bytes_sent(messages, cluster, num_steps, num_steps)
    derived |= {'cluster_messages': messages, 'cluster_bytes_per_token': sent / derived['tokens']}
  return Run(run_id(resolved), resolved, model, optimizer, derived, cluster)


@functools.lru_cache(maxsize=1024)
def _shapes(model: ModelConfig) -> Any:
  key, tokens = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((1, 2), jnp.int32)
  return jax.eval_shape(Transformer(model).init, key, tokens, tokens)['params']


def reseeded(run: Run, seed: int) -> Run:
  """The same run at another seed, as resolve would have it."""
  resolved = run.resolved | {'seed': seed}
  return dataclasses.replace(run, resolved=resolved, run_id=run_id(resolved))


def check_size(model: ModelConfig, config: ConfigDict) -> None:
  """Raises ConfigError for what no machine holds, or what int32 cannot count."""
  tokens = config.data.batch_size * config.data.seq_len
  sizes = {
    'data.batch_size * data.seq_len': tokens,
    'streams * width': model.connection.streams * model.width,
    'heads * (head_dim + value_dim)': model.heads * (model.head_dim + model.value_dim),
    'moe.shared * moe.ffn_width': model.moe.shared * model.moe.ffn_width if model.moe else 0,
  }
  for name, size in sizes.items():
    require(size <= INT32, f'{name} = {size}: at most {INT32}')
  parts, moments = config.optimizer.microbatches or 1, optim.least_moments(config.optimizer)
  needed = cost.least_bytes(model, tokens, parts, moments=moments)
  require(
    needed <= MOST_BYTES,
    f'the model has {cost.parameters(model)["total"]} parameters and needs {needed / 2**40:.0f} TiB at the '
    f'least; at most {MOST_BYTES / 2**40:.0f}: lower model.width, depth, vocab_size or the like',
  )


@functools.lru_cache(maxsize=1024)
def _check_fit(model: ModelConfig, optimizer: OptimizerConfig) -> None:
  """Raises ConfigError where the manifold does not fit the parameters that its pattern matches."""
  if optimizer.manifold is None:
    return
  require(not model.warms_up, 'model.sparse.stage=warmup moves the index alone: leave optimizer.manifold out')

  def first_update(key):
    state = init_state(key, model, optimizer)
    transform = optim.transform(optimizer, model, jnp.zeros(()), jnp.zeros(()))
    return transform.update(state.params, state.opt_state, state.params)

  check_pattern('optimizer.manifold_pattern', optimizer.manifold_pattern)
  try:
    check_matches(optimizer.manifold, optimizer.manifold_pattern, _shapes(model))
    jax.eval_shape(first_update, jax.eval_shape(lambda: jax.random.key(0)))
  except ValueError as error:
    raise ConfigError(f'optimizer.manifold={optimizer.manifold}: {error}') from None


def _resolved_connection(given: dict[str, Any], spec: ConnectionSpec) -> dict[str, Any]:
  """The connection with every value that its preset sets written out."""
  written = {
    field.name: getattr(spec, field.name)
    for field in dataclasses.fields(spec)
    if field.name not in ('constraint', 'init')
  }
  for gate in ('read_gate', 'write_gate'):
    written[gate] = dataclasses.asdict(written[gate])
  return {
    'name': given['name'],
    'preset': given['preset'] or next(iter(PRESETS[given['name']])),
    **written,
    'constraint': spec.constraint.name,
    'constraint_params': dict(spec.constraint.params),
    'init': json.loads(json.dumps(dataclasses.asdict(spec.init))),
    'output_init_scaling': given['output_init_scaling'],
  }


def rebuild_model(resolved: dict[str, Any], constraint: Constraint | None = None) -> ModelConfig:
  """The ModelConfig of a resolved configuration (config.json).

  constraint: the caller's own, where the run has one. Raises ConfigError for values of another kind or out of
  range, an unknown constraint, or one of another name or parameters than the run's.
  """
  config = config_file.complete(resolved)
  check_counts(config)
  model = config.model.to_dict() | derive_sizes(config)
  try:
    spec = _rebuild_connection(resolved['model']['connection'], constraint)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise _of_connection(error) from None
  rebuilt = model_of(model, config.transfer.to_dict(), spec)
  check_size(rebuilt, config)
  check_connection(rebuilt)
  return rebuilt


def configuration_of(resolved: dict[str, Any]) -> ConfigDict:
  """The configuration that resolves to this one (config.json): with equal data, the same run.

  Traces nothing. Raises ConfigError as rebuild_model does, and where the connection's start values have no
  name (presets.INITS).
  """
  config = config_file.complete(resolved)
  try:
    spec = _rebuild_connection(resolved['model']['connection'], None)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise _of_connection(error) from None
  connection = config.model.connection
  for name, gate in (('read', spec.read_gate), ('write', spec.write_gate)):
    connection[f'{name}_gate'], connection[f'{name}_scale'] = gate.kind, float(gate.scale)
    connection[f'{name}_eps'] = float(gate.eps)
  changes = {'mixing': spec.init.mixing, 'alpha': spec.init.alpha}
  changes = {name: float(value) for name, value in changes.items() if value is not None}
  connection.update(changes)
  named = (
    name for name, init in INITS.items() if dataclasses.replace(init(spec.streams), **changes) == spec.init
  )
  connection.init = next(named, None)
  require(connection.init is not None, f'model.connection.init: nothing in presets.INITS is {spec.init}')
  return config


def _of_connection(error: Exception) -> ConfigError:
  if isinstance(error, ConfigError):
    return error
  return ConfigError(f'model.connection: {type(error).__name__}: {error}')


def _rebuild_connection(given: dict[str, Any], constraint: Constraint | None) -> ConnectionSpec:
  connection = {key: value for key, value in given.items() if key != 'output_init_scaling'}
  init = {key: tuple(v) if isinstance(v, list) else v for key, v in connection.pop('init').items()}
  for gate in ('read_gate', 'write_gate'):
    connection[gate] = Gate(**connection[gate])
  if constraint is not None:
    trained = connection['constraint'], connection.pop('constraint_params')
    if (constraint.name, json.loads(json.dumps(constraint.params))) != trained:
      raise ConfigError(f'the run was trained with the constraint {trained[0]} of {trained[1]}')
    connection['constraint'] = constraint
  spec = connection_spec(**connection, init=Init(**init))
  for key, value in connection.items():  # None would be the preset's
    lost = value is None and getattr(spec, key, None) is not None
    require(not lost, f'model.connection.{key} must have a value, got None')
  return spec


def steps_of(duration: ConfigDict, tokens_per_step: int, flops_per_token: float, params: int) -> int:
  """The number of updates, rounded to the nearest and at least 1, from the one duration that is set.

  tokens_per_param counts matmul parameters with the unembedding (cost.parameters: 'matmul').
  """
  if duration.steps is not None:
    return duration.steps
  name = next(name for name, value in duration.items() if value is not None)
  if duration.tokens is not None:
    tokens = duration.tokens
  elif duration.flops is not None:
    tokens = duration.flops / flops_per_token
  else:
    tokens = duration.tokens_per_param * params
  steps = tokens / tokens_per_step
  require(steps <= INT32, f'duration.{name}={duration[name]:g} means {steps:.3g} updates; at most {INT32}')
  return max(1, round(steps))


def warnings_of(run: Run) -> list[str]:
  """What of a run is allowed but hardly meant, a line each."""
  warmup = optim.warmup_steps(run.optimizer, run.num_steps)
  if warmup <= run.num_steps:
    return []
  return [
    f'optimizer.warmup_steps={warmup} is longer than the run of {run.num_steps} updates: the learning rate '
    f'ends at {run.num_steps / warmup:.0%} of optimizer.lr'
  ]


def run_id(resolved: dict[str, Any]) -> str:
  """First 12 hex digits of the SHA-256 of what of the resolved configuration decides its numbers."""
  text = json.dumps(deciding(resolved), sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def deciding(resolved: dict[str, Any]) -> dict[str, Any]:
  """The configuration less labels, hardware, paths and fields that are off (None, a connection's default).

  So a new field that is off by default leaves the ids of older runs as they were.
  """

  def without_none(node: Any) -> Any:
    if not isinstance(node, dict):
      return node
    return {key: without_none(value) for key, value in node.items() if value is not None}

  kept = without_none(json.loads(json.dumps(resolved)))
  kind, separator, _ = kept['data']['name'].partition(':')
  if separator and kind in PLACED:
    kept['data']['name'] = kind  # the digest says which text; the path may change
  for path in NOT_IN_ID:
    node = functools.reduce(lambda node, key: node.get(key, {}), path[:-1], kept)
    node.pop(path[-1], None)
  if not kept.get('cluster'):
    kept.pop('cluster', None)
  for section in ('mla', 'moe', 'sparse', 'mtp'):
    if not kept['model'].get(section):
      kept['model'].pop(section, None)
  connection = kept['model']['connection']
  for field in dataclasses.fields(ConnectionSpec):
    if connection.get(field.name, dataclasses.MISSING) == field.default:
      del connection[field.name]
  return kept
