"""From counted operations to a predicted step: times, collectives, memory, and what to change. Pure.

Everything here is a prediction from peak rates. An operation takes max(FLOPs / peak, bytes / bandwidth), a
collective its links' bandwidth. Operations follow each other as in the compiler's schedule, which is the
order of the text. **A collective overlaps only with what the schedule has between its start and its done**
(a -start and -done pair, or the fusions over which a TPU spreads one collective): that window takes
max(link time, time of the operations in it). Collectives share the links, one after the other. A collective
without such a window waits for the links and holds up everything; a fusion that computes and communicates
takes the larger of the two. What a loop's body starts ends within it. Memory traffic, that of collectives
too, is never overlapped with other traffic. `serial` overlaps nothing; the roofline, max(all FLOPs / peak,
all bytes / bandwidth, all link time), overlaps everything.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mhc_jax.chips import Chip
from mhc_jax.errors import require

from .chips import compute_seconds, link_seconds
from .hlo_cost import Body, Count, Done, Operation, in_scope

GIB = 2**30

# Parts of a step with a cost of their own: scopes that mhc_jax.layers name (jax.named_scope).
SCOPES = ('attention_scores', 'routed_experts')

# How far an operation's group extends along each axis of the torus, and whether as a ring.
Sides = Callable[[Operation], Sequence[tuple[int, bool]]]


def predict(counted: Count, chip: Chip, sides: Sides) -> dict[str, Any]:
  """Totals of one device, seconds of a step, collectives by kind, parts by source file and by scope, and the
  ten costliest operations.
  """
  rows = [_row(operation, chip, sides(operation)) for operation in counted.operations]
  compute = sum(row['compute_seconds'] for row in rows)
  links = sum(row['link_seconds'] for row in rows)
  peak, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
  passes = counted.total('matmul_passes') + counted.total('vector_flops')
  serial = sum(row['seconds'] for row in rows)
  return {
    'per_device': {
      'flops': counted.flops,
      'matmul_flops': counted.total('matmul_flops'),
      'vector_flops': counted.total('vector_flops'),
      'hbm_bytes': counted.total('bytes'),
      'compiler_cycles': sum(row.times * (row.cycles or 0) for row in counted.operations),
    },
    'seconds': {
      'step': body_seconds(counted.body, chip, sides)[0],
      'serial': serial,
      'without_collectives': compute,
      'collectives': links,
      'roofline': max(passes / peak, counted.total('bytes') / bandwidth, links),
      'all_flops': passes / peak,
      'all_bytes': counted.total('bytes') / bandwidth,
    },
    'collectives': _collectives(rows),
    'parts': _parts(rows),
    'scopes': {scope: _sums([row for row in rows if in_scope(row['op_name'], scope)]) for scope in SCOPES},
    'costliest': [
      {**row, 'share': row['seconds'] / serial} for row in sorted(rows, key=lambda row: -row['seconds'])[:10]
    ],
    'uncounted': {'loops': counted.unknown_loops, 'custom_calls': dict(counted.custom_calls)},
  }


def body_seconds(body: Body, chip: Chip, sides: Sides) -> tuple[float, float]:
  """(seconds, seconds in which the links work) of all executions of a body, by the rule at the top."""
  now = free = busy = 0.0  # free: when the links are
  ends: dict[str, float] = {}
  for item in body.items:
    if isinstance(item, Done):
      now = max(now, ends.pop(item.window, now))
      continue
    if isinstance(item, Body):
      seconds, links = body_seconds(item, chip, sides)
      now = (max(now, free) if links else now) + seconds
      free, busy = (now if links else free), busy + links
      continue
    seconds, links = compute_seconds(item, chip), link_seconds(item, chip, sides(item))
    busy += links
    if item.window is not None:
      free = ends[item.window] = max(now, free) + links
      now += seconds
    elif links:
      now = free = max(now, free) + max(seconds, links)
    else:
      now += seconds
  return body.times * max(now, free), body.times * busy


def _row(operation: Operation, chip: Chip, sides: Sequence[tuple[int, bool]]) -> dict[str, Any]:
  """One operation over the whole step: all of its executions."""
  times = operation.times
  compute, links = compute_seconds(operation, chip), link_seconds(operation, chip, sides)
  flops = operation.matmul_flops + operation.vector_flops
  memory = operation.bytes / (chip.bandwidth / chip.devices)
  limit = 'links' if links > compute else ('memory' if memory >= compute else 'compute')
  return {
    'name': operation.name,
    'opcode': operation.opcode,
    'source': operation.source,
    'op_name': operation.op_name,
    'times': times,
    'seconds': times * max(compute, links),
    'compute_seconds': times * compute,
    'link_seconds': times * links,
    'limit': limit,
    'flops': times * flops,
    'hbm_bytes': times * operation.bytes,
    'collective': operation.collective,
    'payload': times * operation.payload,
    'group': len(operation.group),
  }


def _collectives(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """kind -> executions, bytes of the whole arrays, seconds on the links; the largest group."""
  kinds: dict[str, dict[str, float]] = {}
  for row in rows:
    if row['collective']:
      kind = kinds.setdefault(row['collective'], {'times': 0, 'bytes': 0.0, 'seconds': 0.0, 'group': 0})
      kind['times'] += row['times']
      kind['bytes'] += row['payload']
      kind['seconds'] += row['link_seconds']
      kind['group'] = max(kind['group'], row['group'])
  return kinds


def _parts(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Source file of an operation's root -> seconds, FLOPs and bytes, the dearest first."""
  files: dict[str, list[dict[str, Any]]] = {}
  for row in rows:
    files.setdefault(row['source'].partition(':')[0] or 'unnamed', []).append(row)
  parts = {name: _sums(of_file) for name, of_file in files.items()}
  return dict(sorted(parts.items(), key=lambda item: -item[1]['seconds']))


def _sums(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
  return {key: sum((row[key] for row in rows), 0.0) for key in ('seconds', 'flops', 'hbm_bytes')}


def speed(
  seconds: float, tokens: int, flops: Mapping[str, float], chips: int, chip: Chip, counted: bool = True
) -> dict[str, float | None]:
  """Tokens per second of all chips, and MFU: a model's own FLOPs (cost.py) over what the chips could do.

  flops: per token, `causal` (of attention's scores the half that a causal kernel needs) and `full`. `mfu`
  has the causal ones and cannot exceed 1; `mfu_full` those of the laws. counted: False where a kernel's
  FLOPs are unknown: its time is, too, and there is no MFU. Raises ConfigError for an MFU over 1.
  """
  rate = {name: value * tokens / (seconds * chips * chip.flops) for name, value in flops.items()}
  require(
    not counted or rate['causal'] <= 1,
    f'predicted MFU is {100 * rate["causal"]:.4g} %: {seconds:.4g} s a step for {tokens} tokens of '
    f'{flops["causal"]:.3g} FLOPs on {chips} chips; the program was not read whole',
  )
  known = {'mfu': rate['causal'], 'mfu_full': rate['full']} if counted else {'mfu': None, 'mfu_full': None}
  return {'tokens_per_second': tokens / seconds, **known}


def check_products(counted: Count, least: float) -> None:
  """Raises ConfigError where a device's matrix products are fewer than its share of the model's, `least`."""
  found = counted.total('matmul_flops')
  without = f'; FLOPs not counted in {", ".join(counted.custom_calls)}' if counted.custom_calls else ''
  require(
    found >= least,
    f"counted {found:.4g} FLOPs of matrix products a device and step, below the model's own {least:.4g} "
    f'(causal attention): the program was not read whole{without}',
  )
