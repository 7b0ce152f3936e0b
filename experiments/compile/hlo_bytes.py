"""Bytes of main memory of one operation of an HLO module; hlo_cost.py says how it counts."""

import functools
from collections.abc import Callable

from .hlo_text import Computation, Instruction, Module, Shape


def bytes_of(module: Module, computation: Computation, instruction: Instruction) -> float:
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
  if opcode == 'custom-call' and (estimate := instruction.estimate('bytes_accessed')) is not None:
    return estimate
  if opcode == 'copy-start':  # its results name the destination and the source
    return float(sum(_main(shape) for shape in instruction.shapes[:2]))
  results = instruction.shapes
  if opcode.endswith('-start'):  # the operands again, then the results
    results = results[len(computation.operand_shapes(instruction)) :] or results
  return float(sum(_main(shape) for shape in [*computation.operand_shapes(instruction), *results]))


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
