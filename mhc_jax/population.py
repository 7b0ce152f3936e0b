"""Runs of equal shapes side by side: the states of P members stacked, K updates of all of them a dispatch.

plan, train_step -> **population** -> loop. A member is a run like any other: its numbers are those of the run
alone up to rounding (vmap adds an axis to every array, and the compiler may add in another order), and only
its own folder knows it. P = 1 has no axis: how an accelerator trains a run alone, where the host, which needs
milliseconds for a dispatch and a batch, would keep it waiting.

A program has a power of two of places, and each computes from its own numbers alone. Members lie there in
their order, copies of the last fill up what is left. So where a member ends, the others move up, half as many
places do when half are empty, and what a member computes follows from who is left: a population that is
killed goes on as it would have, bit for bit.
"""

import dataclasses
import functools
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
MOST_MEMBERS = 64
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

  A power of two: as many as compute 1e11 FLOPs per update together, and by the least that each needs take no
  more than a third of the memory. On CPU members lose to processes: there is no dispatch to save, and their
  arrays leave the cache. Runs that take several devices have no room for others.
  """
  device = jax.devices()[0]
  if device.platform == 'cpu' or not on_one_device(run):
    return 1
  c, derived = run.resolved, run.derived
  fit = _FLOPS / (derived['tokens_per_step'] * derived['flops_per_token'])
  memory = memory_of(device)
  if memory is not None:
    parts = c['optimizer']['microbatches'] or 1
    fit = min(fit, memory / 3 / cost.least_bytes(run.model, derived['tokens_per_step'], parts))
  return 1 << (int(min(max(fit, 1), MOST_MEMBERS)).bit_length() - 1)


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
    self._most = max(1, min(MOST_UPDATES, _MOST_BYTES // (row_bytes * _places(len(members)))))
    self._orders = {m: train_order(train, m.plan.resolved['seed'], data['repeat']) for m in members}
    self._places: list[Any] = []
    self._replicated = NamedSharding(mesh, P())
    self.most = self._most

  def keep(self, live: Sequence[Any]) -> bool:
    """Lays out these members in this order; True where that takes programs that were not used before."""
    places = [*live, *live[-1:] * (_places(len(live)) - len(live))]
    if places == self._places:
      return False
    if self._places:
      slots = np.array([self._places.index(member) for member in places])
      self._state = _rearranged(self._state, slots)
    else:
      states = [jax.device_get(member.at.state) for member in live]
      states += states[-1:] * (len(places) - len(live))
      self._state = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
      for member in live:
        member.at.state = None  # it is here
    self._state = jax.device_put(self._state, self._replicated)
    hparams = [hparams_of(m.plan.optimizer, m.plan.num_steps) for m in places]
    hparams = jax.tree.map(lambda *leaves: np.stack(leaves), *hparams)
    self._hparams = jax.device_put(hparams, self._replicated)
    changed, self._places = len(places) != len(self._places), places
    same = self._model, self._optimizer, self._mesh, self._train.bos, self._train.cross_documents
    self._of_size = member_programs(*same, len(places), self._most)
    return changed

  def advance(self, count: int) -> dict[str, jax.Array]:
    """Dispatches that many updates of every member; their metrics, the first `count` of (K, P, ...)."""
    cut: dict[tuple[int, int], np.ndarray] = {}  # members of one seed see the same
    first = self._cut(self._places[0], count)
    window_KPBS = np.zeros((self._most, len(self._places), *first.shape[1:]), first.dtype)
    for place, member in enumerate(self._places):
      key = member.plan.resolved['seed'], member.step
      if key not in cut:
        cut[key] = self._cut(member, count) if place else first
      window_KPBS[:count, place] = cut[key]
    window_KPBS = jax.device_put(window_KPBS, self._replicated)
    self._state, metrics = self._of_size.advance(self._state, window_KPBS, self._hparams, np.int32(count))
    return metrics

  def _cut(self, member: Any, count: int) -> np.ndarray:
    rows = member.plan.resolved['data']['batch_size']
    places, order = range(member.step * rows, (member.step + count) * rows), self._orders[member]
    return self._train.cut(np.array([order[place] for place in places]).reshape(count, rows))

  def took(self, seconds: float) -> None:
    """How long an update takes: dispatches shall not keep whoever stops the run waiting."""
    self.most = max(1, min(self._most, int(_SECONDS / max(seconds, 1e-9))))

  def fetch(self, metrics: dict[str, jax.Array], count: int) -> list[list[dict[str, np.ndarray]]]:
    """Of each update, of each place: its metrics."""
    values = jax.device_get(metrics)
    places = range(len(next(iter(values.values()))[0]))
    return [[{name: x[k, place] for name, x in values.items()} for place in places] for k in range(count)]

  def state(self, member: Any) -> TrainState:
    """The member's, as it has it alone."""
    return self._of_size.take(self._state, self._places.index(member))

  def sums(self, validation: list[Batch]) -> Callable[[Any], tuple[list[tuple[Any, Any]], Any]]:
    """member -> evaluate_sums of every batch, and the first's records where they came with them: not here."""
    params = self._state.params
    found = jax.device_get([self._of_size.evaluate(params, batch) for batch in validation])

    def of_member(member: Any) -> tuple[list[tuple[Any, Any]], Any]:
      place = self._places.index(member)
      return [(total[place], count[place]) for total, count in found], None

    return of_member


def _places(members: int) -> int:
  """The power of two that holds them."""
  return 1 << (members - 1).bit_length()


@jax.jit
def _rearranged(state: TrainState, slots: jax.Array) -> TrainState:
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
  evaluate = _over_members(functools.partial(evaluate_sums, model=model, mesh=mesh), (0, None), places)

  def advance(state: TrainState, window_KPBS: jax.Array, hparams: dict[str, jax.Array], count: jax.Array):
    """`count` updates: as an array, so that one program does any number, the same way."""

    def update(k, carry):
      state, metrics = carry
      state, now = step(state, as_batch(window_KPBS[k], bos, cross_documents, jnp), hparams)
      return state, jax.tree.map(lambda every, one: every.at[k].set(one), metrics, now)

    batch = jax.eval_shape(lambda x: as_batch(x[0], bos, cross_documents, jnp), window_KPBS)
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
  """train_step of so many members: state, batch and hparams with a leading axis."""
  step = functools.partial(train_step, model=model, optimizer=optimizer, mesh=mesh)
  return _over_members(step, (0, 0, 0), places)


def _over_members(function: Callable, axes: tuple[int | None, ...], places: int) -> Callable:
  """jax.vmap; for one place without the axis inside, so that it is the program of a run alone."""
  if places > 1:
    return jax.vmap(function, axes)

  def run(*arguments):
    pairs = zip(arguments, axes, strict=True)
    inner = [x if axis is None else jax.tree.map(lambda leaf: leaf[0], x) for x, axis in pairs]
    return jax.tree.map(lambda leaf: leaf[None], function(*inner))

  return run
