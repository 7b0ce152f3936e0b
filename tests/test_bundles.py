"""Cycles of TPU kernels from their static schedule."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.compile import __main__ as compile_command
from experiments.compile import bundles, tpu
from experiments.compile.hlo_cost import count
from experiments.compile.hlo_text import parse_module

# As libtpu writes it, shortened: a grid of 4 steps (6 with the pipeline's stages) around a loop of 8.
# Comments span lines; branches back have delay slots.
SCHEDULE = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s2 = sld [smem:[#allocation0]] }
   0x1   :  { %12 = sbr.rel (%p323_p0) target = $region4 } /* Start region 94 */
   0x2 LB: > { %s3 = sadd.s32 4294967295, %s5 /* iteration index, stage = 1 */ }
   0x3   : > { %s4 = sadd.s32 4294967294, %s5 /* iteration index, stage = 2 */
iteration_bounds: (2, 2)
 */ }
   0x4 LB: >> { %s6 = sadd.s32 1, %s7 } /* Start region 83 :: Start region 37 */
   0x5   : >> { %p173_p8 = scmp.ge.s32.totalorder (%p9_p1), %s6, 8 /* loop exit test */ }
   0x6   : >> { %175 = sbr.rel (!%p173_p8) target = $region83 }
   0x7   : >> { %205 = vst [vmem:[%s204_s23] sm:$0xff] } /* End region 83 :: End region 37 */
   0x8   : > { %p21_p9 = scmp.ge.s32.totalorder %s24_s14, 6 /* loop exit test */ }
   0x9   : > { %23 = sbr.rel (!%p21_p9) target = $region94 }
   0xa   :  {} /* End region 94 */
   0xb   :  {}
   0xc PF:  {} /* exit bundle */
"""


def test_loops_run_as_often_as_their_exit_tests_say():
  inner, outer = 4 * 8, 6  # bundles of the inner loop and those of the outer one alone
  assert bundles.cycles(SCHEDULE) == 1 + 4 * (1 + outer - 1 + inner) + 2


@pytest.mark.parametrize(
  'text,words',
  (('', 'no bundles'), (SCHEDULE.replace(' /* loop exit test */', '', 1), 'does not say how often it runs')),
)
def test_what_cannot_be_known_is_an_error(text, words):
  with pytest.raises(ValueError, match=words):
    bundles.cycles(text)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
def test_a_kernel_compiled_for_a_chip_that_is_not_there(capsys):
  """Kernels of the rows that sum to 1: cycles of both ways, and the traffic of inputs and outputs."""
  arguments = ['--kernels', '--only=row_stochastic', '--tokens=2048', '--width=256', '--json']
  assert compile_command.main(arguments) == 0
  found = json.loads(capsys.readouterr().out)['row_stochastic']
  assert len(found['kernels']) == 2 and found['bytes'] > 0
  assert all(0 < kernel['cycles'] < 20_000 for kernel in found['kernels'].values())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('libtpu') is None, reason='needs libtpu')
def test_a_real_program_with_splash_attention_is_read_whole():
  """Its kernels' metadata has lines that begin with braces; without an estimate they are named."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  device = tpu.described_devices('v5p:2x2x1')[0]
  where = NamedSharding(Mesh(np.array([device]), ('d',)), P())
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((256, 256))])

  def loss(q_HTK):
    kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
    return jnp.sum(jnp.sin(kernel(q_HTK, q_HTK, q_HTK).astype(jnp.float32)))

  q_HTK = jax.ShapeDtypeStruct((1, 256, 128), jnp.bfloat16, sharding=where)
  text = jax.jit(jax.grad(loss)).lower(q_HTK).compile().as_text()
  module = parse_module(text)
  assert any(line.startswith('}}') for line in text.splitlines()), 'nothing is tested here any more'
  found = count(module)
  # Every line that is an instruction is one: names in the text are unique within a computation.
  lines = sum(re.match(r'\s+(ROOT )?%\S+ = ', line) is not None for line in text.splitlines())
  assert sum(len(computation.instructions) for computation in module.computations.values()) == lines
  assert len(found.custom_calls) >= 2 and found.total('matmul_flops') == 0
