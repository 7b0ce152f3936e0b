"""Accelerators: peak rates and memory, from their makers' public tables, and JAX's names for them.

Sources. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables "Key specifications" (v4's
interconnect: the six links of 50 GB/s each way of arXiv 2304.01433). GPUs: NVIDIA's data sheets of the SXM
modules (A100 80GB, H100, H200, and HGX B200), dense bfloat16, and of the DGX systems for the network (the
ConnectX ports of each GPU). Watts: NVIDIA's from these data sheets (thermal design power; of H100, H200 and
B200 the highest setting); v4's from its table, the highest measured. Of the other TPUs none are published.
"""

import dataclasses
import re

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
  watts: float | None = None  # of one chip with its memory, at most; None where its maker does not say


# v4 and v5p have two TensorCores that JAX sees as one device ("megacore"); 7x has two that it sees as two.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip('v4', 275e12, 1200 * GB, 32 * GIB, 600 * GB, axes=3, wraps_at=4, watts=192),
    Chip('v5e', 197e12, 819 * GB, 16 * GIB, 400 * GB, axes=2, wraps_at=16),
    Chip('v5p', 459e12, 2765 * GB, 95 * GIB, 1200 * GB, axes=3, wraps_at=4),
    Chip('v6e', 918e12, 1638 * GB, 32 * GIB, 800 * GB, axes=2, wraps_at=16),
    Chip('7x', 2307e12, 7380 * GB, 192 * GIB, 1200 * GB, axes=3, wraps_at=4, devices=2),
    Chip('A100', 312e12, 2039 * GB, 80 * GB, 600 * GB, axes=None, network=25 * GB, domain=8, watts=400),
    Chip('H100', 989e12, 3350 * GB, 80 * GB, 900 * GB, axes=None, network=50 * GB, domain=8, watts=700),
    Chip('H200', 989e12, 4800 * GB, 141 * GB, 900 * GB, axes=None, network=50 * GB, domain=8, watts=700),
    Chip('B200', 2250e12, 8000 * GB, 180 * GB, 1800 * GB, axes=None, network=50 * GB, domain=8, watts=1000),
  )
}
TPUS = tuple(name for name, chip in CHIPS.items() if chip.axes)
GPUS = tuple(name for name, chip in CHIPS.items() if not chip.axes)
# Of the peak in bfloat16, with attention's scores counted in full: assumed, where nothing was measured.
# By the TPU compiler's program the residual model of width 512 and depth 12 reaches 0.30 on v5e:2x4, without
# what the host costs.
UTILISATION = 0.25
# What JAX calls a device of each. Modules of other forms (PCIe, NVL) have other clocks, a MIG is part of one.
_KINDS = {
  'v4': r'TPU v4',
  'v5e': r'TPU v5 ?(lite|e)',
  'v5p': r'TPU v5p?',
  'v6e': r'TPU v6 ?(lite|e)',
  '7x': r'TPU ?(v?7x?)',
  'A100': r'NVIDIA A100-(SXM|PCIE).*',
  'H100': r'NVIDIA H100 80GB HBM3',
  'H200': r'NVIDIA H200',
  'B200': r'NVIDIA B200',
}


def chip_of(device_kind: str) -> Chip | None:
  """The chip of a JAX device by its `device_kind`; None for a CPU and for chips that are not in CHIPS."""
  if ' MIG ' in device_kind:
    return None
  return next((CHIPS[name] for name, kind in _KINDS.items() if re.fullmatch(kind, device_kind)), None)
