"""The dense feed-forward sublayer: SwiGLU."""

import flax.linen as nn
import jax
from jax.sharding import Mesh

from mhc_jax.layers import fp8
from mhc_jax.layers.parts import Output, Visible, linear_of, ones, rms_norm
from mhc_jax.model_config import ModelConfig
from mhc_jax.sharding import constrain


def swiglu(
  x_BTD: jax.Array,
  width: int,
  c: ModelConfig,
  mesh: Mesh | None,
  prefix: str = '',
  measured: list[dict[str, jax.Array]] | None = None,
) -> jax.Array:
  """SwiGLU (arXiv 2002.05202) of that width; its maps belong to the calling module. measured: linear_of's."""
  linear = linear_of(c, mesh, measured)
  gate_BTF = linear((c.width, width), name=f'{prefix}gate')(x_BTD)
  up_BTF = linear((c.width, width), name=f'{prefix}up')(x_BTD)
  hidden_BTF = constrain(jax.nn.silu(gate_BTF) * up_BTF, 'BTF', mesh)
  return linear((width, c.width), gain=c.output_gain, name=f'{prefix}down')(hidden_BTF)


class FeedForward(nn.Module):
  """RMSNorm and SwiGLU: (B, T, D) -> (B, T, D)."""

  config: ModelConfig
  mesh: Mesh | None = None
  record: bool = False

  @nn.compact
  def __call__(self, x_BTD: jax.Array, seen: Visible) -> Output:
    c = self.config
    x_BTD = rms_norm(x_BTD, self.param('norm', ones, (c.width,)), c.norm_eps)
    measured = [] if self.record else None
    y_BTD = swiglu(constrain(x_BTD, 'BSD', self.mesh), c.ffn_width, c, self.mesh, measured=measured)
    return y_BTD, fp8.records(measured)
