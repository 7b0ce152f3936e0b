"""Forward mode and Hessians through backwards written by hand, against differences in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.layers.grouped_experts import Routing, experts
from mhc_jax.layers.unembedding import loss_sums
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model

STEP = 1e-5
PARAMS = {'birkhoff_sinkhorn': {'iterations': 3}, 'birkhoff_dual': {'max_iterations': 8}}
SHAPES = {  # of the arguments of each function below
  'read': ((2, 1, 2), (2, 1, 2, 3)),
  'write': ((2, 2, 1, 2), (2, 1, 2), (2, 1, 2, 3), (1, 2, 3)),
  'write without H_res': ((2, 1, 2), (2, 1, 2, 3), (1, 2, 3)),
  'experts': ((1, 4, 2), (1, 4, 2), (3, 2, 3), (3, 2, 3), (3, 3, 2)),
}
CHOSEN = np.array([[[0, 1], [2, 0], [1, 0], [0, 2]]])
FUNCTIONS = {
  'read': hc.read,
  'write': hc.write,
  'write without H_res': functools.partial(hc.write, None),
  'experts': lambda x, weight, *maps: experts(x, Routing(jnp.asarray(CHOSEN), weight), *maps, None),
}


def check(function, args, rng):
  """J t, and the Hessian of a scalar times t.

  Central differences miss by STEP^2 = 1e-10 times a third derivative, and by rounding, 1e-16 / STEP.
  """
  direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), args)
  weight = jnp.asarray(rng.normal(size=jax.eval_shape(function, *args).shape))

  def loss(*args):
    return jnp.sum(weight * jnp.sin(function(*args)))

  def first(*args):
    return function(*args), jax.grad(loss, tuple(range(len(args))))(*args)

  @jax.jit
  def both(*args):
    return jax.jvp(first, args, direction)

  def moved(sign):
    return both(*jax.tree.map(lambda x, t: x + sign * STEP * t, args, direction))[0]

  wanted = jax.tree.map(lambda up, down: (up - down) / (2 * STEP), moved(1), moved(-1))
  for a, b in zip(*map(jax.tree.leaves, (both(*args)[1], wanted)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7 * max(1, np.abs(b).max()))
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted[1])) > 1e-3


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_with_a_backward_of_their_own(x64, rng, name):
  check(FUNCTIONS[name], tuple(jnp.asarray(rng.normal(size=shape)) for shape in SHAPES[name]), rng)


def test_jacobians_of_experts(x64, rng):
  """By columns and by rows: both are batches of one direction each, which ragged products need help with."""
  x, *others = (jnp.asarray(rng.normal(size=shape)) for shape in SHAPES['experts'])
  both = jax.jit(lambda x: [way(FUNCTIONS['experts'])(x, *others) for way in (jax.jacfwd, jax.jacrev)])
  columns, rows = both(x)
  np.testing.assert_allclose(columns, rows, rtol=1e-12, atol=1e-12)
  assert np.abs(rows).max() > 0.1


@pytest.mark.parametrize('name', sorted(CONSTRAINTS.keys() - {'identity'}))
def test_every_constraint(x64, rng, name):
  constraint = CONSTRAINTS[name](**PARAMS.get(name, {}))
  n = 4 if name in ('orthogonal_quaternion', 'birkhoff_kronecker') else 3
  coords = jnp.asarray(rng.normal(size=(constraint.num_coordinates(n), 2)))
  check(lambda coords: constraint.matrix(coords, n), (coords,), rng)


def test_every_order_of_modes_under_every_transformation(x64, rng):
  """Of the Hessian of one small function, within scan, remat, jit and vmap."""
  pre, x = jnp.asarray(rng.normal(size=(2, 1, 2))), jnp.asarray(rng.normal(size=(3, 2, 1, 2, 3)))

  def loss(pre):
    @jax.checkpoint
    def body(total, x_NBTD):
      return total + jnp.sum(jnp.sin(hc.read(pre * total, x_NBTD))), None

    return jax.lax.scan(body, 1.0, x)[0]

  modes = [inner(outer(loss)) for inner in (jax.jacfwd, jax.jacrev) for outer in (jax.jacfwd, jax.jacrev)]
  found = jax.jit(lambda pre: [mode(pre) for mode in modes])(pre)
  for other in found[1:]:
    np.testing.assert_allclose(other, found[0], rtol=1e-10, atol=1e-12)
  push = jax.linearize(loss, pre)[1]
  np.testing.assert_allclose(push(pre), jnp.vdot(jax.grad(loss)(pre), pre), rtol=1e-12)
  assert np.abs(found[0]).max() > 0.1


@pytest.mark.slow
def test_the_whole_model(x64, rng):
  """A layer that is recomputed in a scan."""
  c = base_config()
  c.model.update({'width': 4, 'depth': 1, 'heads': 1, 'ffn_width': 2, 'dtype': 'float64', 'remat': 'layer'})
  c.model.connection.update({'name': 'hc', 'streams': 2})
  model = dataclasses.replace(build_model(c), vocab_size=5)
  tokens = rng.integers(0, 5, (1, 4))
  shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens, tokens)['params']
  params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), shapes)

  def loss(params):
    logits = Transformer(model).apply({'params': params}, tokens, 0 * tokens)[0]
    return loss_sums(logits, jnp.roll(tokens, -1, 1), jnp.ones((1, 4)))[0]

  check(loss, (params,), rng)
