"""FLOPs of one operation of an HLO module; hlo_cost.py says how it counts."""

import functools
import math
import re

import numpy as np

from .hlo_text import Computation, Instruction, Module

_ELEMENTWISE = set(
  'abs add and ceil clamp compare convert count-leading-zeros divide floor imag is-finite maximum minimum '
  'multiply negate not or popcnt real reduce-precision remainder round-nearest-afz round-nearest-even select '
  'shift-left shift-right-arithmetic shift-right-logical sign subtract xor'.split()
)
# Passes of bfloat16 products in one float32 product (jax.lax.Precision: high, highest).
_PASSES = {'default': 1, 'high': 3, 'highest': 6}


def flops_of(
  module: Module, computation: Computation, instruction: Instruction
) -> tuple[float, float, float]:
  """(of matrix products, the same times passes, of vector operations) of one execution."""
  opcode = instruction.opcode
  if opcode == 'fusion':
    return _flops_inside(module, instruction.called[0])
  if opcode == 'custom-call':
    flops = _library_flops(computation, instruction) or instruction.estimate('flops') or 0.0
    return flops, flops, 0.0
  if opcode in ('dot', 'convolution', 'ragged-dot'):
    flops = _product_flops(computation, instruction)
    shapes = computation.operand_shapes(instruction)
    wide = all(shape.dtype in ('f32', 'f64') for shape in shapes[:2])
    precision = instruction.find(r'operand_precision=\{(\w+)')
    return flops, flops * (_PASSES.get(precision, 1) if wide else 1), 0.0
  if opcode in _ELEMENTWISE:
    return 0.0, 0.0, float(instruction.shapes[0].elements)
  if opcode in ('reduce', 'reduce-window', 'map'):
    done = instruction.shapes[0].elements
    if opcode == 'reduce':
      done = computation.operand_shapes(instruction)[0].elements - done
    elif opcode == 'reduce-window':
      sizes = instruction.find(r'window=\{size=([\dx]+)') or '1'
      done *= math.prod(int(size) for size in sizes.split('x')) - 1
    applied = instruction.find(r'to_apply=%([^\s,]+)')
    return 0.0, 0.0, done * _flops_inside(module, applied)[2]
  return 0.0, 0.0, 0.0


def flops_unknown(instruction: Instruction) -> bool:
  """Whether a kernel says nothing of its FLOPs: no estimate of its own, no product of a library."""
  return instruction.estimate('flops') is None and not _is_product(instruction)


def _is_product(instruction: Instruction) -> bool:
  return '"dot_dimension_numbers"' in instruction.attributes


def _library_flops(computation: Computation, instruction: Instruction) -> float | None:
  """Of a matrix product that XLA:GPU gives to a library; None for other custom calls."""
  if not _is_product(instruction):
    return None
  left = computation.instructions[instruction.operands[0]].shapes[0].dims
  dims = instruction.find(r'"lhs_contracting_dimensions":\[([^\]]*)\]') or ''
  return 2.0 * instruction.shapes[0].elements * math.prod(left[int(i)] for i in re.findall(r'\d+', dims))


def _flops_inside(module: Module, name: str) -> tuple[float, float, float]:
  inner = module.computations[name]
  parts = [flops_of(module, inner, instruction) for instruction in inner.instructions.values()]
  return tuple(math.fsum(part) for part in zip(*parts, strict=True))


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
  labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.bare)
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
