"""Which folder becomes which package: a checkout has four, an installed mhc_jax is one with all inside."""

from setuptools import find_packages, setup

FOLDERS = {
  'mhc_jax': 'mhc_jax',
  'mhc_jax.analysis': 'analysis',
  'mhc_jax.configs': 'configs',
  'mhc_jax.experiments': 'experiments',
}

setup(
  package_dir=FOLDERS,
  packages=[
    package
    for name, folder in FOLDERS.items()
    for package in (name, *(f'{name}.{inner}' for inner in find_packages(folder)))
  ],
)
