"""The plans for accelerators as a page: what each trains, and how long one H100 and a v5e-8 would take.

  python -m experiments.plans > docs/plans.md

No run of theirs has been timed: the hours are FLOPs over an assumed share of the chips' peak
(mhc_jax/chips.py).
"""

import sys

from mhc_jax.chips import CHIPS, UTILISATION
from mhc_jax.command import end_with_message
from mhc_jax.plan import Run

from .forecast import short
from .planning import EXPERIMENTS, plan

MACHINES = {'H100': ('H100', 1), 'v5e-8': ('v5e', 8)}  # name -> chip, number
AT_LEAST = 1e17  # FLOPs of a plan that is worth a chip
HEAD = f"""# Plans for accelerators

Made by `python -m experiments.plans`. Every plan reads FineWeb-Edu's sample 10BT (parquet on the Hugging
Face hub, about 1e10 tokens; extra `text`) by a tokenizer of 32768 tokens trained on it, and sees no token
twice. `docs/data.md` has the commands. `mhc sweep NAME:large --dry-run` shows the runs and fetches nothing.

Hours are those of all devices together, at {UTILISATION:.0%} of their peak in bfloat16. That share is an
**assumption**: no run of these has been timed. The TPU compiler's own program of the residual model of width
512 and depth 12 is predicted to reach 30% on a v5e-8 (`mhc compile`). Take the hours to be right to a factor
of two at best; compilation and evaluation come on top. On v5e-8 a run takes all eight chips
(`--config.mesh.data=8`): four streams of width 512 leave 13 GB between twelve layers, and a chip has 16.
"""


def hours(runs: list[Run], machine: str) -> float:
  """Device-hours of these runs on a machine of MACHINES."""
  flops = sum(run.derived['flops'] for run in runs)
  return flops / (UTILISATION * CHIPS[MACHINES[machine][0]].flops) / 3600


def sentence(runs: list[Run]) -> str | None:
  """The hours of a plan for accelerators; None for one that a laptop can do."""
  if sum(run.derived['flops'] for run in runs) < AT_LEAST:
    return None
  words = ' or '.join(f'{hours(runs, machine):,.0f} device-hours on {machine}' for machine in MACHINES)
  return f'on accelerators {words}, for an assumed {UTILISATION:.0%} of the peak (docs/plans.md)'


def large() -> list[str]:
  """The plans that have a scale for accelerators."""
  found = []
  for name, runs in EXPERIMENTS.items():
    try:
      runs('large')
    except ValueError:
      continue
    found.append(f'{name}:large')
  return found


def page() -> str:
  """The page as Markdown."""
  columns = ('plan', 'runs', 'shapes', 'widths', 'depths', 'tokens of a run', 'FLOPs')
  columns += tuple(f'device-hours, {machine}' for machine in MACHINES)
  lines = [HEAD, '| ' + ' | '.join(columns) + ' |']
  lines.append('|' + '---|' * len(columns))
  for name in large():
    _, runs = plan(name, download=False)
    tokens = [run.derived['tokens'] for run in runs]
    cells = [f'`{name}`', f'{len(runs)}', f'{len({run.shapes for run in runs})}']
    cells += [_range([run.model.width for run in runs]), _range([run.model.depth for run in runs])]
    cells.append(' to '.join(dict.fromkeys(short(value) for value in (min(tokens), max(tokens)))))
    cells.append(f'{sum(run.derived["flops"] for run in runs):.2g}')
    cells += [f'{hours(runs, machine):,.0f}' for machine in MACHINES]
    lines.append('| ' + ' | '.join(cells) + ' |')
  return '\n'.join(lines)


def _range(values: list[int]) -> str:
  distinct = sorted(set(values))
  return ', '.join(map(str, distinct))


def main() -> int:
  """Prints the page."""
  print(page())
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
