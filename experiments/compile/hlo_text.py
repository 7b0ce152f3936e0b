"""Optimised HLO text -> computations and instructions. Pure; hlo_cost.py counts what they do.

Reads what `compiled.as_text()` prints for CPU and TPU: operands are looked up by name in their computation,
layouts may have tiles and a memory space, `bf16[32,1024]{1,0:T(8,128)(2,1)S(1)}`.
"""

import dataclasses
import functools
import math
import re

import numpy as np

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_LEAF = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'(ENTRY )?%?([^\s(]+) \(.*->.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?(\S+) = ')
_OPCODE = re.compile(r'\s*([\w-]+)\(')
_NAMES = re.compile(r'%([^\s,()]+)')


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array: its type, sizes and where and how it is stored."""

  dtype: str
  dims: tuple[int, ...]
  layout: str  # what the braces hold: minor-to-major order, tiles T(8,128), memory space S(1)

  @property
  def elements(self) -> int:
    """Number of elements, without padding."""
    return math.prod(self.dims)

  @property
  def on_chip(self) -> bool:
    """Whether it lies outside the main memory: in a TPU's vector or scalar memory."""
    space = re.search(r'S\((\d+)\)', self.layout)
    return space is not None and space[1] != '0'

  @functools.cached_property
  def bytes(self) -> int:
    """Bytes stored, with the padding of the first tile."""
    bits = _BITS[self.dtype] if self.dtype in _BITS else int(re.search(r'\d+', self.dtype)[0])
    sizes = list(self.dims)
    tile = re.search(r'T\(([\d,]+)\)', self.layout)
    if tile and sizes:
      order = [int(i) for i in self.layout.split(':')[0].split(',')]
      for axis, step in zip(order, reversed(tile[1].split(',')), strict=False):
        sizes[axis] = -(-sizes[axis] // int(step)) * int(step)
    return math.prod(sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shapes opcode(operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # a tuple's leaves in order
  operands: tuple[str, ...]
  inside: str  # the text between the parentheses
  attributes: str
  is_root: bool

  def find(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes."""
    match = re.search(pattern, self.attributes)
    return None if match is None else match[1]

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs: a fusion's, a call's, a loop's body, all of a conditional's."""
    lists = re.findall(r'\b(?:calls|branch_computations|called_computations)=\{?([^}=]*)', self.attributes)
    names = [name for text in lists for name in _NAMES.findall(f'{text},')]
    if self.opcode == 'call':
      names += re.findall(r'\bto_apply=%([^\s,]+)', self.attributes)
    names += re.findall(r'\b(?:body|true_computation|false_computation)=%([^\s,]+)', self.attributes)
    return tuple(dict.fromkeys(names))

  @property
  def op_name(self) -> str:
    """JAX's name of the operation: the path of scopes and the primitive."""
    return self.find(r'op_name="([^"]*)"') or ''


@dataclasses.dataclass(frozen=True)
class Computation:
  """A list of instructions, in order."""

  name: str
  instructions: dict[str, Instruction]

  @functools.cached_property
  def root(self) -> Instruction:
    """Its result."""
    return next(i for i in reversed(self.instructions.values()) if i.is_root)

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {int(i.inside): i for i in self.instructions.values() if i.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Instructions by the name of what they read."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users.setdefault(operand, []).append(instruction)
    return users


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, the entry's name, and where in the source each stack frame is."""

  computations: dict[str, Computation]
  entry: str
  frames: dict[int, tuple[str, int]]  # stack frame -> (file, line), innermost
  partitions: int  # devices


def parse_module(text: str) -> Module:
  """The text of one optimised module; raises ValueError where it has no entry computation."""
  computations: dict[str, Computation] = {}
  entry, current, lines = '', None, text.splitlines()
  for line in lines:
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = Computation(header[2], {})
        entry = header[2] if header[1] else entry
    elif line.startswith('}'):
      computations[current.name] = current
      current = None
    else:
      instruction = _instruction(line)
      if instruction is not None:
        current.instructions[instruction.name] = instruction
  if not entry:
    raise ValueError('no ENTRY computation: this is not the text of an HLO module')
  partitions = re.search(r'num_partitions=(\d+)', lines[0])
  return Module(computations, entry, _frames(lines), int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction | None:
  start = _INSTRUCTION.match(line)
  if start is None:
    return None
  position = start.end()
  if line[position] == '(':  # a tuple
    stop = _closing(line, position)
  else:
    stop = line.index(' ', position)
  shapes = tuple(
    Shape(dtype, tuple(int(size.lstrip('<=')) for size in dims.split(',') if size), layout or '')
    for dtype, dims, layout in _LEAF.findall(line[position:stop])
  )
  opcode = _OPCODE.match(line, stop)
  end = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : end - 1]
  return Instruction(
    name=start[2],
    opcode=opcode[1],
    shapes=shapes,
    operands=tuple(_NAMES.findall(inside)),
    inside=inside,
    attributes=line[end:],
    is_root=start[1] is not None,
  )


def _closing(line: str, position: int) -> int:
  """The position after the parenthesis that closes the one at `position`."""
  depth = 0
  for match in re.compile(r'[()]').finditer(line, position):
    depth += 1 if match[0] == '(' else -1
    if depth == 0:
      return match.end()
  raise ValueError(f'unbalanced parentheses in {line[:80]!r}')


def _frames(lines: list[str]) -> dict[int, tuple[str, int]]:
  """The tables at the top of the text: stack frame -> location -> file."""
  tables: dict[str, dict[int, str]] = {'FileNames': {}, 'FileLocations': {}, 'StackFrames': {}}
  table: dict[int, str] | None = None
  for line in lines:
    if line.strip() in ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames'):
      table = tables.get(line.strip(), {})
    elif _HEADER.match(line):
      break
    elif table is not None and line[:1].isdigit():
      number, _, rest = line.partition(' ')
      table[int(number)] = rest
  frames = {}
  for number, frame in tables['StackFrames'].items():
    location = tables['FileLocations'].get(_number('file_location_id', frame), '')
    file = tables['FileNames'].get(_number('file_name_id', location), '').strip('"')
    frames[number] = (file, _number('line', location))
  return frames


def _number(name: str, text: str) -> int:
  match = re.search(rf'\b{name}=(\d+)', text)
  return int(match[1]) if match else 0


def trip_count(module: Module, loop: Instruction) -> int | None:
  """How often a while loop runs: as the compiler says, or the constant that its condition compares with.

  The latter takes the counter to start at 0 and to step by 1, as those of jax.lax.scan do. None: unknown.
  """
  known = loop.find(r'known_trip_count":\{"n":"(\d+)"')
  if known is not None:
    return int(known)
  condition = module.computations[loop.find(r'condition=%([^\s,]+)')]
  root, values = condition.root, condition.instructions
  if root.opcode == 'fusion':  # XLA:CPU wraps the comparison
    fused = module.computations[root.called[0]]
    if fused.root.opcode != 'compare':
      return None
    numbers = {parameter.name: number for number, parameter in fused.parameters.items()}
    names = [root.operands[numbers[name]] for name in fused.root.operands if name in numbers]
    direction, values = fused.root.find(r'direction=(\w+)'), {**fused.instructions, **values}
    names += [name for name in fused.root.operands if name not in numbers]
  elif root.opcode == 'compare':
    names, direction = root.operands, root.find(r'direction=(\w+)')
  else:
    return None
  limits = [values[name].inside for name in names if values[name].opcode == 'constant']
  if direction != 'LT' or len(limits) != 1 or not limits[0].isdigit():
    return None
  return int(limits[0])


def replica_group(instruction: Instruction) -> np.ndarray:
  """The first group of a collective: numbers of the devices in the mesh's order, () for all or unknown.

  Of the three notations {{0,1},{2,3}}, [4,2]<=[2,4]T(1,0) and mesh['a'=4,'b'=2] {'b'}.
  """
  listed = instruction.find(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}')
  if listed is not None:
    return np.array([int(number) for number in listed.split(',')])
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', instruction.attributes)
  if iota is not None:
    return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0]
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}', instruction.attributes
  )
  if mesh is None:
    return np.array([], int)
  axes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])]
  ids = _iota(mesh[2]) if mesh[2] else np.arange(math.prod(size for _, size in axes))
  names, sizes = [], []
  # Part of an axis is written 'a':(k)m: m devices, with k groups of them outside.
  parts = {name: (int(k), int(m)) for name, k, m in re.findall(r"'([^']*)':\((\d+)\)(\d+)", mesh[3])}
  for name, size in axes:
    outer, size_in = parts.get(name, (1, size))
    names += [None, name, None]
    sizes += [outer, size_in, size // (outer * size_in)]
  used = set(re.findall(r"'([^']*)'", mesh[3]))
  chosen = tuple(slice(None) if name in used else 0 for name in names)
  return ids.reshape(sizes)[chosen].reshape(-1)


def _iota(text: str) -> np.ndarray:
  """'[2,4]T(1,0)' -> the numbers 0 to 7 in that shape, transposed, flat."""
  shape, _, order = text.partition('T')
  sizes = [int(size) for size in shape.strip('[]').split(',')]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  if order:
    ids = ids.transpose([int(axis) for axis in order.strip('()').split(',')])
  return ids.reshape(-1)
