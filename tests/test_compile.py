"""Counting in HLO text, and the arithmetic of predictions."""

import dataclasses
import functools
import itertools
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.compiled import volume
from experiments.compile.chips import link_seconds
from experiments.compile.hlo_cost import Body, Count, Done, Operation, count
from experiments.compile.hlo_text import Shape, parse_module, replica_group, trip_count
from experiments.compile.report import changes
from experiments.compile.step_time import check_products, predict, speed
from experiments.compile.tpu import group_sides
from mhc_jax.chips import CHIPS
from mhc_jax.config import base_config
from mhc_jax.errors import ConfigError
from mhc_jax.model import Transformer
from mhc_jax.model_config import build_model

# What the TPU's compiler makes of a scan of six residual products on v5p:4x4x4, weights split 16-fold; names
# shortened and attributes left out.
TPU = parse_module((pathlib.Path(__file__).parent / 'data' / 'tpu.hlo').read_text())


def config(**mesh):
  c = base_config()
  c.model.update({'width': 16, 'depth': 2, 'heads': 2, 'scan_unroll': 1})
  c.model.connection.update({'name': 'residual', 'streams': 2})
  c.data.update({'seq_len': 8, 'batch_size': 8})
  c.optimizer.warmup_steps, c.duration.steps = 1, 2
  c.mesh.update(mesh)
  return c


@functools.cache
def compiled(arm, scan):
  """(the count, XLA's own) of a small model's gradient, blocks in a scan or unrolled."""
  c = config()
  c.model.scan, c.model.depth, c.model.connection.name = scan, 4, arm
  model, tokens = dataclasses.replace(build_model(c), vocab_size=16), jnp.zeros((2, 8), jnp.int32)
  params = jax.eval_shape(Transformer(model).init, jax.random.key(0), tokens, tokens)['params']

  def loss(params):
    return jnp.mean(jax.nn.logsumexp(Transformer(model).apply({'params': params}, tokens, tokens)[0], -1))

  program = jax.jit(jax.grad(loss)).lower(params).compile()
  return count(parse_module(program.as_text())), program.cost_analysis()


@pytest.mark.slow
@pytest.mark.parametrize('arm', ('residual', 'mhc'))
def test_a_scan_counts_as_its_unrolled_model(arm):
  """mhc has loops within the loop: Sinkhorn's. Beyond products, a scan adds its own slices and counters."""
  scan, loop = compiled(arm, True)[0], compiled(arm, False)[0]
  # The unrolled compiler drops the first block's unused parts of the streams' gradient.
  assert scan.total('matmul_flops') == pytest.approx(loop.total('matmul_flops'), rel=5e-3)
  assert scan.flops == pytest.approx(loop.flops, rel=0.02)
  assert not scan.unknown_loops and not loop.unknown_loops and not loop.custom_calls
  xla = compiled(arm, True)[1]['flops']
  assert xla < 0.5 * scan.flops, 'XLA counts the loops: this file has no purpose any more'


def test_the_count_is_xlas_where_there_are_no_loops():
  """Rest: what XLA counts for operations such as gathers, and bytes of slices inside fusions."""
  found, xla = compiled('residual', False)
  assert found.flops == pytest.approx(xla['flops'], rel=2e-3)
  assert found.total('bytes') == pytest.approx(xla['bytes accessed'], rel=0.02)


def test_a_tpu_program_with_tiles_memory_spaces_and_a_loop():
  found = count(TPU)
  rows = {row.name: row for row in found.operations}
  mb = 2**20
  assert {name: row.bytes for name, row in rows.items()} == {
    'dynamic-slice_fusion.2': mb / 8
    + 4,  # reads a 64th of the stack and the index; the result is on the chip
    'all-gather.3': 2 * mb,  # from the chip to memory
    'copy-start.2': 2 * mb,  # from memory to the chip
    'fusion.16': 4 * mb,  # weights in and x out; x was on the chip
    'dynamic-update-slice_fusion.2': 4 * mb + 4,  # the stack is updated in place
    'add.24': 12,
  }
  assert all(row.times == 6 for row in found.operations) and not found.unknown_loops
  assert found.total('matmul_flops') == 6 * 2 * 1024**3
  assert rows['fusion.16'].vector_flops == 4 * 1024**2  # three conversions and an addition
  gather = rows['all-gather.3']
  assert (gather.collective, gather.payload, gather.group) == ('all-gather', 2 * mb, tuple(range(16)))
  assert (gather.source, rows['fusion.16'].cycles) == ('model.py:49', 14796)


# Products as a TPU's compiler writes them, with the 20 heads as a window: shapes, attributes, FLOPs.
CONVOLUTIONS = {
  'width to heads': (
    'bf16[4096,2560,1] bf16[20,128,2560] bf16[4096,20,128]',
    'window={size=20 pad=19_19 rhs_reversal=1}, dim_labels=bf0_0oi->b0f',
    2 * 4096 * 2560 * 20 * 128,
  ),
  'each head by itself': (
    'bf16[20,4096,128] bf16[20,128,512] bf16[20,4096,512]',
    'window={size=20 stride=19 lhs_dilate=20}, dim_labels=0bf_0io->0bf',
    2 * 20 * 4096 * 128 * 512,
  ),
  'heads summed': (
    'bf16[4096,20,128] bf16[128,20,2560] bf16[2560,4096,1]',
    'window={size=20}, dim_labels=b0f_i0o->fb0',
    2 * 4096 * 20 * 128 * 2560,
  ),
  'a plain product': ('f32[8,32] f32[16,32] f32[8,16]', 'dim_labels=bf_oi->bf', 2 * 8 * 32 * 16),
}


@pytest.mark.parametrize('name', CONVOLUTIONS)
def test_products_written_as_convolutions_count_without_their_padding(name):
  shapes, attributes, flops = CONVOLUTIONS[name]
  left, right, out = shapes.split()
  found = count(
    parse_module(
      f'ENTRY %main (a: {left}, b: {right}) -> {out} {{\n'
      f'  %a = {left} parameter(0)\n  %b = {right} parameter(1)\n'
      f'  ROOT %c = {out} convolution(%a, %b), {attributes}, operand_precision={{high,high}}\n}}'
    )
  )
  assert found.total('matmul_flops') == flops
  passes = 3 if left.startswith('f32') else 1  # of bfloat16 products in a float32 product
  assert found.total('matmul_passes') == passes * flops


GROUPS = {
  'replica_groups={{0,1},{2,3}}': [0, 1],
  'source_target_pairs={{0,3},{1,2}}': [0, 3],
  'replica_groups=[4,2]<=[8]': [0, 1],
  'replica_groups=[4,2]<=[2,4]T(1,0)': [0, 4],
  "replica_groups=mesh['a'=2,'b'=4] {'a'}": [0, 4],
  "replica_groups=mesh['a'=2,'b'=4] {'a','b'}": list(range(8)),
  "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}": [0, 1, 2, 3],
  "replica_groups=mesh['a'=8] {'a':(2)2}": [0, 2],
  'channel_id=1': [],
}


@pytest.mark.parametrize('text', GROUPS)
def test_the_first_group_of_every_notation(text):
  line = (
    f'  %p = f32[8] parameter(0)\n  ROOT %x = f32[8]{{0}} all-reduce(%p), {text}, metadata={{op_name="x"}}'
  )
  module = parse_module(f'ENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}')
  np.testing.assert_array_equal(replica_group(module.computations['main'].root), GROUPS[text])


KERNEL = """\
HloModule m, is_scheduled=true, frontend_attributes={note="one (
two"}

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%q)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %k = (f32[8]{0}, f32[8]{0}) custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={k={
"xprof_metadata":"{\\"block_q\\": 512, calls=%none, )]}"
}}, metadata={op_name="a/pallas_call"}, backend_config={"body":"x
}
}}","cost_estimate":{"flops":"640","transcendentals":"0","bytes_accessed":"96"}}
  %e = f32[8]{0} get-tuple-element(%k), index=1, frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}
  ROOT %b = f32[8]{0} fusion(%e), kind=kLoop, calls=%fused
}
"""


def test_instructions_may_span_lines_and_strings_hold_anything():
  """As the custom call of JAX's splash attention does; the lines after it were once dropped."""
  module = parse_module(KERNEL)
  main = module.computations['main'].instructions
  assert list(main) == ['p', 'k', 'e', 'b'] and module.scheduled
  assert main['k'].called == () and main['k'].op_name == 'a/pallas_call'
  assert [row.name for row in count(module).operations] == ['k', 'b']
  assert count(module).flops == 640 + 8


UNREAD = {
  'a stray line': ('  ROOT %b', 'and this\n  ROOT %b', 'no instruction'),
  'no opcode': ('negate(%q)', '', 'without an opcode'),
  'no end': ('calls=%fused\n}', 'calls=%fused', 'has no end'),
  'an open bracket': ('kind=kLoop', 'kind=kLoop, x={', 'has no end'),
  'an open string': ('kind=kLoop', 'kind="kLoop', 'unbalanced'),
  'a closing bracket': ('kind=kLoop', 'kind=kLoop}', 'unbalanced'),
  'no such computation': ('calls=%fused', 'calls=%gone', 'gone, which is not there'),
  'no such operand': ('fusion(%e)', 'fusion(%gone)', 'gone, which is not there'),
  'a line outside': ('ENTRY', '  %x = f32[] constant(0)\nENTRY', 'outside every computation'),
  'no entry': ('ENTRY ', '', 'no ENTRY'),
}


@pytest.mark.parametrize('name', UNREAD)
def test_what_cannot_be_read_is_an_error(name):
  old, new, words = UNREAD[name]
  assert KERNEL.count(old) == 1
  with pytest.raises(ValueError, match=words):
    parse_module(KERNEL.replace(old, new))


def test_bytes_include_the_padding_of_tiles():
  assert Shape('bf16', (4, 10), '1,0:T(8,128)(2,1)').bytes == 8 * 128 * 2
  assert Shape('f32', (10, 4, 300), '0,2,1:T(8,128)').bytes == 4 * 304 * 128 * 4  # 10 is minor, 300 next
  assert Shape('f32', (10, 4), '1,0').bytes == 160 and Shape('pred', (3,), '').bytes == 3
  assert Shape('f32', (), ':T(128)S(6)').bytes == 4 and Shape('s4', (16,), '0').bytes == 8
  assert Shape('bf16', (8,), '0:T(128)S(1)').on_chip and not Shape('bf16', (8,), '0:T(128)').on_chip


def operation(**fields):
  zero = dict.fromkeys(('matmul_flops', 'matmul_passes', 'vector_flops', 'bytes', 'payload'), 0.0)
  names = {'name': 'x', 'opcode': 'fusion', 'op_name': 'a/b', 'source': 'model.py:3', 'cycles': None}
  return Operation(**{**names, **zero, 'times': 1, 'collective': None, 'arrays': (), 'group': (), **fields})


def counted(rows):
  """A count of these operations, each in a loop of its own."""
  return Count(Body(1, [Body(row.times, [row]) for row in rows]), [], {})


def test_a_step_is_the_sum_of_what_limits_each_operation():
  chip = CHIPS['v5p']
  found = counted(
    [
      operation(times=3, matmul_flops=459e12, matmul_passes=459e12, bytes=2765e7),  # 1 s, memory 0.01 s
      operation(times=2, bytes=2765e9, source='generator.py:1'),  # 1 s
      # 8 chips along one wrapped axis, 200 GB/s: 7/8 of the payload.
      operation(collective='all-gather', payload=400e9, group=tuple(range(8)), bytes=2765e6),
    ]
  )
  predicted = predict(found, chip, lambda operation: [(8, True)] if operation.group else [])
  seconds = predicted['seconds']
  assert seconds['step'] == pytest.approx(3 + 2 + 1.75)
  assert seconds['without_collectives'] == pytest.approx(3 + 2 + 0.001)
  assert seconds['collectives'] == pytest.approx(1.75)
  assert seconds['roofline'] == pytest.approx(3) and seconds['all_bytes'] == pytest.approx(2.031)
  assert [row['limit'] for row in predicted['costliest']] == ['compute', 'memory', 'links']
  assert predicted['costliest'][0]['share'] == pytest.approx(3 / 6.75)
  assert predicted['parts']['generator.py']['seconds'] == pytest.approx(2)
  assert predicted['collectives']['all-gather']['bytes'] == 400e9
  assert seconds['serial'] == pytest.approx(seconds['step'])
  # 1e12 FLOPs a token, 1000 tokens in 2 s on 2 chips.
  assert speed(2.0, 1000, {'causal': 1e12, 'full': 2e12}, 2, chip) == {
    'tokens_per_second': 500,
    'mfu': pytest.approx(1e15 / (4 * 459e12)),
    'mfu_full': pytest.approx(2e15 / (4 * 459e12)),
  }


ONE_SECOND = {'collective': 'all-gather', 'group': tuple(range(8)), 'payload': 8 / 7 * 200e9}  # on the links
WINDOWS = {  # a body's items -> seconds, of operations of 1 s (w: 3 s) and collectives of 1 s
  'synchronous': (['c', 's', 'c'], 3),
  'hidden by what is between': (['a', 'c', 'a.', 'c'], 2),
  'not by what comes after': (['a', 'a.', 'c'], 2),
  'the links do one at a time': (['a', 'b', 'c', 'a.', 'b.'], 2),
  'and enough to hide both': (['a', 'b', 'w', 'a.', 'b.'], 3),
  'a synchronous one waits for the links': (['a', 's', 'c', 'a.'], 3),
  'what is not waited for ends in its body': (['c', 'a'], 2),
  'a loop inside a window': (['a', ['c', 'c'], 'a.'], 4),
  'a loop with collectives waits for the links': (['a', ['s'], 'a.'], 3),
}


@pytest.mark.parametrize('name', WINDOWS)
def test_collectives_overlap_what_is_between_their_start_and_end(name):
  """Loops inside run twice."""

  def body(items, times):
    return Body(times, [item_of(item) for item in items])

  def item_of(item):
    if isinstance(item, list):
      return body(item, 2)
    if item.endswith('.'):
      return Done(item[0])
    if item in 'cw':
      return operation(bytes=2765e9 * (3 if item == 'w' else 1))
    return operation(**ONE_SECOND, window=None if item == 's' else item)

  items, seconds = WINDOWS[name]
  found = Count(body(items, 1), [], {})
  predicted = predict(found, CHIPS['v5p'], lambda operation: [(8, True)] if operation.group else [])
  assert predicted['seconds']['step'] == pytest.approx(seconds)


def test_more_than_a_chip_can_do_is_an_error():
  """As a program that was not read whole gave: 0.010 s a step and an MFU of 7,138 %."""
  with pytest.raises(ConfigError, match=r'MFU is 108\.9 %'):
    speed(1.0, 1000, {'causal': 5e11, 'full': 1e12}, 1, CHIPS['v5p'])
  unknown = speed(1.0, 1000, {'causal': 5e11, 'full': 1e12}, 1, CHIPS['v5p'], counted=False)
  assert unknown == {'tokens_per_second': 1000, 'mfu': None, 'mfu_full': None}
  found = dataclasses.replace(counted([operation(times=2, matmul_flops=5.0)]), custom_calls={'splash': 3})
  check_products(found, 10.0)
  with pytest.raises(ConfigError, match=r'counted 10 FLOPs .* own 11 .* FLOPs not counted in splash'):
    check_products(found, 11.0)


@pytest.mark.parametrize(
  'op_name,inside',
  (
    ('jit(step)/jvp(Transformer)/layers/attention/attention_scores/btgrk,bsgk->bgrts/dot_general', True),
    ('jit(step)/transpose(jvp(Transformer))/checkpoint/rematted_computation/attention_scores/dot', True),
    ('jit(step)/transpose(jvp(attention_scores))/dot_general', True),
    ('jit(step)/layers/attention/query/dot_general', False),
    ('jit(step)/no_attention_scores_here/mul', False),
    ('', False),
  ),
)
def test_a_part_is_what_is_in_its_scope_whatever_jax_made_of_it(op_name, inside):
  """Forward, transposed and recomputed; the source file does not matter."""
  found = counted([operation(op_name=op_name, bytes=2765e9, times=2), operation(op_name='other')])
  scopes = predict(found, CHIPS['v5p'], lambda _: ())['scopes']
  wanted = (
    {'seconds': 2.0, 'flops': 0.0, 'hbm_bytes': 2 * 2765e9}
    if inside
    else dict.fromkeys(scopes['routed_experts'], 0)
  )
  assert scopes['attention_scores'] == pytest.approx(wanted)


def test_half_a_chip_has_half_its_rates():
  found = counted([operation(bytes=7380e9)])
  assert predict(found, CHIPS['7x'], lambda _: ())['seconds']['step'] == pytest.approx(2)


COLLECTIVES = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]) parameter(0)
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %fused = f32[4,8]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next = (s32[], f32[4,8]) tuple(%p, %fused)
}

%all-reduce-scatter.1 (q: f32[8,8]) -> f32[4,8] {
  %q = f32[8,8]{1,0:T(8,128)} parameter(0)
  %all = f32[8,8]{1,0:T(8,128)} all-reduce(%q), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  %at = s32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all, %at, %at), dynamic_slice_sizes={4,8}
}

%part_of_async (r: bf16[2,8]) -> bf16[4,8] {
  %r = bf16[2,8]{1,0} parameter(0)
  ROOT %piece = bf16[4,8]{1,0} all-gather(%r), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%until (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x0: f32[4,8], y0: bf16[2,8]) -> f32[4,8] {
  %x0 = f32[4,8]{1,0} parameter(0)
  %y0 = bf16[2,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[4,8]) tuple(%zero, %x0)
  %w1 = (s32[], f32[4,8]) while(%t), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %w2 = (s32[], f32[4,8]) while(%t), condition=%until, body=%body
  %begin = bf16[4,8]{1,0} fusion(%y0), kind=kCustom, calls=%part_of_async
  %end = bf16[4,8]{1,0} fusion(%y0), kind=kCustom, calls=%part_of_async
  %go = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%x0), channel_id=4, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a', 'b':(1)2}, dimensions={0}
  %stop = f32[16,8]{1,0} all-gather-done(%go)
  ROOT %both = (f32[4,8]{1,0}, /*index=1*/bf16[2,8]{1,0}) all-reduce(%x0, %y0), channel_id=5, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
  """Trip counts noted and not, parts of one channel in two fusions, a TPU's reduce-scatter."""
  found = {}
  for row in count(parse_module(COLLECTIVES)).operations:
    if row.collective:
      what = (row.collective, len(row.group), row.arrays, row.payload)
      found[what] = found.get(what, 0) + row.times
  assert found == {
    ('all-gather', 2, (32,), 64): 1,
    ('all-gather', 2, (64,), 256): 3 + 5,
    ('all-gather', 4, (128,), 512): 1,
    ('all-reduce', 8, (32, 16), 160): 1,
    ('reduce-scatter', 2, (64,), 4096): 8,  # with the padding of its tile
  }
  windows = {row.name: row.window for row in count(parse_module(COLLECTIVES)).operations if row.window}
  assert windows == {'begin': 'begin', 'go': 'go'}
  entry = count(parse_module(COLLECTIVES)).body.items
  places = [item.window if isinstance(item, Done) else getattr(item, 'name', 'loop') for item in entry]
  assert places == ['loop', 'loop', 'begin', 'end', 'begin', 'go', 'go', 'both']
  assert volume(COLLECTIVES)['all-gather'] == {'count': 10, 'bytes': 64 + 8 * 256 + 512}


ENDS = {  # the condition of a loop, and the computation that it may have in a fusion -> trips
  'a constant beside the fusion': ('fusion(%i, %limit)', 's32[] parameter(1)', 'LT', 9),
  'a constant inside': ('fusion(%i)', 's32[] constant(7)', 'LT', 7),
  'no constant': ('fusion(%i, %i)', 's32[] parameter(1)', 'LT', None),
  'counted down': ('fusion(%i)', 's32[] constant(7)', 'GT', None),
}


@pytest.mark.parametrize('name', ENDS)
def test_a_loop_whose_comparison_is_in_a_fusion_ends_at_its_constant(name):
  """As XLA:CPU writes conditions."""
  root, other, direction, trips = ENDS[name]
  module = parse_module(f"""\
%compared (a: s32[], b: s32[]) -> pred[] {{
  %a = s32[] parameter(0)
  %b = {other}
  ROOT %less = pred[] compare(%a, %b), direction={direction}
}}

%until (p: (s32[])) -> pred[] {{
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %limit = s32[] constant(9)
  ROOT %wrapped = pred[] {root}, kind=kLoop, calls=%compared
}}

%body (q: (s32[])) -> (s32[]) {{
  %q = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %next = s32[] add(%j, %j)
  ROOT %r = (s32[]) tuple(%next)
}}

ENTRY %main (x: (s32[])) -> (s32[]) {{
  %x = (s32[]) parameter(0)
  ROOT %loop = (s32[]) while(%x), condition=%until, body=%body
}}
""")
  assert trip_count(module, module.computations['main'].root) == trips
  counted = count(module)
  assert [row.times for row in counted.operations] == [trips or 1]
  assert counted.unknown_loops == ([] if trips else ['loop'])


def test_what_is_updated_in_place_counts_its_update():
  """A scatter reads and writes the rows that it adds to; so does a part of a fusion with several results."""
  module = parse_module("""\
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%two (whole: f32[64,8], row: f32[1,8], at: s32[], other: f32[8]) -> (f32[512], f32[8]) {
  %whole = f32[64,8]{1,0} parameter(0)
  %row = f32[1,8]{1,0} parameter(1)
  %at = s32[] parameter(2)
  %other = f32[8]{0} parameter(3)
  %updated = f32[64,8]{1,0} dynamic-update-slice(%whole, %row, %at, %at)
  %flat = f32[512]{0} bitcast(%updated)
  %negative = f32[8]{0} negate(%other)
  ROOT %both = (f32[512]{0}, f32[8]{0}) tuple(%flat, %negative)
}

ENTRY %main (w: f32[64,8], i: s32[4,1], u: f32[4,8], r: f32[1,8], k: s32[], o: f32[8]) -> f32[64,8] {
  %w = f32[64,8]{1,0} parameter(0)
  %i = s32[4,1]{1,0} parameter(1)
  %u = f32[4,8]{1,0} parameter(2)
  %r = f32[1,8]{1,0} parameter(3)
  %k = s32[] parameter(4)
  %o = f32[8]{0} parameter(5)
  %fused = (f32[512]{0}, f32[8]{0}) fusion(%w, %r, %k, %o), kind=kLoop, calls=%two
  ROOT %scattered = f32[64,8]{1,0} scatter(%w, %i, %u), to_apply=%add
}
""")
  row = 8 * 4  # bytes
  assert {operation.name: operation.bytes for operation in count(module).operations} == {
    'fused': (row + 4 + row) + (row + row),  # row, index and the other in; the row and the other out
    'scattered': 3 * 4 * row + 4 * 4,  # four rows read, added to and written, and four indices
  }


LINKS = {  # kind, chips along each axis of v5p (100 GB/s per link and direction) -> seconds for 800 GB
  ('all-gather', (8, 1, 1)): 3.5,
  ('all-gather', (2, 1, 1)): 4,  # a line: one link
  ('all-gather', (4, 1, 1)): 6,
  ('all-gather', (8, 8, 1)): 800 * 63 / 64 / 400,
  ('reduce-scatter', (8, 1, 1)): 3.5,
  ('all-reduce', (8, 1, 1)): 7,
  ('all-to-all', (8, 1, 1)): 8,
  ('collective-permute', (2, 1, 1)): 8,
  (None, (8, 1, 1)): 0,
}


@pytest.mark.parametrize('case', LINKS)
def test_collectives_take_the_links_that_their_group_has(case):
  kind, sides = case
  group = tuple(range(int(np.prod(sides))))
  found = operation(collective=kind, payload=800e9, group=group)
  rings = [(side, side == 8) for side in sides]
  assert link_seconds(found, CHIPS['v5p'], rings) == pytest.approx(LINKS[case])


SWITCHED = {  # kind, members on a host of H100 (450 GB/s, 50 GB/s beyond), hosts -> seconds for 800 GB
  ('all-gather', 8, 1): 800 * 7 / 8 / 450,
  ('all-gather', 8, 2): max(800 * 15 / 16 / 450, 800 / 2 / (8 * 50)),
  ('all-reduce', 1, 8): 2 * 800 * 7 / 8 / 50,
  ('collective-permute', 4, 2): 800 / 50,
  ('collective-permute', 2, 1): 800 / 450,
}


@pytest.mark.parametrize('case', SWITCHED)
def test_gpus_have_a_switch_and_a_port_each(case):
  kind, members, hosts = case
  found = operation(collective=kind, payload=800e9, group=tuple(range(members * hosts)))
  sides = [(members, False), (hosts, False)]
  assert link_seconds(found, CHIPS['H100'], sides) == pytest.approx(SWITCHED[case])


def test_a_group_is_a_ring_where_it_fills_an_axis_that_wraps():
  """4x8x2: groups along the first axis; along every second chip of the second; of one device."""
  coords = list(itertools.product(range(4), range(8), range(2)))
  devices = np.array([types.SimpleNamespace(coords=place) for place in coords], object)
  sides = group_sides(types.SimpleNamespace(devices=devices), CHIPS['v5p'])
  groups = {
    tuple(range(0, 64, 16)): [(4, True), (1, False), (1, False)],
    (0, 4, 8, 12): [(1, False), (4, False), (1, False)],
    tuple(range(64)): [(4, True), (8, True), (2, False)],
    (): [(1, False)] * 3,
  }
  for group, wanted in groups.items():
    assert sides(operation(group=group)) == wanted


def test_what_does_not_fit_says_what_to_change():
  c = base_config()
  c.mesh.fsdp, c.data.batch_size = 4, 8
  arguments = {'params': 30, 'optimizer': 60, 'batch': 1}
  lines = changes(c, arguments, 100.0)
  assert 'remat=layer' in lines[0] and '90 %' in lines[1] and 'fsdp (now 4)' in lines[1]
  assert lines[2].startswith('2 sequences') and 'optimizer.microbatches' in lines[2]
  assert 'dtype=bfloat16' in lines[3] and len(lines) == 5
  c.model.remat, c.model.dtype, c.mesh.tensor, c.optimizer.microbatches = 'layer', 'bfloat16', 2, 2
  small = changes(c, {**arguments, 'params': 1, 'optimizer': 2}, 100.0)
  assert 'tensor (now 2)' in small[0] and len(small) == 2
