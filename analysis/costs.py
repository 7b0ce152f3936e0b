"""What arms cost: their losses over FLOPs, tokens, seconds and bytes, and what equal loss takes of each.

  python -m experiments.costs study:cpu --out docs/results/study-cpu/costs.csv
  python -m analysis.costs docs/results/study-cpu     # draws loss_vs_costs.png there

Prints a Markdown table: of a token at the largest size, FLOPs, bytes and seconds over the reference's; and of
an equal loss. FLOPs for equal loss are those of multipliers.csv with their 95 % interval (one law through all
sizes); bytes and seconds take their ratio to FLOPs at the largest size.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message

from .figures.draw import Drawing, by_arm, hollow, legend, log_axis, looks, panels
from .publish import draw_png

SIZE = ['arm', 'width', 'depth']
UNITS = {'flops': 'FLOPs', 'bytes': 'bytes', 'seconds': 'seconds'}
PER_TOKEN = {'flops_per_token': 'flops', 'bytes_per_token': 'bytes', 'seconds_per_token_median': 'seconds'}
AXES = {'flops': 'training FLOPs', 'tokens': 'tokens', 'seconds': 'seconds', 'bytes': 'bytes of memory'}


def spent(runs: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
  """A row for each arm, size and budget: mean loss over seeds, and what a run took of each of AXES."""
  finished = runs[(runs['state'] == 'finished') & runs['axis'].isna()]
  means = finished.groupby([*SIZE, 'tokens'], sort=False)['validation_loss'].mean().reset_index()
  found = means.merge(costs.rename(columns=PER_TOKEN)[[*SIZE, *UNITS]], on=SIZE)
  return found.assign(**{unit: found[unit] * found['tokens'] for unit in UNITS})


def equal_loss(costs: pd.DataFrame, multipliers: pd.DataFrame, reference: str = 'residual') -> pd.DataFrame:
  """By arm: `flops`, `bytes`, `seconds` of a token over the reference's at the largest size; and what equal
  loss takes of each over the reference, need_UNIT with low_UNIT and high_UNIT.
  """
  size = max(zip(costs['width'], costs['depth'], strict=True))
  own = costs[(costs['width'] == size[0]) & (costs['depth'] == size[1])].rename(columns=PER_TOKEN)
  own = own.set_index('arm')[list(UNITS)]
  ratios, rows = own / own.loc[reference], []
  for _, m in multipliers.dropna(subset='flops').iterrows():
    low, high = (1 / end for end in reversed(json.loads(m['flops_interval'])))
    ratio = ratios.loc[m['arm']]
    row = {'arm': m['arm']} | dict(ratio)
    for unit in UNITS:
      needs = {'need': 1 / m['flops'], 'low': low, 'high': high}
      row |= {f'{k}_{unit}': v * ratio[unit] / ratio['flops'] for k, v in needs.items()}
    rows.append(row)
  return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
  """The table of equal_loss."""
  names = [f'{name} {of}' for of in ('a token', 'for equal loss') for name in UNITS.values()]
  lines = [f'| over residual | {" | ".join(names)} |', '|' + '---|' * 7]
  for _, r in table.iterrows():
    ratios = [f'{r[unit]:.2f}' for unit in UNITS]
    needs = [f'{r[f"need_{u}"]:.2f} ({r[f"low_{u}"]:.2f} to {r[f"high_{u}"]:.2f})' for u in UNITS]
    lines.append(f'| {" | ".join([r["arm"], *ratios, *needs])} |')
  return '\n'.join(lines)


def loss_vs_costs(table: pd.DataFrame) -> Drawing:
  """Loss over what a run took, a panel for each of AXES."""
  arms = list(dict.fromkeys(table['arm']))
  style = looks(arms)
  with panels(len(AXES)) as (fig, axes):
    for ax, (column, label) in zip(axes, AXES.items(), strict=True):
      for arm, own in by_arm(table, arms):
        ax.plot(own[column], own['validation_loss'], **hollow(style[arm]), markersize=4, label=arm)
      log_axis(ax, label)
    axes[0].set_ylabel('validation loss (nats per token)')
    legend(fig, axes[0])
  caption = 'Mean loss over seeds, by what one run takes; bytes as counted in the compiled step.'
  return Drawing(fig, caption, table)


def main(argv: list[str] | None = None) -> int:
  """Draws the figure; prints the table."""
  parser = argparse.ArgumentParser(
    'python -m analysis.costs', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('folder', type=Path, help='with results.csv, multipliers.csv and costs.csv')
  folder = parser.parse_args(argv).folder
  runs, costs, found = (pd.read_csv(folder / f'{name}.csv') for name in ('results', 'costs', 'multipliers'))
  draw_png(loss_vs_costs(spent(runs, costs)), folder, 'loss_vs_costs')
  print(markdown(equal_loss(costs, found)))
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
