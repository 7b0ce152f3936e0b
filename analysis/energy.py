"""`mhc energy`: docs/energy.md, what a token of training and a loss cost in joules, beside the claims.

Where: docs/compile/ (programs for chips that are not here), docs/gpu-h200.json (measured steps),
docs/results/ (measured multipliers, counted joules) and published fits -> here -> docs/energy.md. Pure but
for `read`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from mhc_jax.chips import CHIPS
from mhc_jax.command import end_with_message
from mhc_jax.errors import require
from mhc_jax.paths import user_path
from mhc_jax.run_folder import load_json

from .efficiency import at_equal_loss
from .needs import Need
from .published import published_fits

# Joules of one FLOP and of one byte, at the least: what arithmetic units and memory themselves take.
# A multiply in bfloat16 and an add in float32 are 0.21 and 0.38 pJ at 7 nm: Jouppi et al., ISCA 2021
# (doi 10.1109/ISCA52012.2021.00010), Table 2.
FLOP = (0.21 + 0.38) / 2 * 1e-12
# HBM2, activation and error correction included, 3.92 pJ a bit: O'Connor et al., MICRO 2017
# (doi 10.1145/3123939.3124545), section 2.
BYTE = 8 * 3.92e-12
PAIRS = (('paper_3b', 4), ('paper_9b', 4), ('paper_27b', 4), ('paper_3b_1t', 4), ('paper_9b', 8))  # on v5p
GPU = 'H200'
HEAD = """# Energy: what a token and the same loss cost

Written by `mhc energy` from `docs/compile/`, [gpu-h200.json](gpu-h200.json), `docs/results/` and published
fits. No energy was measured on an accelerator for this page.

**Joules at least.** FLOPs x {flop:.3f} pJ + bytes x {byte:.1f} pJ: arithmetic units at 7 nm (a bfloat16
multiply and a float32 add, Jouppi et al., ISCA 2021, Table 2) and HBM2 (3.92 pJ a bit, O'Connor et al.,
MICRO 2017). Chips of another process differ; wires, caches, idle units and links come on top.

**Joules at most.** The chip's power for the time of the step: {watts}.
Of other chips there is a dash: their makers publish no power.

**For equal loss.** An arm needs 1 / m of residual's FLOPs for the same loss; its joules are those times its
joules for a FLOP. m is *measured* on this project's small models (`mhc sweep quick`:
{own}), or *published* (mHC
by xHC's fits, arXiv 2607.14530: {published}). Both are carried to sizes at which they
were not measured: they show the range of what is known, and forecast nothing.
"""
CLAIMS = """
## Claims beside these numbers

| claim | number | so |
|---|---|---|
| "72 % less energy", or "28 %" of it | {loss_range} for equal loss; at equal tokens {token_range} \
| refuted: nothing measured or published comes near |
| "70 % less power" | a chip may draw its power in either arm; energy differs as above \
| refuted: a connection does not change it |
| "exponentially less memory bandwidth" | bytes {byte_range} at equal tokens | refuted: more, not less |
| +6.7 % training time at n = 4 (arXiv 2512.24880) | {time_range} predicted on v5p; {gpu_range} measured on \
one {gpu}, with small models and XLA's programs at the boundaries | agrees on v5p, and needs fused kernels |
"""
PAPER = """Energy at equal tokens: from the ratio of FLOPs, were all energy in products, to that of bytes,
were all in memory; that of the times lies between. At equal loss: over the interval of m, by joules at least
and by time. At n = 8 m is that of n = 4."""
LIMITS = """
Bytes are those of compiled programs, which exist of residual and mHC alone; other arms have times and FLOPs
here and, in every report, under "What a token and equal loss cost". `--config.log.energy=nvml`, `rapl` or
`cpu:WATTS` counts the joules of a run.
"""


def energy_at_least(flops: float, moved: float) -> float:
  """Joules of arithmetic and main memory alone; moved in bytes."""
  return FLOP * flops + BYTE * moved


def read(docs: Path) -> dict[str, Any]:
  """What the page is made of; raises ConfigError for a folder that lacks it."""
  reports = {path.stem: load_json(path)[0] for path in sorted((docs / 'compile').glob('paper_*.json'))}
  steps, _ = load_json(docs / 'gpu-h200.json')
  arrows = docs / 'results' / 'quick' / 'paper_compute.csv'
  require(bool(reports) and steps is not None and arrows.is_file(), f'{docs} is not the docs/ of a checkout')
  counted = []
  for path in sorted((docs / 'results').glob('*/results.csv')):
    table = pd.read_csv(path)
    if 'joules_per_token' in table and table['joules_per_token'].notna().any():
      counted.append(table.assign(sweep=path.parent.name))
  return {
    'reports': reports,
    'steps': steps['rows'],
    'needs': _needs(pd.read_csv(arrows)),
    'counted': counted,
  }


def _needs(arrows: pd.DataFrame) -> dict[str, Need]:
  """Arm -> compute over residual's for equal loss, of the figure's arrows."""
  rows = arrows[arrows['kind'] == 'arrow'].set_index('arm')
  return {a: Need(r['needed'], r['needed_low'], r['needed_high']) for a, r in rows.iterrows()}


def published_need(arm: str = 'mHC') -> Need:
  """The same of published fits: the middle and the ends of their range, which are no interval."""
  values = 1 / published_fits().query('arm == @arm')['multiplier']
  return Need((values.min() + values.max()) / 2, values.min(), values.max())


def page(data: dict[str, Any]) -> str:
  """docs/energy.md."""
  needs, outside = data['needs'], published_need()
  paper = [_pair(data['reports'], name, n, needs['mhc'], outside) for name, n in PAIRS]
  paper = [pair for pair in paper if pair]
  gpu = _gpu(data['steps'], needs, outside)
  watts = ', '.join(f'{c.name} {c.watts:g} W' for c in CHIPS.values() if c.watts)
  own = ', '.join(f'{arm} needs {_times(one)}' for arm, one in needs.items())
  head = {'flop': FLOP * 1e12, 'byte': BYTE * 1e12, 'watts': watts, 'own': own}
  lines = [
    HEAD.format(**head, published=f'{outside.low:.2f} to {outside.high:.2f} times'),
    *_paper_lines(paper),
  ]
  mhc = [row for row in gpu if row['arm'] == 'mhc']
  ranges = {
    'loss_range': _range([x for pair in paper for x in (*pair['measured'], *pair['published'])]),
    'token_range': _range([pair[k] for pair in paper for k in ('flops', 'bytes', 'seconds')]),
    'byte_range': _range([pair['bytes'] for pair in paper]),
    'time_range': _range([pair['seconds'] for pair in paper if pair['n'] == 4]),
    'gpu_range': _range([row['seconds'] for row in mhc]),
  }
  lines += [CLAIMS.format(**ranges, gpu=GPU), *_gpu_lines(gpu), *_counted_lines(data['counted']), LIMITS]
  return '\n'.join(lines)


def _pair(reports: dict, config: str, n: int, own: Need, outside: Need) -> dict[str, Any] | None:
  """mHC over residual of one compiled pair, and each one's numbers of a token; None where one is missing."""
  found = [reports.get(f'{config}-v5p-{arm}') for arm in ('residual', f'mhc-n{n}')]
  if not all(r and r['fits'] and 'serial' in r['predicted']['seconds'] for r in found):
    return None
  arms = []
  for r in found:
    tokens, one = r['batch_size'] * r['seq_len'] / r['devices'], r['predicted']['per_device']
    each = {'flops': one['flops'] / tokens, 'bytes': one['hbm_bytes'] / tokens}
    each |= {'seconds': r['predicted']['seconds']['step'] / tokens, 'params': r['params']}
    arms.append(each | {'least': energy_at_least(each['flops'], each['bytes'])})
  over = {name: arms[1][name] / arms[0][name] for name in ('flops', 'bytes', 'seconds', 'least')}
  ends = {
    key: (
      min(at_equal_loss(need, over[unit], over['flops'])[1] for unit in ('least', 'seconds')),
      max(at_equal_loss(need, over[unit], over['flops'])[2] for unit in ('least', 'seconds')),
    )
    for key, need in (('measured', own), ('published', outside))
  }
  chip = CHIPS[found[0]['topology'].partition(':')[0]]
  return (
    {'name': config.removeprefix('paper_').replace('_', '-').upper(), 'n': n, 'chip': chip, 'arms': arms}
    | over
    | ends
  )


def _paper_lines(paper: list[dict[str, Any]]) -> list[str]:
  """A line per arm of each pair."""
  columns = ('model, a token of training', 'parameters, active', 'FLOPs', 'bytes', 'chip-seconds')
  columns += (
    'mJ at least',
    'mJ at most',
    'energy at equal tokens',
    'at equal loss, m measured',
    'm published',
  )
  lines = ["## The paper's sizes, compiled for v5p", '', _line(*columns), '|---' * len(columns) + '|']
  shown = set()
  for pair in paper:
    for arm, one in zip(('residual', f'mHC, n = {pair["n"]}'), pair['arms'], strict=True):
      if arm == 'residual' and pair['name'] in shown:
        continue
      shown.add(pair['name'])
      most = pair['chip'].watts and f'{1e3 * pair["chip"].watts * one["seconds"]:.3g}'
      cells = [f'{pair["name"]}, {arm}', f'{one["params"]["total"]:.3g}, {one["params"]["active"]:.3g}']
      cells += [f'{one[name]:.3g}' for name in ('flops', 'bytes', 'seconds')]
      cells += [f'{1e3 * one["least"]:.3g}', most or '–']
      if arm == 'residual':
        cells += ['1', '1', '1']
      else:
        extremes = [pair[k] for k in ('flops', 'bytes', 'seconds')]
        cells += [_range(extremes), _range(pair['measured']), _range(pair['published'])]
      lines.append(_line(*cells))
  return [*lines, '', PAPER]


def _gpu(steps: list[dict], needs: dict[str, Need], outside: Need) -> list[dict[str, Any]]:
  """Measured steps of model.kernels=auto in bfloat16, each over residual's of its size."""
  rows = [r for r in steps if r['part'] == 'step' and r.get('by') == 'auto' and r['dtype'] == 'bfloat16']
  base = {(r['width'], r['depth']): _of_token(r) for r in rows if r['arm'] == 'residual'}
  out = []
  for r in rows:
    one, ours = _of_token(r), base[r['width'], r['depth']]
    over = {name: one[name] / ours[name] for name in ('flops', 'seconds')}
    row = {'arm': r['arm'], 'size': f'{r["width"]} wide, {r["depth"]} layers', 'token': one} | over
    need = Need(1, 1, 1) if r['arm'] == 'residual' else needs.get(r['arm'])
    row['measured'] = need and at_equal_loss(need, over['seconds'], over['flops'])
    row['published'] = at_equal_loss(outside, over['seconds'], over['flops']) if r['arm'] == 'mhc' else None
    out.append(row)
  return out


def _of_token(r: dict) -> dict[str, float]:
  seconds = 1 / r['tokens_per_s']
  return {'seconds': seconds, 'flops': r['tflops'] * 1e12 * seconds}


def _gpu_lines(rows: list[dict[str, Any]]) -> list[str]:
  watts = CHIPS[GPU].watts
  columns = ('arm', 'size', 'FLOPs', 'seconds', 'mJ at least (arithmetic alone)', f'mJ at most ({watts:g} W)')
  columns += ('energy at equal tokens', 'at equal loss, m measured', 'm published')
  lines = [f'## Measured steps on one {GPU}, a token', '', _line(*columns), '|---' * len(columns) + '|']
  for r in rows:
    first = r['arm'] == 'residual'
    cells = [r['arm'], r['size'], f'{r["token"]["flops"]:.3g}', f'{r["token"]["seconds"]:.3g}']
    cells += [f'{1e3 * FLOP * r["token"]["flops"]:.3g}', f'{1e3 * watts * r["token"]["seconds"]:.3g}']
    cells += ['1' if first else _more(r['seconds'])]
    cells += ['1' if first else _range(r[key][1:]) if r[key] else '–' for key in ('measured', 'published')]
    lines.append(_line(*cells))
  return [
    *lines,
    '',
    'Energy is taken as proportional to time here: the same board, near its power in either arm.',
  ]


def _counted_lines(tables: list[pd.DataFrame]) -> list[str]:
  """Joules of runs that counted them: medians by arm and size."""
  if not tables:
    return []
  columns = ('sweep', 'arm', 'size', 'runs', 'joules of a token', 'counted by')
  lines = ['', '## Counted in runs', '', _line(*columns), '|---' * len(columns) + '|']
  for table in tables:
    known = table[table['joules_per_token'].notna()]
    keys = ['sweep', 'arm', 'width', 'depth', 'energy']
    for (sweep, arm, width, depth, by), own in known.groupby(keys, sort=False):
      joules = f'{own["joules_per_token"].median():.3g}'
      lines.append(_line(sweep, arm, f'{width}x{depth}', str(len(own)), joules, by))
  return lines


def _times(need: Need) -> str:
  return f'{need.value:.2f} ({need.low:.2f} to {need.high:.2f}) times'


def _more(ratio: float) -> str:
  return f'{100 * (ratio - 1):+.1f} %'


def _range(ratios: Any) -> str:
  return f'{_more(min(ratios))} to {_more(max(ratios))}'


def _line(*cells: str) -> str:
  return f'| {" | ".join(cells)} |'


def main(argv: list[str] | None = None) -> int:
  """The command line: writes energy.md into the folder."""
  parser = argparse.ArgumentParser('mhc energy', description='Write docs/energy.md from the data in docs/.')
  parser.add_argument('--docs', type=user_path, default=Path('docs'), help='folder of the manual (docs)')
  a = parser.parse_args(argv)
  (a.docs / 'energy.md').write_text(page(read(a.docs)), 'utf-8')
  print(f'wrote {a.docs / "energy.md"}')
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
