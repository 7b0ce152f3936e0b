"""Runs of equal shapes side by side: the states of P members stacked, K updates of all of them a dispatch.

plan, train_step -> **population** -> loop. A member is a run like any other: its numbers are those of the run
alone up to rounding (vmap adds an axis to every array, and the compiler may add in another order), and only
its own folder knows it. P = 1 has no axis: how an accelerator trains a run alone, where the host, which needs
milliseconds for a dispatch and a batch, would keep it waiting.

A program has a power of two of places, and each computes from its own numbers alone. Members lie there in
their order, copies of the last fill up what is left. So where members end, the others move up, and half as
many places do when half are empty: at a step that no clock decides, after all that are left were saved. What
a member computes then follows from who is left and where they stand: a population that is killed goes on as
it would have, bit for bit.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mhc_jax import cost
from mhc_jax.config import OptimizerConfig
from mhc_jax.data import Windows, as_batch, train_order
from mhc_jax.memory import memory_of
from mhc_jax.model_config import ModelConfig
from mhc_jax.optimizer import least_moments
from mhc_jax.plan import Run
from mhc_jax.train_step import (
  Batch,
  Programs,
  TrainState,
  evaluate_sums,
  hparams_of,
  train_step,
  without_traced,
)

MOST_UPDATES = 64  # of a dispatch
_MOST_BYTES = 2**26  # of the tokens of a dispatch
_SECONDS = 0.5  # that a dispatch should take at the most: whoever stops a run waits for two of them
# Members at the most. On a TPU more of them leave its vector memory, and each takes longer again.
MOST_MEMBERS, ON_TPU = 64, 8
# What an accelerator computes in about a millisecond. A step of small arrays takes one or more whatever its
# FLOPs are, by the number of its operations; members whose FLOPs together stay below find room beside it.
_FLOPS = 1e11


def alike(run: Run) -> tuple[Any, ...]:
  """What must be equal for two runs to be members of one population."""
  data, resolved = run.resolved['data'], run.resolved
  names = 'batch_size', 'seq_len', 'cross_documents', 'digest', 'tokenizer'
  evaluated = resolved['evaluation']['sequences'], resolved['evaluation']['batch_size']
  of_data, mesh = tuple(data[name] for name in names), tuple(sorted(resolved['mesh'].items()))
  return run.model, without_traced(run.optimizer), of_data, evaluated, mesh


def most_members(run: Run) -> int:
  """How many runs like this one fit beside each other on the device that is here; 1 on CPU.

  A power of two, 8 at the most on TPUs and 64 on others: as many as compute 1e11 FLOPs per update together,
  and by the least that each needs take no more than a third of the memory. On CPU members lose to processes:
  there is no dispatch to save, and their arrays leave the cache. Runs that take several devices have no room
  for others, nor have clusters.
  """
  device = jax.devices()[0]
  if device.platform == 'cpu' or not on_one_device(run) or run.loose:
    return 1
  c, derived = run.resolved, run.derived
  fit = _FLOPS / (derived['tokens_per_step'] * derived['flops_per_token'])
  memory = memory_of(device)
  if memory is not None:
    parts = c['optimizer']['microbatches'] or 1
    tokens, moments = derived['tokens_per_step'], least_moments(run.optimizer)
    fit = min(fit, memory / 3 / cost.least_bytes(run.model, tokens, parts, moments=moments))
  most = ON_TPU if device.platform == 'tpu' else MOST_MEMBERS
  return 1 << (int(min(max(fit, 1), most)).bit_length() - 1)


def on_one_device(run: Run) -> bool:
  """Whether the run takes one device of one process."""
  return jax.process_count() == 1 and all(size == 1 for size in run.resolved['mesh'].values())


@dataclasses.dataclass(frozen=True)
class MemberPrograms:
  """The jitted functions of some number of places."""

  advance: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
  evaluate: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
  take: Callable[[TrainState, int], TrainState]  # of one place, as a run alone has it


class Population:
  """The members that train, by place, and their states on the device."""

  def __init__(self, members: Sequence[Any], compiled: Programs, train: Windows, mesh: Mesh):
    """members: of loop.Member, with states of their own, which go to the device with the first `keep`."""
    plan = members[0].plan
    data = plan.resolved['data']
    row_bytes = data['batch_size'] * (data['seq_len'] + 1) * train.tokens.itemsize
    self._model, self._optimizer, self._mesh = plan.model, without_traced(plan.optimizer), mesh
    self._compiled, self._train = compiled, train
    self._most = max(1, min(MOST_UPDATES, _MOST_BYTES // (row_bytes * places_for(len(members)))))
    self._orders = {m: train_order(train, m.plan.resolved['seed'], data['repeat']) for m in members}
    self._places: list[Any] = []
    self._replicated = NamedSharding(mesh, P())
    self.most = self._most
    self.waited = 0.0  # seconds for the batches of the last dispatch

  def keep(self, live: Sequence[Any]) -> bool:
    """Lays out these members in this order; True where that takes programs that were not used before."""
    places = [*live, *live[-1:] * (places_for(len(live)) - len(live))]
    if places == self._places:
      return False
    if self._places:
      slots = [self._places.index(member) for member in places]
      self._state = _rearranged(self._state, slots[0] if len(slots) == 1 else np.array(slots))
    else:
      self._state = self._stacked([member.at.state for member in places])
      for member in live:
        member.at.state = None  # it is here
    self._hparams = self._stacked([hparams_of(m.plan.optimizer, m.plan.num_steps) for m in places])
    changed, self._places = len(places) != len(self._places), places
    same = self._model, self._optimizer, self._mesh, self._train.bos, self._train.cross_documents
    self._of_size = member_programs(*same, len(places), self._most)
    return changed

  def _stacked(self, trees: list[Any]) -> Any:
    """On the device; by way of the host, so that it never holds all twice."""
    if len(trees) == 1:
      return jax.device_put(trees[0], self._replicated)
    distinct = {id(tree): jax.device_get(tree) for tree in trees}
    trees = [distinct[id(tree)] for tree in trees]
    return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees), self._replicated)

  def advance(self, count: int) -> dict[str, jax.Array]:
    """Dispatches that many updates of every member; their metrics, of which the first `count` of K count."""
    began = time.monotonic()
    cut: dict[tuple[int, int], np.ndarray] = {}  # members of one seed see the same
    first = self._cut(self._places[0], count)
    window_KPBS = np.zeros((self._most, len(self._places), *first.shape[1:]), first.dtype)
    for place, member in enumerate(self._places):
      key = member.plan.resolved['seed'], member.step
      if key not in cut:
        cut[key] = self._cut(member, count) if place else first
      window_KPBS[:count, place] = cut[key]
    window = jax.device_put(window_KPBS if len(self._places) > 1 else window_KPBS[:, 0], self._replicated)
    self.waited = time.monotonic() - began
    self._state, metrics = self._of_size.advance(self._state, window, self._hparams, np.int32(count))
    return metrics

  def _cut(self, member: Any, count: int) -> np.ndarray:
    rows, order = member.plan.resolved['data']['batch_size'], self._orders[member]
    every = member.plan.num_steps * rows  # a diverged member may go on to compute beyond its end
    order_KB = [order[place % every] for place in range(member.step * rows, (member.step + count) * rows)]
    return self._train.cut(np.array(order_KB).reshape(count, rows))

  def took(self, seconds: float) -> None:
    """How long an update takes: dispatches shall not keep whoever stops the run waiting."""
    self.most = max(1, min(self._most, int(_SECONDS / max(seconds, 1e-9))))

  def fetch(self, metrics: dict[str, jax.Array], count: int) -> list[list[dict[str, np.ndarray]]]:
    """Of each update, of each place as it was then: its metrics."""
    values = jax.device_get(metrics)
    if values['loss'].ndim == 1:
      values = {name: x[:, None] for name, x in values.items()}
    places = range(values['loss'].shape[1])
    return [[{name: x[k, place] for name, x in values.items()} for place in places] for k in range(count)]

  def state(self, member: Any) -> TrainState:
    """The member's, as it has it alone."""
    if len(self._places) == 1:
      return self._state
    return self._of_size.take(self._state, self._places.index(member))

  def sums(self, validation: list[Batch]) -> Callable[[Any], tuple[list[tuple[Any, Any]], Any]]:
    """member -> evaluate_sums of every batch, and the first's records where they came with them: not here."""
    params = self._state.params
    found = jax.device_get([self._of_size.evaluate(params, batch) for batch in validation])

    def of_member(member: Any) -> tuple[list[tuple[Any, Any]], Any]:
      place = self._places.index(member)
      return [tuple(np.reshape(x, -1)[place] for x in pair) for pair in found], None

    return of_member


def places_for(members: int) -> int:
  """The power of two that holds them."""
  return 1 << (members - 1).bit_length()


@jax.jit
def _rearranged(state: TrainState, slots: jax.Array) -> TrainState:
  """Of stacked members, these; one alone without the axis."""
  return jax.tree.map(lambda x: x[slots], state)


@functools.lru_cache(maxsize=8)
def member_programs(
  model: ModelConfig,
  optimizer: OptimizerConfig,
  mesh: Mesh,
  bos: int,
  cross_documents: bool,
  places: int,
  most: int,
) -> MemberPrograms:
  """The jitted functions of so many places, that do up to `most` updates a dispatch."""
  step = member_step(model, optimizer, mesh, places)
  evaluate = functools.partial(evaluate_sums, model=model, mesh=mesh)
  if places > 1:
    evaluate = jax.vmap(evaluate, (0, None))

  def advance(state: TrainState, window_KXS: jax.Array, hparams: dict[str, jax.Array], count: jax.Array):
    """`count` updates: as an array, so that one program does any number, the same way."""

    def update(k, carry):
      state, metrics = carry
      state, now = step(state, as_batch(window_KXS[k], bos, cross_documents, jnp), hparams)
      return state, jax.tree.map(lambda every, one: every.at[k].set(one), metrics, now)

    batch = jax.eval_shape(lambda x: as_batch(x[0], bos, cross_documents, jnp), window_KXS)
    shapes = jax.eval_shape(step, state, batch, hparams)[1]
    metrics = jax.tree.map(lambda x: jnp.zeros((most, *x.shape), x.dtype), shapes)
    return lax.fori_loop(0, count, update, (state, metrics))

  replicated = NamedSharding(mesh, P())
  return MemberPrograms(
    advance=jax.jit(advance, donate_argnums=0, out_shardings=replicated),
    evaluate=jax.jit(evaluate, out_shardings=replicated),
    take=jax.jit(lambda state, place: jax.tree.map(lambda x: x[place], state), out_shardings=replicated),
  )


def member_step(model: ModelConfig, optimizer: OptimizerConfig, mesh: Mesh, places: int) -> Callable:
  """train_step of so many members: all that it takes and gives with a leading axis, but for one alone."""
  step = functools.partial(train_step, model=model, optimizer=optimizer, mesh=mesh)
  return step if places == 1 else jax.vmap(step)
