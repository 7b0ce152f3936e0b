"""What a sweep consists of: the experiments by name, overrides and seeds, and the plan that a folder keeps.

An experiment is a file of experiments/ with runs(arg) -> list of configs, named here.
"""

import contextlib
import difflib
import json
import os
import pickle
import shlex
import sys
import textwrap
from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from mhc_jax import settings
from mhc_jax.config import fill_mesh
from mhc_jax.config_file import override
from mhc_jax.data import is_here
from mhc_jax.errors import ConfigError, require
from mhc_jax.plan import Run, reseeded, resolve
from mhc_jax.run_folder import load_options, load_plan
from mhc_jax.sharding import make_mesh
from mhc_jax.storage import write_json
from mhc_jax.train import load_data

from . import (
  ablation,
  attention_residual,
  clusters,
  fp8,
  fractions,
  identity_or_mixing,
  isoflop,
  learning_rate,
  mtp,
  protocol,
  quick,
  rank,
  rotations,
  router,
  sparse,
  stability,
  study,
)
from .workers import corpus_of

EXPERIMENTS: dict[str, Callable[[str | None], list[ConfigDict]]] = {
  'quick': quick.runs,
  'learning_rate': learning_rate.runs,
  'identity_or_mixing': identity_or_mixing.runs,
  'ablation': ablation.runs,
  'stability': stability.runs,
  'rank': rank.runs,
  'isoflop': isoflop.runs,
  'router': router.runs,
  'attention_residual': attention_residual.runs,
  'fractions': fractions.runs,
  'fp8': fp8.runs,
  'sparse': sparse.runs,
  'mtp': mtp.runs,
  'clusters': clusters.runs,
  'study': study.runs,
  'rotations': rotations.runs,
}


def plan(
  name: str,
  overrides: Sequence[str] = (),
  seeds: int | None = None,
  *,
  download: bool = True,
  elsewhere: bool = False,
  devices: int | None = None,
) -> tuple[list[ConfigDict], list[Run]]:
  """The experiment's configs and what they resolve to, in order; `name` may be NAME:argument.

  overrides: `--config.a.b=v`, for every run. seeds: every distinct configuration at seeds 0 .. seeds - 1.
  download: False leaves corpora that are not on this machine away: their runs have no digest, and other ids.
  elsewhere: the devices are not this process's, so meshes are not held against them; devices: their number.
  Raises ConfigError for an unknown experiment, an invalid config or override, or two equal runs.
  """
  configs = configs_of(name, overrides, seeds)
  planned, seen = [], {}
  for index, config in enumerate(configs):
    if elsewhere and devices is None:
      require(-1 not in config.mesh.values(), 'mesh: -1, what is left of the devices, needs a number here')
    fill_mesh(config, devices or jax.device_count())
    if seeds and index % seeds:  # the one before, at another seed
      planned.append(reseeded(planned[-1], config.seed))
      continue
    settings.check_precision(config.model.dtype)
    if download or is_here(config.data.name, config.data.dir):
      corpus = corpus_of(config.data)
      run = resolve(config, corpus.digest)
      load_data(run, corpus)  # refuses what the corpus is too small for, before anything starts
    else:
      run = resolve(config, '')
    if not elsewhere:
      make_mesh(run.resolved['mesh'])  # refuses what the devices do not fit
    if run.run_id in seen:
      why = ': it varies what an override holds fast; choose another field, or --seeds' if overrides else ''
      raise ConfigError(f'{name} plans run {run.run_id} ({run.resolved["arm"]}) twice{why}')
    seen[run.run_id] = run
    planned.append(run)
  return configs, planned


def configs_of(name: str, overrides: Sequence[str] = (), seeds: int | None = None) -> list[ConfigDict]:
  """The experiment's configurations, locked, not yet resolved."""
  name, _, argument = name.partition(':')
  near = difflib.get_close_matches(name, EXPERIMENTS, 1)
  hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(EXPERIMENTS)}'
  require(name in EXPERIMENTS, f'no experiment {name!r}; {hint}')
  try:
    configs = EXPERIMENTS[name](argument or None)
  except ValueError as error:
    raise ConfigError(f'{name}: {error}') from None
  for config in configs:
    override(config, overrides)
  if seeds is not None:
    fixed = any(text.startswith('--config.seed=') for text in overrides)
    require(not fixed, '--seeds sets the seed of every run: leave --config.seed out')
    configs = at_seeds(configs, seeds)
  return [config.lock() for config in configs]


def at_seeds(configs: list[ConfigDict], seeds: int) -> list[ConfigDict]:
  """Every configuration, those that differ by their seed alone once, at seeds 0 .. seeds - 1."""
  distinct = {}
  for config in configs:
    fields = config.to_dict() | {'seed': None}
    distinct.setdefault(json.dumps(fields, sort_keys=True), config)
  seeded = []
  for config in distinct.values():
    copied = pickle.dumps(config)
    for seed in range(seeds):
      seeded.append(pickle.loads(copied))
      seeded[-1].seed = seed
  return seeded


def listing() -> str:
  """The experiments: what each is for, and for each argument that it takes how many runs."""
  lines = []
  for name, runs in EXPERIMENTS.items():
    counts, module = {}, sys.modules[runs.__module__]
    for argument in (None, *getattr(module, 'SCALES', protocol.SCALES)):
      with contextlib.suppress(ValueError):  # an argument that it does not take
        counts[f'{name}:{argument}' if argument else name] = len(runs(argument))
    lines.append(', '.join(f'{called} ({count} runs)' for called, count in counts.items()))
    purpose = module.__doc__.splitlines()[0]
    lines.append(textwrap.indent(textwrap.fill(purpose, 96), '    '))
  return '\n'.join(lines)


def options_of(folder: str, given: list[str]) -> list[str]:
  """The options that shape the plan: those given, or, where none are, those of the folder's plan."""
  return given or load_options(folder)


def keep(folder: str, name: str, options: list[str], planned: list[Run]) -> None:
  """Writes plan.json."""
  runs = [{'run_id': run.run_id, 'arm': run.resolved['arm']} for run in planned]
  write_json(os.path.join(folder, 'plan.json'), {'sweep': name, 'options': options, 'runs': runs})


def check_extends(folder: str, name: str, options: list[str], planned: list[Run]) -> None:
  """Raises ConfigError where the folder's plan was made with other options and has other runs."""
  kept = load_options(folder)
  if options == kept:
    return
  try:
    before = load_plan(folder)[1]
  except ConfigError:  # none, or a broken one: it is written again
    return
  missing = before.keys() - {run.run_id for run in planned}
  if missing:
    raise ConfigError(
      f'{folder} holds the runs of `{shlex.join(["mhc", "sweep", name, *kept])}`, and {len(missing)} of them '
      'are not in this plan: repeat those options, or choose another --out'
    )
