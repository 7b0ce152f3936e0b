"""Functions with a backward of their own, as jax.custom_vjp, that forward mode goes through too.

A backward written by hand is there for speed and memory. It also says what the Jacobian J is, as g -> J^T g:
forward mode applies the transpose of that, t -> J t. So jvp, linearize, jacfwd and Hessians in any order of
modes need no further rules, and gradients stay those of the backward, operation by operation.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir


def with_backward(
  function: Callable[..., jax.Array],
  forward: Callable[..., tuple[jax.Array, Any]],
  backward: Callable[..., tuple[Any, ...]],
  nondiff_argnums: tuple[int, ...] = (),
) -> Callable[..., jax.Array]:
  """function, whose gradients are `backward`'s, by the rules of jax.custom_vjp.

  function(*args) returns one array, forward(*args) the same and what backward needs, and
  backward(*nondiff, that, g) a gradient for every other argument, None for integers. What nondiff_argnums
  names (no arrays) comes last in args. backward must be differentiable in turn; forward mode costs about two
  of it.
  """

  @functools.partial(jax.custom_jvp, nondiff_argnums=nondiff_argnums)
  @functools.wraps(function)
  def called(*args: Any) -> jax.Array:
    return function(*args)

  @called.defjvp
  def derivative(*args: Any) -> tuple[jax.Array, jax.Array]:
    *nondiff, primals, tangents = args
    result, saved = forward(*primals, *nondiff)
    leaves, structure = jax.tree.flatten(saved)
    moving = [jnp.issubdtype(x.dtype, jnp.inexact) for x in jax.tree.leaves(primals)]

    def pull(leaves: tuple[jax.Array, ...], g: jax.Array) -> list[jax.Array]:
      gradients = backward(*nondiff, structure.unflatten(leaves), g)
      return _picked(moving, jax.tree.leaves(tuple(map(_filled, primals, gradients))))

    steps = _picked(moving, jax.tree.leaves(tangents))
    return result, _push.bind(*leaves, *steps, pull=pull, count=len(leaves), out=jax.typeof(result))

  return called


def _picked(flags: list[bool], values: list[Any]) -> list[Any]:
  return [value for flag, value in zip(flags, values, strict=True) if flag]


def _filled(primal: Any, gradient: Any) -> Any:
  """A gradient with as many leaves as its argument: None stands for those of all."""
  return jax.tree.map(lambda _: 0, primal) if gradient is None else gradient


# _push(*saved, *tangents) = J t, where pull(saved, g) = J^T g. Its transpose is the call of pull itself, so
# that a gradient has the same operations as with jax.custom_vjp, and J t is made where forward mode wants it.


def _apply(*args: jax.Array, pull: Callable, count: int, out: Any) -> jax.Array:
  transposed = jax.vjp(functools.partial(pull, args[:count]), jnp.zeros(out.shape, out.dtype))[1]
  return transposed(list(args[count:]))[0]


def _differentiate(primals: tuple, tangents: tuple, **how: Any) -> tuple[jax.Array, jax.Array]:
  moving = [type(t) is not ad.Zero for t in tangents]

  def apply(*values: jax.Array) -> jax.Array:
    rest = iter(values)
    return _apply(*(next(rest) if flag else x for flag, x in zip(moving, primals, strict=True)), **how)

  return jax.jvp(apply, _picked(moving, primals), _picked(moving, tangents))


def _transpose(g: Any, *args: Any, pull: Callable, count: int, out: Any) -> list[Any]:
  gradients = pull(args[:count], ad.instantiate_zeros(g))
  wanted = zip(gradients, args[count:], strict=True)
  return [None] * count + [d if ad.is_undefined_primal(step) else None for d, step in wanted]


def _batch(args: tuple, axes: tuple, *, pull: Callable, count: int, out: Any) -> tuple[jax.Array, int]:
  size = next(x.shape[axis] for x, axis in zip(args, axes, strict=True) if axis is not None)
  fronted = [
    x if axis is None and i < count else batching.bdim_at_front(x, axis, size)
    for i, (x, axis) in enumerate(zip(args, axes, strict=True))
  ]
  saved_axes = tuple(None if axis is None else 0 for axis in axes[:count])
  batched = jax.vmap(pull, (saved_axes, 0))
  return _push.bind(*fronted, pull=batched, count=count, out=unmapped_aval(size, 0, out)), 0


_push = Primitive('push')
_push.def_impl(_apply)
_push.def_abstract_eval(lambda *_, out, **__: out)
mlir.register_lowering(_push, mlir.lower_fun(_apply, multiple_results=False))
ad.primitive_jvps[_push] = _differentiate
ad.primitive_transposes[_push] = _transpose
batching.primitive_batchers[_push] = _batch
