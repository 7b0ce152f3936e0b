"""docs/study_tables.md: the study's tables beside its text, from the CSVs of docs/results.

python -m analysis.study_tables > docs/study_tables.md
"""

import sys
from pathlib import Path

import pandas as pd

from mhc_jax.command import end_with_message

from . import costs, rank_verdicts, verdicts
from .publish import RESULTS
from .results_tables import table_text

HEAD = """# Tables of the study

Written by `python -m analysis.study_tables` from `docs/results/`. Differences are in nats per token, paired
by size, tokens and seed, with 95 % intervals; bytes of mhc exact are a lower bound, for its loops count once.
The text is [the study](study.md)."""


def page(results: Path = RESULTS) -> str:
  """The page; raises FileNotFoundError where a folder of the study is missing."""

  def read(name: str) -> pd.DataFrame:
    return pd.read_csv(results / f'{name}.csv')

  gpu, cpu, muon = (read(f'{name}/results') for name in ('study-gpu-small', 'study-cpu', 'study-cpu-muon'))
  score = read('study/score_cpu')
  costly = costs.equal_loss(read('study-cpu/costs'), read('study-cpu/multipliers'))
  parts = (
    ('Arm minus residual by size, on the GPU', verdicts.markdown_of_sizes(gpu)),
    ('Arm minus residual by size, on two cores', verdicts.markdown_of_sizes(cpu)),
    ('mhc exact minus 20 iterations, and the other contrasts, by Muon on two cores', verdicts.markdown(muon)),
    ('Muon (here) against AdamW (there), on two cores', verdicts.markdown_of_changes(muon, cpu)),
    ('Ranks and streams of mhc, on two cores', rank_verdicts.markdown(read('study-cpu-ranks/results'))),
    ('Ranks of an older sweep, whose losses had been seen', rank_verdicts.markdown(read('rank/results'))),
    ('What a token and an equal loss cost on two cores, at the largest size', costs.markdown(costly)),
    ('Prediction of the largest size on the GPU, not run yet', predicted(read('study/prediction_gpu'))),
    ('Prediction of the largest size on two cores (error: predicted minus measured)', scored(score)),
  )
  return '\n\n'.join([HEAD, *(f'## {title}\n\n{body}' for title, body in parts)])


def predicted(found: pd.DataFrame) -> str:
  """The law's loss with its interval for a new run, and the gap carried."""
  rows = [
    (r['arm'], f'{r["law"]:.3f}', f'{r["low"]:.3f} to {r["high"]:.3f}', f'{r["gap carried"]:.3f}')
    for _, r in found.iterrows()
  ]
  return table_text(('arm', 'law', '95 % of a new run', 'by the gap carried'), rows)


def scored(found: pd.DataFrame) -> str:
  """What was predicted beside what was measured."""
  names = ('arm', 'law', '95 % of a new run', 'runs', 'loss', 'error of law', 'gap carried', 'gap found')
  rows = []
  for _, r in found.iterrows():
    law, ends = f'{r["law"]:.3f}', f'{r["low"]:.3f} to {r["high"]:.3f}'
    gaps = (f'{r[k]:+.3f}' for k in ('law error', 'gap', 'measured gap'))
    rows.append((r['arm'].replace('_', ' '), law, ends, r['runs'], f'{r["measured"]:.3f}', *gaps))
  return table_text(names, rows)


def main() -> int:
  """Prints the page."""
  print(page())
  return 0


if __name__ == '__main__':
  sys.exit(end_with_message(main))
