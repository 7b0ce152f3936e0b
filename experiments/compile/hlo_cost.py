"""What an optimised HLO module does on one device: FLOPs, bytes of main memory and collectives by operation.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs, nested loops
too. Conventions: a multiply-add is 2 FLOPs. A top-level operation reads its operands and writes its results
once, with their padding; a fusion is one operation: of an operand that it only slices it reads the slices, of
one that it updates in place it writes the update. What lies in a TPU's on-chip memory is free. Only the
dearest branch of a conditional counts. Exponentials and other transcendental functions count no FLOPs. Of a
kernel (a custom call of Pallas or of XLA's own) FLOPs and bytes are those of the estimate that it carries.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable

import numpy as np

from .hlo_text import Computation, Instruction, Module, Shape, replica_group, trip_count

COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# Names, no work. The -done of an asynchronous pair was counted at its -start.
_FREE = {'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'partition-id'}
_FREE |= {'replica-id', 'opt-barrier', 'add-dependency', 'domain'}
_FREE_CALLS = ('AllocateBuffer', 'Sharding', 'SPMDFullToShardShape', 'SPMDShardToFullShape')
_ELEMENTWISE = set(
  'abs add and ceil clamp compare convert count-leading-zeros divide floor imag is-finite maximum minimum '
  'multiply negate not or popcnt real reduce-precision remainder round-nearest-afz round-nearest-even select '
  'shift-left shift-right-arithmetic shift-right-logical sign subtract xor'.split()
)
# Passes of bfloat16 products in one float32 product (jax.lax.Precision: high, highest).
_PASSES = {'default': 1, 'high': 3, 'highest': 6}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of the schedule, and what one execution of it does on one device."""

  name: str
  opcode: str
  op_name: str  # JAX's path of scopes
  source: str  # file:line, where known
  times: int  # executions in one step
  matmul_flops: float  # of dots and convolutions
  matmul_passes: float  # the same times the passes that float32 products take on a TPU
  vector_flops: float
  bytes: float  # of main memory, read and written
  collective: str | None
  arrays: tuple[int, ...]  # elements of each whole array that the group gathers, reduces or exchanges
  payload: float  # their bytes
  group: tuple[int, ...]  # the first group of devices, by their place in the mesh
  cycles: int | None  # what the TPU compiler estimates


@dataclasses.dataclass(frozen=True)
class Count:
  """All operations of a module, and what could not be counted."""

  operations: list[Operation]
  unknown_loops: list[str]  # loops whose trip count is not in the text: counted once
  custom_calls: dict[str, int]  # target -> executions, of those whose FLOPs are unknown

  def total(self, field: str) -> float:
    """The sum of a field over all executions."""
    return sum(operation.times * getattr(operation, field) for operation in self.operations)

  @property
  def flops(self) -> float:
    """FLOPs of a step on one device."""
    return self.total('matmul_flops') + self.total('vector_flops')


def in_scope(op_name: str, scope: str) -> bool:
  """Whether JAX's name of an operation has this jax.named_scope, alone or inside jvp() or transpose()."""
  return re.search(rf'\b{scope}\b', op_name) is not None


def count(module: Module) -> Count:
  """Walks the module from its entry."""
  result = Count([], [], collections.Counter())
  _walk(module, module.computations[module.entry], 1, result)
  return result


def _walk(module: Module, computation: Computation, times: int, result: Count) -> None:
  channels: set[str] = set()
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(('-done', '-update')):
      continue
    called = [module.computations[name] for name in instruction.called]
    if opcode == 'while':
      trips = trip_count(module, instruction)
      if trips is None:
        result.unknown_loops.append(instruction.name)
      _walk(module, called[0], times * (1 if trips is None else trips), result)
    elif opcode in ('call', 'async-start'):
      _walk(module, called[0], times, result)
    elif opcode == 'conditional':
      branches = [Count([], [], collections.Counter()) for _ in called]
      for branch, computation_of_branch in zip(branches, called, strict=True):
        _walk(module, computation_of_branch, times, branch)
      dearest = max(branches, key=lambda branch: (branch.total('bytes'), branch.flops))
      result.operations.extend(dearest.operations)
      result.unknown_loops.extend(dearest.unknown_loops)
      result.custom_calls.update(dearest.custom_calls)
    elif instruction.find(r'custom_call_target="([^"]*)"') not in _FREE_CALLS:
      if opcode == 'custom-call' and _estimate(instruction, 'flops') is None:
        result.custom_calls[instruction.find(r'custom_call_target="([^"]*)"')] += times
      result.operations.append(_operation(module, computation, instruction, times, channels))


def _operation(
  module: Module, computation: Computation, instruction: Instruction, times: int, channels: set[str]
) -> Operation:
  """channels: of the collectives before it. A TPU spreads an asynchronous one over fusions of one channel."""
  matmul, passes, vector = _flops(module, computation, instruction)
  holder, collective = _collective(module, computation, instruction)
  kind, arrays, payload, group = None, (), 0.0, ()
  channel = collective and collective.find(r'channel_id=(\d+)')
  if collective is not None and not (instruction.opcode == 'fusion' and channel in channels):
    channels |= {channel} if channel else set()
    kind = collective.opcode.removesuffix('-start')
    group = tuple(replica_group(collective).tolist()) or tuple(range(module.partitions))
    parts, shapes = len(group) if kind == 'all-gather' else 1, _operand_shapes(holder, collective)
    arrays = tuple(parts * shape.elements for shape in shapes)
    payload = parts * sum(shape.bytes for shape in shapes)
    if kind == 'all-reduce' and 'all-reduce-scatter' in holder.name:
      kind = 'reduce-scatter'  # how a TPU's compiler writes it: all-reduce and slice in one fusion
  file, line = module.frames.get(int(instruction.find(r'stack_frame_id=(\d+)') or 0), ('', 0))
  cycles = instruction.find(r'"estimated_cycles":"(\d+)"')
  return Operation(
    name=instruction.name,
    opcode=instruction.opcode,
    op_name=instruction.op_name,
    source=f'{file.rsplit("/", 1)[-1]}:{line}' if file else '',
    times=times,
    matmul_flops=matmul,
    matmul_passes=passes,
    vector_flops=vector,
    bytes=_bytes(module, computation, instruction),
    collective=kind,
    arrays=arrays,
    payload=payload,
    group=group,
    cycles=None if cycles is None else int(cycles),
  )


def _collective(
  module: Module, computation: Computation, instruction: Instruction
) -> tuple[Computation, Instruction | None]:
  """The collective that an instruction is or, where it is a fusion, holds, and the computation it is in."""
  if instruction.opcode.removesuffix('-start') in COLLECTIVES:
    return computation, instruction
  if instruction.opcode == 'fusion':
    inner = module.computations[instruction.called[0]]
    for inside in inner.instructions.values():
      holder, collective = _collective(module, inner, inside)
      if collective is not None:
        return holder, collective
  return computation, None


def _operand_shapes(computation: Computation, instruction: Instruction) -> list[Shape]:
  return [shape for name in instruction.operands for shape in computation.instructions[name].shapes]


# FLOPs ---------------------------------------------------------------------------------------------------


def _flops(module: Module, computation: Computation, instruction: Instruction) -> tuple[float, float, float]:
  """(of matrix products, the same times passes, of vector operations) of one execution."""
  opcode = instruction.opcode
  if opcode == 'fusion':
    return _flops_inside(module, instruction.called[0])
  if opcode == 'custom-call':
    flops = _estimate(instruction, 'flops') or 0.0
    return flops, flops, 0.0
  if opcode in ('dot', 'convolution', 'ragged-dot'):
    flops = _product_flops(computation, instruction)
    shapes = _operand_shapes(computation, instruction)
    wide = all(shape.dtype in ('f32', 'f64') for shape in shapes[:2])
    precision = instruction.find(r'operand_precision=\{(\w+)')
    return flops, flops * (_PASSES.get(precision, 1) if wide else 1), 0.0
  if opcode in _ELEMENTWISE:
    return 0.0, 0.0, float(instruction.shapes[0].elements)
  if opcode in ('reduce', 'reduce-window', 'map'):
    done = instruction.shapes[0].elements
    if opcode == 'reduce':
      done = _operand_shapes(computation, instruction)[0].elements - done
    elif opcode == 'reduce-window':
      sizes = instruction.find(r'window=\{size=([\dx]+)') or '1'
      done *= math.prod(int(size) for size in sizes.split('x')) - 1
    applied = instruction.find(r'to_apply=%([^\s,]+)')
    return 0.0, 0.0, done * _flops_inside(module, applied)[2]
  return 0.0, 0.0, 0.0


def _flops_inside(module: Module, name: str) -> tuple[float, float, float]:
  inner = module.computations[name]
  parts = [_flops(module, inner, instruction) for instruction in inner.instructions.values()]
  return tuple(math.fsum(part) for part in zip(*parts, strict=True))


def _estimate(instruction: Instruction, field: str) -> float | None:
  """A field of a kernel's own cost estimate, None where it has none."""
  value = instruction.find(rf'"cost_estimate":\{{[^}}]*"{field}":"(\d+)"')
  return None if value is None else float(value)


def _product_flops(computation: Computation, instruction: Instruction) -> float:
  left, right = (computation.instructions[name].shapes[0].dims for name in instruction.operands[:2])
  out = instruction.shapes[0]
  if instruction.opcode == 'convolution':
    return _convolution_flops(left, right, out.dims, instruction)
  if instruction.opcode == 'ragged-dot':  # every row meets one group's matrix
    dims = instruction.find(r'lhs_contracting_dims=\{([\d,]+)\}') or str(len(left) - 1)
    return 2.0 * out.elements * math.prod(left[int(i)] for i in dims.split(','))
  dims = instruction.find(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
  return 2.0 * out.elements * math.prod(left[int(i)] for i in dims.split(',') if i)


def _convolution_flops(
  left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], instruction: Instruction
) -> float:
  """2 x pairs of an input and a kernel element that meet; TPUs write matrix products as convolutions, with
  batch dimensions as strided and dilated windows whose other positions are padding."""
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.attributes)
  window = instruction.find(r'window=\{([^}]*)\}') or ''
  spatial = sorted(set(labels[1]) - set('bf'))
  pairs = 1
  for index, label in enumerate(spatial):
    values = {key: part.split('x')[index] for key, part in re.findall(r'(\w+)=(\S+)', window)}
    pairs *= _meeting_positions(
      left[labels[1].index(label)],
      right[labels[2].index(label)],
      out[labels[3].index(label)],
      stride=int(values.get('stride', 1)),
      low=int(values.get('pad', '0_0').rsplit('_', 1)[0]),
      dilate=(int(values.get('lhs_dilate', 1)), int(values.get('rhs_dilate', 1))),
    )
  groups = int(instruction.find(r'feature_group_count=(\d+)') or 1)
  batch_groups = int(instruction.find(r'batch_group_count=(\d+)') or 1)
  batch, features = left[labels[1].index('b')], left[labels[1].index('f')]
  return 2.0 * pairs * batch / batch_groups * features / groups * out[labels[3].index('f')]


@functools.cache
def _meeting_positions(
  size: int, kernel: int, out: int, stride: int, low: int, dilate: tuple[int, int]
) -> int:
  """Pairs (output position, kernel position) of one dimension that meet an input element, not padding."""
  at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * dilate[1] - low
  return int(np.sum((at >= 0) & (at <= (size - 1) * dilate[0]) & (at % dilate[0] == 0)))


# Bytes ---------------------------------------------------------------------------------------------------


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
  """Bytes of main memory that one execution reads and writes."""
  opcode, values = instruction.opcode, computation.instructions
  operands = [values[name] for name in instruction.operands]
  if opcode == 'fusion':
    inner = module.computations[instruction.called[0]]
    read = sum(
      _read(module, inner, inner.parameters[number].name, operand)
      for number, operand in enumerate(operands)
      if number in inner.parameters
    )
    return read + _written(module, inner, inner.root, instruction.shapes)
  if opcode in ('dynamic-slice', 'slice', 'gather'):
    return sum(_main(shape) for shape in instruction.shapes) + _sliced(operands[0], instruction.shapes)
  if opcode == 'dynamic-update-slice':
    return _main(operands[1].shapes[0]) + _updated(instruction.shapes[0], operands[1].shapes[0])
  if opcode == 'scatter':  # operands, indices, updates
    arrays = len(operands) // 2
    updates = sum(_main(operand.shapes[0]) for operand in operands[arrays + 1 :])
    return 3.0 * updates + _main(operands[arrays].shapes[0])
  if opcode == 'custom-call' and (estimate := _estimate(instruction, 'bytes_accessed')) is not None:
    return estimate
  if opcode == 'copy-start':  # its results name the destination and the source
    return float(sum(_main(shape) for shape in instruction.shapes[:2]))
  results = instruction.shapes
  if opcode.endswith('-start'):  # the operands again, then the results
    results = results[len(_operand_shapes(computation, instruction)) :] or results
  return float(sum(_main(shape) for shape in [*_operand_shapes(computation, instruction), *results]))


def _main(shape: Shape) -> int:
  return 0 if shape.on_chip else shape.bytes


def _sliced(operand: Instruction, slices: tuple[Shape, ...]) -> int:
  """Bytes read of an operand of which only slices are used."""
  if operand.shapes[0].on_chip:
    return 0
  return min(operand.shapes[0].bytes, sum(shape.bytes for shape in slices))


def _updated(whole: Shape, update: Shape) -> int:
  """Bytes written by an update in place."""
  return 0 if whole.on_chip else min(whole.bytes, update.bytes)


def _read(module: Module, inner: Computation, name: str, operand: Instruction) -> int:
  """Bytes that a fusion reads of one operand, whose name inside it is `name`."""
  whole = sum(_main(shape) for shape in operand.shapes)
  return min(whole, _used(module, inner, name, whole, lambda: whole)) if whole else 0


def _used(module: Module, inner: Computation, name: str, whole: int, after: Callable[[], int]) -> int:
  """The same for a value inside; after() is what is used of it beyond `inner`, whose result it may be."""
  total = 0
  for user in inner.users.get(name, []):
    first = user.operands[0] == name and name not in user.operands[1:]
    if user.opcode in ('dynamic-slice', 'slice', 'gather') and first:
      total += sum(shape.bytes for shape in user.shapes)
    elif user.opcode == 'dynamic-update-slice' and first:
      total += 0
    elif user.opcode in ('bitcast', 'tuple', 'get-tuple-element'):
      total += after() if user.is_root else _used(module, inner, user.name, whole, after)
    elif user.opcode == 'fusion':
      nested = module.computations[user.called[0]]
      beyond = functools.partial(_used, module, inner, user.name, whole, after)
      numbers = [number for number, operand in enumerate(user.operands) if operand == name]
      names = [nested.parameters[number].name for number in numbers]
      total += sum(_used(module, nested, inside, whole, beyond) for inside in names)
    else:
      return whole
  return total


def _written(module: Module, inner: Computation, root: Instruction, results: tuple[Shape, ...]) -> int:
  """Bytes that a fusion writes, whose root is `root`."""
  if root.opcode == 'tuple':
    parts = [inner.instructions[name] for name in root.operands]
    if len(parts) == len(results):
      return sum(
        _written(module, inner, part, (result,)) for part, result in zip(parts, results, strict=True)
      )
  if root.opcode == 'bitcast' and root.operands[0] in inner.instructions:
    before = inner.instructions[root.operands[0]]
    if before.opcode in ('dynamic-update-slice', 'fusion', 'bitcast'):
      return _written(module, inner, before, results)
  if root.opcode == 'fusion':
    nested = module.computations[root.called[0]]
    return _written(module, nested, nested.root, results)
  if root.opcode == 'dynamic-update-slice':
    return _updated(results[0], inner.instructions[root.operands[1]].shapes[0])
  return sum(_main(shape) for shape in results)
