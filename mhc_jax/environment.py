"""`mhc env`: what a report of a fault needs: versions, devices, memory, flags, data folder, revision."""

import argparse
import glob
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata

import jax
import psutil

from mhc_jax.command import end_with_message
from mhc_jax.data.corpus import data_folder
from mhc_jax.workdir import PACKAGES, revision

_PLUGINS = ('jax-cuda12-plugin', 'jax-cuda13-plugin', 'jax-rocm7-plugin', 'libtpu')
_FLAGS = ('JAX_', 'XLA_', 'LIBTPU_', 'TPU_', 'CUDA_', 'NVIDIA_', 'TF_CPP_', 'OMP_', 'OPENBLAS_', 'TFDS_')
# Accelerator -> (files that its driver makes, what JAX calls its platform, the extras that see it).
_DRIVERS = {
  'an NVIDIA GPU': ('/dev/nvidia[0-9]*', 'gpu', 'cuda13 (driver 580 or newer) or cuda12'),
  'an AMD GPU': ('/dev/kfd', 'gpu', 'rocm'),
  'a TPU': ('/dev/accel[0-9]*', 'tpu', 'tpu'),
}


def facts() -> dict[str, str]:
  """Name -> value, in the order of the report; asks for the devices, which starts JAX."""
  memory, data = psutil.virtual_memory(), data_folder(None)
  cores = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, 'cpu_affinity') else os.cpu_count()
  packages = [f'{name} {version}' for name in (*PACKAGES, *_PLUGINS) if (version := _version(name))]
  flags = [f'{name}={value}' for name, value in sorted(os.environ.items()) if name.startswith(_FLAGS)]
  return {
    'mhc_jax': f'{metadata.version("mhc_jax")}, revision {revision()}',
    'python': f'{platform.python_version()} in {sys.prefix}',
    'packages': ', '.join(packages),
    'system': f'{platform.system()} {platform.release()} {platform.machine()}',
    'memory': f'{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, {cores} cores',
    'devices': devices(),
    'driver': nvidia_driver() or 'no nvidia-smi',
    'data': f'{data}, {shutil.disk_usage(_existing(data)).free / 2**30:.1f} GiB free',
    'flags': ' '.join(flags) or 'none',
  }


def devices() -> str:
  """The devices that JAX sees, with their memory where they tell it; or why it sees none."""
  try:
    seen = jax.devices()
  except RuntimeError as error:  # a platform that JAX_PLATFORMS asks for and that is not there
    return f'none: {" ".join(str(error).split())}'
  stats = (seen[0].memory_stats() or {}) if seen[0].platform != 'cpu' else {}
  limit = f', {stats["bytes_limit"] / 2**30:.1f} GiB each' if 'bytes_limit' in stats else ''
  return f'{len(seen)} x {seen[0].device_kind} ({seen[0].platform}){limit}'


def nvidia_driver() -> str | None:
  """Name, driver and memory of every NVIDIA GPU, from nvidia-smi; None without it."""
  command = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total', '--format=csv,noheader']
  try:
    answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
  except (OSError, subprocess.SubprocessError):
    return None
  return '; '.join(answer.stdout.strip().splitlines()) or None


def warnings() -> list[str]:
  """What keeps an accelerator of this machine from being used; [] where nothing does."""
  try:
    seen = {device.platform for device in jax.devices()}
  except RuntimeError:
    seen = set()
  said = []
  for name, (files, its_platform, extras) in _DRIVERS.items():
    if glob.glob(files) and its_platform not in seen:
      chosen = os.environ.get('JAX_PLATFORMS')
      cure = f'JAX_PLATFORMS={chosen} hides it' if chosen else f"pip install 'mhc_jax[...]' with {extras}"
      said.append(f'{name} is here, but JAX does not see it: {cure}')
  return said


def _version(package: str) -> str | None:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return None


def _existing(path):
  return next(folder for folder in (path, *path.parents) if folder.exists())


def main(argv: list[str] | None = None) -> int:
  """The command line; returns 0, or 1 where an accelerator is here that JAX does not see."""
  argparse.ArgumentParser(prog='mhc env', description=__doc__).parse_args(argv)
  for name, value in facts().items():
    print(f'{name:9} {value}')
  said = warnings()
  for line in said:
    print(f'warning: {line}', file=sys.stderr)
  return int(bool(said))


if __name__ == '__main__':
  sys.exit(end_with_message(main))
