"""Hostile and damaged run folders, reported: one line, or a table that is right for every other run."""

import functools
import json
import random
from pathlib import Path

import pandas as pd
import pytest

from analysis import report
from tests import synthetic_runs
from tests.campaign import damage
from tests.campaign.damaged import hurt
from tests.campaign.tiny import Said, Tiny, command, files_below, unfit

SIZES = ((32, 2), (64, 2))


@functools.cache
def sweep(folder: Path) -> tuple[Path, pd.DataFrame]:
  """(a whole sweep of four arms and two sizes, its table)."""
  folder.mkdir()
  synthetic_runs.write_sweep(folder, sizes=SIZES, ranks=False)
  whole = damage.copy(folder, folder.with_name(f'{folder.name}-reported'))
  said = report_of(whole)
  if said.code:
    raise RuntimeError(f'the undisturbed report failed: {said.err}')
  return folder, table(whole)


def report_of(folder: Path) -> Said:
  """What `mhc report` says of a sweep; figures are built and not rendered."""
  with pytest.MonkeyPatch.context() as patch:
    synthetic_runs.blank(patch)
    return command(report.main, folder, '--resamples', '2')


def table(folder: Path) -> pd.DataFrame:
  """results.csv by run, as texts."""
  return pd.read_csv(folder / 'results.csv', dtype=str, keep_default_na=False).set_index('run_id')


def reported(tiny: Tiny, folder: Path, rng: random.Random) -> tuple[str, str]:
  """One file of a sweep's folder is damaged, or values of it become hostile."""
  source, expected = sweep(tiny.folder / 'synthetic')
  place = damage.copy(source, folder)
  path, what = hurt(place, rng, [path for path in files_below(place) if path.suffix in ('.json', '.jsonl')])
  said = report_of(place)
  failure = unfit(said)
  if not failure and said.code == 0:
    failure = wrong_report(place, expected, path, said.out + said.err)
  return f'report: {what}', failure


def wrong_report(folder: Path, expected: pd.DataFrame, path: Path, said: str) -> str:
  """'' where the page and the table may be as they are after path was damaged."""
  if '<script>alert(1)' in (folder / 'report' / 'index.html').read_text(errors='replace'):
    return 'unfit end: a value of a run reaches the page as a script'
  if ',=1+1' in (folder / 'results.csv').read_text(errors='replace'):
    return 'unfit end: a value of a run is a formula in results.csv'
  got, run_id = table(folder), path.parent.name
  for name in expected.index:
    if name == run_id and (_is_object(path) or name in said or path.name in said):
      continue
    if path.name != 'plan.json' and (name not in got.index or differs(got.loc[name], expected.loc[name])):
      return f'wrong number: the row of run {name}'
    if path.name == 'plan.json' and name in got.index and differs(got.loc[name], expected.loc[name], 'arm'):
      return f'wrong number: the row of run {name}'
  return ''


def differs(row: pd.Series, other: pd.Series, *but: str) -> bool:
  """Whether two rows differ in what both tables have; 3 and 3.0 are the same."""
  both = [name for name in row.index.intersection(other.index) if name not in but]
  return any(_value(row[name]) != _value(other[name]) for name in both)


def _value(text: str) -> float | str:
  try:
    return float(text)
  except ValueError:
    return text


def _is_object(path: Path) -> bool:
  """Whether a damaged file is still what its name says: then its values are taken for true."""
  try:
    lines = path.read_text().splitlines() if path.suffix == '.jsonl' else [path.read_text()]
    return all(isinstance(json.loads(line), dict) for line in lines)
  except (OSError, ValueError, RecursionError):
    return False
