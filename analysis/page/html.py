"""Small pieces of HTML: escaped text, tables, figures, numbers in words.

Where: under page.py. Every text is escaped here, once.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..figures.draw import Panel


class Raw(str):
  """Text that is HTML already."""


def text(value: object) -> str:
  """Escaped text of a value; Raw passes."""
  return value if isinstance(value, Raw) else html.escape(str(value))


def number(value: float | None, digits: int = 4) -> str:
  """A number with `digits` significant digits; a dash where there is none."""
  if value is None or not math.isfinite(value):
    return '–'
  return f'{value:.{digits}g}'


def loss(value: float | None) -> str:
  """Nats to four decimals."""
  return '–' if value is None or not math.isfinite(value) else f'{value:.4f}'


def big(value: float | None) -> str:
  """1.2M, 3.4e+15: counts of parameters and tokens in short."""
  if value is None or not math.isfinite(value):
    return '–'
  for scale, unit in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if scale <= abs(value) < 1e12:
      return f'{value / scale:.3g}{unit}'
  return f'{value:.3g}'


def span(ends: Sequence[float] | None, digits: int = 3) -> str:
  """[low, high] or a dash."""
  if not ends or ends[0] is None:
    return '–'
  return f'[{number(ends[0], digits)}, {number(ends[1], digits)}]'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: Sequence[int] = (0,), wide=()) -> Raw:
  """A table that scrolls sideways on its own; columns in `left` are text, in `wide` may wrap."""

  def cell(tag: str, k: int, value: object) -> str:
    kind = 'w' if k in wide and tag == 'td' else 't' if k in left or k in wide else ''
    return f'<{tag}{f" class={kind}" if kind else ""}>{text(value)}</{tag}>'

  top = ''.join(cell('th', k, name) for k, name in enumerate(head))
  body = ''.join(
    '<tr>' + ''.join(cell('td', k, value) for k, value in enumerate(row)) + '</tr>' for row in rows
  )
  return Raw(f'<div class=scroll><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def figures(panels: Sequence[Panel], folder: Path) -> Raw:
  """Panels side by side where there is room, embedded as SVG, with links to their files' names.

  Composites, named paper_... or learning_rate..., take a row of their own.
  """
  out = []
  for panel in panels:
    image = base64.b64encode((folder / f'{panel.name}.svg').read_bytes()).decode()
    kind = ' class=wide' if panel.name.startswith(('paper_', 'learning_rate')) else ''
    out.append(
      f'<figure id="{panel.name}"{kind}><div class=scroll><img alt="{text(panel.caption)}" '
      f'src="data:image/svg+xml;base64,{image}"></div><figcaption>{text(panel.caption)} '
      f'<a href="{panel.name}.csv">CSV</a> <a href="{panel.name}.png">PNG</a></figcaption></figure>'
    )
  return Raw('<div class=grid>' + ''.join(out) + '</div>' if out else '')


def paragraph(*sentences: str) -> Raw:
  """One paragraph."""
  return Raw('<p>' + ' '.join(text(s) for s in sentences if s) + '</p>')


def bullets(items: Iterable[str]) -> Raw:
  """A list."""
  return Raw('<ul>' + ''.join(f'<li>{text(item)}</li>' for item in items) + '</ul>')


def warning(items: Sequence[str], title: str) -> Raw:
  """A highlighted box, or nothing."""
  if not items:
    return Raw('')
  return Raw(f'<div class=warn><strong>{text(title)}</strong>{bullets(items)}</div>')


def folded(title: str, inside: str) -> Raw:
  """Content that opens on a click."""
  return Raw(f'<details><summary>{text(title)}</summary>{inside}</details>')
