"""Which arrays of tokens a compiled program moves between devices."""

from experiments.compile.hlo_cost import count
from experiments.compile.hlo_text import parse_module

MOVES = ('all-gather', 'all-to-all', 'collective-permute')


def token_arrays(
  hlo_text: str, factor: int, kinds: tuple[str, ...] = MOVES, routed: bool = False
) -> list[int]:
  """Elements of every array with tokens and the full width, a multiple of `factor`, once for each time.

  Those that go to experts and come back, and their routers' scores, if routed, and those that do not, if not.
  """
  found = []
  for operation in count(parse_module(hlo_text)).operations:
    if operation.collective not in kinds or len(operation.group) < 2:
      continue
    if routed == ('/routed_experts/' in operation.op_name or '/top_k' in operation.op_name):
      found += [elements for elements in operation.arrays if elements % factor == 0] * operation.times
  return found
