"""The study's answers on ranks and streams from a published sweep: paired differences to the full model.

python -m analysis.rank_verdicts docs/results/study-cpu-ranks
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from mhc_jax.command import end_with_message
from mhc_jax.errors import require

from .conventions import AXIS_FIELD
from .fitting.intervals import LEVEL
from .results_tables import table_text
from .selection import rate_losses
from .verdicts import CELL, holm, settle


def by_rank(table: pd.DataFrame) -> pd.DataFrame:
  """A row for each rank, or number of streams, of an arm at a size: its mean difference to the full model.

  Runs are in blocks of equal budget and seed, at the rate that is best on the other seeds. The noise is
  pooled over an axis, by what blocks and values leave over (its intervals of 95 % hold in some 90 % where
  several rates are as good); p-values are corrected for the axis's values. Values with a run that did not
  finish are left out, and so is an axis of one block. Raises ConfigError for an arm without a run of the full
  model, or with several runs of one value.
  """
  out = []
  axes = table[table['axis'].notna()].groupby(['arm', 'axis', 'width', 'depth'], sort=False)
  for (arm, axis, width, depth), rows in axes:
    alike = (table['arm'] == arm) & (table['width'] == width) & (table['depth'] == depth)
    full = table[alike & table['axis'].isna()]
    require(len(full) > 0, f'{arm} has no run of the full model beside its {axis} at {width:.0f}x{depth:.0f}')
    runs = pd.concat([rows, full]).assign(value=lambda t, axis=axis: t[axis].fillna(np.inf))
    kept = pd.concat([_at_best_rate(own) for _, own in runs.groupby([*CELL, 'value'])])
    several = kept.duplicated([*CELL, 'seed', 'value']).any()
    require(not several, f'runs of {arm} differ by more than size, budget, seed and {axis}')
    flops, losses = (kept.pivot(index=[*CELL, 'seed'], columns='value', values=k) for k in ('flops', 'loss'))
    home = full[axis].fillna(np.inf).iloc[0]
    losses = losses[losses[home].notna()].dropna(axis=1)
    left = losses.sub(losses.mean(axis=1), axis=0) - losses.mean() + losses.to_numpy().mean()
    freedom = (len(losses) - 1) * (losses.shape[1] - 1)
    if freedom < 1:
      continue
    error = float(np.sqrt(2 * (left**2).to_numpy().sum() / freedom / len(losses)))
    found = pd.DataFrame({'mean': losses.sub(losses[home], axis=0).mean().drop(home)})
    found = found.assign(half=stats.t.ppf(0.5 + LEVEL / 2, freedom) * error)
    found['p'] = 2 * stats.t.sf(found['mean'].abs() / error, freedom)
    found['flops'] = flops.loc[losses.index].sum().drop(home) + flops.loc[losses.index, home].sum()
    where = {'arm': arm, 'axis': axis, 'width': width, 'depth': depth, 'home': home}
    out.append(found.reset_index().assign(**where, holm=holm(found['p'])))
  return pd.concat(out) if out else pd.DataFrame()


def _at_best_rate(rows: pd.DataFrame) -> pd.DataFrame:
  """Of each seed the run at that rate of its own that is best on the others; loss: NaN if unfinished."""
  kept = []
  for seed, own in rows.groupby('seed'):
    others = rows[(rows['seed'] != seed) & rows['lr'].isin(own['lr'])]
    best = rate_losses(others if len(others) else own).idxmin()
    kept.append(own[own['lr'] == best])
  kept = pd.concat(kept)
  return kept.assign(loss=kept['validation_loss'].where(kept['state'] == 'finished'))


def markdown(table: pd.DataFrame) -> str:
  """The table of by_rank; empty where the sweep has no ranks."""
  rows = []
  for _, r in by_rank(table).iterrows():
    own, home = ('full' if np.isinf(v) else f'{v:.0f}' for v in (r['value'], r['home']))
    what = f'{r["arm"]} {r["width"]:.0f}x{r["depth"]:.0f}, {AXIS_FIELD[r["axis"]]} {own}'
    mean, to_settle = f'{r["mean"]:+.4f} ± {r["half"]:.4f}', settle(r['mean'], r['half'], r['flops'])
    rows.append((what, home, mean, f'{r["holm"]:.2g}', to_settle))
  return table_text(('rank or streams', 'minus', 'mean', 'p (Holm)', 'FLOPs to settle'), rows)


def main(argv: list[str] | None = None) -> int:
  """Command line; prints the table."""
  parser = argparse.ArgumentParser('python -m analysis.rank_verdicts', description=__doc__.splitlines()[0])
  parser.add_argument('folder', type=Path, help='with results.csv, as docs/results/study-cpu-ranks')
  folder = parser.parse_args(argv).folder
  found = markdown(pd.read_csv(folder / 'results.csv'))
  require(bool(found), f'{folder} has no rank, or number of streams, with two seeds beside a full model')
  print(found)
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
