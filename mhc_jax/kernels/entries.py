"""What the primitives of JAX do to small arrays whose entries are many tokens each.

An array of one token, (n, n) say, is a numpy array here: of numbers, where it is the same for every token, or
of objects, each entry a number of Python's or `lanes`, a JAX array of one shape that holds this entry of many
tokens. Loop counters are JAX arrays of shape (). So shapes, indices and constants are gone before a kernel is
compiled, and its instructions are operations on whole registers.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class NotInLanesError(ValueError):
  """A function of one token that cannot be computed with tokens in lanes; the message says why."""


def is_number(entry: Any) -> bool:
  return isinstance(entry, (bool, int, float, np.generic))


def is_predicate(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, np.bool_)


def is_known(x: np.ndarray) -> bool:
  """Whether an array is the same for every token and known now."""
  return x.dtype != object


def array_of(entries: list[Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
  """The array with these entries in row-major order; one of numbers where all are."""
  if all(map(is_number, entries)):
    return np.array(entries, dtype).reshape(shape)
  x = np.empty(len(entries), object)
  for i, entry in enumerate(entries):
    x[i] = entry
  return x.reshape(shape)


def entries_of(x: np.ndarray) -> list[Any]:
  """Entries in row-major order, numbers as Python's."""
  return x.ravel().tolist() if is_known(x) else list(x.ravel())


def row_of(x: np.ndarray, i: int) -> np.ndarray:
  """x[i], an array also where that is a single entry."""
  return x[i : i + 1].reshape(x.shape[1:])


def spread(entry: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """An entry as lanes of this shape."""
  if is_number(entry):
    return jnp.full(shape, entry, dtype)
  if entry.shape == shape:
    return entry
  if is_predicate(dtype):  # Mosaic spreads numbers only
    return jnp.full(shape, entry.astype(jnp.float32)) > 0
  return jnp.full(shape, entry, dtype)


def common_shape(entries: list[Any]) -> tuple[int, ...]:
  """That of the lanes among the entries, () if there are counters only."""
  return max((entry.shape for entry in entries if not is_number(entry)), key=len)


def computed(primitive: Any, params: dict, dtypes: list[Any], entries: list[Any]) -> Any:
  """An elementwise primitive of single entries, not all of them numbers."""
  name = primitive.name
  if name == 'select_n':
    return selected(entries[0], entries[1:], dtypes[1])
  first, second = (*entries, None)[:2]
  if name in ('add', 'add_any', 'sub') and _is(second, 0):
    return first
  if name in ('add', 'add_any') and _is(first, 0):
    return second
  if name in ('mul', 'div') and _is(second, 1):
    return first
  if name == 'mul' and _is(first, 1):
    return second
  if name in ('and', 'or') and is_predicate(dtypes[0]):
    number, other = (first, second) if is_number(first) else (second, first)
    if is_number(number):
      return other if number == (name == 'and') else number
  shape = common_shape(entries)
  return primitive.bind(*(spread(e, shape, d) for e, d in zip(entries, dtypes, strict=True)), **params)


def _is(entry: Any, number: int) -> bool:
  return entry is not None and is_number(entry) and entry == number


def selected(which: Any, cases: list[Any], dtype: Any) -> Any:
  """cases[which], for a predicate or a number of a case."""
  if is_number(which):
    return cases[int(which)]
  if all(case is cases[0] or (is_number(case) and _is(cases[0], case)) for case in cases[1:]):
    return cases[0]
  shape = common_shape([which, *cases])
  which = spread(which, shape, which.dtype)
  cases = [spread(case, shape, dtype) for case in cases]
  if not is_predicate(which.dtype):
    choose = lambda chosen, k: selected(which == k, [chosen, cases[k]], dtype)  # noqa: E731
    return functools.reduce(choose, range(1, len(cases)), cases[0])
  if is_predicate(dtype):  # Mosaic chooses between numbers only
    return (which & cases[1]) | (~which & cases[0])
  return jnp.where(which, cases[1], cases[0])


def folded(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """A primitive of known arrays, computed now: by numpy, or by JAX where numpy has no such function."""
  rule = NUMPY.get(eqn.primitive.name)
  if rule is not None:
    return [np.asarray(rule(*inputs), eqn.outvars[0].aval.dtype)]
  outputs = _bound(eqn, [np.asarray(x, v.aval.dtype) for x, v in zip(inputs, eqn.invars, strict=True)])
  return outputs if eqn.primitive.multiple_results else [outputs]


def _bound(eqn: Any, inputs: list[np.ndarray]) -> Any:
  with jax.ensure_compile_time_eval():
    return jax.tree.map(np.asarray, eqn.primitive.bind(*map(jnp.asarray, inputs), **eqn.params))


def elementwise(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """A primitive that maps entries to entries."""
  out, dtypes = eqn.outvars[0].aval, [v.aval.dtype for v in eqn.invars]
  columns = [entries_of(np.broadcast_to(x, out.shape)) for x in inputs]
  results = []
  for entries in zip(*columns, strict=True):
    if all(map(is_number, entries)):
      results.append(_folded_entry(eqn, entries, dtypes).item())
    else:
      results.append(computed(eqn.primitive, eqn.params, dtypes, list(entries)))
  return [array_of(results, out.shape, out.dtype)]


def _folded_entry(eqn: Any, entries: tuple, dtypes: list[Any]) -> np.ndarray:
  return folded(eqn, [np.asarray(e, d) for e, d in zip(entries, dtypes, strict=True)])[0]


def pairwise(primitive: Any, a: Any, b: Any, dtype: Any) -> Any:
  """A primitive of two entries of one dtype."""
  if is_number(a) and is_number(b):
    return NUMPY[primitive.name](np.asarray(a, dtype), np.asarray(b, dtype)).item()
  return computed(primitive, {}, [dtype, dtype], [a, b])


def reduction(primitive: Any) -> Callable:
  """Over axes, entry after entry in row-major order."""

  def rule(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    axes, out, dtype = eqn.params['axes'], eqn.outvars[0].aval, eqn.invars[0].aval.dtype
    kept = [axis for axis in range(inputs[0].ndim) if axis not in axes]
    rows = inputs[0].transpose(*kept, *axes).reshape(out.size, -1)
    combine = functools.partial(pairwise, primitive, dtype=dtype)
    return [array_of([functools.reduce(combine, entries_of(row)) for row in rows], out.shape, out.dtype)]

  return rule


def cumulative(primitive: Any) -> Callable:
  """Along one axis."""

  def rule(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    axis, out = eqn.params['axis'], eqn.outvars[0].aval
    step = -1 if eqn.params['reverse'] else 1
    rows = np.moveaxis(inputs[0], axis, -1)
    combine = functools.partial(pairwise, primitive, dtype=out.dtype)
    done = [list(itertools.accumulate(entries_of(row)[::step], combine))[::step] for row in _rows(rows)]
    return [np.moveaxis(array_of(list(itertools.chain(*done)), rows.shape, out.dtype), -1, axis)]

  return rule


def _rows(x: np.ndarray) -> np.ndarray:
  return x.reshape(-1, x.shape[-1])


def dot_general(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """Sums of products in the result's dtype, without the terms that a zero of a constant makes vanish."""
  (contract, batch), out = eqn.params['dimension_numbers'], eqn.outvars[0].aval
  a_XIK, b_XJK = (_split_axes(x, batch[i], contract[i]) for i, x in enumerate(inputs))
  sums = []
  for a_IK, b_JK in zip(a_XIK, b_XJK, strict=True):
    sums += [_inner(entries_of(a_K), entries_of(b_K), out.dtype) for a_K in a_IK for b_K in b_JK]
  return [array_of(sums, out.shape, out.dtype)]


def _split_axes(x: np.ndarray, batch: tuple[int, ...], contract: tuple[int, ...]) -> np.ndarray:
  """(batch, others, contracted)."""
  others = [axis for axis in range(x.ndim) if axis not in (*batch, *contract)]
  size = lambda axes: int(np.prod([x.shape[axis] for axis in axes], dtype=int))  # noqa: E731
  return x.transpose(*batch, *others, *contract).reshape(size(batch), size(others), size(contract))


def _inner(a_K: list[Any], b_K: list[Any], dtype: Any) -> Any:
  """-1 is a subtraction, as permutations with signs want it."""
  total = 0
  for a, b in zip(a_K, b_K, strict=True):
    if _is(a, 0) or _is(b, 0):
      continue
    minus = _is(a, -1) or _is(b, -1)
    term = (b if _is(a, -1) else a) if minus else pairwise(lax.mul_p, a, b, dtype)
    total = pairwise(lax.sub_p if minus else lax.add_p, total, term, dtype)
  return total


def moved(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """A primitive that only moves entries (DATA names the arrays that it moves): applied to their numbers.

  Other inputs say where to; raises NotInLanesError where they depend on the token or on a loop.
  """
  out, entries = eqn.outvars[0].aval, []
  numbered = []
  for i, x in enumerate(inputs):
    if i in DATA[eqn.primitive.name]:
      numbered.append(np.arange(len(entries), len(entries) + x.size, dtype=np.float32).reshape(x.shape))
      entries += entries_of(x)
    else:
      numbered.append(np.asarray(_index(eqn, x), eqn.invars[i].aval.dtype))
  outside = np.nan if jnp.issubdtype(out.dtype, jnp.inexact) else jnp.iinfo(out.dtype).min
  places = _bound(eqn, numbered).ravel()
  return [array_of([outside if p != p else entries[int(p)] for p in places], out.shape, out.dtype)]


def scatter_add(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  """Each update is added to the entries at which a one in its place arrives."""
  operand, indices, updates = inputs
  indices = np.asarray(_index(eqn, indices), eqn.invars[1].aval.dtype)
  out = eqn.outvars[0].aval
  totals = entries_of(operand)
  for place, update in enumerate(entries_of(updates)):
    one = np.zeros(updates.size, np.float32)
    one[place] = 1
    hit = _bound(eqn, [np.zeros(operand.shape, np.float32), indices, one.reshape(updates.shape)])
    for i in np.flatnonzero(hit):
      totals[i] = pairwise(lax.add_p, totals[i], update, out.dtype)
  return [array_of(totals, out.shape, out.dtype)]


def _index(eqn: Any, x: np.ndarray) -> np.ndarray:
  if not is_known(x):
    raise NotInLanesError(f'{eqn.primitive.name} at an index that depends on the token or on a loop')
  return x


def _broadcast(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  shape, places = eqn.params['shape'], eqn.params['broadcast_dimensions']
  sides = [1] * len(shape)
  for size, axis in zip(inputs[0].shape, places, strict=True):
    sides[axis] = size
  return [np.broadcast_to(inputs[0].reshape(sides), shape)]


def _slice(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  starts, limits = eqn.params['start_indices'], eqn.params['limit_indices']
  steps = eqn.params['strides'] or (1,) * len(starts)
  return [inputs[0][tuple(map(slice, starts, limits, steps))]]


def _iota(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  out, axis = eqn.outvars[0].aval, eqn.params['dimension']
  return [np.indices(out.shape)[axis].astype(out.dtype)]


def _dynamic_slice(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  x, sizes = inputs[0], eqn.params['slice_sizes']
  return [x[_window(eqn, x, inputs[1:], sizes)]]


def _dynamic_update_slice(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  x, update = inputs[:2]
  out = x.astype(x.dtype if is_known(x) and is_known(update) else object)
  out[_window(eqn, x, inputs[2:], update.shape)] = update
  return [out]


def _window(eqn: Any, x: np.ndarray, starts: list[np.ndarray], sizes: tuple[int, ...]) -> tuple[slice, ...]:
  """Where a dynamic slice lies: moved inside where it would reach beyond an end."""
  window = []
  for start, size, length in zip(starts, sizes, x.shape, strict=True):
    first = min(max(int(_index(eqn, start)), 0), length - size)
    window.append(slice(first, first + size))
  return tuple(window)


def _pad(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  x, value = inputs
  out = np.empty(eqn.outvars[0].aval.shape, object)
  out.fill(entries_of(value)[0])
  sources, places = [], []
  for size, length, (low, _, interior) in zip(x.shape, out.shape, eqn.params['padding_config'], strict=True):
    place = low + np.arange(size) * (interior + 1)
    inside = (place >= 0) & (place < length)
    sources.append(np.flatnonzero(inside))
    places.append(place[inside])
  out[np.ix_(*places)] = x[np.ix_(*sources)]
  return [array_of(list(out.ravel()), out.shape, eqn.outvars[0].aval.dtype)]


def _split(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  return np.split(inputs[0], np.cumsum(eqn.params['sizes'])[:-1], eqn.params['axis'])


def _unstack(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  return [row_of(np.moveaxis(inputs[0], eqn.params['axis'], 0), i) for i in range(len(eqn.outvars))]


def _together(join: Callable, axis: str) -> Callable:
  """Concatenation or stacking; known arrays beside others become entries."""

  def rule(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
    parts = inputs if all(map(is_known, inputs)) else [x.astype(object) for x in inputs]
    return [join(parts, axis=eqn.params[axis])]

  return rule


def _reshaped(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  return [inputs[0].reshape(eqn.outvars[0].aval.shape)]


def _same(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  return list(inputs)


def _empty(eqn: Any, inputs: list[np.ndarray]) -> list[np.ndarray]:
  return [np.zeros(eqn.outvars[0].aval.shape, eqn.outvars[0].aval.dtype)]


NUMPY: dict[str, Callable] = {
  'abs': np.abs,
  'add': np.add,
  'add_any': np.add,
  'and': np.bitwise_and,
  'convert_element_type': lambda x: x,
  'eq': np.equal,
  'ge': np.greater_equal,
  'gt': np.greater,
  'le': np.less_equal,
  'lt': np.less,
  'max': np.maximum,
  'min': np.minimum,
  'mul': np.multiply,
  'ne': np.not_equal,
  'neg': np.negative,
  'not': np.invert,
  'or': np.bitwise_or,
  'rem': np.fmod,
  'sub': np.subtract,
}
ELEMENTWISE = frozenset(NUMPY) | frozenset(
  """acos acosh asin asinh atan atan2 atanh cbrt ceil clamp cos cosh div erf erf_inv erfc exp exp2 expm1
  floor integer_pow is_finite lgamma log log1p logistic nextafter one_minus_square pow reduce_precision
  round rsqrt select_n sign sin sinh sqrt square tan tanh xor""".split()
)
DATA = {'gather': (0,), 'scatter': (0, 2)}
RULES: dict[str, Callable] = {
  **dict.fromkeys(ELEMENTWISE, elementwise),
  **dict.fromkeys(DATA, moved),
  **dict.fromkeys(('reshape', 'squeeze', 'expand_dims'), _reshaped),
  **dict.fromkeys(('copy', 'copy_p', 'name', 'optimization_barrier', 'reshard', 'stop_gradient'), _same),
  **dict.fromkeys(('empty', 'empty2'), _empty),
  **dict.fromkeys(('scatter-add', 'scatter_add'), scatter_add),
  'broadcast_in_dim': _broadcast,
  'concatenate': _together(np.concatenate, 'dimension'),
  'cummax': cumulative(lax.max_p),
  'cummin': cumulative(lax.min_p),
  'cumprod': cumulative(lax.mul_p),
  'cumsum': cumulative(lax.add_p),
  'dot_general': dot_general,
  'dynamic_slice': _dynamic_slice,
  'dynamic_update_slice': _dynamic_update_slice,
  'iota': _iota,
  'pad': _pad,
  'reduce_and': reduction(lax.and_p),
  'reduce_max': reduction(lax.max_p),
  'reduce_min': reduction(lax.min_p),
  'reduce_or': reduction(lax.or_p),
  'reduce_prod': reduction(lax.mul_p),
  'reduce_sum': reduction(lax.add_p),
  'rev': lambda eqn, inputs: [np.flip(inputs[0], eqn.params['dimensions'])],
  'slice': _slice,
  'split': _split,
  'stack': _together(np.stack, 'axis'),
  'transpose': lambda eqn, inputs: [inputs[0].transpose(eqn.params['permutation'])],
  'unstack': _unstack,
}
