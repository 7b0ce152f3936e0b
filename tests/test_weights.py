"""Open weights: names, folds and refusals, by plain numpy written from the published models."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mhc_jax import hyper_connection as hc
from mhc_jax.config_file import parse
from mhc_jax.errors import ConfigError
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model
from mhc_jax.presets import PRESETS
from mhc_jax.weights.layouts import CLASSES, choose, config_of, fields_of, settled
from mhc_jax.weights.tensors import flat, parameters_of, published

MLA = ('mla.kv_rank=6', 'mla.head_dim=6', 'mla.rope_dim=4', 'mla.value_dim=5')
QUERIES = (*MLA, 'mla.q_rank=7')
MOE = (*MLA, 'moe.experts=4', 'moe.active=2', 'moe.shared=2')
RESIDUAL = 'connection.name=residual'


def model_of(*overrides, base=None):
  """A tiny model; base: (width, depth) of the transfer."""
  sizes = ('width=16', 'depth=3', 'heads=4', 'vocab_size=270')
  names = [f'--config.model.{name}' for name in (*sizes, *overrides)]
  width, depth = base or (None, None)
  return build_model(
    parse(
      'laptop:smoke',
      [*names, f'--config.transfer.base_width={width}', f'--config.transfer.base_depth={depth}'],
    )
  )


@functools.cache
def shapes_of(model):
  tokens = jnp.zeros((1, 2), jnp.int32)
  return jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens, tokens)['params']


def random_params(model, rng):
  """Every parameter, norms and biases too, away from its start."""
  return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes_of(model))


def logits_of(model, params, tokens_BT):
  apply = jax.jit(lambda params, tokens: Transformer(model).apply({'params': params}, tokens, tokens * 0)[0])
  return np.asarray(apply(params, tokens_BT))


# The published models, for one sequence, in numpy: t are tensors, c is config.json.


def rms(x, weight, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotated(x_TK, theta):
  half = x_TK.shape[-1] // 2
  angle = np.arange(len(x_TK))[:, None] * theta ** (-np.arange(half) / half)
  turned = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * angle)
  return np.concatenate([turned.real, turned.imag], -1)


def attend(q_TK, k_TK, v_TK):
  scores = q_TK @ k_TK.T / np.sqrt(q_TK.shape[1])
  scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True) @ v_TK


def grouped(t, c, at, x):
  """Llama: rotary embedding of whole heads, keys and values shared by groups of queries."""
  heads, groups, theta = (
    c['num_attention_heads'],
    c['num_key_value_heads'],
    c['rope_parameters']['rope_theta'],
  )
  q, k, v = (x @ t[f'{at}.{name}_proj.weight'].T for name in 'qkv')
  q, k, v = np.split(q, heads, 1), np.split(k, groups, 1), np.split(v, groups, 1)
  outs = [
    attend(rotated(q[head], theta), rotated(k[head * groups // heads], theta), v[head * groups // heads])
    for head in range(heads)
  ]
  return np.concatenate(outs, 1) @ t[f'{at}.o_proj.weight'].T


def latent(t, c, at, x):
  """DeepSeek-V2 (2405.04434): keys and values from a normed latent, one rotary key for all heads."""
  heads, nope, theta = c['num_attention_heads'], c['qk_nope_head_dim'], c['rope_parameters']['rope_theta']
  down = x @ t[f'{at}.kv_a_proj_with_mqa.weight'].T
  rank = c['kv_lora_rank']
  if c['q_lora_rank'] is None:
    q = x @ t[f'{at}.q_proj.weight'].T
  else:
    q = (
      rms(x @ t[f'{at}.q_a_proj.weight'].T, t[f'{at}.q_a_layernorm.weight'], 1e-6)
      @ t[f'{at}.q_b_proj.weight'].T
    )
  normed = rms(down[:, :rank], t[f'{at}.kv_a_layernorm.weight'], 1e-6)
  key = rotated(down[:, rank:], theta)
  q = np.split(q, heads, 1)
  kv = np.split(normed @ t[f'{at}.kv_b_proj.weight'].T, heads, 1)
  outs = []
  for q_TK, kv_TK in zip(q, kv, strict=True):
    q_TK = np.concatenate([q_TK[:, :nope], rotated(q_TK[:, nope:], theta)], 1)
    outs.append(attend(q_TK, np.concatenate([kv_TK[:, :nope], key], 1), kv_TK[:, nope:]))
  return np.concatenate(outs, 1) @ t[f'{at}.o_proj.weight'].T


def swiglu(t, at, x):
  gate = x @ t[f'{at}.gate_proj.weight'].T
  return (gate / (1 + np.exp(-gate)) * (x @ t[f'{at}.up_proj.weight'].T)) @ t[f'{at}.down_proj.weight'].T


def mixture(t, c, at, x):
  """DeepSeek-V3 (2412.19437, section 2.1.2), one group of experts."""
  scores = 1 / (1 + np.exp(-x @ t[f'{at}.gate.weight'].T))
  biased, y = scores + t[f'{at}.gate.e_score_correction_bias'], swiglu(t, f'{at}.shared_experts', x)
  for token in range(len(x)):
    chosen = np.argsort(-biased[token])[: c['num_experts_per_tok']]
    for expert in chosen:
      weight = c['routed_scaling_factor'] * scores[token, expert] / scores[token, chosen].sum()
      y[token] += weight * swiglu(t, f'{at}.experts.{expert}', x[token])
  return y


def forward(t, c, tokens_T):
  x, eps = t['model.embed_tokens.weight'][tokens_T], c['rms_norm_eps']
  for layer in range(c['num_hidden_layers']):
    at = f'model.layers.{layer}'
    attention = grouped if c['model_type'] == 'llama' else latent
    x = x + attention(t, c, f'{at}.self_attn', rms(x, t[f'{at}.input_layernorm.weight'], eps))
    normed = rms(x, t[f'{at}.post_attention_layernorm.weight'], eps)
    dense = c['model_type'] == 'llama' or layer < c['first_k_dense_replace']
    x = x + (swiglu(t, f'{at}.mlp', normed) if dense else mixture(t, c, f'{at}.mlp', normed))
  return rms(x, t['model.norm.weight'], eps) @ t['lm_head.weight'].T


CASES = {
  'llama': ((RESIDUAL, 'kv_heads=2'), None),
  'llama with transfer': ((RESIDUAL, 'kv_heads=2'), (8, 2)),
  'deepseek_v3': ((RESIDUAL, *MOE), None),
  'deepseek_v3 with transfer': ((RESIDUAL, *MOE, 'scan=False'), (8, 2)),
  'deepseek_v3, dense': ((RESIDUAL, *QUERIES), (8, 2)),
}


@pytest.mark.parametrize('case', CASES)
def test_published_tensors_are_the_model_of_the_class(x64, rng, case):
  """Logits of ours are those of the published formulas on the published tensors: 1e-12 relative."""
  overrides, base = CASES[case]
  model = model_of('dtype=float64', *overrides, base=base)
  params, tokens_BT = random_params(model, rng), rng.integers(0, 270, (1, 9))
  layout = choose(None, model)
  assert layout == case.split()[0].rstrip(',')
  assert base is None or (model.width_ratio, model.depth_ratio) == (2, 1.5)
  config = json.loads(json.dumps(config_of(layout, model, 64, 256, 'float64')))
  expected = forward(published(params, model, folded=True), config, tokens_BT[0])
  ours = logits_of(model, params, tokens_BT)[0]
  assert np.abs(ours).max() > 0.1 and np.ptp(ours) > 0.1
  np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * np.abs(ours).max())


@pytest.mark.parametrize(
  'overrides',
  [(f'connection.name={name}', f'connection.preset={p}') for name in PRESETS for p in PRESETS[name]]
  + [
    ('connection.rank=3', *MOE),
    ('connection.rank=3', 'connection.generator=cp', 'scan=False'),
    ('connection.constraint=orthogonal_cayley', 'connection.expansion=learned'),
    ('connection.preset=deepseek_v4', *MOE, 'dense_layers=2', 'moe.router=sinkhorn'),
    (RESIDUAL, 'weights.rank=3'),
    (RESIDUAL, 'sparse.kind=topk', 'sparse.topk=4'),
    (*QUERIES, 'sparse.kind=topk', 'sparse.topk=4', 'sparse.window=2'),
  ],
  ids=' '.join,
)
def test_every_model_comes_back_as_it_was(rng, overrides):
  """Every number, in float32, through the table and back; no two parameters under one name."""
  model = model_of(*overrides)
  params = random_params(model, rng)
  tensors = published(params, model, folded=False)
  assert sum(x.size for x in tensors.values()) == sum(x.size for x in jax.tree.leaves(params))
  assert all(x.flags.c_contiguous for x in tensors.values())
  back = parameters_of(tensors, shapes_of(model), model)
  jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize('transpose', (True, False))
def test_connections_have_the_names_and_layout_of_deepseek_v4(x64, rng, transpose):
  """mHC of V4's code, numpy, on the published tensors: rows pre | post | res, comb applied transposed."""
  model = model_of(
    'dtype=float64',
    'connection.preset=deepseek_v4',
    f'connection.constraint_params.transpose={transpose}',
  )
  params, n, layer = random_params(model, rng), 4, 1
  t = published(params, model, folded=False)
  x_NBTD = rng.standard_normal((n, 1, 3, 16))
  at, x = f'model.layers.{layer}.hc_ffn', x_NBTD[:, 0].transpose(1, 0, 2)
  flat_x = x.reshape(3, -1)
  mixes = flat_x / np.sqrt((flat_x**2).mean(-1, keepdims=True) + 1e-6) @ t[f'{at}_fn'].T
  scale, base = t[f'{at}_scale'], t[f'{at}_base']
  pre = 1 / (1 + np.exp(-(mixes[:, :n] * scale[0] + base[:n]))) + 1e-6
  post = 2 / (1 + np.exp(-(mixes[:, n : 2 * n] * scale[1] + base[n : 2 * n])))
  comb = (mixes[:, 2 * n :] * scale[2] + base[2 * n :]).reshape(-1, n, n)
  comb = np.exp(comb - comb.max(-1, keepdims=True))
  comb = comb / comb.sum(-1, keepdims=True) + 1e-6
  comb = comb / (comb.sum(1, keepdims=True) + 1e-6)
  for _ in range(19):
    comb = comb / (comb.sum(2, keepdims=True) + 1e-6)
    comb = comb / (comb.sum(1, keepdims=True) + 1e-6)
  own = jax.tree.map(lambda leaf: leaf[layer], params['layers']['feed_forward_connection'])
  found = hc.generate(own, jnp.asarray(x_NBTD), model.connection, 0)
  close = dict(rtol=0, atol=1e-12)
  np.testing.assert_allclose(found.pre_NBT[:, 0].T, pre, **close)
  np.testing.assert_allclose(found.post_NBT[:, 0].T, post, **close)
  np.testing.assert_allclose(found.res_NMBT[:, :, 0].transpose(2, 1, 0), comb, **close)
  assert t['hc_head_fn'].shape == (n, n * 16) and t['hc_head_scale'].shape == (1,)


NOT_OF_CLASS = {
  ('llama', ()): r'its connection, of 4 stream\(s\), is not the residual',
  ('llama', ('connection.name=hc', 'connection.streams=1')): r'of 1 stream\(s\), is not the residual',
  ('llama', (RESIDUAL, 'connection.write_scale=0.5')): 'is not the residual',
  ('llama', (RESIDUAL, *MLA)): 'latent attention',
  ('llama', (RESIDUAL, 'moe.experts=4')): 'latent attention or experts',
  ('llama', (RESIDUAL, 'weights.rank=3')): 'weights_rank=3',
  ('llama', (RESIDUAL, 'sparse.kind=window', 'sparse.window=4')): 'sparse is nothing that the class computes',
  ('deepseek_v3', (RESIDUAL, *QUERIES, 'sparse.kind=topk', 'sparse.topk=4')): 'sparse is nothing',
  ('deepseek_v3', (RESIDUAL,)): 'not latent',
  ('deepseek_v3', (RESIDUAL, *MLA, 'norm_eps=1e-5')): 'norm_eps=1e-05',
  ('deepseek_v3', (RESIDUAL, *MOE, 'moe.shared=0')): 'a shared one',
  ('deepseek_v3', (RESIDUAL, *MOE, 'moe.router=sinkhorn')): 'router=sinkhorn',
}


@pytest.mark.parametrize(('layout', 'overrides'), NOT_OF_CLASS)
def test_what_the_class_does_not_compute_is_refused_in_one_line(layout, overrides):
  model = model_of(*overrides)
  with pytest.raises(ConfigError, match=NOT_OF_CLASS[layout, overrides]) as refused:
    choose(layout, model)
  assert CLASSES[layout] in str(refused.value) and choose(None, model) != layout


def test_further_tokens_have_no_published_names():
  with pytest.raises(ConfigError, match=r'model.mtp.depth: the module .* has no published names'):
    choose(None, model_of('mtp.depth=1'))


def test_a_parameter_without_a_published_name_is_refused(rng):
  """Nothing is left out without a word."""
  model = model_of()
  params = random_params(model, rng)
  params['layers']['attention']['sink'] = np.zeros((3, 4))
  with pytest.raises(ConfigError, match='layers/attention/sink has no published name'):
    published(params, model, folded=False)
  tensors = published(random_params(model, rng), model, folded=False)
  like, lost = shapes_of(model), tensors | {'model.layers.0.self_attn.sinks': np.zeros(4)}
  with pytest.raises(ConfigError, match=r'has also the tensor model.layers.0.self_attn.sinks'):
    parameters_of(lost, like, model)
  lost = {name: x for name, x in tensors.items() if 'hc_attn_base' not in name}
  with pytest.raises(ConfigError, match=r'lacks the tensor model.layers.0.hc_attn_base and 2 more'):
    parameters_of(lost, like, model)
  with pytest.raises(
    ConfigError, match=r'lm_head.weight has the shape \[16, 270\], the model needs \[270, 16\]'
  ):
    parameters_of(tensors | {'lm_head.weight': np.zeros((16, 270), np.float32)}, like, model)


def said(layout):
  overrides = (RESIDUAL, 'kv_heads=2') if layout == 'llama' else (RESIDUAL, *MOE, *QUERIES)
  return config_of(layout, model_of(*overrides), 64, 256, 'float32')


@pytest.mark.parametrize('layout', ('llama', 'deepseek_v3'))
def test_config_json_comes_back_as_the_model(layout):
  fields = fields_of(json.loads(json.dumps(said(layout))))
  model = model_of(RESIDUAL, *(f'{name}={value}' for name, value in fields.items()))
  assert model == model_of(RESIDUAL, *(('kv_heads=2',) if layout == 'llama' else (*MOE, *QUERIES)))


@pytest.mark.parametrize(
  ('layout', 'change', 'words'),
  [
    ('llama', {'model_type': 'deepseek_v4'}, "model_type 'deepseek_v4': read are llama, deepseek_v3"),
    ('llama', {'model_type': 'mistral', 'sliding_window': 4096}, "model_type 'mistral'"),
    ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, 'rope_scaling='),
    ('llama', {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}}, 'rope_parameters='),
    ('llama', {'sliding_window': 128}, 'sliding_window=128, which is not computed here'),
    ('llama', {'attention_bias': True}, 'attention_bias=True'),
    ('llama', {'mlp_bias': True}, 'mlp_bias=True'),
    ('llama', {'hidden_act': 'gelu'}, 'hidden_act=gelu'),
    ('llama', {'head_dim': 8}, 'head_dim=8 is not'),
    ('llama', {'quantization_config': {'bits': 4}}, 'quantization_config='),
    ('llama', {'hidden_size': '16'}, "hidden_size='16' is no whole number"),
    ('deepseek_v3', {'q_lora_rank': 'x'}, "q_lora_rank='x' is no whole number"),
    ('deepseek_v3', {'n_group': 2}, 'n_group=2'),
    ('deepseek_v3', {'norm_topk_prob': False}, 'norm_topk_prob=False'),
    ('deepseek_v3', {'scoring_func': 'softmax'}, 'scoring_func=softmax'),
    ('deepseek_v3', {'rms_norm_eps': 1e-5}, 'rms_norm_eps=1e-05'),
  ],
)
def test_what_a_config_json_says_and_is_not_computed_is_refused(layout, change, words):
  with pytest.raises(ConfigError, match=words) as refused:
    fields_of(said(layout) | change)
  assert '\n' not in str(refused.value)


def test_rotary_pairs_of_neighbours_and_tied_heads_are_settled_exactly(rng):
  """Interleaved (V3's default): neighbours turn as pairs; the same numbers, half a head apart, are ours."""
  model = model_of(RESIDUAL, *MOE, *QUERIES)
  config = said('deepseek_v3')
  tensors = published(random_params(model, rng), model, folded=False)
  together = dict(tensors)
  for layer in range(3):
    for name, groups in (('q_b_proj', 4), ('kv_a_proj_with_mqa', 1)):
      key = f'model.layers.{layer}.self_attn.{name}.weight'
      rows = np.split(tensors[key], groups)
      for index, part in enumerate(rows):
        first, second = np.split(part[-4:], 2)
        rows[index] = np.concatenate([part[:-4], np.stack([first, second], 1).reshape(4, -1)])
      together[key] = np.concatenate(rows)
      assert not np.array_equal(together[key], tensors[key])
  for change in ({'rope_interleave': True}, {}):
    stated = {name: x for name, x in config.items() if name != 'rope_interleave'} | change
    jax.tree.map(np.testing.assert_array_equal, settled(together, stated), tensors)
  jax.tree.map(np.testing.assert_array_equal, settled(tensors, config), tensors)
  tied = {name: x for name, x in tensors.items() if name != 'lm_head.weight'}
  found = settled(tied, config | {'tie_word_embeddings': True})
  np.testing.assert_array_equal(found['lm_head.weight'], tensors['model.embed_tokens.weight'])
  with pytest.raises(ConfigError, match=r'ties lm_head.weight to an embedding that it differs from'):
    settled(tensors, config | {'tie_word_embeddings': True})
  assert flat({'a': {'b': 1}}) == {'a/b': 1}
