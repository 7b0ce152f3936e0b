"""Clusters that train apart and average their parameters now and then: DiLoCo and its streaming form.

config -> optimizer -> **clusters** -> train_step. M workers, each with its rows of the batch and moments of
its own, which stay, make H updates; then, for the parameters p that all agreed on last (arXiv 2311.08105,
algorithm 1),

    D = p - mean_m p_m,   v <- mu v + D,   p <- p - lr (D + mu v),   p_m <- p.

Streaming (arXiv 2501.18512, algorithm 2): fragments of the layers do so at times of their own; an average is
applied `overlap` updates after it was sent, to p_m <- (p_m + p) / 2; D is sent in 4 bits. Frozen parameters,
the routers' biases, are averaged alone. At the end of a run all fragments are averaged, with nothing under
way. p is what is evaluated and saved as the run's parameters.

On a mesh the workers lie along an axis of their own, the outer part of `data`: nothing but D, and the few
numbers of the log, goes from worker to worker.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mhc_jax.errors import require
from mhc_jax.parameters import kinds, path_name
from mhc_jax.sharding import BATCH, state_sharding

AXIS = 'workers'
MIX = 0.5  # what a worker keeps of its own where an average arrives late (2501.18512)
EXPONENTS = 7  # of E3M0: 0, and 2^-6 .. 2^0 of the largest number; the paper's format without a mantissa
_NEEDS = ('outer_lr', 'outer_momentum', 'fragments', 'overlap', 'outer_bits')


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
  """How workers are coupled; the published outer settings where none are given."""

  workers: int  # M
  sync_every: int | None  # H; None: gradients are averaged in every update
  outer_lr: float
  outer_momentum: float  # Nesterov's
  fragments: int
  overlap: int  # updates from sending to arrival
  outer_bits: int  # of a number sent: 32 or 4


@flax.struct.dataclass
class Clusters:
  """What a state holds beside the outer parameters: the workers' parameters and moments, (M, ...) each.

  One worker has no axis: as population.py's, so that its program is that of a run without clusters.
  """

  params: Any
  opt_state: Any
  momentum: Any  # v
  sent: Any  # averages under way; None without overlap


def build_cluster(config: ConfigDict) -> ClusterConfig | None:
  """config.cluster -> ClusterConfig, None where it is off; raises ConfigError for what does not fit."""
  c, mesh = config.cluster, config.mesh
  for name in ('sync_every', *_NEEDS):
    base = 'workers' if name == 'sync_every' else 'sync_every'
    require(c[name] is None or c[base] is not None, f'cluster.{name} needs cluster.{base}')
  if c.workers is None:
    return None
  values = {'outer_lr': 0.7, 'outer_momentum': 0.9, 'fragments': 1, 'overlap': 0, 'outer_bits': 32}
  values |= {name: value for name, value in c.items() if value is not None} | {'sync_every': c.sync_every}
  found = ClusterConfig(**values)
  require(found.workers >= 1, f'cluster.workers must be at least 1, got {found.workers}')
  every = found.sync_every or 1
  require(c.sync_every is None or every == c.sync_every >= 1, 'cluster.sync_every must be at least 1')
  most = min(every, config.model.depth)
  for name, least, limit in (('fragments', 1, most), ('overlap', 0, every - 1)):
    fits = least <= values[name] <= limit
    require(fits, f'cluster.{name} must lie between {least} and {limit} here, got {values[name]}')
  require(found.outer_lr > 0, f'cluster.outer_lr must be positive, got {found.outer_lr}')
  require(0 <= found.outer_momentum < 1, f'cluster.outer_momentum must lie in [0, 1), got {c.outer_momentum}')
  require(found.outer_bits in (4, 32), f'cluster.outer_bits must be 4 or 32, got {found.outer_bits}')
  require(
    config.optimizer.manifold != 'loro',
    "optimizer.manifold=loro turns every worker's factors its own way: they have no average; no cluster then",
  )
  along, parts = min(found.workers, mesh.data), config.optimizer.microbatches or 1
  require(
    max(found.workers, mesh.data) % along == 0,
    f'mesh.data={mesh.data} must be a multiple or a divisor of cluster.workers={found.workers}',
  )
  shares = found.workers * mesh.data // along * mesh.fsdp * mesh.expert * parts
  require(
    config.data.batch_size % shares == 0,
    f'data.batch_size={config.data.batch_size}, of all workers, must be a multiple of {shares}: '
    'cluster.workers times the devices of one that split its batch times optimizer.microbatches',
  )
  return found


def without_traced(cluster: ClusterConfig) -> ClusterConfig:
  """The clusters less what enters a step as an array: equal ones share a compilation."""
  return dataclasses.replace(
    cluster, sync_every=1, outer_lr=1.0, outer_momentum=0.0, overlap=min(cluster.overlap, 1)
  )


def worker_mesh(mesh: Mesh | AbstractMesh, workers: int) -> Mesh | AbstractMesh:
  """The same devices with `data` split into the axis of workers and what is left for each of them."""
  data = mesh.shape['data']
  along = min(workers, data)
  sizes = (along, *(size // along if axis == 'data' else size for axis, size in mesh.shape.items()))
  names, types = (AXIS, *mesh.axis_names), (AxisType.Auto,) * (len(mesh.axis_names) + 1)
  if isinstance(mesh, AbstractMesh):
    return AbstractMesh(sizes, names, axis_types=types)
  return Mesh(mesh.devices.reshape(sizes), names, axis_types=types)


def start(params: Any, opt_state: Any, cluster: ClusterConfig) -> Clusters:
  """All workers at the same place, to the bit: behind a barrier, or every copy is computed anew."""
  params, opt_state = own = lax.optimization_barrier((params, opt_state))
  if cluster.workers > 1:
    own = jax.tree.map(lambda x: jnp.stack([x] * cluster.workers), own)
  return Clusters(*own, jax.tree.map(jnp.zeros_like, params), params if cluster.overlap else None)


def sharding(clusters: Clusters, workers: int, mesh: Mesh, own: Mesh) -> Clusters:
  """Where its leaves lie: workers' ones along their axis of `own`, each as it would lie alone."""

  def apart(tree: Any) -> Any:
    if workers == 1:
      return state_sharding(tree, mesh)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), tree)
    return jax.tree.map(lambda where: NamedSharding(own, P(AXIS, *where.spec)), state_sharding(one, own))

  of_all = [
    None if tree is None else state_sharding(tree, mesh) for tree in (clusters.momentum, clusters.sent)
  ]
  return Clusters(apart(clusters.params), apart(clusters.opt_state), *of_all)


def pieces(params: Any, fragments: int) -> list[Any]:
  """For every fragment what of each leaf is in it: an index of its first axis, or False for nothing.

  Layer l is in fragment l mod fragments, the paper's strided pattern; embedding and expansion are in the
  first, what comes after the layers in the last. Together they are every number once.
  """
  dense = sum(name.startswith('layer_') for name in params)  # beside the stack of scanned layers

  def index(path: tuple[Any, ...], leaf: Any, fragment: int) -> Any:
    first = path_name(path[:1])
    if first == 'layers':
      at = (fragment - dense) % fragments
      return at < leaf.shape[0] and slice(at, None, fragments)
    layer = 0 if first in ('embedding', 'expansion') else -1
    layer = int(first.removeprefix('layer_')) if first.startswith('layer_') else layer
    return layer % fragments == fragment and Ellipsis

  return [
    jax.tree_util.tree_map_with_path(lambda path, leaf, p=p: index(path, leaf, p), params)
    for p in range(fragments)
  ]


def take(tree: Any, piece: Any, of_workers: bool = False) -> Any:
  """A fragment, None in place of leaves that are not in it."""

  def part(x: jax.Array, at: Any) -> Any:
    if at is False or at is Ellipsis:
      return x if at is Ellipsis else None
    return x[:, at] if of_workers else x[at]

  return jax.tree.map(part, tree, piece)


def put(tree: Any, piece: Any, new: Any, of_workers: bool = False) -> Any:
  """The tree with a fragment replaced."""

  def part(x: jax.Array, at: Any, y: Any) -> jax.Array:
    if at is False or at is Ellipsis:
      return y if at is Ellipsis else x
    return x.at[:, at].set(y) if of_workers else x.at[at].set(y)

  return jax.tree.map(part, tree, piece, new)


def encode(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """(codes of E3M0 two to a byte along the last axis, scales over `axes`): the nearest of 15 numbers each.

  Numbers are 0 and +- 2^-6 .. 2^0 times the largest magnitude of `axes`; halfway goes up in magnitude.
  """
  scale = jnp.max(jnp.abs(x), axes, keepdims=True)
  y = jnp.abs(x) / jnp.where(scale > 0, scale, 1)
  mantissa, exponent = jnp.frexp(y)  # y = mantissa 2^exponent, mantissa in [1/2, 1)
  power = exponent - (mantissa < 0.75) + EXPONENTS
  code = jnp.where(y >= 2.0**-EXPONENTS, jnp.maximum(power, 1), 0) + 8 * (x < 0)
  code = jnp.pad(code, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)]).astype(jnp.uint8)
  return code[..., ::2] | (code[..., 1::2] << 4), scale


def decode(code: jax.Array, scale: jax.Array, size: int) -> jax.Array:
  """The numbers of `encode`, `size` along the last axis."""
  both = jnp.stack([code & 15, code >> 4], -1).reshape(*code.shape[:-1], -1)[..., :size].astype(jnp.int32)
  power = (both & 7) - EXPONENTS
  scale = jnp.broadcast_to(scale, both.shape)
  return jnp.where(both & 7 > 0, jnp.ldexp(scale, power), 0) * (1 - 2 * (both >> 3))


def average(params: Any, workers: Any, bits: int, mesh: Mesh | None) -> Any:
  """p - mean_m D_m of a fragment, D_m in so many bits: mean_m p_m where they are all. Frozen ones in 32."""

  def mean(path: tuple[Any, ...], p: jax.Array, p_M: jax.Array, kind: str) -> jax.Array:
    if bits == 32 or kind == 'frozen':
      return p_M.mean(0)
    stacked = path_name(path).startswith('layers/')
    d_M = p[None] - p_M
    d_M = d_M[..., None] if p.ndim == stacked else d_M  # of a number one per layer
    codes, scale = encode(d_M, tuple(range(1 + stacked, d_M.ndim)))
    codes, scale = lax.optimization_barrier((_gathered(codes, mesh), _gathered(scale, mesh)))
    return p - decode(codes, scale, d_M.shape[-1]).mean(0).reshape(p.shape)

  return jax.tree_util.tree_map_with_path(mean, params, workers, kinds(params))


def _gathered(x: jax.Array, mesh: Mesh | None) -> jax.Array:
  """Every worker's, on every worker: what is small is what goes between them."""
  if mesh is None or mesh.size == 1:
    return x
  return lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *[P.UNCONSTRAINED] * (x.ndim - 1))))


def outer_step(params: Any, momentum: Any, target: Any, lr: jax.Array, mu: jax.Array) -> tuple[Any, Any]:
  """(p, v) after the step towards `target`, p - D: exactly there at lr 1 and mu 0, as frozen ones always."""

  def step(p: jax.Array, v: jax.Array, to: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    if kind == 'frozen':
      return to, v
    d = p - to
    v = (mu * v + d).astype(v.dtype)
    return (to + (1 - lr) * d - lr * mu * v).astype(p.dtype), v

  both = jax.tree.map(step, params, momentum, target, kinds(params))
  return jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), both)


def _arrived(
  state: tuple[Any, Clusters],
  piece: Any,
  target: Any,
  hparams: dict[str, jax.Array],
  mix: jax.Array | float,
  project: Callable[[Any], Any],
) -> tuple[Any, Clusters]:
  params, clusters = state
  p, v = take(params, piece), take(clusters.momentum, piece)
  p, v = outer_step(p, v, target, hparams['outer_lr'], hparams['outer_momentum'])
  p = project(p)
  p_M = take(clusters.params, piece, of_workers=True)
  p_M = jax.tree.map(lambda x, one: (mix * x + (1 - mix) * one[None]).astype(x.dtype), p_M, p)
  new = put(clusters.params, piece, p_M, of_workers=True)
  return put(params, piece, p), clusters.replace(params=new, momentum=put(clusters.momentum, piece, v))


def synchronised(
  params: Any,
  clusters: Clusters,
  done: jax.Array,
  hparams: dict[str, jax.Array],
  cluster: ClusterConfig,
  project: Callable[[Any], Any] = lambda params: params,
  mesh: Mesh | None = None,
) -> tuple[Any, Clusters]:
  """What of the averaging is due after `done` updates.

  Fragment p is sent where done is p H / fragments modulo H; all are at the end. hparams: sync_every, overlap,
  outer_lr, outer_momentum and num_steps. project: parameters, or some, put on their manifold (optimizer.py).
  """
  every, ends = hparams['sync_every'], done == hparams['num_steps']

  def sent(state: tuple[Any, Clusters], piece: Any) -> Any:
    p, p_M = take(state[0], piece), take(state[1].params, piece, of_workers=True)
    return average(p, p_M, cluster.outer_bits, mesh)

  def at_once(state: tuple[Any, Clusters], piece: Any) -> tuple[Any, Clusters]:
    return _arrived(state, piece, sent(state, piece), hparams, 0.0, project)

  def send(state: tuple[Any, Clusters], piece: Any) -> tuple[Any, Clusters]:
    params, clusters = state
    return params, clusters.replace(sent=put(clusters.sent, piece, sent(state, piece)))

  def arrive(state: tuple[Any, Clusters], piece: Any) -> tuple[Any, Clusters]:
    return _arrived(state, piece, take(state[1].sent, piece), hparams, jnp.where(ends, 0.0, MIX), project)

  state = params, clusters
  for fragment, piece in enumerate(pieces(params, cluster.fragments)):
    offset = fragment * every // cluster.fragments
    due = (done % every == offset) | ends
    if cluster.overlap:  # less than H, so that what is sent now is not what arrives now, but at the end
      before = done - hparams['overlap']
      state = _where(due, send, state, piece)
      state = _where(((before > 0) & (before % every == offset)) | ends, arrive, state, piece)
    else:
      state = _where(due, at_once, state, piece)
  return state


def _where(due: jax.Array, function: Callable, state: Any, piece: Any) -> Any:
  """function of the state where it is due. A loop of one iteration or none: decompositions of a projection
  inside a lax.cond can hang XLA:CPU (manifold_updates.loro)."""
  with jax.named_scope('synchronised'):
    body = lambda carry: (jnp.zeros((), bool), function(carry[1], piece))  # noqa: E731
    return lax.while_loop(lambda carry: carry[0], body, (due, state))[1]


def update(
  params: Any,
  clusters: Clusters,
  batch: dict[str, jax.Array],
  done: jax.Array,
  hparams: dict[str, jax.Array],
  cluster: ClusterConfig,
  inner: Callable[[Any, Any, dict[str, jax.Array]], tuple[Any, Any, dict[str, jax.Array]]],
  project: Callable[[Any], Any] = lambda params: params,
  mesh: Mesh | None = None,
) -> tuple[Any, Clusters, dict[str, jax.Array]]:
  """One update of every worker by its rows of the batch, M equal parts, and the averaging due after it.

  inner: (parameters, moments, rows) -> (parameters, moments, metrics) of one worker. done: updates with this
  one. Metrics are means over workers, of losses (loss, loss_NAME) by their targets; `drift`: the mean
  distance of a worker's parameters from p before they are averaged.
  """
  of_workers = clusters.params, clusters.opt_state, batch
  if cluster.workers == 1:
    p_M, moments_M, metrics = jax.tree.map(lambda x: x[None], inner(*of_workers))
  else:
    p_M, moments_M, metrics = _side_by_side(inner, *of_workers, cluster.workers, mesh)
  targets_M = metrics['targets']
  share_M = targets_M / jnp.maximum(targets_M.sum(), 1)
  away = jax.vmap(lambda p: optax.tree.norm(jax.tree.map(jnp.subtract, p, params)), spmd_axis_name=AXIS)(p_M)
  means = {name: value.mean(0) for name, value in metrics.items()}
  losses = {
    name: (share_M.reshape(-1, *[1] * (x_M.ndim - 1)) * x_M).sum(0)  # loss_NAME may be by layer
    for name, x_M in metrics.items()
    if name.startswith('loss')
  }
  clusters = clusters.replace(params=p_M, opt_state=moments_M)
  params, clusters = synchronised(params, clusters, done, hparams, cluster, project, mesh)
  if cluster.workers == 1:
    p, moments = jax.tree.map(lambda x: x[0], (clusters.params, clusters.opt_state))
    clusters = clusters.replace(params=p, opt_state=moments)
  return params, clusters, means | losses | {'targets': targets_M.sum(), 'drift': away.mean()}


def _side_by_side(
  inner: Callable, params: Any, opt_state: Any, batch: dict[str, jax.Array], workers: int, mesh: Mesh | None
) -> tuple[Any, Any, dict[str, jax.Array]]:
  split = {name: x.reshape(workers, -1, *x.shape[1:]) for name, x in batch.items()}
  if mesh is not None and mesh.size > 1:
    rows = NamedSharding(mesh, P(AXIS, BATCH))
    split = {name: lax.with_sharding_constraint(x, rows) for name, x in split.items()}
  return jax.vmap(inner, spmd_axis_name=AXIS)(params, opt_state, split)


def hparams_of(cluster: ClusterConfig) -> dict[str, np.generic]:
  """What `synchronised` takes as arrays, less the number of updates."""
  counts = {name: np.int32(getattr(cluster, name)) for name in ('sync_every', 'overlap')}
  return counts | {name: np.float32(getattr(cluster, name)) for name in ('outer_lr', 'outer_momentum')}


def message_bytes(params: Any, cluster: ClusterConfig) -> list[int]:
  """Bytes that all workers together send to average each fragment once; params: a tree of shapes.

  32 bits: a ring's all-reduce, 2 (M - 1) times the parameters. 4 bits: to each of M - 1 others the codes and
  a scale per matrix of a layer, M (M - 1) times those. Without sync_every: a gradient's all-reduce.
  """
  m = cluster.workers

  def leaf(path: tuple[Any, ...], x: Any, at: Any, kind: str) -> int:
    if at is False:
      return 0
    stacked = path_name(path).startswith('layers/')
    layers = len(range(x.shape[0])[at]) if stacked else 1
    shape = x.shape[stacked:] or (1,)
    if cluster.outer_bits == 32 or kind == 'frozen':
      return 2 * (m - 1) * 4 * layers * math.prod(shape)
    return m * (m - 1) * layers * (math.prod(shape[:-1]) * -(-shape[-1] // 2) + 4)

  def total(piece: Any) -> int:
    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(leaf, params, piece, kinds(params))))

  return [total(piece) for piece in pieces(params, cluster.fragments)]


def bytes_sent(messages: list[int], cluster: ClusterConfig, step: int, num_steps: int) -> int:
  """Bytes that all workers together have sent in the first `step` updates; messages: of message_bytes."""
  every, ends = cluster.sync_every or 1, step == num_steps
  step -= ends  # at the end each fragment is sent once, whatever is due
  offsets = [fragment * every // len(messages) for fragment in range(len(messages))]
  times = [(step - offset) // every + (offset > 0) + ends for offset in offsets]
  return sum(count * size for count, size in zip(times, messages, strict=True))
