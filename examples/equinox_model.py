"""The connection in a model of Equinox: bfloat16 over a mesh, H_res by a kernel where an accelerator is."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import P

from mhc_jax import hyper_connection as hc
from mhc_jax.kernels import choice, lanes
from mhc_jax.presets import connection_spec

SPEC, WIDTH, DEPTH, VOCAB = connection_spec('mhc', streams=4), 64, 2, 64
SPLIT = hc.Coefficients(P(None, 'data'), P(None, 'data'), P(None, None, 'data'))  # their batch, over devices


class Model(eqx.Module):
  table: jax.Array
  maps: jax.Array
  connections: list[dict[str, jax.Array]]

  def __init__(self, key):
    self.table = jax.random.normal(key, (VOCAB, WIDTH))
    self.maps = jax.random.normal(key, (DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
    self.connections = [hc.init_params(key, SPEC, WIDTH, sublayer=i) for i in range(DEPTH)]

  def __call__(self, tokens_BT, mesh, dtype=jnp.bfloat16):
    matrix = lanes.kernel_for(SPEC.constraint, SPEC.streams, choice.chip_of('auto', mesh))
    own = lambda params, x_NBTD: hc.generate(params, x_NBTD, SPEC, matrix=matrix)  # of a device's tokens
    specs = {'in_specs': (P(), P(None, 'data')), 'out_specs': SPLIT, 'check_vma': False}
    x_NBTD = hc.expand(self.table[tokens_BT].astype(dtype), SPEC.streams)
    for params, map_DD in zip(self.connections, self.maps.astype(dtype), strict=True):
      c = jax.shard_map(own, mesh=mesh, **specs)(params, x_NBTD)
      y_BTD = jax.nn.gelu(hc.read(c.pre_NBT, x_NBTD)) @ map_DD  # your sublayer
      x_NBTD = hc.write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD)
    return hc.collapse(x_NBTD, 'mean').astype(jnp.float32) @ self.table.T / WIDTH


@eqx.filter_jit
def step(model, tokens_BT, mesh):  # of gradient descent; the next token is one more
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda model: cross_entropy(model(tokens_BT, mesh), tokens_BT + 1).mean()
  return jax.tree.map(lambda w, g: w - 0.5 * g, model, eqx.filter_grad(loss)(model)), loss(model)


if __name__ == '__main__':
  mesh, model = jax.sharding.Mesh(jax.devices(), ('data',)), Model(jax.random.key(0))
  tokens_BT = jax.device_put(jnp.tile(jnp.arange(16), (4 * mesh.size, 1)), jax.NamedSharding(mesh, P('data')))
  for _ in range(20):
    model, value = step(model, tokens_BT, mesh)
    print(f'loss {value:.3f}')
