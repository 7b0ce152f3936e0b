"""What an optimised HLO module does on one device: FLOPs, bytes of main memory and collectives by operation.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs, nested loops
too. Conventions: a multiply-add is 2 FLOPs. A top-level operation reads its operands and writes its results
once, with their padding; a fusion is one operation: of an operand that it only slices it reads the slices, of
one that it updates in place it writes the update. What lies in a TPU's on-chip memory is free. Only the
dearest branch of a conditional counts. Exponentials and other transcendental functions count no FLOPs. Of a
kernel (a custom call of Pallas or of XLA's own) FLOPs and bytes are those of the estimate that it carries;
one without is named in `custom_calls`. The order of operations is kept: it is the schedule (step_time.py).
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from .hlo_bytes import bytes_of
from .hlo_flops import flops_of, flops_unknown
from .hlo_text import Computation, Instruction, Module, replica_group, trip_count

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
_FREE_CALLS += ('PrepareAsyncCallStart', 'PrepareAsyncCallDone')
_TARGET = r'custom_call_target="([^"]*)"'
_WITHOUT_PRODUCTS = ('ragged-dot-metadata',)  # XLA's own, of integers
# Targets that are programs: Pallas's of TPUs and GPUs, and the libraries' products and attention of NVIDIA's.
KERNELS = re.compile(r'tpu_custom_call|mosaic|triton|__cublas|__cudnn|cutlass')


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
  window: str | None = None  # of an asynchronous collective: the name that its Done has


@dataclasses.dataclass(frozen=True)
class Done:
  """The place in the schedule at which an asynchronous collective must have ended."""

  window: str


@dataclasses.dataclass(frozen=True)
class Body:
  """A computation in its schedule's order: operations, loops and the ends of asynchronous collectives."""

  times: int  # executions in one execution of what it is in
  items: list['Operation | Body | Done']

  @property
  def operations(self) -> Iterator[Operation]:
    """All operations, those of loops inside included."""
    for item in self.items:
      if isinstance(item, Body):
        yield from item.operations
      elif isinstance(item, Operation):
        yield item


@dataclasses.dataclass(frozen=True)
class Count:
  """All operations of a module, and what could not be counted."""

  body: Body  # of the entry
  unknown_loops: list[str]  # loops whose trip count is not in the text: counted once
  custom_calls: dict[str, int]  # kernel -> executions, of those whose FLOPs are unknown

  @functools.cached_property
  def operations(self) -> list[Operation]:
    """In the order of the schedule."""
    return list(self.body.operations)

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
  result = Count(Body(1, []), [], collections.Counter())
  _walk(module, module.computations[module.entry], 1, result)
  return result


def _walk(
  module: Module, computation: Computation, times: int, result: Count, window: str | None = None
) -> None:
  """Adds a computation that runs `times` times; window: of the asynchronous call that it is."""
  channels: set[str] = set()
  parts = _channel_parts(module, computation)
  for instruction in computation.instructions.values():
    opcode = instruction.opcode
    if opcode.endswith('-done') and instruction.operands:
      result.body.items.append(Done(_started(computation, instruction)))
    if opcode in _FREE or opcode.endswith(('-done', '-update')):
      continue
    called = [module.computations[name] for name in instruction.called]
    if opcode == 'while':
      trips = trip_count(module, instruction)
      if trips is None:
        result.unknown_loops.append(instruction.name)
      loop = dataclasses.replace(result, body=Body(1 if trips is None else trips, []))
      _walk(module, called[0], times * loop.body.times, loop)
      result.body.items.append(loop.body)
    elif opcode in ('call', 'async-start'):
      _walk(module, called[0], times, result, instruction.name if opcode == 'async-start' else window)
    elif opcode == 'conditional':
      branches = [Count(Body(1, []), [], collections.Counter()) for _ in called]
      for branch, computation_of_branch in zip(branches, called, strict=True):
        _walk(module, computation_of_branch, times, branch)
      dearest = max(branches, key=lambda branch: (branch.total('bytes'), branch.flops))
      result.body.items.append(dearest.body)
      result.unknown_loops.extend(dearest.unknown_loops)
      result.custom_calls.update(dearest.custom_calls)
    elif instruction.find(_TARGET) not in _FREE_CALLS:
      if opcode == 'custom-call' and is_kernel(instruction) and flops_unknown(instruction):
        result.custom_calls[instruction.name] += times
      row = _operation(module, computation, instruction, times, channels)
      own = instruction.name if opcode.endswith('-start') else window
      first, last = parts.get(instruction.name, (None, False))
      if module.scheduled and row.collective and (own or first):
        row = dataclasses.replace(row, window=own or first)
      result.body.items.append(row)
      if last:
        result.body.items.append(Done(first))


def is_kernel(instruction: Instruction) -> bool:
  """Whether a custom call runs a program of its own, whose FLOPs must be known."""
  if instruction.op_name in _WITHOUT_PRODUCTS:
    return False
  return KERNELS.search(instruction.find(_TARGET) or '') is not None


def _channel_parts(module: Module, computation: Computation) -> dict[str, tuple[str, bool]]:
  """Fusions over which a TPU spreads one asynchronous collective -> (the first of them, whether the last)."""
  fusions: dict[str, list[str]] = {}
  for instruction in computation.instructions.values():
    if instruction.opcode == 'fusion':
      _, collective = _collective(module, computation, instruction)
      if collective is not None and (channel := collective.find(r'channel_id=(\d+)')):
        fusions.setdefault(channel, []).append(instruction.name)
  spread = [names for names in fusions.values() if len(names) > 1]
  return {name: (names[0], name == names[-1]) for names in spread for name in names}


def _started(computation: Computation, done: Instruction) -> str:
  """The name of the -start that a -done ends, through its -updates."""
  name = done.operands[0]
  while name in computation.instructions and computation.instructions[name].opcode.endswith('-update'):
    name = computation.instructions[name].operands[0]
  return name


def _operation(
  module: Module, computation: Computation, instruction: Instruction, times: int, channels: set[str]
) -> Operation:
  """channels: of the collectives before it. A TPU spreads an asynchronous one over fusions of one channel."""
  matmul, passes, vector = flops_of(module, computation, instruction)
  holder, collective = _collective(module, computation, instruction)
  kind, arrays, payload, group = None, (), 0.0, ()
  channel = collective and collective.find(r'channel_id=(\d+)')
  if collective is not None and not (instruction.opcode == 'fusion' and channel in channels):
    channels |= {channel} if channel else set()
    kind = collective.opcode.removesuffix('-start')
    group = tuple(replica_group(collective).tolist()) or tuple(range(module.partitions))
    parts, shapes = len(group) if kind == 'all-gather' else 1, holder.operand_shapes(collective)
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
    bytes=bytes_of(module, computation, instruction),
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
