"""A function of one token, evaluated for many tokens that lie in lanes (entries.py).

The function is traced as it is, (K,) -> (n, n) say, without any axis of tokens. Calls are inlined; a loop
stays one where its body needs no index that the loop counts and, on TPUs, stacks nothing, and is written out
elsewhere; what differs between platforms is decided. Each token gets what the function gives for it alone: a
loop that ends by a condition runs until no token of the block wants another turn, and keeps the values of
those that are done.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from mhc_jax.kernels.entries import (
  RULES,
  NotInLanesError,
  array_of,
  entries_of,
  folded,
  is_known,
  is_number,
  is_predicate,
  row_of,
  selected,
  spread,
)

# Parameters under which primitives that call keep what they call, and the primitives.
INNER = ('jaxpr', 'call_jaxpr', 'fun_jaxpr')
CALLS = frozenset(
  'jit pjit closed_call core_call checkpoint remat remat2 custom_jvp_call custom_vjp_call custom_lin'.split()
)
PLATFORMS = {'tpu': 'tpu', 'interpret': 'tpu', 'gpu': 'cuda'}
# A loop of at most so many turns is written out, and one that stacks what it computes, of at most so many.
SHORT = 2
STACKED = {'tpu': math.inf, 'interpret': math.inf, 'gpu': 8}


class Rows(NamedTuple):
  """What a scan stacks, until something needs it as an array.

  Triton takes 20 ms and more for each instruction of loops that are written out, and there is no memory to
  stack in. So a scan over such rows computes each from the start: quadratic in the turns, in a few registers.
  """

  at: Callable[[jax.Array], list[np.ndarray]]  # index -> rows of everything that the scan stacks
  whole: Callable[[], list[np.ndarray]]
  place: int  # among what the scan stacks


def evaluate(jaxpr: Any, consts: list[Any], inputs: list[np.ndarray], platform: str) -> list[np.ndarray]:
  """The outputs of a jaxpr of one token, for inputs whose entries may be lanes.

  platform: 'tpu', 'gpu' or 'interpret', whose branches of lax.platform_dependent are taken. Raises
  NotInLanesError for a primitive without a rule, naming it, and for an index that depends on a token.
  """
  return list(map(_whole, _evaluate(jaxpr, consts, inputs, platform)))


def _whole(x: Any) -> np.ndarray:
  return x.whole()[x.place] if isinstance(x, Rows) else x


def _evaluate(jaxpr: Any, consts: list[Any], inputs: list[Any], platform: str) -> list[Any]:
  """Outputs that are arrays or Rows."""
  values = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
  values |= dict(zip(jaxpr.invars, inputs, strict=True))

  def value(v: Any) -> Any:
    return np.asarray(v.val, v.aval.dtype) if isinstance(v, jex.Literal) else values[v]

  for eqn in _needed(jaxpr):
    outputs = _equation(eqn, [value(v) for v in eqn.invars], platform)
    values |= dict(zip(eqn.outvars, outputs, strict=True))
  return [value(v) for v in jaxpr.outvars]


def _constant(value: Any) -> np.ndarray:
  if isinstance(value, jax.core.Tracer):
    raise NotInLanesError('the function closes over an array that is being traced: pass it as an argument')
  return np.asarray(value)


def _needed(jaxpr: Any) -> list[Any]:
  """The equations that outputs depend on, in order."""
  wanted = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
  needed = []
  for eqn in reversed(jaxpr.eqns):
    if eqn.effects or not wanted.isdisjoint(eqn.outvars):
      needed.append(eqn)
      wanted.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
  return needed[::-1]


def _equation(eqn: Any, inputs: list[Any], platform: str) -> list[Any]:
  name = eqn.primitive.name
  if name == 'platform_index':
    return [np.asarray(_platform_index(eqn.params['platforms'], PLATFORMS[platform]), np.int32)]
  if name in CALLS:
    return _called(next(eqn.params[key] for key in INNER if key in eqn.params), inputs, platform)
  if name == 'scan':
    return _scan(eqn, inputs, platform)
  inputs = list(map(_whole, inputs))
  if name == 'push':  # J t of a function with a backward of its own (derivatives.py)
    traced = jax.make_jaxpr(lambda *args: eqn.primitive.impl(*args, **eqn.params))
    return _closed(traced(*(v.aval for v in eqn.invars)), inputs, platform)
  if name in CONTROL:
    return CONTROL[name](eqn, inputs, platform)
  if name in RULES and not (inputs and all(map(is_known, inputs)) and name in FOLDED):
    return RULES[name](eqn, inputs)
  if inputs and all(map(is_known, inputs)) and not eqn.effects:
    return folded(eqn, inputs)
  raise NotInLanesError(f'{name} has no rule for tokens in lanes')


def _platform_index(platforms: tuple, platform: str) -> int:
  """That of the first branch for this platform or for any."""
  return next(i for i, names in enumerate(platforms) if names is None or platform in names)


def _called(jaxpr: Any, inputs: list[Any], platform: str) -> list[Any]:
  inner, consts = (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, 'consts') else (jaxpr, [])
  return _evaluate(inner, consts, inputs, platform)


def _closed(jaxpr: Any, inputs: list[np.ndarray], platform: str) -> list[np.ndarray]:
  return list(map(_whole, _called(jaxpr, inputs, platform)))


def _cond(eqn: Any, inputs: list[np.ndarray], platform: str) -> list[np.ndarray]:
  """The branch taken, or where tokens differ, all branches and a choice between their results."""
  branches, which = eqn.params['branches'], entries_of(inputs[0])[0]
  if is_number(which):
    return _closed(branches[int(which)], inputs[1:], platform)
  results = [_closed(branch, inputs[1:], platform) for branch in branches]
  outputs = []
  for out, *cases in zip(eqn.outvars, *results, strict=True):
    entries = zip(*map(entries_of, cases), strict=True)
    chosen = [selected(which, list(case), out.aval.dtype) for case in entries]
    outputs.append(array_of(chosen, out.aval.shape, out.aval.dtype))
  return outputs


def _carried_inputs(eqn: Any) -> tuple[int, int]:
  """Where a scan's carry begins among its inputs and ends: what is stacked has an axis more than in the body.

  By shapes, as versions of JAX name these counts differently.
  """
  body = eqn.params['jaxpr'].jaxpr
  carry, rows = (
    sum((one.aval.ndim == other.aval.ndim) == same for one, other in zip(outer, inner, strict=True))
    for outer, inner, same in ((eqn.outvars, body.outvars, True), (eqn.invars, body.invars, False))
  )
  stop = len(eqn.invars) - rows
  return stop - carry, stop


def _scan(eqn: Any, inputs: list[Any], platform: str) -> list[Any]:
  p, split = eqn.params, _carried_inputs(eqn)
  consts, carry = (list(map(_whole, part)) for part in (inputs[: split[0]], inputs[split[0] : split[1]]))
  xs, avals = inputs[split[1] :], [v.aval for v in eqn.outvars]
  length, stacks = p['length'], len(avals) > len(carry)

  def turn(carry: list[np.ndarray], xs: list[np.ndarray]) -> list[np.ndarray]:
    return _closed(p['jaxpr'], [*consts, *carry, *xs], platform)

  def row(k: Any) -> Any:
    return length - 1 - k if p['reverse'] else k

  @functools.cache
  def written_out() -> list[np.ndarray]:
    now, ys, arrays = carry, [None] * length, list(map(_whole, xs))
    for i in map(row, range(length)):
      results = turn(now, [row_of(x, i) for x in arrays])
      now, ys[i] = results[: len(carry)], results[len(carry) :]
    rows = zip(zip(*ys, strict=True), avals[len(carry) :], strict=True)
    return [*now, *itertools.starmap(_stacked, rows)]

  def after(turns: Any) -> list[np.ndarray]:
    """The carry after so many turns, by a loop."""
    return _counted(
      lambda now, k: turn(now, _rows(xs, row(k)))[: len(carry)], carry, avals[: len(carry)], turns
    )

  if length <= (STACKED[platform] if stacks else SHORT) or not all(isinstance(x, Rows) for x in xs):
    return written_out()
  try:
    last = after(length)
  except NotInLanesError:  # an index that the loop counts is known when it is written out
    return written_out()
  at = lambda i: turn(after(row(i)), _rows(xs, i))[len(carry) :]  # noqa: E731
  whole = lambda: written_out()[len(carry) :]  # noqa: E731
  return [*last, *(Rows(at, whole, place) for place in range(len(avals) - len(carry)))]


def _rows(xs: list[Rows], i: Any) -> list[np.ndarray]:
  """Row i of each; those of one scan are computed at once."""
  made = {at: at(i) for at in dict.fromkeys(x.at for x in xs)}
  return [made[x.at][x.place] for x in xs]


def _stacked(rows: tuple[np.ndarray, ...], aval: Any) -> np.ndarray:
  return array_of(list(itertools.chain(*map(entries_of, rows))), aval.shape, aval.dtype)


def _while(eqn: Any, inputs: list[np.ndarray], platform: str) -> list[np.ndarray]:
  p = eqn.params
  at = p['cond_nconsts'], p['cond_nconsts'] + p['body_nconsts']
  cond_consts, body_consts, carry = inputs[: at[0]], inputs[at[0] : at[1]], inputs[at[1] :]
  avals = [v.aval for v in eqn.outvars]

  def goes_on(carry: list[np.ndarray]) -> Any:
    return entries_of(_closed(p['cond_jaxpr'], [*cond_consts, *carry], platform)[0])[0]

  def turn(carry: list[np.ndarray]) -> list[np.ndarray]:
    return _closed(p['body_jaxpr'], [*body_consts, *carry], platform)

  try:
    return _conditional(goes_on, turn, carry, avals)
  except NotInLanesError:
    going = goes_on(carry)
    while is_number(going) and going:  # an index that the loop counts: known when it is written out
      carry = turn(carry)
      going = goes_on(carry)
    if not is_number(going):
      raise
    return carry


CONTROL: dict[str, Callable] = {'cond': _cond, 'while': _while}
# With known inputs these are computed by numpy or JAX at once; the others only move what they get.
FOLDED = frozenset(name for name, rule in RULES.items() if getattr(rule, '__name__', '') == 'elementwise')


def _counted(turn: Callable, carry: list[np.ndarray], avals: list[Any], length: Any) -> list[np.ndarray]:
  """`length` turns (carry, counter) -> carry, as a loop."""
  entries, dtypes = _flat(carry, avals)

  def body(entries: list[Any], k: Any) -> list[Any]:
    return _flat(turn(_arrays(entries, avals), k), avals)[0]

  shapes = _carried(body, entries, dtypes)
  loop = lambda k, moving: _packed(body(_merged(entries, shapes, dtypes, moving), k), shapes, dtypes)  # noqa: E731
  moving = lax.fori_loop(0, length, loop, _packed(entries, shapes, dtypes, start=True))
  return _arrays(_merged(entries, shapes, dtypes, moving), avals)


def _conditional(
  goes_on: Callable, turn: Callable, carry: list[np.ndarray], avals: list[Any]
) -> list[np.ndarray]:
  """Turns as long as a token of the block wants one; the values of others stay as they are."""
  entries, dtypes = _flat(carry, avals)
  entries, dtypes = [goes_on(carry), *entries], [np.dtype(bool), *dtypes]
  if is_number(entries[0]) and not entries[0]:
    return carry

  def body(entries: list[Any], _: Any = None) -> list[Any]:
    going, *old = entries
    new = _flat(turn(_arrays(old, avals)), avals)[0]
    if not is_number(going) and going.shape:
      new = [selected(going, list(pair), d) for *pair, d in zip(old, new, dtypes[1:], strict=True)]
    return [goes_on(_arrays(new, avals)), *new]

  shapes = _carried(body, entries, dtypes)
  if shapes[0] is None:
    raise NotInLanesError('while has a condition that never changes')
  loop = lambda moving: _packed(body(_merged(entries, shapes, dtypes, moving)), shapes, dtypes)  # noqa: E731
  moving = lax.while_loop(
    lambda moving: jnp.max(moving[0]) > 0, loop, _packed(entries, shapes, dtypes, start=True)
  )
  return _arrays(_merged(entries, shapes, dtypes, moving)[1:], avals)


def _flat(arrays: list[np.ndarray], avals: list[Any]) -> tuple[list[Any], list[Any]]:
  """Entries and dtypes of all arrays, one after the other."""
  entries = list(itertools.chain(*map(entries_of, arrays)))
  return entries, [aval.dtype for aval in avals for _ in range(aval.size)]


def _arrays(entries: list[Any], avals: list[Any]) -> list[np.ndarray]:
  rest = iter(entries)
  return [array_of([next(rest) for _ in range(aval.size)], aval.shape, aval.dtype) for aval in avals]


def _carried(body: Callable, entries: list[Any], dtypes: list[Any]) -> list[tuple[int, ...] | None]:
  """The shape in which a loop carries each entry: None for numbers that it leaves as they are."""
  shapes = [None if is_number(entry) else entry.shape for entry in entries]
  while True:
    after = []

    def probe(k: jax.Array, *moving: jax.Array, shapes: list = shapes, after: list = after) -> jax.Array:
      start = _merged(entries, shapes, dtypes, moving)
      for old, new in zip(start, body(start, k), strict=True):
        same = is_number(old) and is_number(new) and (old == new or (old != old and new != new))
        after.append(None if same else () if is_number(new) else new.shape)
      return jnp.zeros(())

    moving = [(s, d) for s, d in zip(shapes, dtypes, strict=True) if s is not None]
    counter = jax.ShapeDtypeStruct((), np.int32)
    jax.eval_shape(probe, counter, *(jax.ShapeDtypeStruct(s, _carried_dtype(d)) for s, d in moving))
    joined = [
      max(pair, key=lambda s: -1 if s is None else len(s)) for pair in zip(shapes, after, strict=True)
    ]
    if joined == shapes:
      return shapes
    shapes = joined


def _carried_dtype(dtype: Any) -> Any:
  """Mosaic carries no predicates round a loop."""
  return np.dtype(np.float32) if is_predicate(dtype) else dtype


def _packed(
  entries: list[Any], shapes: list, dtypes: list[Any], start: bool = False
) -> tuple[jax.Array, ...]:
  """The entries that a loop carries, as arrays."""
  carried = [e for e in zip(entries, shapes, dtypes, strict=True) if e[1] is not None]
  return tuple(_start(*each) if start else spread(*each).astype(_carried_dtype(each[2])) for each in carried)


def _start(entry: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """An entry before the first turn. Mosaic cannot carry on from a register that it knows to be constant."""
  carried = _carried_dtype(dtype)
  if not shape or not (is_number(entry) or not entry.shape):
    return spread(entry, shape, dtype).astype(carried)
  places = functools.reduce(jnp.add, [lax.broadcasted_iota(jnp.int32, shape, i) for i in range(len(shape))])
  zero = jnp.minimum(places, 0)
  return zero.astype(carried) + spread(entry, shape, dtype).astype(carried)


def _merged(entries: list[Any], shapes: list, dtypes: list[Any], moving: tuple) -> list[Any]:
  """All entries: those that the loop carries, and the numbers that it leaves as they are."""
  rest, merged = iter(moving), []
  for entry, shape, dtype in zip(entries, shapes, dtypes, strict=True):
    now = entry if shape is None else next(rest)
    merged.append(now > 0 if shape is not None and is_predicate(dtype) else now)
  return merged
