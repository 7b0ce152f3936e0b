"""What the four models of the paper have in common (arXiv 2512.24880, Table 5). No config by itself.

All: 1 leading dense layer of 8 times the expert's width, then experts (6 of the routed and 2 shared ones per
token); latent attention of KV rank 512 with heads of 128 + 64 rotary dimensions; sequences of 4096 tokens;
AdamW, step schedule, 2000 updates of warmup; n = 4 streams. Where the table is silent: queries of full rank,
DeepSeek-V3's scale 2.5 of the routed experts, bias rate 1e-3 (arXiv 2408.15664), gradients clipped to norm 1,
start values of variance 1 / fan-in.

No mesh here has an `expert` axis. A device sees 16,000 tokens or more of a step, and gathering the weights of
a layer's experts over fsdp moves no more bytes than gathering the tokens of 8 devices would; and all rows of
the experts' buffers are in use, where 8 shards need buffers of 8 times the mean load to drop no token.

The paper's corpus and tokenizer are not public. Bytes take 257 of the 129280 rows of the vocabulary, which
has the paper's size so that shapes and costs are the paper's; any corpus of enough tokens does, by
--config.data.name, and C4 has enough for all but the trillion tokens.
"""

from ml_collections import ConfigDict

from mhc_jax.config import base_config

ARMS = ('residual', 'hc', 'mhc')


def paper_config(
  arg: str | None,
  *,
  width: int,
  depth: int,
  heads: int,
  experts: int,
  expert_width: int,
  batch_size: int,
  steps: int,
  lr: float,
  topology: str,
  mesh: dict[str, int],
) -> ConfigDict:
  """The locked config of one model; arg is its connection, None for mhc. ValueError for another one."""
  if arg not in (None, '', *ARMS):
    raise ValueError(f'the argument must be one of {", ".join(ARMS)}, got {arg!r}')
  c = base_config()
  c.model.connection.name = arg or 'mhc'
  c.model.update({'width': width, 'depth': depth, 'heads': heads, 'vocab_size': 129280})
  c.model.mla.update({'kv_rank': 512, 'head_dim': 128, 'rope_dim': 64, 'value_dim': 128})
  c.model.moe.update({'experts': experts, 'active': 6, 'shared': 2, 'ffn_width': expert_width})
  c.model.update({'dense_layers': 1, 'ffn_width': 8 * expert_width, 'norm_eps': 1e-20})
  c.model.update({'dtype': 'bfloat16', 'remat': 'products', 'scan_unroll': 1})
  c.data.update({'name': 'c4/en', 'seq_len': 4096, 'batch_size': batch_size})
  c.optimizer.update({'lr': lr, 'eps': 1e-20, 'schedule': 'step', 'warmup_steps': 2000})
  c.duration.steps = steps
  c.evaluation.update({'every_steps': 1000, 'sequences': 1024, 'batch_size': 512})
  c.log.diagnostics_every_steps = 1000
  c.checkpoint.every_steps = 1000
  c.topology = topology
  c.mesh.update(mesh)
  return c.lock()
