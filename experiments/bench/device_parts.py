"""What `mhc bench device` measures: functions to time, and what each computes and moves at the least."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mhc_jax import cost
from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config, build_optimizer
from mhc_jax.constraints import CONSTRAINTS
from mhc_jax.data import BYTES
from mhc_jax.kernels import attention, boundary, lanes
from mhc_jax.kernels.choice import Chip
from mhc_jax.layers.attention import causal_mask, formula
from mhc_jax.model_config import build_model
from mhc_jax.population import member_programs
from mhc_jax.presets import connection_spec
from mhc_jax.sharding import make_mesh
from mhc_jax.train_step import hparams_of, init_state, without_traced

from .. import quick
from .arm_steps import functions_of


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of the whole benchmark."""

  product: int  # rows and columns of the matrices whose product is timed
  copied: int  # float32 numbers of the array whose copy is timed
  tokens: int  # of boundary and constraints
  width: int  # of the boundary's streams, 4 of them
  sequences: int  # of attention
  time: int
  heads: int  # with queries and keys of 192 and values of 128 numbers
  steps: tuple[tuple[int, int, int, int], ...]  # width, depth, sequences, their length
  arms: tuple[str, ...] = ('residual', 'identity', 'hc', 'mhc')
  dtypes: tuple[str, ...] = ('bfloat16', 'float32')
  constraints: tuple[str, ...] = tuple(CONSTRAINTS)
  populations: tuple[tuple[str, int, int], ...] = (('residual', 64, 4), ('residual', 256, 4), ('mhc', 64, 4))
  members: tuple[int, ...] = (1, 4, 16, 64)
  updates: int = 16  # of all members in a dispatch


FULL = Sizes(
  product=8192,
  copied=2**28,
  tokens=8192,
  width=2560,
  sequences=4,
  time=4096,
  heads=16,
  steps=((512, 8, 32, 1024), (1024, 16, 8, 2048), (2048, 16, 4, 2048)),
)
SMALL = Sizes(
  product=256,
  copied=2**20,
  tokens=128,
  width=128,
  sequences=1,
  time=128,
  heads=1,
  steps=((32, 1, 1, 128),),
  arms=('residual', 'mhc'),
  dtypes=('float32',),
  constraints=('birkhoff_sinkhorn',),
  populations=(('residual', 32, 1),),
  members=(1, 4),
  updates=2,
)


@dataclasses.dataclass(frozen=True)
class Part:
  """One row: a function without arguments, and what a call of it moves and computes at the least."""

  names: dict[str, Any]
  build: Callable[[], Callable[[], Any]]
  flops: float = 0.0
  bytes: float = 0.0
  tokens: int = 0
  updates: int = 0  # of all members together


def limits(sizes: Sizes) -> Iterator[Part]:
  """Matrix products and a copy: what all others are measured by."""
  n = sizes.product
  for dtype in sizes.dtypes:

    def product(dtype=dtype):
      a, b = (jax.random.normal(jax.random.key(i), (n, n), dtype) for i in range(2))
      return functools.partial(jax.jit(jnp.matmul), a, b)

    yield Part({'part': 'peak', 'dtype': dtype}, product, flops=2.0 * n**3)

  def copy():
    return functools.partial(jax.jit(lambda x: x + 1), jnp.zeros(sizes.copied, jnp.float32))

  yield Part({'part': 'bandwidth', 'dtype': 'float32'}, copy, bytes=8.0 * sizes.copied)


def attentions(sizes: Sizes, chip: Chip | None) -> Iterator[Part]:
  """Forward and backward; FLOPs of the causal half, 2 products forward and 4 backward."""
  shape = sizes.sequences, sizes.time, sizes.heads
  scale, segments = 192**-0.5, jnp.zeros(shape[:2], jnp.int32)
  functions = {'xla': lambda q, k, v: formula(q, k, v, causal_mask(segments), scale)}
  if chip is not None:
    kernel = attention.triton if chip.platform == 'gpu' else attention.splash
    functions['kernel'] = lambda q, k, v: kernel(q, k, v, segments, scale, chip.platform == 'interpret')
  if chip is not None and chip.platform == 'gpu':  # for comparison: it knows no documents

    def cudnn(q, k, v):
      v = jnp.pad(v, [(0, 0)] * 3 + [(0, 64)])
      whole = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation='cudnn')
      return whole[..., :128]

    functions['cudnn'] = cudnn
  flops = 6.0 * sizes.sequences * sizes.heads * sizes.time**2 * (192 + 128) / 2
  for dtype in sizes.dtypes:
    for by, function in functions.items():

      def build(function=function, dtype=dtype):
        sizes_K = (192, 192, 128)
        arrays = [jax.random.normal(jax.random.key(i), (*shape, k), dtype) for i, k in enumerate(sizes_K)]
        return functools.partial(jax.jit(with_pull(function)), *arrays)

      yield Part({'part': 'attention', 'by': by, 'dtype': dtype}, build, flops=flops)


def with_pull(function: Callable) -> Callable:
  """function's value and the gradients of its outputs' sum by all arguments."""

  def run(*arguments):
    value, pull = jax.vjp(function, *arguments)
    return value, pull(jax.tree.map(jnp.ones_like, value))

  return run


def boundaries(sizes: Sizes, chip: Chip | None) -> Iterator[Part]:
  """mHC's write, generation and read between two sublayers, 4 streams."""
  spec, n, width, tokens = connection_spec('mhc', streams=4), 4, sizes.width, (1, sizes.tokens)

  def by_definition(params, *pending):
    return hc.boundary(params, boundary.definition(boundary.Pending(*pending), spec), spec)

  functions = {'xla': by_definition}
  if chip is not None:
    functions['kernel'] = lambda params, *pending: boundary.boundary(
      params, boundary.Pending(*pending), spec, jnp.int32(0), chip
    )
  for dtype in sizes.dtypes:
    said = None if chip is None else boundary.why_not(spec, width, sizes.tokens, jnp.dtype(dtype), chip)
    for by, function in functions.items():
      for what, units in (('forward', 2 * n + 2), ('forward_backward', 5 * n + 5)):

        def build(function=function, dtype=dtype, what=what, said=said if by == 'kernel' else None):
          if said is not None:
            raise NotImplementedError(said)
          params = hc.init_params(jax.random.key(0), spec, width, 0)
          keys = jax.random.split(jax.random.key(1), 3)
          arrays = [
            jax.random.normal(key, s, dtype) for key, s in zip(keys, _shapes(n, tokens, width), strict=False)
          ]
          mix = jax.random.uniform(keys[2], (n + n * n, *tokens), jnp.float32)
          run = function if what == 'forward' else with_pull(function)
          return functools.partial(jax.jit(run), params, *arrays, mix)

        moved = units * sizes.tokens * width * jnp.dtype(dtype).itemsize
        yield Part({'part': f'boundary {what}', 'by': by, 'dtype': dtype}, build, bytes=float(moved))


def _shapes(n: int, tokens: tuple[int, int], width: int) -> tuple[tuple[int, ...], ...]:
  return (n, *tokens, width), (*tokens, width)


def constraints(sizes: Sizes, chip: Chip | None) -> Iterator[Part]:
  """Each constraint's matrix and its vjp at n = 4, float32."""
  for name in sizes.constraints:
    constraint = CONSTRAINTS[name]()
    if not constraint.num_coordinates(4):
      continue
    functions = {'xla': functools.partial(constraint.matrix, n=4)}
    if chip is not None:
      functions['kernel'] = functools.partial(lanes.matrix_kernel, constraint, n=4, platform=chip.platform)
    for by, function in functions.items():

      def build(function=function, constraint=constraint):
        shape = constraint.num_coordinates(4), 1, sizes.tokens
        coords = jax.random.normal(jax.random.key(0), shape)
        return functools.partial(jax.jit(with_pull(lambda coords: function(coords))), coords)

      yield Part({'part': 'constraint', 'constraint': name, 'by': by, 'dtype': 'float32'}, build)


def steps(sizes: Sizes, chip: Chip | None) -> Iterator[Part]:
  """train_step of every arm, FLOPs by cost.py; float32 at the first size alone."""
  programs_of = {'xla': 'xla'} if chip is None else {'xla': 'xla', 'kernel': 'pallas'}
  kinds = itertools.product(sizes.steps, sizes.dtypes, programs_of, sizes.arms)
  for (width, depth, batch, time), dtype, by, arm in kinds:
    if dtype == 'float32' and width != sizes.steps[0][0]:
      continue
    c = base_config()
    c.model.update({'width': width, 'depth': depth, 'heads': max(1, width // 128), 'dtype': dtype})
    c.model.kernels, c.model.connection.name = programs_of[by], arm
    c.data.batch_size, c.data.seq_len, c.optimizer.warmup_fraction = batch, time, 0.05
    names = {'part': 'step', 'arm': arm, 'by': by, 'width': width, 'depth': depth, 'dtype': dtype}
    flops = cost.train_flops_per_token(build_model(c), time) * batch * time
    build = functools.partial(lambda c: functions_of(c)['step'], c)
    yield Part(names, build, flops=flops, tokens=batch * time)


def populations(sizes: Sizes) -> Iterator[Part]:
  """Runs of experiments/quick.py's kind as members of one program: several updates of all a dispatch."""
  for arm, width, depth in sizes.populations:
    for members in sizes.members:
      c = quick.config(arm, width, depth, seed=0)
      names = {'part': 'population', 'arm': arm, 'width': width, 'depth': depth, 'dtype': c.model.dtype}
      tokens = c.data.batch_size * c.data.seq_len * members * sizes.updates
      flops = cost.train_flops_per_token(build_model(c), c.data.seq_len) * tokens
      build = functools.partial(_population, c, members, sizes.updates)
      counts = {'flops': flops, 'tokens': tokens, 'updates': members * sizes.updates}
      yield Part(names | {'members': members}, build, **counts)


def _population(c, members: int, updates: int) -> Callable[[], Any]:
  model, optimizer, mesh = build_model(c), without_traced(build_optimizer(c)), make_mesh({})
  together = member_programs(model, optimizer, mesh, BYTES.bos, True, members, updates)
  init = functools.partial(init_state, model=model, optimizer=optimizer)
  shape = updates, members, c.data.batch_size, c.data.seq_len + 1
  window_KPBS = jax.random.randint(jax.random.key(1), shape, 0, BYTES.bos)
  hparams = jax.tree.map(jnp.asarray, hparams_of(build_optimizer(c), 1000))
  if members == 1:
    state, window = jax.jit(init)(jax.random.key(0)), window_KPBS[:, 0]
  else:
    state, window = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), members)), window_KPBS
    hparams = {name: jnp.full(members, value) for name, value in hparams.items()}

  def run() -> Any:
    nonlocal state
    state, metrics = together.advance(state, window, hparams, jnp.int32(updates))
    return metrics

  return run
