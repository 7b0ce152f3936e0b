"""Collectives of a program, read from made-up HLO with every form that XLA writes."""

from experiments.bench_scaling import volume
from mhc_jax.hlo import collectives

HLO = """\
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %x = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %gathered = f32[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups=[4,2]<=[8], dimensions={0}
  %fused = f32[4,8]{1,0} fusion(%gathered), kind=kCustom, calls=%all-reduce-scatter.1
}

%all-reduce-scatter.1 (q: f32[8,8]) -> f32[4,8] {
  %q = f32[8,8]{1,0:T(8,128)} parameter(0)
  %all = f32[8,8]{1,0:T(8,128)} all-reduce(%q), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all), dynamic_slice_sizes={4,8}
}

%part_of_async (r: bf16[2,8]) -> bf16[4,8] {
  %r = bf16[2,8]{1,0} parameter(0)
  ROOT %piece = bf16[4,8]{1,0} all-gather(%r), channel_id=3, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%until (p: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x0: f32[4,8], y0: bf16[2,8]) -> f32[4,8] {
  %x0 = f32[4,8]{1,0} parameter(0)
  %y0 = bf16[2,8]{1,0} parameter(1)
  %w1 = (s32[], f32[4,8]) while(%t), condition=%until, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %w2 = (s32[], f32[4,8]) while(%t), condition=%until, body=%body
  %begin = bf16[4,8]{1,0} fusion(%y0), kind=kCustom, calls=%part_of_async
  %end = bf16[4,8]{1,0} fusion(%y0), kind=kCustom, calls=%part_of_async
  %go = (f32[4,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%x0), channel_id=4, \
replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a', 'b':(1)2}, dimensions={0}
  %stop = f32[32,8]{1,0} all-gather-done(%go)
  ROOT %both = (f32[4,8]{1,0}, /*index=1*/bf16[2,8]{1,0}) all-reduce(%x0, %y0), channel_id=5, to_apply=%add
}
"""


def test_collectives_are_counted_with_their_loops():
  found = {each['kind']: [] for each in collectives(HLO)}
  for each in collectives(HLO):
    found[each.pop('kind')].append(each)
  assert found == {
    'all-gather': [
      {'bytes': 64, 'group_size': 2, 'shapes': ((4, 8),), 'count': 1},  # in two fusions, one channel
      {'bytes': 256, 'group_size': 2, 'shapes': ((8, 8),), 'count': 3 + 5},  # trips noted; of the condition
      {'bytes': 1024, 'group_size': 4, 'shapes': ((32, 8),), 'count': 1},
    ],
    'all-reduce': [{'bytes': 160, 'group_size': 0, 'shapes': ((4, 8), (2, 8)), 'count': 1}],
    'reduce-scatter': [{'bytes': 256, 'group_size': 2, 'shapes': ((8, 8),), 'count': 8}],
  }
  assert volume(HLO)['all-gather'] == {'count': 10, 'bytes': 64 + 8 * 256 + 1024}
