"""examples/: the connection in other people's models, against the definition; sharded, bfloat16, a kernel."""

import importlib.util
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mhc_jax import hyper_connection as hc
from mhc_jax.kernels import choice, lanes
from mhc_jax.kernels.choice import Chip

EXAMPLES = Path(__file__).parent.parent / 'examples'
NAMES = tuple(sorted(path.stem for path in EXAMPLES.glob('*.py')))


def load(name):
  """The file as a module; skips where its framework is not installed."""
  if name == 'equinox_model':
    pytest.importorskip('equinox')
  spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def model_of(name, module, dtype):
  """(forward(tokens, mesh), the connections, function of sublayer i, embedding, what divides the logits)."""
  key, rng = jax.random.key(0), np.random.default_rng(0)
  if name == 'flax_nnx':
    model = module.Model(nnx.Rngs(0), dtype)
    for layer in model.connections:
      layer['b_res'][...] = coordinates(rng)
    connections = [{k: v[...] for k, v in layer.items()} for layer in model.connections]
    return model, connections, lambda i, h: model.maps[i](nnx.gelu(h)), model.table.embedding[...], 1
  if name == 'equinox_model':
    model = module.Model(key)
    connections, table = model.connections, model.table
    forward = lambda tokens, mesh: model(tokens, mesh, dtype)  # noqa: E731
    branch = lambda i, h: jax.nn.gelu(h) @ model.maps[i]  # noqa: E731
  else:
    params = module.init(key)
    connections, table = params['connections'], params['table']
    forward = lambda tokens, mesh: module.forward(params, tokens, mesh, dtype)  # noqa: E731
    branch = lambda i, h: jax.nn.gelu(h) @ params['maps'][i]  # noqa: E731
  for layer in connections:
    layer['b_res'] = coordinates(rng)
  return forward, connections, branch, table, module.WIDTH


def coordinates(rng):
  """Of an H_res that is far from symmetric."""
  return jnp.asarray(2 * rng.standard_normal(16), jnp.float32)


def by_definition(module, connections, branch, table, scale, tokens_BT):
  """The same model by the paper's formulas, in NumPy but for coefficients and F."""
  x_NBTD = np.stack([np.asarray(table)[tokens_BT]] * module.SPEC.streams)
  for i, params in enumerate(connections):
    pre, post, res = map(np.asarray, hc.generate(params, jnp.asarray(x_NBTD), module.SPEC))
    assert np.abs(res - res.swapaxes(0, 1)).max() > 0.3
    y_BTD = np.asarray(branch(i, jnp.asarray(np.einsum('nbt,nbtd->btd', pre, x_NBTD))))
    x_NBTD = np.einsum('nmbt,mbtd->nbtd', res, x_NBTD) + post[..., None] * y_BTD
  return x_NBTD.mean(0) @ np.asarray(table).T / scale


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'kernel'), [*((name, False) for name in NAMES), ('plain_jax', True)])
def test_it_is_the_definition(name, kernel, monkeypatch):
  """In float32, over two devices, with an H_res whose transpose is another; by the TPU's kernel, too."""
  module, by_kernel = load(name), []
  # The first sublayer mixes equal streams, and the last is followed by their mean: neither shows H_res.
  monkeypatch.setattr(module, 'DEPTH', 3)
  if kernel:
    monkeypatch.setattr(choice, 'chip_of', lambda *_: Chip('tpu', interpret=True))
    run = lanes.matrix_kernel
    counted = lambda *args, **how: by_kernel.append(how) or run(*args, **how)  # noqa: E731
    monkeypatch.setattr(lanes, 'matrix_kernel', counted)
  forward, *rest = model_of(name, module, jnp.float32)
  mesh = jax.sharding.Mesh(jax.devices()[:2], ('data',))
  tokens_BT = jax.device_put(jnp.arange(32).reshape(4, 8), jax.NamedSharding(mesh, jax.P('data')))
  logits_BTV = jax.jit(forward, static_argnums=1)(tokens_BT, mesh)
  assert logits_BTV.sharding.spec[0] == 'data'
  assert len(by_kernel) == module.DEPTH * kernel
  expected = by_definition(module, *rest, np.asarray(tokens_BT))
  # Sums of 64 to 256 products of float32, three sublayers deep: some 1e-6 of the largest.
  assert np.abs(logits_BTV - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize('name', NAMES)
def test_it_learns_and_is_short(name, capsys):
  """As a program, in bfloat16 over all devices: 40 lines at most, and the loss falls."""
  module = load(name)
  assert len([line for line in Path(module.__file__).read_text().splitlines() if line.strip()]) <= 40
  runpy.run_path(module.__file__, run_name='__main__')
  first, *_, last = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
  assert last < 0.7 * first
