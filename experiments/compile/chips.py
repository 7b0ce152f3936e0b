"""Peak rates of accelerators, from their makers' public tables, and the least time that an operation takes.

Sources. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables "Key specifications" (v4's
interconnect: the six links of 50 GB/s each way of arXiv 2304.01433). GPUs: NVIDIA's data sheets of the SXM
modules (A100 80GB, H100, H200, and HGX B200), dense bfloat16, and of the DGX systems for the network (the
ConnectX ports of each GPU).
"""

import dataclasses
from collections.abc import Sequence

from .hlo_cost import Operation

GB, GIB = 1e9, 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip. A device of JAX is a chip, or half of one where `devices` is 2."""

  name: str
  flops: float  # bfloat16 products, per second
  bandwidth: float  # of the main memory, bytes per second
  memory: float  # bytes
  interconnect: float  # bytes per second, both directions, all links
  axes: int | None  # of the torus; None: a switch
  wraps_at: int = 0  # shortest side of a slice whose ends are connected
  devices: int = 1
  network: float = 0.0  # GPUs: bytes per second in each direction beyond the domain of the switch
  domain: int = 0  # GPUs on one switch


# v4 and v5p have two TensorCores that JAX sees as one device ("megacore"); 7x has two that it sees as two.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 1200 * GB, 32 * GIB, 600 * GB, axes=3, wraps_at=4),
    Chip('v5e', 197e12, 819 * GB, 16 * GIB, 400 * GB, axes=2, wraps_at=16),
    Chip('v5p', 459e12, 2765 * GB, 95 * GIB, 1200 * GB, axes=3, wraps_at=4),
    Chip('v6e', 918e12, 1638 * GB, 32 * GIB, 800 * GB, axes=2, wraps_at=16),
    Chip('7x', 2307e12, 7380 * GB, 192 * GIB, 1200 * GB, axes=3, wraps_at=4, devices=2),
    Chip('A100', 312e12, 2039 * GB, 80 * GB, 600 * GB, axes=None, network=25 * GB, domain=8),
    Chip('H100', 989e12, 3350 * GB, 80 * GB, 900 * GB, axes=None, network=50 * GB, domain=8),
    Chip('H200', 989e12, 4800 * GB, 141 * GB, 900 * GB, axes=None, network=50 * GB, domain=8),
    Chip('B200', 2250e12, 8000 * GB, 180 * GB, 1800 * GB, axes=None, network=50 * GB, domain=8),
  )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.axes)


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
