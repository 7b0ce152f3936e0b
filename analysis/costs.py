"""What arms cost: their losses over FLOPs, tokens, seconds and bytes, and what equal loss takes of each.

  python -m experiments.costs study:cpu --out docs/results/study-cpu/costs.csv
  python -m analysis.costs docs/results/study-cpu     # draws loss_vs_costs.png there

Prints a Markdown table: of a token at the largest size, FLOPs, bytes and seconds over the reference's; and of
an equal loss at that size, those over the tokens that the arm saves by multipliers.csv (equal_tokens, with
its 95 % interval: one law through all sizes). Bytes of exact projections are a lower bound (costs.py).
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .figures.draw import Drawing, by_arm, hollow, legend, log_axis, looks, panels
from .publish import draw_png
from .results_tables import table_text

SIZE = ['arm', 'width', 'depth']
UNITS = {'flops': 'FLOPs', 'bytes': 'bytes', 'seconds': 'seconds'}
PER_TOKEN = {'flops_per_token': 'flops', 'bytes_per_token': 'bytes', 'seconds_per_token_median': 'seconds'}
AXES = {'flops': 'training FLOPs', 'tokens': 'tokens', 'seconds': 'seconds', 'bytes': 'bytes of memory'}


def spent(runs: pd.DataFrame, costs: pd.DataFrame) -> pd.DataFrame:
  """A row for each arm, size and budget: mean loss over seeds, and what a run took of each of AXES.

  Of the runs that a law may be fitted to. Raises ConfigError where costs are of another device.
  """
  finished = runs[(runs['state'] == 'finished') & runs['excluded'].isna()]
  kinds = {*finished['device_kind'], *costs['device_kind']}
  require(len(kinds) == 1, f'runs and costs are of different devices: {", ".join(sorted(kinds))}')
  means = finished.groupby([*SIZE, 'tokens'], sort=False)['validation_loss'].mean().reset_index()
  found = means.merge(costs.rename(columns=PER_TOKEN)[[*SIZE, *UNITS]], on=SIZE)
  return found.assign(**{unit: found[unit] * found['tokens'] for unit in UNITS})


def equal_loss(costs: pd.DataFrame, multipliers: pd.DataFrame, reference: str = 'residual') -> pd.DataFrame:
  """By arm: `flops`, `bytes`, `seconds` of a token over the reference's at the largest size; and what equal
  loss takes of each over the reference, need_UNIT with low_UNIT and high_UNIT.
  """
  dearest = costs[costs['arm'] == reference].nlargest(1, 'flops_per_token').iloc[0]
  own = costs[(costs['width'] == dearest['width']) & (costs['depth'] == dearest['depth'])]
  own = own.rename(columns=PER_TOKEN).set_index('arm')[list(UNITS)]
  ratios, rows = own / own.loc[reference], []
  known = multipliers[multipliers['arm'].isin(own.index)].dropna(
    subset=['equal_tokens', 'equal_tokens_interval']
  )
  for _, m in known.iterrows():
    ratio, ends = ratios.loc[m['arm']], reversed(json.loads(m['equal_tokens_interval']))
    row = {'arm': m['arm']} | dict(ratio)
    for name, saved in zip(('need', 'low', 'high'), (m['equal_tokens'], *ends), strict=True):
      row |= {f'{name}_{unit}': ratio[unit] / saved for unit in UNITS}
    rows.append(row)
  return pd.DataFrame(rows)


def markdown(table: pd.DataFrame) -> str:
  """The table of equal_loss."""
  names = [f'{name} {of}' for of in ('a token', 'for equal loss') for name in UNITS.values()]
  rows = []
  for _, r in table.iterrows():
    ratios = (f'{r[unit]:.2f}' for unit in UNITS)
    needs = (f'{r[f"need_{u}"]:.2f} ({r[f"low_{u}"]:.2f} to {r[f"high_{u}"]:.2f})' for u in UNITS)
    rows.append((r['arm'], *ratios, *needs))
  return table_text(('over residual', *names), rows)


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
