"""The campaign's table in Markdown, and its place in a page."""

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from mhc_jax.workdir import revision
from tests.campaign.parts import PARTS
from tests.campaign.trials import KINDS

BEGIN, END = '<!-- campaign -->', '<!-- end of the campaign -->'


def markdown(rows: dict[str, list[dict[str, Any]]], seconds: float) -> str:
  """A row per part: what was tried, how often, and the failures by kind."""
  lines = [f'| part | what is tried | tried | {" | ".join(KINDS.values())} | seconds |']
  lines.append(f'|---|---|{"---:|" * (2 + len(KINDS))}')
  total = [0] * (2 + len(KINDS))
  for name, records in rows.items():
    numbers = [sum(r['count'] for r in records)]
    failures = [failure for r in records for failure in r['failures']]
    numbers += [sum(failure.startswith(f'{kind}:') for failure in failures) for kind in KINDS]
    numbers.append(round(sum(r['seconds'] for r in records)))
    total = [sum(pair) for pair in zip(total, numbers, strict=True)]
    shown = [f'{number:,}' for number in numbers]
    if records and all(r['skipped'] for r in records):
      shown[0] = 'skipped: not possible here'
    lines.append(f'| {name} | {PARTS[name].what} | {" | ".join(shown)} |')
  lines.append(f'| | together | {" | ".join(f"{number:,}" for number in total)} |')
  versions = f'Python {platform.python_version()}, JAX {metadata.version("jax")}'
  return '\n'.join([*lines, '', f'Revision {revision()}, {versions}, {seconds / 60:.0f} minutes.'])


def write_into(page: Path, text: str) -> None:
  """Puts the table between the page's two marks."""
  before, _, rest = page.read_text().partition(BEGIN)
  _, end, after = rest.partition(END)
  if not end:
    raise SystemExit(f'error: {page} lacks the lines {BEGIN} and {END}')
  page.write_text(f'{before}{BEGIN}\n\n{text}\n\n{END}{after}')
