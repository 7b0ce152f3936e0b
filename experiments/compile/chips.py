"""The least time that an operation takes on a chip: by its FLOPs, its bytes, and the links between chips."""

from collections.abc import Sequence

from mhc_jax.chips import Chip

from .hlo_cost import Operation


def compute_seconds(operation: Operation, chip: Chip) -> float:
  """max(FLOPs / peak, bytes / bandwidth) of one execution on one device; float32 products in their passes."""
  flops = (operation.matmul_passes + operation.vector_flops) / (chip.flops / chip.devices)
  return max(flops, operation.bytes / (chip.bandwidth / chip.devices))


def link_seconds(operation: Operation, chip: Chip, sides: Sequence[tuple[int, bool]]) -> float:
  """Time of one execution of a collective on the links, bandwidth alone.

  GPUs: sides are (members of the group on a host, hosts); what comes from other hosts is spread over the
  members' ports, and everything passes the switch.

  sides: of each axis of the torus, how many chips the group has there (1: it does not extend along it), and
  whether it is a ring: all chips of an axis whose ends are connected. A ring receives from both neighbours, a
  line from one; so does every second chip of a ring, which shares its links with the others. All-to-all: each
  byte crosses a quarter of each side on average. A permutation goes to the next neighbour, over one link.
  """
  group = len(operation.group) or 1
  if operation.collective is None or group == 1:
    return 0.0
  twice = 2 if operation.collective == 'all-reduce' else 1
  if chip.axes is None:
    (members, _), (hosts, _) = sides
    inside, outside = (
      operation.payload / (chip.interconnect / 2),
      operation.payload / (members * chip.network),
    )
    if operation.collective == 'collective-permute':
      return outside * members if hosts > 1 else inside
    return twice * max(inside * (group - 1) / group, outside * (hosts - 1) / hosts)
  link = chip.interconnect / 2 / (2 * chip.axes)  # one link, one direction
  if operation.collective == 'collective-permute':
    return operation.payload / link
  used = [(side, ring) for side, ring in sides if side > 1]
  if not used:  # two devices of one chip
    return operation.payload / chip.bandwidth
  if 'all-to-all' in operation.collective:
    side, ring = max(used)
    return operation.payload * max(side / 4, 1) / (2 * link if ring else link)
  rate = sum(2 * link if ring else link for _, ring in used)
  return twice * operation.payload * (group - 1) / group / rate
