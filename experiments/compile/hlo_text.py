"""Optimised HLO text -> computations and instructions. Pure; hlo_cost.py counts what they do.

Reads what `compiled.as_text()` prints for CPU and TPU: operands are looked up by name in their computation,
layouts may have tiles and a memory space, `bf16[32,1024]{1,0:T(8,128)(2,1)S(1)}`. An instruction may span
lines and its strings may hold anything: it ends at the line that closes its brackets. All of the text is
read, or it is a ValueError: what was dropped without a word would be missing from every count.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BITS = {'pred': 8, 's4': 4, 'u4': 4, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_LEAF = re.compile(r'([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'(ENTRY )?%?([^\s(]+) \(.*->.*\{$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?(\S+) = ')
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|["(){}\[\]]', re.DOTALL)  # a quote alone: its string goes on
_TABLES = ('FileNames', 'FunctionNames', 'FileLocations', 'StackFrames')
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
  """`%name = shapes opcode(operands), attributes`."""

  name: str
  opcode: str
  shapes: tuple[Shape, ...]  # a tuple's leaves in order
  operands: tuple[str, ...]
  inside: str  # the text between the parentheses
  attributes: str
  is_root: bool

  @functools.cached_property
  def bare(self) -> str:
    """The attributes with empty strings for all strings."""
    return _STRING.sub('""', self.attributes)

  def find(self, pattern: str) -> str | None:
    """The first group of a pattern in the attributes; within strings only where the pattern has a quote."""
    match = re.search(pattern, self.attributes if '"' in pattern else self.bare)
    return None if match is None else match[1]

  def estimate(self, field: str) -> float | None:
    """A field of a kernel's own cost estimate, None where it has none."""
    value = self.find(rf'"cost_estimate":\{{[^}}]*"{field}":"(\d+)"')
    return None if value is None else float(value)

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it runs: a fusion's, a call's, a loop's body, all of a conditional's."""
    lists = re.findall(r'\b(?:calls|branch_computations|called_computations)=\{?([^}=]*)', self.bare)
    names = [name for text in lists for name in _NAMES.findall(f'{text},')]
    if self.opcode == 'call':
      names += re.findall(r'\bto_apply=%([^\s,]+)', self.bare)
    names += re.findall(r'\b(?:body|true_computation|false_computation)=%([^\s,]+)', self.bare)
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

  def operand_shapes(self, instruction: Instruction) -> list[Shape]:
    """Of all operands of one of its instructions, tuples' leaves one by one."""
    return [shape for name in instruction.operands for shape in self.instructions[name].shapes]


@dataclasses.dataclass(frozen=True)
class Module:
  """Computations by name, the entry's name, and where in the source each stack frame is."""

  computations: dict[str, Computation]
  entry: str
  frames: dict[int, tuple[str, int]]  # stack frame -> (file, line), innermost
  partitions: int  # devices
  scheduled: bool  # whether the order of the text is the order of execution


def parse_module(text: str) -> Module:
  """The text of one optimised module; raises ValueError where a part of it cannot be read."""
  computations: dict[str, Computation] = {}
  entry, current, lines = '', None, text.splitlines()
  tables: list[str] = []
  for line in _statements(lines):
    if current is None:
      header = _HEADER.match(line)
      if header:
        current = Computation(header[2], {})
        entry = header[2] if header[1] else entry
      elif line.startswith(('HloModule', '//', *_TABLES)) or not line.strip() or line[0].isdigit():
        tables.append(line)
      else:
        raise ValueError(f'outside every computation: {line[:80]!r}')
    elif line.startswith('}'):
      computations[current.name] = current
      current = None
    elif line.strip():
      instruction = _instruction(line)
      current.instructions[instruction.name] = instruction
  if current is not None:
    raise ValueError(f'computation {current.name} has no end')
  if not entry:
    raise ValueError('no ENTRY computation: this is not the text of an HLO module')
  for computation in computations.values():
    _check_names(computation, computations)
  first = next((line for line in tables if line.startswith('HloModule')), '')
  partitions = re.search(r'num_partitions=(\d+)', first)
  scheduled = 'is_scheduled=true' in first
  return Module(computations, entry, _frames(tables), int(partitions[1]) if partitions else 1, scheduled)


def _statements(lines: list[str]) -> Iterator[str]:
  """Lines, joined to the one that closes their brackets; headers and ends of computations alone."""
  held: list[str] = []
  depth, quoted = 0, False
  for line in lines:
    if not held and (_HEADER.match(line) or line.startswith('}')):
      yield line
      continue
    held.append(line)
    opened, quoted = _opened(line, quoted)
    depth += opened
    if depth < 0:
      raise ValueError(f'unbalanced: {held[0][:80]!r}')
    if not depth and not quoted:
      yield '\n'.join(held)
      held = []
  if held:
    raise ValueError(f'unbalanced, never closed: {held[0][:80]!r}')


def _opened(line: str, quoted: bool) -> tuple[int, bool]:
  """(brackets opened less closed, whether a string goes on) of a line; quoted: it begins in a string."""
  if quoted:
    end = re.match(r'(?:[^"\\]|\\.)*"', line)
    if end is None:
      return 0, True
    line = line[end.end() :]
  depth = 0
  for match in _TOKEN.finditer(line):
    if match[0] == '"':
      return depth, True
    depth += (match[0] in '([{') - (match[0] in ')]}')
  return depth, False


def _instruction(line: str) -> Instruction:
  start = _INSTRUCTION.match(line)
  if start is None:
    raise ValueError(f'no instruction: {line[:80]!r}')
  position = start.end()
  stop = _closing(line, position) if line[position] == '(' else line.find(' ', position)  # '(': a tuple
  opcode = _OPCODE.match(line, stop) if stop > 0 else None
  if opcode is None:
    raise ValueError(f'an instruction without an opcode: {line[:80]!r}')
  shapes = tuple(
    Shape(dtype, tuple(int(size.lstrip('<=')) for size in dims.split(',') if size), layout or '')
    for dtype, dims, layout in _LEAF.findall(line[position:stop])
  )
  end = _closing(line, opcode.end() - 1)
  inside = line[opcode.end() : end - 1]
  return Instruction(
    name=start[2],
    opcode=opcode[1],
    shapes=shapes,
    operands=tuple(_NAMES.findall(_STRING.sub('""', inside))),
    inside=inside,
    attributes=line[end:],
    is_root=start[1] is not None,
  )


def _closing(line: str, position: int) -> int:
  """The position after the bracket that closes the one at `position`."""
  depth = 0
  for match in _TOKEN.finditer(line, position):
    depth += (match[0] in '([{') - (match[0] in ')]}')
    if depth == 0:
      return match.end()
  raise ValueError(f'unbalanced: {line[:80]!r}')


def _check_names(computation: Computation, computations: dict[str, Computation]) -> None:
  """Raises ValueError where an operand or a computation that is run is nowhere in the text."""
  for instruction in computation.instructions.values():
    runs = {*instruction.called, *re.findall(r'\b(?:to_apply|condition)=%([^\s,]+)', instruction.bare)}
    for name in (runs - computations.keys()) | (set(instruction.operands) - computation.instructions.keys()):
      raise ValueError(f'{instruction.name} in {computation.name} names {name}, which is not there')


def _frames(lines: list[str]) -> dict[int, tuple[str, int]]:
  """The tables above the computations: stack frame -> location -> file."""
  tables: dict[str, dict[int, str]] = {'FileNames': {}, 'FileLocations': {}, 'StackFrames': {}}
  table: dict[int, str] | None = None
  for line in lines:
    if line.strip() in _TABLES:
      table = tables.get(line.strip(), {})
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
  iota = re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', instruction.bare)
  if iota is not None:
    return _iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0]
  mesh = re.search(
    r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}', instruction.bare
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
