"""The pure train_step, and the jitted functions of one model on one mesh.

config -> data -> model -> **train_step** -> checkpoint -> metrics. What differs between runs of equal shapes
(learning rate, weight decay, seed, duration) enters as arrays, so that they share one compilation.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax import clusters as loose
from mhc_jax import manifold_updates
from mhc_jax import optimizer as optim
from mhc_jax.clusters import ClusterConfig
from mhc_jax.config import OptimizerConfig
from mhc_jax.kernels.choice import kernels_for
from mhc_jax.model import Transformer, two_ahead
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain, constrain_state, state_sharding


@flax.struct.dataclass
class TrainState:
  """The number of updates done, the parameters (nested dicts) and optax's state."""

  step: jax.Array
  params: Any
  opt_state: Any


# Initialisation runs once: compiling it well costs seconds and saves milliseconds.
_UNOPTIMISED = {'xla_backend_optimization_level': 0}

Hparams = dict[str, jax.Array]  # lr, weight_decay, num_steps, warmup: traced, so no recompilation
Batch = dict[str, jax.Array]  # inputs, targets, weights, segments, each (B, T)


@dataclasses.dataclass(frozen=True)
class Programs:
  """The jitted functions of one model on one mesh; built once per shape by `programs`.

  record: evaluate_sums of a batch, and what diagnostics.py takes of its first sequence. evaluate: the same,
  but for the second where kernels compute the first.
  """

  init: Callable[[jax.Array], TrainState]
  step: Callable[[TrainState, Batch, Hparams], tuple[TrainState, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Batch], tuple[tuple[jax.Array, jax.Array], Any]]
  record: Callable[[Any, Batch], tuple[tuple[jax.Array, jax.Array], Any]]
  abstract: TrainState  # shapes, dtypes and shardings


def init_state(
  key: jax.Array, model: ModelConfig, optimizer: OptimizerConfig, cluster: ClusterConfig | None = None
) -> TrainState:
  """Initial state. A parameter's value depends on key and its own path alone, not on the connection."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = optim.start(optimizer, Transformer(model).init(key, tokens, tokens)['params'])
  return begin(params, model, optimizer, cluster)


def begin(
  params: Any, model: ModelConfig, optimizer: OptimizerConfig, cluster: ClusterConfig | None = None
) -> TrainState:
  """The state at update 0 with these parameters, with a cluster that of cluster_step."""
  opt_state = optim.transform(optimizer, model, jnp.zeros(()), jnp.zeros(())).init(params)
  opt_state = loose.start(params, opt_state, cluster) if cluster else opt_state
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def evaluate_sums(
  params: Any, batch: Batch, model: ModelConfig, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
  """(sum of cross-entropies in nats, number of predicted tokens) of a batch."""
  return sums_and_records(params, batch, model, mesh)[0]


def sums_and_records(
  params: Any, batch: Batch, model: ModelConfig, mesh: Mesh | None = None, record: int = 0
) -> tuple[tuple[jax.Array, jax.Array], list[dict[str, Any]]]:
  """evaluate_sums, and the model's records: the experts' loads, auxiliary losses, and what diagnostics.py
  takes of the first `record` sequences.
  """
  inputs = (batch['inputs'], batch['segments'])
  labels = (batch['targets'], batch['weights'])
  return Transformer(model, mesh).apply({'params': params}, *inputs, labels=labels, record=record)


class Beside(NamedTuple):
  """What a model says of a batch beside its cross-entropies, as sums over tokens."""

  load_LE: jax.Array | None  # tokens that went to each expert, int32; None without experts
  losses: dict[str, jax.Array]  # auxiliary losses in nats by name, of the model, (), or by layer, (L,)


def sums_and_beside(
  params: Any, batch: Batch, model: ModelConfig, mesh: Mesh | None = None
) -> tuple[tuple[jax.Array, jax.Array], Beside]:
  """evaluate_sums, and what the records carry for training."""
  (total, count), records = sums_and_records(params, batch, model, mesh)
  if model.warms_up:  # nothing but the index learns
    total = jax.lax.stop_gradient(total)
  losses = {name: value for record in records for name, value in record.get('losses', {}).items()}
  return (total, count), Beside(records[1].get('load_E'), losses)


def with_gradients_of(total: jax.Array, losses: dict[str, jax.Array]) -> jax.Array:
  """total, with the gradients of the losses added to its own: what is reported stays the language model's."""
  for loss in losses.values():
    total += jnp.sum(loss - jax.lax.stop_gradient(loss))
  return total


def loss_fn(
  params: Any, batch: Batch, model: ModelConfig, mesh: Mesh | None = None
) -> tuple[jax.Array, Beside]:
  """Mean cross-entropy in nats per predicted token, 0 where there is none, and Beside.

  Its gradient is that of the mean and of all auxiliary losses per predicted token.
  """
  (total, count), beside = sums_and_beside(params, batch, model, mesh)
  return with_gradients_of(total, beside.losses) / jnp.maximum(count, 1), beside


def gradients(
  params: Any, batch: Batch, model: ModelConfig, parts: int | None = None, mesh: Mesh | None = None
) -> tuple[tuple[jax.Array, Beside], Any]:
  """(loss_fn, its gradient), from `parts` microbatches one after another.

  Each adds its sums of losses over the number of tokens of the whole batch, so that every token weighs the
  same wherever it lies, and its loads. Row r is in part r % parts: rows stay on the devices that hold them.
  """
  if parts is None:
    loss_and_beside, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch, model, mesh)
    return loss_and_beside, constrain_state(grads, mesh)
  count = jnp.maximum(jnp.sum(batch['weights']), 1)

  @functools.partial(jax.value_and_grad, has_aux=True)
  def share(params: Any, part: Batch) -> tuple[jax.Array, Beside]:
    (total, _), beside = sums_and_beside(params, part, model, mesh)
    return with_gradients_of(total, beside.losses) / count, beside

  def add(sums: Any, part: Batch) -> tuple[Any, None]:
    part = {name: constrain(value, 'BS', mesh) for name, value in part.items()}
    loss_and_beside, grads = jax.tree.map(jnp.add, sums, share(params, part))
    return (loss_and_beside, constrain_state(grads, mesh)), None

  split = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
  sums = jax.eval_shape(share, params, {name: x[0] for name, x in split.items()})
  loss_and_beside, grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
  return jax.lax.scan(add, (loss_and_beside, constrain_state(grads, mesh)), split)[0]


def train_step(
  state: TrainState,
  batch: Batch,
  hparams: Hparams,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One update. Metrics: loss (before the update), norms of gradient and update, lr, predicted targets.

  A batch without a target (of one token, which begins a document) counts as an update and changes nothing.
  With experts also load_max_over_mean, (L,): the fullest expert's tokens over the mean of its layer. The
  routers' biases then move by these loads, outside of the optimizer. loss_NAME: auxiliary losses per
  predicted target, whose gradients are in the norm. With multi-token prediction also mtp_loss, its mean
  cross-entropy per token that it predicts (loss_mtp is what is added: its sum, weighted, per target).
  """
  (loss, (load_LE, losses)), grads = gradients(state.params, batch, model, optimizer.microbatches, mesh)
  lr = hparams['lr'] * optim.schedule(state.step, hparams['num_steps'], hparams['warmup'], optimizer)
  transform = optim.transform(optimizer, model, lr, hparams['weight_decay'])
  updates, opt_state = transform.update(grads, state.opt_state, state.params)
  metrics = {
    'loss': loss,
    'grad_norm': optax.tree.norm(grads),
    'update_norm': optax.tree.norm(updates),
    'lr': lr,
    'targets': jnp.sum(batch['weights']),
  }
  metrics |= {f'loss_{name}': loss / jnp.maximum(metrics['targets'], 1) for name, loss in losses.items()}
  if model.mtp is not None:
    count = jnp.sum(two_ahead(batch['targets'], batch['weights'])[1])
    metrics['mtp_loss'] = losses['mtp'] / model.mtp.weight / jnp.maximum(count, 1)
  params = optax.apply_updates(state.params, updates)
  if load_LE is not None:
    metrics['load_max_over_mean'] = load_LE.max(-1) / load_LE.mean(-1)
    params = params if model.warms_up else balance(params, load_LE, model)
  if batch['inputs'].shape[1] == 1:  # else no batch can be without a target: no document is empty
    params, opt_state = jax.tree.map(
      lambda new, old: jnp.where(metrics['targets'] > 0, new, old),
      (params, opt_state),
      (state.params, state.opt_state),
    )
  return TrainState(state.step + 1, params, opt_state), metrics


def cluster_step(
  state: TrainState,
  batch: Batch,
  hparams: Hparams,
  model: ModelConfig,
  optimizer: OptimizerConfig,
  cluster: ClusterConfig,
  mesh: Mesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
  """train_step of every worker of clusters.py, and the averaging that is due; mesh: clusters.worker_mesh.

  state.params are the outer parameters, state.opt_state is a clusters.Clusters.
  """

  def inner(params: Any, opt_state: Any, rows: Batch) -> tuple[Any, Any, dict[str, jax.Array]]:
    of_worker = TrainState(state.step, params, opt_state)
    new, metrics = train_step(of_worker, rows, hparams, model, optimizer, mesh)
    return new.params, new.opt_state, metrics

  def project(params: Any) -> Any:
    if optimizer.manifold is None:
      return params
    return manifold_updates.project_params(optim.projection(optimizer), optimizer.manifold_pattern, params)

  given = state.params, state.opt_state, batch, state.step + 1, hparams
  params, workers, metrics = loose.update(*given, cluster, inner, project, mesh)
  return TrainState(state.step + 1, params, workers), metrics


def balance(params: Any, load_LE: jax.Array, c: ModelConfig) -> Any:
  """params with the routers' biases moved by bias_rate * sign(mean load - load), (2408.15664, algorithm 1).

  Their mean is taken out, which no choice among experts depends on: it would drift with the signs' sum.
  load_LE: tokens per expert of the whole batch, for every layer with experts.
  """
  load_LE = load_LE.astype(jnp.float32)
  move_LE = c.moe.bias_rate * jnp.sign(load_LE.mean(-1, keepdims=True) - load_LE)

  def moved(layer, move):
    ffn = layer['feed_forward']
    bias = ffn['router_bias'] + move.astype(ffn['router_bias'].dtype)
    bias -= bias.mean(-1, keepdims=True)
    return {**layer, 'feed_forward': {**ffn, 'router_bias': bias}}

  if c.scan:
    return {**params, 'layers': moved(params['layers'], move_LE)}
  names = [f'layer_{layer}' for layer in range(c.dense_layers, c.depth)]
  return params | {name: moved(params[name], move_E) for name, move_E in zip(names, move_LE, strict=True)}


def hparams_of(
  optimizer: OptimizerConfig, num_steps: int, cluster: ClusterConfig | None = None
) -> dict[str, np.ndarray]:
  """What train_step, or cluster_step, takes as arrays of a run of that many updates."""
  return (loose.hparams_of(cluster) if cluster else {}) | {
    'lr': np.float32(optimizer.lr),
    'weight_decay': np.float32(optimizer.weight_decay),
    'num_steps': np.int32(num_steps),
    'warmup': np.int32(optim.warmup_steps(optimizer, num_steps)),
  }


def programs(
  model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, cluster: ClusterConfig | None = None
) -> Programs:
  """The jitted functions for runs of these shapes; what differs by lr, seed or duration shares them.

  cluster: workers that are coupled loosely; the mesh is the run's, and the state that of cluster_step.
  """
  return _programs(model, without_traced(optimizer), mesh, cluster and loose.without_traced(cluster))


def without_traced(optimizer: OptimizerConfig) -> OptimizerConfig:
  """The optimizer less what enters train_step as an array: equal ones share a compilation."""
  traced = {'lr': 0.0, 'weight_decay': 0.0, 'warmup_steps': None, 'warmup_fraction': 0.0}
  return dataclasses.replace(optimizer, **traced)


@functools.lru_cache(maxsize=8)
def _programs(
  model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, cluster: ClusterConfig | None
) -> Programs:
  init = functools.partial(init_state, model=model, optimizer=optimizer, cluster=cluster)
  abstract = jax.eval_shape(init, jax.random.key(0))
  sharding, replicated = state_sharding(abstract, mesh), NamedSharding(mesh, P())
  step = functools.partial(train_step, model=model, optimizer=optimizer, mesh=mesh)
  if cluster:
    own = loose.worker_mesh(mesh, cluster.workers)
    sharding = sharding.replace(opt_state=loose.sharding(abstract.opt_state, cluster.workers, mesh, own))
    step = functools.partial(cluster_step, model=model, optimizer=optimizer, cluster=cluster, mesh=own)
  abstract = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    abstract,
    sharding,
  )

  # One loop over the layers: without a backward pass, writing them out only takes longer to compile. What is
  # evaluated is the prediction of the next token.
  looped = dataclasses.replace(model, scan_unroll=1, mtp=None)
  evaluate = functools.partial(sums_and_records, model=looped, mesh=mesh)
  record = jax.jit(functools.partial(evaluate, record=1), out_shardings=replicated)
  # Records are those of the definition: where that runs anyway, one program does both.
  shared = kernels_for(model.kernels, mesh) == 'xla'
  return Programs(
    init=jax.jit(init, out_shardings=sharding, compiler_options=_UNOPTIMISED),
    step=jax.jit(step, donate_argnums=0, out_shardings=(sharding, replicated)),
    evaluate=record if shared else jax.jit(evaluate, out_shardings=replicated),
    record=record,
    abstract=abstract,
  )
