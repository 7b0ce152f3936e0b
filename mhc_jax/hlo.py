"""Collectives of a compiled program, read from its HLO text (compiled.as_text())."""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'ragged-all-to-all',
)

_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_NAME = r'%?([\w.\-]+)'
_INSTRUCTION = re.compile(rf'^\s+(?:ROOT )?{_NAME} = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')
_ARRAY = re.compile(r'\b([a-z]+\d*)(?:e\dm\d\w*)?\[([\d,]*)\]')
_OPERAND = r'%([\w.\-]+)'
_CALLED = {
  key: re.compile(rf'{key}={_NAME}')
  for key in ('body', 'condition', 'to_apply', 'calls', 'true_computation', 'false_computation')
}
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
# The three forms in which XLA writes groups: lists, [number, size] of an arrangement, axes of a mesh.
_LISTS = re.compile(r'replica_groups=\{\{([\d,]*)\}')
_ARRANGED = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}')


def collectives(hlo_text: str) -> list[dict[str, Any]]:
  """Every collective as kind, bytes, group_size, count and shapes.

  bytes: of its results on one device in one execution, or of its inputs where they are larger, as in a
  reduce-scatter; shapes: of the same arrays, of which a combined collective has several. group_size: devices
  that take part, 0 for all of them. count: executions in one run of the program, with the trip counts of
  loops where XLA knows them; both branches of a conditional count.
  """
  computations, entry = _computations(hlo_text)
  types = {name: result for lines in computations.values() for name, result, _, _ in lines}
  found: Counter[tuple[Any, ...]] = Counter()

  def visit(computation: str, count: int, channels: set[str]) -> None:
    for _, result, operation, rest in computations[computation]:
      kind = operation.removesuffix('-start')
      if kind in KINDS:
        channel = _CHANNEL.search(rest)
        if channel and channel[1] in channels:  # another part of the same one
          continue
        channels |= {channel[1]} if channel else set()
        if computation.startswith('all-reduce-scatter'):  # a TPU's reduce-scatter
          kind = 'reduce-scatter'
        arrays = _payload(result, [types[name] for name in re.findall(_OPERAND, rest.split('), ')[0])])
        shapes = tuple(shape for _, shape in arrays)
        found[kind, sum(size for size, _ in arrays), _group_size(rest), shapes] += count
      elif operation == 'while':
        visit(_CALLED['body'].search(rest)[1], count * _trips(rest, computations), set())
      else:
        # A TPU spreads an asynchronous collective over several fusions, with the same channel.
        for called in _called(rest):
          visit(called, count, channels if operation == 'fusion' else set())

  visit(entry, 1, set())
  keys = ('kind', 'bytes', 'group_size', 'shapes')
  return [{**dict(zip(keys, key, strict=True)), 'count': count} for key, count in sorted(found.items())]


def _payload(result: str, operands: list[str]) -> list[tuple[int, tuple[int, ...]]]:
  """(bytes, shape) of the results or the operands, whichever are larger."""
  inputs = [array for operand in operands for array in _arrays(operand)]
  results = list(_arrays(result))
  if len(results) > len(inputs):  # an asynchronous start repeats its inputs
    results = results[len(inputs) :]
  return max(results, inputs, key=lambda arrays: sum(size for size, _ in arrays))


def _trips(rest: str, computations: dict[str, list[tuple[str, ...]]]) -> int:
  """How often a loop runs: as XLA notes it, else the constant of a condition with one; 1 where unknown."""
  if known := _TRIPS.search(rest):
    return int(known[1])
  condition = computations[_CALLED['condition'].search(rest)[1]]
  constants = [rest.split(')')[0] for _, _, operation, rest in condition if operation == 'constant']
  return int(constants[0]) if len(constants) == 1 and constants[0].isdecimal() else 1


def _computations(text: str) -> tuple[dict[str, list[tuple[str, ...]]], str]:
  """({computation: [(name, result, operation, the rest of the line)]}, the entry's name)."""
  computations: dict[str, list[tuple[str, ...]]] = {}
  entry, lines = '', []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      lines = computations.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    elif instruction := _INSTRUCTION.match(line):
      lines.append(instruction.groups())
  return computations, entry


def _arrays(text: str) -> Iterator[tuple[int, tuple[int, ...]]]:
  """(bytes, shape) of every array type in a piece of HLO."""
  for kind, dims in _ARRAY.findall(text):
    shape = tuple(int(size) for size in dims.split(',') if size)
    bits = 8 if kind == 'pred' else int(re.sub(r'\D', '', kind) or 0)
    yield math.prod(shape) * bits // 8, shape


def _group_size(rest: str) -> int:
  if found := _LISTS.search(rest):
    return found[1].count(',') + 1
  if found := _ARRANGED.search(rest):
    return int(found[1])
  if found := _MESH.search(rest):
    sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
    axes = re.findall(
      r"'([^']+)'(?::\(\d+\)(\d+))?", found[2]
    )  # 'axis', or 'axis':(offset)size, a part of it
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return 0


def _called(rest: str) -> list[str]:
  branches = (re.findall(_NAME, names) for names in _BRANCHES.findall(rest))
  called = (pattern.findall(rest) for pattern in _CALLED.values())
  return [name for names in (*called, *branches) for name in names]
