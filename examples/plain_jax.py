"""The connection in a model of plain JAX: bfloat16 over a mesh, H_res by a kernel where an accelerator is."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import P

from mhc_jax import hyper_connection as hc
from mhc_jax.kernels import choice, lanes
from mhc_jax.presets import connection_spec

SPEC, WIDTH, DEPTH, VOCAB = connection_spec('mhc', streams=4), 64, 2, 64
SPLIT = hc.Coefficients(P(None, 'data'), P(None, 'data'), P(None, None, 'data'))  # their batch, over devices


def init(key):
  connections = [hc.init_params(key, SPEC, WIDTH, sublayer=i) for i in range(DEPTH)]
  maps = jax.random.normal(key, (DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
  return {'table': jax.random.normal(key, (VOCAB, WIDTH)), 'maps': maps, 'connections': connections}


def forward(params, tokens_BT, mesh, dtype=jnp.bfloat16):
  matrix = lanes.kernel_for(SPEC.constraint, SPEC.streams, choice.chip_of('auto', mesh))
  own = lambda params, x_NBTD: hc.generate(params, x_NBTD, SPEC, matrix=matrix)  # of a device's tokens
  specs = {'in_specs': (P(), P(None, 'data')), 'out_specs': SPLIT, 'check_vma': False}
  x_NBTD = hc.expand(params['table'][tokens_BT].astype(dtype), SPEC.streams)
  for connection, map_DD in zip(params['connections'], params['maps'].astype(dtype), strict=True):
    c = jax.shard_map(own, mesh=mesh, **specs)(connection, x_NBTD)
    y_BTD = jax.nn.gelu(hc.read(c.pre_NBT, x_NBTD)) @ map_DD  # your sublayer
    x_NBTD = hc.write(c.res_NMBT, c.post_NBT, x_NBTD, y_BTD)
  return hc.collapse(x_NBTD, 'mean').astype(jnp.float32) @ params['table'].T / WIDTH


@functools.partial(jax.jit, static_argnums=2)
def step(params, tokens_BT, mesh):  # of gradient descent; the next token is one more
  cross_entropy = optax.softmax_cross_entropy_with_integer_labels
  loss = lambda params: cross_entropy(forward(params, tokens_BT, mesh), tokens_BT + 1).mean()
  value, grads = jax.value_and_grad(loss)(params)
  return jax.tree.map(lambda w, g: w - 0.5 * g, params, grads), value


if __name__ == '__main__':
  mesh, params = jax.sharding.Mesh(jax.devices(), ('data',)), init(jax.random.key(0))
  tokens_BT = jax.device_put(jnp.tile(jnp.arange(16), (4 * mesh.size, 1)), jax.NamedSharding(mesh, P('data')))
  for _ in range(20):
    params, value = step(params, tokens_BT, mesh)
    print(f'loss {value:.3f}')
