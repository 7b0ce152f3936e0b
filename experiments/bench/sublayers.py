"""One sublayer's connection as each implementation computes it, run in that one's own environment.

`python -P sublayers.py NAME WIDTH TOKENS` compiles forward and backward, writes a line of JSON that says what
it is, and then answers every line of its input, a number of calls, with the seconds of one call. Imports of
other people's code are in functions, as no environment has all.

Every sublayer is x <- H_res x + H_post^T F(H_pre x) of 4 streams with F the identity: coefficients from the
streams, read, write, and the gradients of the streams and of all parameters for given ones of the result.
"""

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

STREAMS, ITERATIONS, EPS = 4, 20, 1e-6
SEQUENCES = 16  # that the tokens are in

Run = Callable[[], Any]


def draw(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Normal float32 numbers."""
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def of_jax(function: Callable, params: Any, x: Any, cotangent: Any) -> tuple[Run, Run]:
  """function(params, x)'s value and gradients: the timed call, and one that returns them as arrays."""
  import jax

  def value_and_gradients(params, x, cotangent):
    value, pull = jax.vjp(function, params, x)
    return value, pull(cotangent)

  compiled = jax.jit(value_and_gradients)
  arguments = jax.device_put((params, x, cotangent))

  def run():
    return jax.block_until_ready(compiled(*arguments))

  return run, lambda: [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(run())]


def of_torch(module: Any, function: Callable, width: int, tokens: int, compiled: bool) -> tuple[Run, Run]:
  """As of_jax, of function(x), which uses module's parameters."""
  import torch

  torch.set_num_threads(1)
  function = torch.compile(function) if compiled else function
  shape = SEQUENCES, tokens // SEQUENCES, STREAMS, width
  x, cotangent = torch.from_numpy(draw(shape, 0)).requires_grad_(), torch.from_numpy(draw(shape, 1))
  inputs = [x, *module.parameters()]

  def run():
    value = function(x)
    return value, *torch.autograd.grad(value, inputs, cotangent)

  return run, lambda: [leaf.detach().numpy() for leaf in run()]


def mhc_jax(width: int, tokens: int) -> tuple[Run, Run]:
  """What a Block does on CPU, with the default configuration of mhc."""
  import jax

  from mhc_jax import hyper_connection as hc
  from mhc_jax.config import base_config
  from mhc_jax.model import boundary
  from mhc_jax.model_config import build_model

  c = base_config()
  c.model.connection.name, c.model.connection.streams = 'mhc', STREAMS
  c.model.width, c.model.heads, c.model.dtype = width, max(1, width // 16), 'float32'
  model = build_model(c)
  assert model.connection.constraint.params['iterations'] == ITERATIONS

  def sublayer(params, x_NBTD):
    x_NBTD, y_BTD, own = boundary(params, hc.Pending(x_NBTD), 0, model, None, model.connection)
    return hc.write(own.res_NMBT, own.post_NBT, x_NBTD, y_BTD)

  params = hc.init_params(jax.random.key(0), model.connection, width, 0)
  shape = STREAMS, SEQUENCES, tokens // SEQUENCES, width
  return of_jax(sublayer, params, draw(shape, 0), draw(shape, 1))


def maxtext(width: int, tokens: int, lite: bool = False) -> tuple[Run, Run]:
  """maxtext.layers.mhc, called as its decoder layer does."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from maxtext.common.common_types import HyperConnectionType
  from maxtext.layers.mhc import ManifoldConstrainedHyperConnections

  config = SimpleNamespace(
    sinkhorn_iterations=ITERATIONS,
    mhc_expansion_rate=STREAMS,
    dtype=jnp.float32,
    weight_dtype=jnp.float32,
    matmul_precision='default',
    enable_mhc_lite=lite,
    normalization_layer_epsilon=EPS,
  )
  mesh = jax.make_mesh((1,), ('data',))
  layer = ManifoldConstrainedHyperConnections(config, width, mesh, nnx.Rngs(0))
  graph, params, rest = nnx.split(layer, nnx.Param, ...)

  def sublayer(params, x_BTND):
    mixed = nnx.merge(graph, params, rest)
    kind = HyperConnectionType.MLP_DENSE
    return mixed(lambda x: x, lambda inputs: inputs, x_BTND, kind)[0]

  shape = SEQUENCES, tokens // SEQUENCES, STREAMS, width
  return of_jax(sublayer, params, draw(shape, 0), draw(shape, 1))


def maxtext_lite(width: int, tokens: int) -> tuple[Run, Run]:
  """The same with a softmax over permutations in place of Sinkhorn iterations."""
  return maxtext(width, tokens, lite=True)


def tokamax(width: int, tokens: int) -> tuple[Run, Run]:
  """tokamax.mhc_pre and mhc_post, as XLA compiles them; streams must be bfloat16, parameters float32."""
  import jax.numpy as jnp
  from tokamax.ops import mhc_post, mhc_pre

  outputs = STREAMS * (STREAMS + 2)
  params = {
    'fn': draw((outputs, STREAMS * width), 2) / (STREAMS * width) ** 0.5,
    'scale': np.full(3, 0.01, np.float32),
    'base': np.zeros(outputs, np.float32),
  }

  def sublayer(params, x):
    values = params['fn'], params['scale'], params['base'], EPS, EPS, EPS, 2.0, ITERATIONS
    post, mixing, y = mhc_pre(x, *values, implementation='xla')
    return mhc_post(y, x, post, mixing, implementation='xla')

  x, cotangent = (jnp.asarray(draw((tokens, STREAMS * width), seed), jnp.bfloat16) for seed in (0, 1))
  return of_jax(sublayer, params, x, cotangent)


def transformers(width: int, tokens: int, compiled: bool = False) -> tuple[Run, Run]:
  """DeepseekV4HyperConnection, and the write as in DeepseekV4DecoderLayer."""
  import torch
  from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

  config = SimpleNamespace(
    hc_mult=STREAMS, hc_sinkhorn_iters=ITERATIONS, hc_eps=EPS, rms_norm_eps=EPS, hidden_size=width
  )
  module = DeepseekV4HyperConnection(config)
  for seed, parameter in enumerate(module.parameters()):
    parameter.data = torch.from_numpy(0.02 * draw(tuple(parameter.shape), seed))

  def sublayer(x):
    post, mixing, y = module(x)
    return post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(mixing.transpose(-1, -2), x)

  return of_torch(module, sublayer, width, tokens, compiled)


def transformers_compiled(width: int, tokens: int) -> tuple[Run, Run]:
  """The same through torch.compile."""
  return transformers(width, tokens, compiled=True)


def lucidrains(width: int, tokens: int, compiled: bool = False) -> tuple[Run, Run]:
  """hyper_connections' mHC of version 2."""
  import torch
  from hyper_connections.mHCv2 import ManifoldConstrainedHyperConnections

  module = ManifoldConstrainedHyperConnections(
    STREAMS, dim=width, branch=torch.nn.Identity(), layer_index=0, sinkhorn_iters=ITERATIONS
  )
  for seed, name in enumerate(('dynamic_alpha_fn', 'dynamic_beta_fn')):  # which start at 0
    parameter = getattr(module, name)
    parameter.data = torch.from_numpy(0.02 * draw(tuple(parameter.shape), seed))
  return of_torch(module, module, width, tokens, compiled)


def lucidrains_compiled(width: int, tokens: int) -> tuple[Run, Run]:
  """The same through torch.compile."""
  return lucidrains(width, tokens, compiled=True)


IMPLEMENTATIONS = {
  build.__name__: build
  for build in (
    mhc_jax,
    maxtext,
    maxtext_lite,
    tokamax,
    transformers,
    transformers_compiled,
    lucidrains,
    lucidrains_compiled,
  )
}


def versions() -> dict[str, str]:
  """Of what a number may depend on, where it is installed."""
  names = 'jax', 'jaxlib', 'maxtext', 'tokamax', 'torch', 'transformers', 'hyper-connections'
  found = {'python': sys.version.split()[0]}
  for name in names:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def check(arrays: list[np.ndarray]) -> None:
  """Raises AssertionError unless all numbers are finite and no gradient is all zeros."""
  for array in arrays:
    assert np.isfinite(array).all() and array.any(), f'{array.shape}: not finite, or zeros'


def serve(run: Run, questions: Any, answers: Any) -> None:
  """Answers each line, a number of calls, with the seconds of one: of this process, and by the clock."""
  for line in questions:
    calls, cpu, wall = int(line), time.process_time(), time.perf_counter()
    for _ in range(calls):
      run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps({'cpu': cpu / calls, 'wall': wall / calls}), file=answers, flush=True)


def main(name: str, width: str, tokens: str) -> None:
  """What the module says."""
  answers = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)  # what a library prints is no answer
  run, arrays = IMPLEMENTATIONS[name](int(width), int(tokens))
  began, results = time.perf_counter(), arrays()
  check(results)
  first = {'versions': versions(), 'arrays': len(results), 'first_call_s': time.perf_counter() - began}
  print(json.dumps(first), file=answers, flush=True)
  serve(run, sys.stdin, answers)


if __name__ == '__main__':
  main(*sys.argv[1:])
