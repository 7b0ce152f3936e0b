"""cost.py against the real parameter tree, the real program's matrix products, and XLA's count."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mhc_jax import hyper_connection as hc
from mhc_jax.config import base_config
from mhc_jax.cost import (
  forward_flops_per_token,
  mean_keys,
  parameters,
  routed_flops_over_ideal,
  train_flops_per_token,
  train_product_flops_per_token,
)
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import PRESETS

VOCAB, B, T = 11, 2, 6

CASES = {
  **{f'{name} {preset}': {'name': name, 'preset': preset} for name in PRESETS for preset in PRESETS[name]},
  'mhc rank 2': {'name': 'mhc', 'rank': 2},
  'hc rank 1': {'name': 'hc', 'rank': 1},
  'hc without reads': {'name': 'hc', 'read_gate': 'fixed'},
  'hc mixing alone': {'name': 'hc', 'read_gate': 'fixed', 'write_gate': 'fixed'},
  'mhc cp': {'name': 'mhc', 'generator': 'cp', 'rank': 2},
  'mhc norm weight': {'name': 'mhc', 'norm_weight': True, 'expansion': 'learned'},
  'mhc static': {'name': 'mhc', 'dynamic': False},
  'mhc of 2 streams': {'name': 'mhc', 'streams': 2},
  'identity of 1 stream': {'name': 'identity', 'streams': 1},
  'mhc of 2 streams in 4 fractions': {'name': 'mhc', 'streams': 2, 'fractions': 4, 'norm_weight': True},
  'fractions by cp': {'name': 'mhc', 'fractions': 2, 'generator': 'cp', 'rank': 2, 'collapse': 'learned'},
  'factored weights': {'name': 'residual', 'weights_rank': 3},
  'grouped queries': {'name': 'mhc', 'kv_heads': 1},
  'latent attention': {
    'name': 'residual',
    'mla': {'kv_rank': 6, 'head_dim': 4, 'rope_dim': 2, 'value_dim': 3},
  },
  'fp8': {'name': 'mhc', 'precision': 'fp8_v3'},
  'a query latent': {
    'name': 'residual',
    'mla': {'kv_rank': 6, 'head_dim': 4, 'rope_dim': 2, 'value_dim': 3, 'q_rank': 5},
    'sparse': {'kind': 'topk', 'topk': 2, 'index_heads': 3, 'index_dim': 6},
  },
  'chosen tokens': {'name': 'mhc', 'kv_heads': 2, 'sparse': {'kind': 'topk', 'topk': 3}},
  'a window': {'name': 'residual', 'sparse': {'kind': 'window', 'window': 3}},
  'multi-token': {'name': 'mhc', 'preset': 'deepseek_v4', 'expansion': 'learned', 'mtp': {'depth': 1}},
  'experts': {'name': 'mhc', 'moe': {'experts': 5, 'active': 2, 'shared': 1, 'ffn_width': 7}},
}


def model(case):
  fields = dict(CASES[case])
  c = base_config()
  c.model.update(
    {'width': 16, 'depth': 3, 'heads': 4, 'ffn_width': 20, 'kv_heads': fields.pop('kv_heads', None)}
  )
  c.model.precision = fields.pop('precision', None)
  c.model.weights.rank = fields.pop('weights_rank', None)
  for section in ('mla', 'moe', 'sparse', 'mtp'):
    c.model[section].update(fields.pop(section, {}))
  c.model.connection.update(fields)
  return dataclasses.replace(build_model(c), vocab_size=VOCAB)


def abstract_inputs():
  return (jax.ShapeDtypeStruct((B, T), jnp.int32),) * 2


@functools.cache
def variables(config):
  return jax.eval_shape(Transformer(config).init, jax.random.key(0), *abstract_inputs())


def tree(config):
  """{path: size} of the real parameters."""
  leaves = jax.tree_util.tree_leaves_with_path(variables(config)['params'])
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf.size for path, leaf in leaves}


def group(name):
  """The group that a parameter belongs to, from its path alone."""
  parts = name.split('/')
  if parts[0] == 'mtp':
    return 'mtp'
  if 'connection' in name or parts[0] in ('collapse', 'expansion'):
    return 'hc_dynamic' if re.match('phi|read_', parts[-1]) else 'hc_static'
  if 'index' in parts:
    return 'index'
  if 'norm' in parts[-1]:
    return 'norm'
  expert = re.match('router|shared|expert', '/'.join(parts[2:]))
  if expert:
    return {'router': 'router', 'shared': 'shared_experts', 'expert': 'routed_experts'}[expert[0]]
  return parts[1] if parts[0].startswith('layer') else parts[0]


@pytest.mark.parametrize('case', CASES)
def test_parameters_by_group_are_those_of_the_tree(case):
  config = model(case)
  counted = dict.fromkeys(parameters(config), 0)
  for name, size in tree(config).items():
    for key in (group(name), 'total'):
      counted[key] += size
  idle = 2 * 3 * 3 * 16 * 7 if config.moe else 0  # two layers, 3 of 5 experts, 3 maps
  others = ('router', 'shared_experts', 'routed_experts') if config.moe else ()
  counted['matmul'] = sum(counted[n] for n in ('attention', 'feed_forward', 'unembedding', *others)) - idle
  counted['active'] = counted['total'] - counted.get('mtp', 0) - counted['embedding'] - idle
  counted['non_embedding'] = counted['active'] + idle - counted['unembedding']
  assert counted == parameters(config)


def matrix_products(jaxpr, times=1):
  """(equation, how often it runs) of every matrix product; bodies of scans count by their length."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ('dot_general', 'ragged_dot_general'):
      yield equation, times
    assert equation.primitive.name != 'while' or not list(inner_products(equation)), 'unknown trip count'
    inner_times = times * equation.params['length'] if equation.primitive.name == 'scan' else times
    yield from ((inner, n * inner_times) for inner, n in inner_products(equation))


def inner_products(equation):
  for value in equation.params.values():
    if hasattr(value, 'jaxpr') or hasattr(value, 'eqns'):
      yield from matrix_products(getattr(value, 'jaxpr', value))


def product_flops(equation):
  """Of a grouped product: every row meets one expert."""
  numbers = equation.params.get('dimension_numbers') or equation.params['ragged_dot_dimension_numbers']
  (contracted, _), _ = getattr(numbers, 'dot_dimension_numbers', numbers)
  left = equation.invars[0].aval.shape
  return 2 * equation.outvars[0].aval.size * math.prod(left[axis] for axis in contracted)


def forward_products(config):
  labels = abstract_inputs() if config.mtp else None  # which multi-token prediction needs
  jaxpr = jax.make_jaxpr(Transformer(config).apply)(variables(config), *abstract_inputs(), labels=labels)
  return list(matrix_products(jaxpr.jaxpr))


def product_terms(config):
  """The terms of cost.py that are matrix products, without the norms and reads inside two of them."""
  terms, spec = forward_flops_per_token(config, T), config.connection
  norms, further = 3 * spec.streams * config.width, config.mtp is not None
  if spec.read_gate.kind == 'dense':
    terms.pop('hc_generator')  # norms alone, in another number
  elif 'hc_generator' in terms:
    terms['hc_generator'] -= 2 * (config.depth + further) * spec.dynamic * norms
  if 'hc_collapse' in terms:
    terms['hc_collapse'] -= (1 + further) * (norms + 2 * spec.streams * config.width)
  names = ('unembedding', 'attention_maps', 'attention_scores', 'feed_forward')
  some = {
    'hc_generator',
    'hc_dense',
    'hc_elementwise',
    'hc_collapse',
    'router',
    'shared_experts',
    'routed_experts',
    'mtp',
  }
  some |= {'index_maps', 'index_scores'}
  return sum(terms[name] for name in (*names, *terms.keys() & some))


def constraint_products(spec):
  """FLOPs of the matrix products inside the constraint's map, per token: a part of what it states."""
  coords_K1 = jax.ShapeDtypeStruct((spec.constraint.num_coordinates(spec.units), 1), jnp.float32)
  jaxpr = jax.make_jaxpr(lambda c: spec.constraint.matrix(c, spec.units))(coords_K1)
  products = sum(times * product_flops(equation) for equation, times in matrix_products(jaxpr.jaxpr))
  assert products <= spec.constraint.flops(spec.units)
  return products


@pytest.mark.parametrize('case', CASES)
def test_flops_of_matrix_products_are_those_of_the_program(case):
  config = model(case)
  counted = sum(times * product_flops(equation) for equation, times in forward_products(config))
  inside = 2 * (config.depth + (config.mtp is not None)) * constraint_products(config.connection)
  if config.indexed:  # the loss states attention's weights again, which XLA merges (test_sparse.py)
    inside += 2 * config.depth * T * config.heads * config.head_dim
  assert counted == B * T * (product_terms(config) + inside)


def xla_flops(function, *shapes):
  return jax.jit(function).lower(*shapes).cost_analysis()['flops']


def test_xla_counts_each_matrix_product_alike():
  """Exact before optimisation and one product at a time: XLA counts the body of a loop once."""
  seen = {}
  for equation, _ in forward_products(model('mhc deepseek_v4')):
    shapes = tuple(jax.ShapeDtypeStruct(v.aval.shape, jnp.float32) for v in equation.invars)
    numbers = equation.params['dimension_numbers']
    seen[str((shapes, numbers))] = (equation, numbers, shapes)
  assert len(seen) >= 8  # kinds of products; layers share theirs
  for equation, numbers, shapes in seen.values():
    product = functools.partial(lax.dot_general, dimension_numbers=numbers)
    assert xla_flops(product, *shapes) == product_flops(equation)


def test_xla_counts_reads_and_writes_alike():
  """Up to the first addition of each sum, which multiply-adds count and XLA does not."""
  n, width = 4, 16
  config = model('mhc paper')
  terms = {k: v / (2 * config.depth) for k, v in forward_flops_per_token(config, T).items()}
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  gates, streams = shape((n, B, T)), shape((n, B, T, width))
  read = xla_flops(hc.read, gates, streams)
  assert read == B * T * (terms['hc_read'] - width)
  write = xla_flops(hc.write, shape((n, n, B, T)), gates, streams, shape((B, T, width)))
  assert write == B * T * (terms['hc_mix'] + terms['hc_write'] - n * width)


def test_buffers_that_are_not_skipped_cost_more_than_the_ideal():
  """64 experts, 6 active: devices with 8 experts take all 6 choices of every token, those with 2 take 2."""
  c = base_config()
  c.model.moe.update({'experts': 64, 'active': 6})
  ratios = [
    routed_flops_over_ideal(dataclasses.replace(build_model(c), vocab_size=VOCAB), shards)
    for shards in (1, 8, 32)
  ]
  assert ratios == [1, 8, 32 * 2 / 6]


def test_terms_of_the_connection_follow_its_parts():
  terms = {case: forward_flops_per_token(model(case), T) for case in CASES}
  assert not any(name.startswith('hc_') for name in terms['residual plain'])
  assert terms['identity sigmoid']['hc_mix'] == terms['identity sigmoid']['hc_constraint'] == 0
  assert terms['mhc static']['hc_generator'] == 0
  assert terms['mhc rank 2']['hc_generator'] < terms['mhc paper']['hc_generator']
  assert terms['mhc paper']['hc_constraint'] == 6 * 20 * 4 * 16  # 2L sublayers, 20 times 4 n^2
  for case in CASES:
    if not model(case).indexed:
      assert train_flops_per_token(model(case), T) == 3 * sum(terms[case].values())


def test_a_causal_model_needs_half_of_its_scores():
  """T + 1 of every 2 T; nothing else changes, and the products leave out the connection alone."""
  c = model('mhc paper')
  terms = forward_flops_per_token(c, T)
  scores = terms['attention_scores']
  full, causal = train_flops_per_token(c, T), train_flops_per_token(c, T, causal=True)
  assert full - causal == pytest.approx(3 * scores * (1 - (T + 1) / (2 * T)))
  connection = sum(flops for name, flops in terms.items() if name.startswith('hc_'))
  assert train_product_flops_per_token(c, T) == pytest.approx(causal - 3 * connection)
  assert connection > 0


@pytest.mark.parametrize('case,most', (('chosen tokens', 3), ('a window', 3), ('grouped queries', T)))
def test_the_ideal_counts_the_keys_that_are_attended_to(case, most):
  """Token t of a document has min(t, most) of them; of an index's scores the causal half is needed."""
  c, terms = model(case), forward_flops_per_token(model(case), T)
  keys = sum(min(t, most) for t in range(1, T + 1)) / T
  assert mean_keys(c, T) == pytest.approx(keys)
  less = 3 * terms['attention_scores'] * (1 - keys / T)
  less += 3 * terms.get('index_scores', 0) * (1 - (T + 1) / (2 * T))
  executed, ideal = train_flops_per_token(c, T), train_flops_per_token(c, T, causal=True)
  assert executed - ideal == pytest.approx(less)
  no_input = terms.get('index_maps', 0)  # has no gradient
  assert executed == pytest.approx(3 * sum(terms.values()) - no_input)
