"""The connection in a model of Flax NNX: bfloat16 over a mesh, H_res by a kernel where an accelerator is."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import P

from mhc_jax import hyper_connection as hc
from mhc_jax.kernels import choice, lanes
from mhc_jax.presets import connection_spec

SPEC, WIDTH, DEPTH, VOCAB = connection_spec('mhc', streams=4), 64, 2, 64
SPLIT = hc.Coefficients(P(None, 'data'), P(None, 'data'), P(None, None, 'data'))  # their batch, over devices


class Model(nnx.Module):
  def __init__(self, rngs, dtype=jnp.bfloat16):
    start = [hc.init_params(rngs.params(), SPEC, WIDTH, sublayer=i) for i in range(DEPTH)]
    self.connections = nnx.List([nnx.Dict(jax.tree.map(nnx.Param, params)) for params in start])
    self.maps = nnx.List([nnx.Linear(WIDTH, WIDTH, dtype=dtype, rngs=rngs) for _ in range(DEPTH)])
    self.table = nnx.Embed(VOCAB, WIDTH, dtype=dtype, rngs=rngs)

  def __call__(self, tokens_BT, mesh):
    matrix = lanes.kernel_for(SPEC.constraint, SPEC.streams, choice.chip_of('auto', mesh))
    own = lambda params, x_NBTD: hc.generate(params, x_NBTD, SPEC, matrix=matrix)  # of a device's tokens
    specs = {'in_specs': (P(), P(None, 'data')), 'out_specs': SPLIT, 'check_vma': False}
    x_NBTD = hc.expand(self.table(tokens_BT), SPEC.streams)
    for connection, map_ in zip(self.connections, self.maps, strict=True):
      params = {name: param[...] for name, param in connection.items()}
      c = jax.shard_map(own, mesh=mesh, **specs)(params, x_NBTD)
      y_BTD = map_(nnx.gelu(hc.read(c.pre_NBT, x_NBTD)))  # your sublayer
      x_NBTD = hc.write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD)
    return self.table.attend(hc.collapse(x_NBTD, 'mean')).astype(jnp.float32)


@nnx.jit(static_argnums=2)
def step(model, tokens_BT, mesh):  # of gradient descent; the next token is one more
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda model: cross_entropy(model(tokens_BT, mesh), tokens_BT + 1).mean()
  value, grads = nnx.value_and_grad(loss)(model)
  nnx.update(model, jax.tree.map(lambda w, g: w - 0.5 * g, nnx.state(model, nnx.Param), grads))
  return value


if __name__ == '__main__':
  mesh, model = jax.sharding.Mesh(jax.devices(), ('data',)), Model(nnx.Rngs(0))
  tokens_BT = jax.device_put(jnp.tile(jnp.arange(16), (4 * mesh.size, 1)), jax.NamedSharding(mesh, P('data')))
  for _ in range(20):
    print(f'loss {step(model, tokens_BT, mesh):.3f}')
